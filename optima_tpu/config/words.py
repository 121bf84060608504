"""The words of a command line: the spellings that mean one setting, and the words that a setting is typed as."""

from collections.abc import Mapping, Sequence
from typing import Any

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.flat import typed
from optima_tpu.config.names import ALIASES
from optima_tpu.runtime.program import refuse_undecodable


def spelled(argument: str) -> str:
    """--cpu-devices as --cpu_devices, --solver NAME as --solver.name NAME, and a setting's other name as its own."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    option = option[2:].replace("-", "_")
    return f"--{ALIASES.get(option, option)}" + (".name" if option in CHOICES else "") + equals + value


def as_spelled(argv: Sequence[str]) -> list[str]:
    """The arguments, each :func:`spelled`. Raises UserError for one that is not UTF-8."""
    refuse_undecodable(argv)
    return [spelled(argument) for argument in argv]


def settings_named(argv: Sequence[str]) -> list[str]:
    """The settings that a command line names, after ``spelled``."""
    return [argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")]


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings by their dotted names as words of a command line."""
    return [word for key, value in settings.items() for word in ("--" + key.removesuffix(".name"), typed(value))]
