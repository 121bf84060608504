"""The cells of a sweep: what each of them is, and which do not go together."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from optima_tpu.config.choices import CHOICES, default_options
from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
      pattern: its label.
      mask: its label.
      update: its label.
      samples: calibration sequences.
      seed: which ones are drawn.
      config: all settings; ``output`` is the cell's own directory.
    """

    pattern: str
    mask: str
    update: str
    samples: int
    seed: int
    config: RunConfig

    def __str__(self) -> str:
        return cell_name(self.mask, self.update, self.pattern, self.samples, self.seed)

    def inside(self, output: Path) -> Self:
        """The cell with its directory inside ``output``."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, output=str(output / self.directory)))

    @property
    def directory(self) -> Path:
        """Where its run is kept."""
        return self.config.run_directory


def cell_name(mask: str, update: str, pattern: str, samples: int, seed: int) -> str:
    """What a cell is called, also where its configuration is not at hand."""
    return f"{mask} + {update}, {pattern}, {samples} samples, seed {seed}"


def differences(cells: Sequence[Cell]) -> list[str]:
    """For every cell, the settings in which the cells differ: "pattern 2:4, solver cg, solver.damping 0.1".

    Without samples and seed, which are in its name. Options of a method are told where they are not its defaults.
    """
    settings = [dict(_told(cell.config)) for cell in cells]
    varying = [
        key
        for key in dict.fromkeys(key for told in settings for key in told)
        if len({str(told.get(key)) for told in settings}) > 1
    ]
    return [", ".join(f"{key} {told[key]}" for key in varying if told.get(key, "") != "") for told in settings]


def refuse_twins(cells: Sequence[Cell]) -> None:
    """No two cells may share a directory, or be the same run under two names.

    Raises:
      UserError: some do, which are named.
    """
    places: dict[Path, Cell] = {}
    runs: dict[RunConfig, Cell] = {}
    for cell in cells:
        if (other := places.setdefault(cell.directory, cell)) is not cell:
            raise UserError(f"the cells {other} and {cell} would share the directory {cell.directory}; change a label")
        if (other := runs.setdefault(dataclasses.replace(cell.config, output=None), cell)) is not cell:
            raise UserError(f"the cells {other} and {cell} have the same settings; leave one out")


def refuse_idle_seeds(cells: Sequence[Cell]) -> None:
    """No cell may be repeated with another seed where seeds change nothing: the spread over them would tell nothing.

    Raises:
      UserError: one is.
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
    """The settings that are worth telling, but for what is in a cell's name."""
    values = to_dict(config)
    for name in ("samples", "seed"):
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
