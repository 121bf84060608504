"""The words of a command line: spellings of settings, and how to type them."""

from collections.abc import Mapping, Sequence
from typing import Any

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.flat import typed
from optima_tpu.config.names import ALIASES
from optima_tpu.runtime.program import refuse_undecodable


def spelled(argument: str) -> str:
    """An argument in its setting's one spelling.

    ``--cpu-devices`` becomes ``--cpu_devices``, ``--solver`` becomes ``--solver.name``, and an alias becomes its setting's
    name.
    """
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    option = option[2:].replace("-", "_")
    return f"--{ALIASES.get(option, option)}" + (".name" if option in CHOICES else "") + equals + value


def as_spelled(argv: Sequence[str]) -> list[str]:
    """The arguments, each :func:`spelled`.

    Raises:
      UserError: an argument is not UTF-8.
    """
    refuse_undecodable(argv)
    return [spelled(argument) for argument in argv]


def settings_named(argv: Sequence[str]) -> list[str]:
    """The settings that a command line names, after ``spelled``."""
    return [argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")]


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings by their dotted names as words of a command line."""
    return [word for key, value in settings.items() for word in ("--" + key.removesuffix(".name"), typed(value))]
