"""The columns of tables on layers, for the terminal and the page.

A row of a table is a layer, or all layers of a kind.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from optima_tpu.method.layer_rules import kind_name
from optima_tpu.report.layer_means import mean, sparsity
from optima_tpu.report.numbers import percent
from optima_tpu.report.records import LayerReport
from optima_tpu.report.view import NONE

Layers = Sequence[LayerReport]
KINDS, EVERY, ROWS = "kinds", "every layer", "rows"
"""The tables of the page: errors by kind of layer, every layer, and what the solver did with rows."""


class Column(NamedTuple):
    """A column.

    Attributes:
      name: its heading on the page.
      tables: the tables of the page that have it.
      cell: the text of a cell, from the layers of a row.
      terminal: its heading in the terminal's table, with a solver and without one; empty where that table lacks it.
      update: whether it shows what the solver did; without a solver the page leaves such a column out.
      applies: whether a run with these layers has the column.
    """

    name: str
    tables: Sequence[str]
    cell: Callable[[Layers], str]
    terminal: tuple[str, str] = ("", "")
    update: bool = False
    applies: Callable[[Layers], bool] = lambda layers: True


def mean_error(layers: Layers, error: str) -> str:
    """The mean of an error, see :func:`layer_means.mean`."""
    value = mean(layers, error)
    return NONE if value is None else percent(value)


def steps(value: float) -> str:
    """A number of iterations."""
    return f"{value:.0f}"


def _error(name: str, error: str, terminal: tuple[str, str] = ("", "")) -> Column:
    update = error.endswith("_after")
    return Column(
        name,
        (KINDS, EVERY),
        lambda layers: mean_error(layers, error),
        terminal,
        update,
        lambda layers: any(getattr(layer, error) is not None for layer in layers),
    )


def _of_rows(name: str, terminal: str, cell: Callable[[Layers], str]) -> Column:
    return Column(name, (EVERY, ROWS), cell, (terminal, ""), update=True)


COLUMNS: Sequence[Column] = (
    Column("matrices", (KINDS,), lambda layers: f"{len(layers):,}"),
    Column("shape", (EVERY,), lambda layers: "×".join(map(str, layers[0].shape))),
    Column(
        "tokens",
        (EVERY,),
        lambda layers: NONE if layers[0].tokens is None else f"{layers[0].tokens:,}",
        # Only experts read different tokens.
        applies=lambda layers: any(kind_name(layer.name) != layer.name for layer in layers),
    ),
    Column("rows", (ROWS,), lambda layers: f"{sum(layer.rows for layer in layers):,}"),
    _error("against dense, before", "dense_before", ("", "against\ndense")),
    _error("against dense, after", "dense_after", ("against\ndense", "")),
    _error("against dense, dense weights", "dense_drift"),
    _error("before", "error_before", ("error\nbefore", "error")),
    _error("after", "error_after", ("error\nafter", "")),
    _error("held out, before", "held_out_before", ("", "held\nout")),
    _error("held out, after", "held_out_after", ("held\nout", "")),
    Column("sparsity", (KINDS, EVERY), lambda layers: percent(sparsity(layers)), ("sparsity", "sparsity")),
    _of_rows("largest gap", "largest\ngap", lambda layers: percent(max(layer.gap_max for layer in layers))),
    _of_rows("median steps", "median\nsteps", lambda layers: steps(statistics.median(layer.steps_median for layer in layers))),
    _of_rows("most steps", "", lambda layers: steps(max(layer.steps_max for layer in layers))),
    _of_rows(
        "not converged", "not con-\nverged", lambda layers: f"{sum(layer.rows - layer.rows_converged for layer in layers):,}"
    ),
    _of_rows("refused", "rows\nrefused", lambda layers: f"{sum(layer.rows_refused for layer in layers):,}"),
)
"""Every column, in the order of all tables."""


def page_columns(table: str, layers: Layers, solver: str | None) -> list[Column]:
    """The columns of a table of the page on a run with these layers."""
    return [each for each in COLUMNS if table in each.tables and (solver or not each.update) and each.applies(layers)]


def terminal_columns(layers: Layers, solver: str | None) -> dict[str, Column]:
    """The columns of the terminal's table, by their headings."""
    return {heading: each for each in COLUMNS if (heading := each.terminal[solver is None]) and each.applies(layers)}
