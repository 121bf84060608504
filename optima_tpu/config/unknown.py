"""Messages for settings and values that do not exist, with suggestions."""

import argparse
import difflib
import re
import shlex
import typing
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.names import ALIASES, ELSEWHERE, GONE
from optima_tpu.config.options import alternatives, fields
from optima_tpu.config.words import settings_named, words_of
from optima_tpu.errors import UserError, did_you_mean


def check_known(names: Iterable[str], existing: set[str], chosen: Mapping[str, str], dashes: str) -> None:
    """Refuses a setting that does not exist, and suggests similar ones."""
    for name in names:
        if name in existing:
            continue
        setting, _, option = name.partition(".")
        owners = [method for method, cls in CHOICES.get(setting, {}).items() if cls and option in fields(cls)]
        if owners and setting in chosen:
            raise UserError(
                f"{dashes}{name} is an option of {setting} {', '.join(owners)}, but {setting} is "
                f"{chosen[setting]} here; choose {owners[0]} or leave the option out"
            )
        refuse_unknown([name], existing, dashes)


def refuse_unknown(names: Iterable[str], existing: set[str], dashes: str) -> None:
    """Refuses a setting that does not exist, and suggests similar ones."""
    for name in names:
        if name in existing:
            continue
        if name in GONE or name.partition(".")[0] in GONE:
            typed = name.removesuffix(".name")  # "tuning: {name: grid}" is "tuning: grid"
            raise UserError(f"there is no setting {dashes}{typed} any more, since it earned next to nothing: leave it out")
        candidates = {entry.removesuffix(".name") for entry in existing}
        elsewhere, value = ELSEWHERE.get(name.replace("-", "_"), ("", ""))
        if elsewhere in candidates:
            example = f"{dashes}{elsewhere}{' ' if dashes else ': '}{value}"
            raise UserError(f"there is no setting {dashes}{name}; did you mean {dashes}{elsewhere}, as in {example}?")
        near = sorted(entry for entry in candidates if entry.rpartition(".")[2] == name.rpartition(".")[2])
        spellings = {entry: entry for entry in candidates} | {alias: own for alias, own in ALIASES.items() if own in candidates}
        near += [spellings[entry] for entry in difflib.get_close_matches(name, spellings, n=3, cutoff=0.6)]
        meant = " or ".join(dashes + entry for entry in list(dict.fromkeys(near))[:3])
        hint = f"did you mean {meant}?" if near else "see --help for all of them"
        raise UserError(f"there is no setting {dashes}{name}; {hint}")


def refusal(
    error: argparse.ArgumentError,
    types: Mapping[str, Any] = MappingProxyType({}),
    parser: argparse.ArgumentParser | None = None,
    argv: Sequence[str] = (),
) -> str:
    """The one-line message of an argparse or jsonargparse error.

    It gives the default as an example of a value. The error holds the setting and its value only in its text. If another
    version words that text otherwise, the text itself is the message.

    Args:
      types: of the settings that ``parser`` has.
      argv: the command line; a setting that it does not name comes from a file.
    """
    message = str(error).replace("unrecognized arguments:", "expected settings as --NAME VALUE, got")
    match = re.match(r'Parser key "([^"]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
    if not match or not parser:
        return " ".join(message.replace(".name:", ":").split())
    name, value = match[1], match[2]
    kinds_of_value = alternatives(types[name])
    words, examples = zip(*map(_words_and_example, kinds_of_value))
    default = next(action.default for action in parser._actions if action.dest == name)
    example = words_of({name: examples[0] if default is None else default})
    typed = shlex.join(example) if name in settings_named(argv) else f"{name}: {example[1]}"
    near = did_you_mean(value, [str(each) for kind in kinds_of_value for each in typing.get_args(kind)])
    return f"expected {name} to be {' or '.join(words)}, got {value or 'nothing'}{near or f'; as in {typed}'}"


def _words_and_example(kind: Any) -> tuple[str, Any]:
    """What values of a type are called, and one of them."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(str, typing.get_args(kind))), typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        return "numbers in brackets such as [1, 2]", [1, 2]
    plain = {int: ("a whole number", 8), float: ("a number", 0.5), bool: ("true or false", True), str: ("text", "TEXT")}
    return plain.get(kind, ("null", None))
