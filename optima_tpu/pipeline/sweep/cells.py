"""The cells of a sweep: their settings, and checks that no two cells conflict."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optima_tpu.config.choices import CHOICES, default_options
from optima_tpu.config.run_config import RunConfig, to_dict, weights_settings
from optima_tpu.errors import UserError
from optima_tpu.report.contents import CellName


class Cell(CellName, frozen=True):
    """One run of the grid, with all of its settings; ``output`` is the cell's own directory."""

    config: RunConfig

    @property
    def directory(self) -> Path:
        """The directory of the cell's run."""
        return self.config.run_directory


def differences(cells: Sequence[Cell]) -> list[str]:
    """For every cell, the settings in which the cells differ: "pattern 2:4, solver cg, solver.damping 0.1".

    Windows and seed are left out, because the cell's name has them. An option of a method appears only if it differs from its
    default.
    """
    settings = [dict(_told(cell.config)) for cell in cells]
    varying = [
        key
        for key in dict.fromkeys(key for told in settings for key in told)
        if len({str(told.get(key)) for told in settings}) > 1
    ]
    return [", ".join(f"{key} {told[key]}" for key in varying if told.get(key, "") != "") for told in settings]


def refuse_twins(cells: Sequence[Cell]) -> None:
    """Refuses two cells that share a directory, or that are the same run under two names.

    Raises:
      UserError: there are two such cells; the message names both.
    """
    places: dict[Path, Cell] = {}
    runs: dict[RunConfig, Cell] = {}
    for cell in cells:
        if (other := places.setdefault(cell.directory, cell)) is not cell:
            raise UserError(f"the cells {other} and {cell} would share the directory {cell.directory}; change a label")
        text = dataclasses.replace(cell.config.calibration, length=cell.config.calibration.window_length)
        if (other := runs.setdefault(dataclasses.replace(cell.config, output=None, calibration=text), cell)) is not cell:
            raise UserError(f"the cells {other} and {cell} have the same settings; leave one out")


def refuse_idle_seeds(cells: Sequence[Cell]) -> None:
    """Refuses several seeds for a cell whose text does not depend on the seed: their spread would mean nothing.

    Raises:
      UserError: there is such a cell.
    """
    from optima_tpu.data import Npy, parse_source  # imports pyarrow and more, which --help does not wait for

    runs: dict[RunConfig, Cell] = {}
    for cell in cells:
        source = parse_source(cell.config.calibration.source)
        text = dataclasses.replace(cell.config.calibration, seed=0)
        without = dataclasses.replace(cell.config, output=None, calibration=text)
        if isinstance(source, Npy) and (other := runs.setdefault(without, cell)) is not cell:
            raise UserError(
                f"expected one seed where calibration.source is {source}, got {other.seed} and {cell.seed}: a source "
                "of token ids draws the same tokens for every seed; write seeds: [0] in the file"
            )


def _told(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """The settings that describe a cell, without those in its name and without the defaults of its methods."""
    values = to_dict(config) | weights_settings(config)  # which has every pattern with its comparison group
    for name in ("windows", "seed"):
        del values["calibration"][name]
    for key, value in values.items():
        if key in CHOICES:
            yield key, value["name"] if value else "null"
            own = default_options(key, value["name"]) if value else {}
            yield from ((f"{key}.{name}", value[name]) for name, default in own.items() if value[name] != default)
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        elif key != "output":
            yield key, value
