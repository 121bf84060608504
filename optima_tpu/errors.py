"""The one exception that is meant for the person at the terminal."""


class UserError(Exception):
    """A problem that the user can act on, in one line: what was expected, what came, what to do.

    The command line prints the message alone, without a traceback, and exits with status 2. Anything else that is
    raised is a defect of this program and keeps its traceback.
    """
