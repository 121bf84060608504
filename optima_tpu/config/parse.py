"""Reads a ``RunConfig`` from a YAML file and the command line.

A YAML file and the command line have the same settings under the same names; a method is chosen by its name, its
options sit beside it:

    pattern: 2:4                        --pattern 2:4
    selector: magnitude                 --selector magnitude
    solver: {name: cg, damping: 0.1}    --solver cg --solver.damping 0.1

The command line overrides the file, the file overrides a preset (``presets``), and the preset overrides the defaults. If no
preset is named, ``presets.default_preset`` chooses it. Options belong to a method: if the command line chooses another method
than the file, the file's options for its method are dropped.

jsonargparse parses the values; this module adds the layers, the suggestions for misspelled names and the messages. Other parsers
of dataclasses (tyro 1.0, draccus 0.11, simple-parsing 0.1.9) were tried on the settings above and would need more code here:

- tyro makes a method a subcommand: ``solver:cg --solver.damping 0.1``, and ``--solver.damping 0.1`` alone is refused. Its
  suggestions are as good as the ones here. It takes defaults as whole instances, so this module would still have to read and
  check a file, put a preset under it, and drop options when the method changes.
- draccus has ``--solver.type cg`` and a file, but needs a registry in each method's base class, lists the options of every
  method in ``--help``, suggests nothing for a misspelled setting, refuses a file's options when the command line chooses
  another method, and reads YAML 1.1, where 2:4 is 124 and the second of two equal keys wins.
- simple-parsing takes the first method of a union, and the command line cannot choose another one.
"""

import argparse
import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jsonargparse

from optima_tpu.config.choices import (
    CHOICES,
    NAMED,
    OPEN,
    canonical_name,
    default_options,
    method_class,
    method_name,
    with_pattern_damping,
)
from optima_tpu.config.document import load_file, long_form, method_settings
from optima_tpu.config.flat import flat
from optima_tpu.config.names import without_gone
from optima_tpu.config.options import alternatives, fields, kinds, make_parser, parts, settings_parser
from optima_tpu.config.presets import default_preset, with_preset
from optima_tpu.config.run_config import SETTINGS, RunConfig, default_run, to_dict
from optima_tpu.config.unknown import check_known, refusal
from optima_tpu.config.words import as_spelled, settings_named
from optima_tpu.config.written import dump
from optima_tpu.errors import UserError, naming
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.patterns import NamedPattern, Pattern, import_pattern, parse_pattern
from optima_tpu.runtime.bounds import refuse_beyond
from optima_tpu.runtime.own_classes import is_import_path
from optima_tpu.runtime.program import refuse_undecodable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def parse(argv: Sequence[str], beside: Iterable[str] = ()) -> RunConfig:
    """The run that a command line asks for: ``[MODEL] [--SETTING VALUE ...]``.

    ``--help`` and ``--print_config`` print and raise SystemExit(0). The settings are changes to ``default_run`` of the model. If
    neither the command line nor the file names a preset, ``presets.default_preset`` chooses it.

    Args:
      beside: the command's own options, which it has read already; one may be what a misspelled setting means.

    Raises:
      UserError: a setting that does not exist, or a value that it cannot have.
    """
    if argv and not argv[0].startswith("-"):
        if any(argument.partition("=")[0] == "--model" for argument in argv):
            raise UserError(f"expected one model, got {argv[0]} and --model")
        argv = ["--model", *argv]
    argv = as_spelled(argv)
    early = _early(argv)
    # jsonargparse would handle --print_config itself, and print another layout.
    rest = [argument for argument in argv if argument != "--print_config"]
    document = load_file(early.config) if early.config else {}
    config = configure(_on_preset(document, early), rest, beside)
    if len(rest) < len(argv):
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def chosen_run(settings: Mapping[str, Any]) -> RunConfig:
    """The run for settings in YAML layout, read as :func:`parse` reads a file.

    Raises:
      UserError: as :func:`parse`.
    """
    document = long_form(copy.deepcopy(dict(settings)), "the settings")
    return configure(_on_preset(document, _early([])))


def _on_preset(document: dict[str, Any], early: argparse.Namespace) -> dict[str, Any]:
    """Adds the default preset to settings that name none."""
    if early.preset is not None or "preset" in document:
        return document
    selector, solver = (
        document.get(setting, {}).get("name") if getattr(early, setting) is None else getattr(early, setting)
        for setting in ("selector", "solver")
    )
    return document | {"preset": default_preset(selector, solver and canonical_name("solver", solver))}


