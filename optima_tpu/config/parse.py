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
import difflib
import functools
import json
import re
import shlex
import shutil
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jsonargparse

from optima_tpu.config import yaml12
from optima_tpu.config.choices import CHOICES, NAMED, OPEN, canonical_name, default_options, method_class, method_name
from optima_tpu.config.flat import flat, typed
from optima_tpu.config.names import ALIASES, ELSEWHERE, GONE, by_own_names, without_gone
from optima_tpu.config.options import PARTS, alternatives, fields, kinds, make_parser, parts, settings_parser
from optima_tpu.config.presets import PLAIN, PRESETS, default_preset, with_preset
from optima_tpu.config.run_config import SETTINGS, RunConfig, default_run, to_dict
from optima_tpu.errors import UserError, did_you_mean
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.patterns import import_pattern, parse_pattern
from optima_tpu.runtime.bounds import refuse_beyond
from optima_tpu.runtime.inside import refuse_special
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
    argv = _words(argv)
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
    """The run for settings in the layout of the YAML files, read as :func:`parse` reads a file with them.

    Raises:
      UserError: as :func:`parse`.
    """
    document = _long(copy.deepcopy(dict(settings)), "the settings")
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
    """The run for settings; if they name no preset, they change the defaults of ``RunConfig``.

    Args:
      document: settings in the layout of the YAML files.
      argv: settings of a command line, which override the document.
      beside: see :func:`parse`.

    Raises:
      UserError: as :func:`parse`.
    """
    argv = _words(argv)
    early = _early(argv)
    document = _long(without_gone(copy.deepcopy(dict(document))), "the settings")
    given = document.pop("preset", None)
    preset = given if early.preset is None else early.preset
    document = with_preset(preset, document)
    model = early.model if early.model is not None else document.get("model")
    base = to_dict(default_run(None if model is None else str(model)))
    chosen = {}
    for name, value in flat(document).items():
        if "\0" in str(value):  # the system ends paths at it
            raise UserError(f"expected {name} without NUL characters, got {value!r}")
    refuse_undecodable(map(str, flat(document).values()))
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

    said = {name: getattr(early, name) or document.get(name) or base[name] for name in ("pattern", "layers")}
    base["solver"] = _damped(base["solver"], said)
    parser = _parser(chosen, base)
    types = kinds(RunConfig, chosen)
    names = {f"{setting}.name" for setting in chosen}
    _check_known(flat(document), {*types, *names, "preset"}, chosen, "")
    _check_known(_options(argv), {*types, *names, "help", "config", "preset", "print_config", *beside}, chosen, "--")
    values = _read(parser, argv, types, document)
    values |= _made(RunConfig, chosen, values)
    group = values["selector"].group
    for name, read in (("pattern", parse_pattern), ("layers", parse_layers)):
        try:
            values[name] = read(values[name], group, import_pattern)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    given = {name: values[name] for name in SETTINGS}
    return RunConfig(given.pop("model")).changed(**given)


