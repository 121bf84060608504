"""The cells of a sweep, and checks that no two cells conflict."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optima_tpu.config.choices import CHOICES, default_options
from optima_tpu.config.run_config import RunConfig, to_dict, weights_settings
from optima_tpu.errors import UserError
from optima_tpu.report.contents import CellName


class Cell(CellName, frozen=True):
    """A run of the grid. Its setting ``output`` is a directory of its own."""

    config: RunConfig

    @property
    def directory(self) -> Path:
        """The directory of the cell's run."""
        return self.config.run_directory


def differences(cells: Sequence[Cell]) -> list[str]:
    """For every cell, the settings in which the cells differ, in words.

    An example is "pattern 2:4, solver cg, solver.damping 0.1". Windows and seed are left out, because the cell's name has them.
    An option of a method appears only if it differs from its default.
    """
    settings = [dict(_described(cell.config)) for cell in cells]
    varying = [
        key
        for key in dict.fromkeys(key for described in settings for key in described)
        if len({str(described.get(key)) for described in settings}) > 1
    ]
    return [", ".join(f"{key} {described[key]}" for key in varying if described.get(key, "") != "") for described in settings]


def refuse_twins(cells: Sequence[Cell]) -> None:
    """Refuses two cells that share a directory, or have the same settings.

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
    """Refuses several seeds for a cell whose text does not depend on them.

    The spread over such seeds would mean nothing.

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


def _described(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """The settings that describe a cell.

    Leaves out the settings in the cell's name, and the defaults of its methods.
    """
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