def configure(document: Mapping[str, Any], argv: Sequence[str] = (), beside: Iterable[str] = ()) -> RunConfig:
    """The run for settings, on their preset or the defaults of ``RunConfig``.

    Args:
      document: settings in the layout of the YAML files.
      argv: settings of a command line, which override the document.
      beside: see :func:`parse`.

    Raises:
      UserError: as :func:`parse`.
    """
    argv = as_spelled(argv)
    early = _early(argv)
    document = long_form(without_gone(copy.deepcopy(dict(document))), "the settings")
    given = document.pop("preset", None)
    preset = given if early.preset is None else early.preset
    settings = _layered(with_preset(preset, document), preset, early)
    chosen = settings.chosen
    parser = _parser(chosen, settings.base)
    types = kinds(RunConfig, chosen)
    names = {f"{setting}.name" for setting in chosen}
    check_known(flat(settings.document), {*types, *names, "preset"}, chosen, "")
    check_known(settings_named(argv), {*types, *names, "help", "config", "preset", "print_config", *beside}, chosen, "--")
    values = _read(parser, argv, types, settings.document)
    values |= _made(RunConfig, chosen, values)
    values |= _patterns(values, values["selector"].group, import_pattern)
    taken = {name: values[name] for name in SETTINGS}
    return RunConfig(taken.pop("model")).changed(**taken)


class _Layers(NamedTuple):
    """The layers of settings below a command line.

    Attributes:
      document: the file's on the preset's, of the chosen methods alone.
      base: the defaults, as --help prints them.
      chosen: setting -> the name of its method.
    """

    document: dict[str, Any]
    base: dict[str, Any]
    chosen: dict[str, str]


def _layered(document: dict[str, Any], preset: str | None, early: argparse.Namespace) -> _Layers:
    """Chooses the methods, and drops the options of others.

    Args:
      early: what the command line says of models, methods and patterns.
    """
    model = early.model if early.model is not None else document.get("model")
    base = to_dict(default_run(None if model is None else str(model)))
    chosen = {}
    _refuse_unwritable(document)
    for setting in CHOICES:
        default = canonical_name(setting, method_settings(base[setting])["name"])
        in_file = canonical_name(setting, document.get(setting, {}).get("name", default))
        given = getattr(early, setting)
        chosen[setting] = in_file if given is None else canonical_name(setting, given)
        if chosen[setting] != in_file:
            document.pop(setting, None)
        if chosen[setting] != default:
            base[setting] = default_options(setting, chosen[setting])
        document.setdefault(setting, {})["name"] = chosen[setting]
    for setting, value in with_preset(preset, {}).items():  # for --help, which prints the defaults
        if not isinstance(value, dict):
            base[setting] = value
        elif value["name"] == chosen[setting]:
            base[setting] = base[setting] | value
    texts = {name: getattr(early, name) or document.get(name) or base[name] for name in ("pattern", "layers")}
    base["solver"] = with_pattern_damping(base["solver"], texts)
    return _Layers(document, base, chosen)


def _refuse_unwritable(document: Mapping[str, Any]) -> None:
    """Raises UserError for values that no file or path can hold."""
    values = flat(document)
    for name, value in values.items():
        if "\0" in str(value):  # the system ends paths at it
            raise UserError(f"expected {name} without NUL characters, got {value!r}")
    refuse_undecodable(map(str, values.values()))


def _patterns(values: Mapping[str, Any], group: str, own: Callable[[str], Pattern] = NamedPattern) -> dict[str, Any]:
    """Reads the pattern and the rules for layers, see ``parse_pattern``."""
    patterns = {}
    for name, read in (("pattern", parse_pattern), ("layers", parse_layers)):
        if name in values:
            with naming(name):
                patterns[name] = read(values[name], group, own)
    return patterns