def _read(
    parser: jsonargparse.ArgumentParser,
    argv: Sequence[str],
    types: Mapping[str, Any],
    document: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The values of the settings that have ``types``, from a command line on top of a document."""
    try:
        given = parser.parse_object(dict(document), defaults=False) if document else None
        namespace = parser.parse_args(argv, namespace=given)
    except argparse.ArgumentError as error:
        raise UserError(_refusal(error, types, parser, argv)) from None
    values = {name: namespace[name] for name in types}
    for name, kind in types.items():
        if values[name] is None and type(None) not in alternatives(kind):
            raise UserError(f"expected a value for {name}, got none; leave the line out for its default")
    refuse_beyond(values)
    return values


def _made(settings: type, chosen: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The methods and parts of a command's settings, by setting; an option without a value has its default."""
    made: dict[str, Any] = dict.fromkeys(chosen)
    for setting, cls in parts(settings, chosen).items():
        options = {name: f"{setting}.{name}" for name in fields(cls)}
        made[setting] = cls(**{name: values[dotted] for name, dotted in options.items() if dotted in values})
    return made


def _damped(options: Any, said: Mapping[str, Any]) -> Any:
    """A solver's default options, with at least the damping of the patterns if the solver has some of its own.

    Args:
      said: the texts of ``pattern`` and ``layers``, as far as they are settings.
    """
    if not isinstance(options, dict) or not options.get("damping"):
        return options
    try:
        rules = parse_layers(str(said.get("layers") or ""))
        patterns = [parse_pattern(str(said.get("pattern", "0.5"))), *(rule.pattern for rule in rules if rule.pattern)]
    except UserError:  # it is raised again where the settings are read
        return options
    return options | {"damping": max(options["damping"], *(pattern.damping for pattern in patterns))}


def _parser(chosen: Mapping[str, str], base: Mapping[str, Any]) -> jsonargparse.ArgumentParser:
    """As ``make_parser``. Kept, since the cells of a sweep need few; not for methods of the user's own, which may change."""
    if any(name not in CHOICES[setting] for setting, name in chosen.items()):
        return make_parser(chosen, base)
    return _kept_parser(json.dumps([chosen, base]), shutil.get_terminal_size().columns)


@functools.cache
def _kept_parser(arguments: str, columns: int) -> jsonargparse.ArgumentParser:
    return make_parser(*json.loads(arguments))


def recorded_run(configuration: Mapping[str, Any]) -> RunConfig:
    """The run of a recorded configuration, in one process, of which no class of the user's own is imported.

    The settings are checked as :func:`configure` checks them. A class that the record names by its import path is replaced by a
    :class:`Named` with the recorded options, and a pattern by a ``NamedPattern``: the run can be shown and written, not repeated.

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
    group = changes.get("selector", config.recipe.selector).group
    for name, read in (("pattern", parse_pattern), ("layers", parse_layers)):
        if name in patterns:
            changes[name] = read(str(patterns[name]), group)
    return config.changed(**changes)


def parse_command(
    settings: type[T], argv: Sequence[str], program: str, description: str, moved: Mapping[str, str] = MappingProxyType({})
) -> T:
    """The settings of a command that works on a model, ``MODEL [--SETTING VALUE ...]``. ``--help`` prints and raises SystemExit(0).

    Args:
      settings: a dataclass with a field ``model``; the others have defaults. A field with the name of a choice takes a method.
      program: how the command is called.
      moved: settings and options of methods that the command does not have -> what to type for each.

    Raises:
      UserError: a setting does not exist, or its value is not allowed.
    """
    argv = _words(argv)
    chosen = _needed(settings, argv)
    base = {field.name: field.default for field in dataclasses.fields(settings) if field.name != "model"}
    for setting, name in chosen.items():
        options = default_options(setting, name).items()
        base[setting] = {option: value for option, value in options if f"{setting}.{option}" not in moved}
    usage = f"{program} MODEL [--SETTING VALUE ...]"
    parser = settings_parser(settings, chosen, base, prog=program, usage=usage, description=description)
    parser.add_argument("model", metavar="MODEL", type=str)
    for name in _options(argv):
        if name in moved:
            raise UserError(f"there is no setting --{name}; type {moved[name]}")
    types = {name: kind for name, kind in kinds(settings, chosen).items() if name not in moved}
    known = {*types, *(f"{setting}.name" for setting in chosen), "help"} - {"model"}
    _check_known(_options(argv), known, chosen, "--")
    if not {"-h", "--help"} & set(argv) and (not argv or argv[0].startswith("-")):
        raise UserError(f"expected the model before everything else, got {argv[0] if argv else 'nothing'}; see {program} --help")
    values = _read(parser, argv, types)
    values |= _made(settings, chosen, values)
    return settings(**{field.name: values[field.name] for field in dataclasses.fields(settings)})


def _needed(settings: "type[DataclassInstance]", argv: Sequence[str]) -> dict[str, str]:
    """The name of the method that a command line chooses for each field of a dataclass that is a choice."""
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


def dump(config: RunConfig) -> str:
    """The configuration as a YAML file that reads back to it."""
    return yaml12.dump(to_dict(config))


def flags(config: RunConfig) -> list[str]:
    """The command line that :func:`parse` reads back to the configuration: the model, and the changes to the defaults."""
    changes = {"model": config.model} | _changed(to_dict(config), to_dict(default_run(config.model)))
    if default_preset(changes.get("selector.name"), changes.get("solver.name")) != PLAIN:
        changes["preset"] = PLAIN
    return words_of(changes)


def on_preset(config: RunConfig) -> str:
    """The preset nearest to a run, and the methods and options that differ from it: ``best --solver mpax``."""
    acting = (*CHOICES, "recapture", "borrow")
    values, plain = to_dict(config), to_dict(default_run(config.model))
    changes = {}
    for name, preset in PRESETS.items():
        base = plain | {setting: _with_defaults(setting, value) for setting, value in preset.settings.items()}
        changes[name] = _changed(*({setting: each[setting] for setting in acting} for each in (values, base)))
    nearest = min(changes, key=lambda name: len(changes[name]))
    return " ".join([nearest, *words_of(changes[nearest])])


def _with_defaults(setting: str, value: Any) -> Any:
    """A setting of a preset, with all options of its method where it is one."""
    if setting not in CHOICES:
        return value
    method = method_settings(value)
    return default_options(setting, method["name"]) | method


def _changed(values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from those of ``base``, by dotted names; options of another method differ from its own defaults.

    A class of the user's own has all its options here.
    """
    settings, defaults = dict(values), dict(base)
    for setting in CHOICES:
        settings[setting], defaults[setting] = method_settings(settings[setting]), method_settings(defaults[setting])
        if settings[setting]["name"] != defaults[setting]["name"]:
            name = settings[setting]["name"]
            # The defaults of the user's own class are in its code, which is not imported where only a record names it.
            defaults[setting] = default_options(setting, name) if name in CHOICES[setting] else {}
    defaults["solver"] = _damped(defaults["solver"], settings)
    default = flat(defaults)
    return {key: value for key, value in flat(settings).items() if value != default.get(key)}


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings by their dotted names as words of a command line."""
    return [word for key, value in settings.items() for word in ("--" + key.removesuffix(".name"), typed(value))]


def load(text: str, origin: str) -> dict[str, Any]:
    """A configuration file's settings, with every method in the form ``{"name": ..., options}``.

    Args:
      origin: the source of the text, for messages.

    Raises:
      UserError: the text is not YAML, or does not hold settings.
    """
    document = yaml12.load(text, origin)
    document = {} if document is None else document
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UserError(f"{origin}: expected settings such as 'model: PATH', got {document!r:.60}")
    return _long(document, origin)


def _long(document: dict[str, Any], origin: str) -> dict[str, Any]:
    """Settings with every method in its long form; a document in that form stays as it is."""
    for setting, value in document.items():
        if setting in CHOICES:
            document[setting] = method_settings(value)
        elif setting in PARTS:
            if not isinstance(value, dict):
                refuse_unknown([setting] if setting in ELSEWHERE else [], {*SETTINGS} - {setting}, "")
                example = yaml12.dump({field.name: field.default for field in dataclasses.fields(PARTS[setting])[:1]}).strip()
                raise UserError(f"{origin}: expected settings under {setting}, such as {example!r}, got {value!r}")
            document[setting] = by_own_names(setting, value, origin)
    return document


def load_file(path: str | Path, what: str = "a YAML file") -> dict[str, Any]:
    """As :func:`load`, from a file; ``what`` is expected of it.

    Raises:
      UserError: as :func:`load`, or the file cannot be read, or is a pipe that this process was not started with.
    """
    file_path = Path(path).expanduser()
    refuse_special(file_path)
    try:
        with file_path.open(encoding="utf-8") as file:
            text = file.read(yaml12.MOST_LETTERS + 1)  # a device has no end
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"expected {what}, cannot read {path}: {reason}") from None
    return load(text, str(path))


def spelled(argument: str) -> str:
    """--cpu-devices as --cpu_devices, --solver NAME as --solver.name NAME, and a setting's other name as its own."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    option = option[2:].replace("-", "_")
    return f"--{ALIASES.get(option, option)}" + (".name" if option in CHOICES else "") + equals + value


def _words(argv: Sequence[str]) -> list[str]:
    """The arguments, each :func:`spelled`. Raises UserError for one that is not UTF-8."""
    refuse_undecodable(argv)
    return [spelled(argument) for argument in argv]


def _options(argv: Sequence[str]) -> list[str]:
    """The settings that a command line names, after ``spelled``."""
    return [argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")]


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
        raise UserError(_refusal(error)) from None
    if early.config and len(early.config) > 1:
        raise UserError(f"expected one --config, got {len(early.config)}: put the settings into one file")
    early.config = early.config and early.config[0]
    return early


def method_settings(value: Any) -> dict[str, Any]:
    """A method in its long form: ``cg`` as ``{"name": "cg"}``."""
    method = dict(value) if isinstance(value, dict) else {"name": value}
    return method | {"name": "null"} if method.get("name", "") is None else method


def _check_known(names: Iterable[str], known: set[str], chosen: Mapping[str, str], dashes: str) -> None:
    """Refuses a setting that does not exist, and suggests similar ones."""
    for name in names:
        if name in known:
            continue
        setting, _, option = name.partition(".")
        owners = [method for method, cls in CHOICES.get(setting, {}).items() if cls and option in fields(cls)]
        if owners and setting in chosen:
            raise UserError(
                f"{dashes}{name} is an option of {setting} {', '.join(owners)}, but {setting} is "
                f"{chosen[setting]} here; choose {owners[0]} or leave the option out"
            )
        refuse_unknown([name], known, dashes)


def refuse_unknown(names: Iterable[str], known: set[str], dashes: str) -> None:
    """Refuses a setting that is not known, and suggests similar ones."""
    for name in names:
        if name in known:
            continue
        if name in GONE or name.partition(".")[0] in GONE:
            raise UserError(f"there is no setting {dashes}{name} any more, since it earned next to nothing: leave it out")
        candidates = {entry.removesuffix(".name") for entry in known}
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


def _refusal(
    error: argparse.ArgumentError,
    types: Mapping[str, Any] = MappingProxyType({}),
    parser: argparse.ArgumentParser | None = None,
    argv: Sequence[str] = (),
) -> str:
    """The message of an argparse or jsonargparse error, in one line, with the default as an example of a value.

    The error has no other trace of the setting and its value than its text. Where another version words it otherwise, the text
    itself is the message.

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
    typed = shlex.join(example) if name in _options(argv) else f"{name}: {example[1]}"
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