def _read(
    parser: jsonargparse.ArgumentParser,
    argv: Sequence[str],
    types: Mapping[str, Any],
    document: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The values of settings, from a command line on top of a document."""
    try:
        given = parser.parse_object(dict(document), defaults=False) if document else None
        namespace = parser.parse_args(argv, namespace=given)
    except argparse.ArgumentError as error:
        raise UserError(refusal(error, types, parser, argv)) from None
    values = {name: namespace[name] for name in types}
    for name, kind in types.items():
        if values[name] is None and type(None) not in alternatives(kind):
            raise UserError(f"expected a value for {name}, got none; leave the line out for its default")
    refuse_beyond(values)
    return values


def _made(settings: type, chosen: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """A command's methods and parts by setting, with defaults filled in."""
    made: dict[str, Any] = dict.fromkeys(chosen)
    for setting, cls in parts(settings, chosen).items():
        options = {name: f"{setting}.{name}" for name in fields(cls)}
        made[setting] = cls(**{name: values[dotted] for name, dotted in options.items() if dotted in values})
    return made


def _parser(chosen: Mapping[str, str], base: Mapping[str, Any]) -> jsonargparse.ArgumentParser:
    """As ``make_parser``, cached unless a method is the user's own.

    The cells of a sweep need few parsers. A class of the user's own may change.
    """
    if any(name not in CHOICES[setting] for setting, name in chosen.items()):
        return make_parser(chosen, base)
    return _kept_parser(json.dumps([chosen, base]), shutil.get_terminal_size().columns)


@functools.cache
def _kept_parser(arguments: str, columns: int) -> jsonargparse.ArgumentParser:
    return make_parser(*json.loads(arguments))


def recorded_run(configuration: Mapping[str, Any]) -> RunConfig:
    """The run of a recorded configuration; no user's own class is imported.

    The run has one process. The settings are checked as :func:`configure` checks them. A class that the record names by its
    import path is replaced by a :class:`Named` with the recorded options, and a pattern by a ``NamedPattern``: the run can be
    shown and written, not repeated.

    Raises:
      UserError: a setting is none of this version.
    """
    methods = {setting: method_settings(configuration[setting]) for setting in OPEN if setting in configuration}
    own = {setting: value for setting, value in methods.items() if is_import_path(str(value.get("name")))}
    patterns = {name: configuration[name] for name in ("pattern", "layers") if name in configuration}
    plain = {name: value for name, value in configuration.items() if name not in (*own, *patterns)}
    damping = own.get("solver", {}).get("damping")
    if damping is not None:
        plain["solver"] = {"name": "cg", "damping": damping}  # checked with the rest
    config = configure({**plain, "coordinator": None, "num_processes": None, "process_id": None})
    if "solver" in own:
        own["solver"]["damping"] = 0.0 if damping is None else config.recipe.damping
    changes: dict[str, Any] = {}
    for setting, value in own.items():
        name = value.pop("name")
        changes[setting] = NAMED[setting](str(name), value)
    texts = {name: str(text) for name, text in patterns.items()}
    return config.changed(**changes, **_patterns(texts, changes.get("selector", config.recipe.selector).group))


def parse_command(
    settings: type[T], argv: Sequence[str], program: str, description: str, moved: Mapping[str, str] = MappingProxyType({})
) -> T:
    """The settings of a command on a model: ``MODEL [--SETTING VALUE ...]``.

    ``--help`` prints and raises SystemExit(0).

    Args:
      settings: a dataclass with a field ``model``; the others have defaults. A field with the name of a choice takes a method.
      program: how the command is called.
      moved: settings and options of methods that the command does not have -> what to type for each.

    Raises:
      UserError: a setting does not exist, or its value is not allowed.
    """
    argv = as_spelled(argv)
    chosen = _needed(settings, argv)
    base = {field.name: field.default for field in dataclasses.fields(settings) if field.name != "model"}
    for setting, name in chosen.items():
        options = default_options(setting, name).items()
        base[setting] = {option: value for option, value in options if f"{setting}.{option}" not in moved}
    usage = f"{program} MODEL [--SETTING VALUE ...]"
    parser = settings_parser(settings, chosen, base, prog=program, usage=usage, description=description)
    parser.add_argument("model", metavar="MODEL", type=str)
    for name in settings_named(argv):
        if name in moved:
            raise UserError(f"there is no setting --{name}; type {moved[name]}")
    types = {name: kind for name, kind in kinds(settings, chosen).items() if name not in moved}
    existing = {*types, *(f"{setting}.name" for setting in chosen), "help"} - {"model"}
    check_known(settings_named(argv), existing, chosen, "--")
    if not {"-h", "--help"} & set(argv) and (not argv or argv[0].startswith("-")):
        raise UserError(f"expected the model before everything else, got {argv[0] if argv else 'nothing'}; see {program} --help")
    values = _read(parser, argv, types)
    values |= _made(settings, chosen, values)
    return settings(**{field.name: values[field.name] for field in dataclasses.fields(settings)})


def _needed(settings: "type[DataclassInstance]", argv: Sequence[str]) -> dict[str, str]:
    """The method that a command line chooses for each field with a choice."""
    chosen = {
        field.name: method_name(field.name, field.default) for field in dataclasses.fields(settings) if field.name in CHOICES
    }
    early = _early(argv) if chosen else None
    for setting in chosen:
        if (given := getattr(early, setting)) is not None:
            chosen[setting] = canonical_name(setting, given)
        if method_class(setting, chosen[setting]) is None:
            needed = ", ".join(name for name, each in CHOICES[setting].items() if each)
            raise UserError(f"expected {setting} to be one of {needed}, got {given}")
    return chosen


def _early(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments that decide which settings exist."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append")
    parser.add_argument("--model")
    parser.add_argument("--preset")
    parser.add_argument("--pattern")
    parser.add_argument("--layers")
    for setting in CHOICES:
        parser.add_argument(f"--{setting}.name", dest=setting)
    try:
        early, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(refusal(error)) from None
    if early.config and len(early.config) > 1:
        raise UserError(f"expected one --config, got {len(early.config)}: put the settings into one file")
    early.config = early.config and early.config[0]
    return early
