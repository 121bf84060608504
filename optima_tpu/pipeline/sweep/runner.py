"""Runs a sweep's cells in turn in one process, which opens models once."""

import contextlib
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.errors import UserError, naming, one_line
from optima_tpu.models.checkpoints.export import FOLDER, is_export_of
from optima_tpu.models.model import Model
from optima_tpu.pipeline.inputs import Texts, manifest_of, on_model, open_model_on_mesh, read_texts, token_digest
from optima_tpu.pipeline.opened import TextPerplexity
from optima_tpu.pipeline.perplexities import read_perplexity
from optima_tpu.pipeline.repair import faults
from optima_tpu.pipeline.run import run
from optima_tpu.pipeline.self_calibration import written_windows
from optima_tpu.pipeline.sweep.cells import Cell
from optima_tpu.pipeline.sweep.grid import CellGrid
from optima_tpu.pipeline.sweep.tables import (
    REMEDY,
    CellResult,
    describe,
    failed,
    finished,
    missing,
    published,
    refuse_loss,
    settings,
    unusual,
    write_tables,
)
from optima_tpu.report.contents import Report
from optima_tpu.report.file import REPORT
from optima_tpu.report.progress import say
from optima_tpu.report.published import change
from optima_tpu.report.run_record import ASSETS, RUN, refuse_another
from optima_tpu.report.summary import print_summary, without_model
from optima_tpu.runtime import signals
from optima_tpu.runtime.checksums import forget, intact, keep, known
from optima_tpu.runtime.files import in_turn, remove, writing
from optima_tpu.runtime.records import encoded, known_record

_HEAVY = ("journal", "activations", "distilled", "distillation", "checkpoint", FOLDER, ASSETS)
"""The folders of a run directory, see ``optima_tpu.pipeline.journal``. A report needs only the files beside them."""


class Shared:
    """Models, texts and dense perplexities, each made once for all cells."""

    def __init__(self):
        self._models: dict[tuple, Model] = {}
        self._texts: dict[tuple, Texts] = {}
        self._dense: dict[tuple, TextPerplexity] = {}

    def model(self, config: RunConfig) -> Model:
        """The model of a cell."""
        key = _model_key(config)
        if key not in self._models:
            self._models[key] = open_model_on_mesh(config)
        return self._models[key]

    def texts(self, config: RunConfig) -> Texts:
        """The texts of a cell, as the model's tokenizer reads them."""
        # A model writes another text in another dtype and, by rounding, on another mesh.
        writer = _model_key(config) if written_windows(config) else (config.model,)
        training = (config.distill.windows, config.distill.written) if config.distill else ()
        key = *writer, config.calibration, config.evaluation, *training
        if key not in self._texts:
            self._texts[key] = read_texts(config, self.model(config))
        return self._texts[key]

    def dense(self, config: RunConfig) -> TextPerplexity | None:
        """The dense model's result on a cell's text; None if not measured."""
        return self._dense.get(self._dense_key(config))

    def learn_dense(self, config: RunConfig) -> None:
        """Stores the dense model's result on a finished cell's text.

        The result includes the losses, which standard errors need.
        """
        if dense := read_perplexity(config.run_directory, self.texts(config).evaluation.ids, "dense"):
            self._dense[self._dense_key(config)] = dense

    def _dense_key(self, config: RunConfig) -> tuple:
        return *_model_key(config), token_digest(self.texts(config).evaluation.ids)


class Sweep:
    """A grid, and the results of its cells so far.

    The constructor opens and reads everything and finds the cells that are finished, so that errors in the input appear before
    the first cell runs.

    Args:
      chosen: the cells that will be run; the tables show earlier results of the other cells.
      keep_checkpoints: keep the pruned models, not only the reports, and with them their exports.
      force: see ``refuse_loss``.

    Raises:
      UserError: the directory has a table with finished cells that the grid does not have, a model or a text cannot be read, a
        pattern, rule or mask does not fit the model, or a cell's directory holds a run with other settings or other code.
    """

    def __init__(self, grid: CellGrid, chosen: Collection[Cell], keep_checkpoints: bool = False, force: bool = False):
        refuse_loss(grid, force)
        self.grid = grid
        self._chosen = chosen
        self._keep_checkpoints = keep_checkpoints
        self._shared = Shared()
        self._reports: dict[Cell, Report] = {}
        self._failures: dict[Cell, str] = {}
        for cell in grid.cells:
            if cell in chosen or (cell.directory / RUN).exists():
                with naming(cell):
                    self._look(cell)

    @property
    def finished(self) -> Collection[Cell]:
        """The cells that have nothing left to do."""
        return self._reports.keys()

    @property
    def results(self) -> list[CellResult]:
        """One result for every cell, in the order of the grid."""

        def result(cell: Cell) -> CellResult:
            if cell in self._reports:
                return finished(cell, self._reports[cell], self.grid.output)
            return failed(cell, self._failures[cell]) if cell in self._failures else missing(cell)

        return [result(cell) for cell in self.grid.cells]

    @property
    def remarks(self) -> list[str]:
        """What is unusual in the finished cells, one line for each finding."""
        return unusual(self._reports)

    @property
    def published(self) -> list[str]:
        """What published methods reach, one line for each sentence."""
        return published(self._reports)

    def write(self, command: str) -> dict[str, Path]:
        """Writes the tables as they are now, and returns their paths by name.

        The tables include cells of this grid that another process has finished since.

        Args:
          command: the command that makes the whole table, for the header.

        Raises:
          UserError: the directory cannot be written.
        """
        with writing(self.grid.output, REMEDY), in_turn(self.grid.output):
            self._look_again()
            header = describe(list(self._reports.values())) | settings(self._reports) | {"command": command}
            return write_tables(self.grid, self.results, header, self.remarks)

    def run(self, console: Console, command: str) -> None:
        """Runs the chosen cells that are not finished.

        Writes the tables after each cell. An error in a cell, such as a device without enough memory, is kept in its result and
        the others go on; the same command tries that cell again.

        Raises:
          UserError: the tables cannot be written.
        """
        cells = self.grid.cells
        for cell, report in list(self._reports.items()):
            if "checkpoint" not in report.files:
                _remove_heavy(cell.directory)  # if its removal was interrupted
                if self._keep_checkpoints and cell in self._chosen:
                    say(console, f"{cell}: an earlier sweep removed its pruned model, so the cell runs again")
                    with writing(cell.directory, "remove the cell's folder by hand"):
                        (cell.directory / REPORT).unlink()
                        forget(cell.directory, [REPORT])
                    del self._reports[cell]
        for number, cell in enumerate(cells, 1):
            if cell not in self._chosen or cell in self._reports:
                continue
            say(console, f"\ncell {number} of {len(cells)}: {cell}")
            shared, config = self._shared, cell.config
            try:
                model, texts, dense = shared.model(config), shared.texts(config), shared.dense(config)
                report = run(config, console=console, model=model, texts=texts, dense=dense, summary=self._summary)
                if not self._keep_checkpoints:
                    report = _lighten(cell.directory, report)
                    say(console, "removed the pruned model; --keep-checkpoints would keep it")
                self._know(cell, report)
            except UserError as error:
                self._fail(console, cell, str(error))
            except Exception as error:
                signals.check()  # the error may be a consequence of the signal
                traceback.print_exc()
                self._fail(console, cell, f"{type(error).__name__}: {one_line(error)}")
            self.write(command)

    def _summary(self, console: Console, report: Report, directory: Path) -> None:
        """Prints the summary of a cell, without the files that are removed.

        The sweep prints each sentence about published results once, not for every cell.
        """
        print_summary(console, report if self._keep_checkpoints else without_model(report), directory, change)

    def _fail(self, console: Console, cell: Cell, reason: str) -> None:
        self._failures[cell] = reason
        say(console, f"failed: {reason}")

    def _look(self, cell: Cell) -> None:
        """Opens what a cell needs, and checks whether the cell is finished.

        Raises UserError as the constructor does.
        """
        signals.check()
        texts, model = self._shared.texts(cell.config), self._shared.model(cell.config)
        config = on_model(cell.config, model.pretrained.config)
        manifest = manifest_of(config, model, texts)
        if (cell.directory / RUN).exists() and (report := self._finished_report(cell, config, manifest, texts)):
            self._know(cell, report)

    def _look_again(self) -> None:
        """Looks for cells that another process has finished.

        Looks only among the cells that are not run here, or that failed here.
        """
        for cell in self.grid.cells:
            waits = cell in self._chosen and cell not in self._failures
            if cell in self._reports or waits or not (cell.directory / REPORT).exists():
                continue
            with contextlib.suppress(UserError):  # a run with other settings or other code: the next start refuses it
                self._look(cell)

    def _finished_report(self, cell: Cell, config: RunConfig, manifest: Mapping[str, Any], texts: Texts) -> Report | None:
        """The report of a finished cell; None for an unfinished one.

        Raises:
          UserError: the directory holds a run with other settings, other code, or measured on another text.
        """
        directory = cell.directory
        if not intact(directory, RUN):  # the run says whether it can go on
            return None
        refuse_another(directory, manifest, to_dict(config))
        report = known_record(directory / REPORT, Report)
        if report is None or faults(directory):
            return None
        if report.evaluation.digest != token_digest(texts.evaluation.ids):
            raise UserError(
                f"{directory} was measured on another text ({report.evaluation.how} there, "
                f"{texts.evaluation.how} here); choose another --output"
            )
        # An export may be requested only now, of a model that was kept before.
        requested = self._keep_checkpoints and cell in self._chosen and cell.config.export and "checkpoint" in report.files
        unfinished = (requested or "transformers" in report.files) and not is_export_of(directory, directory / FOLDER)
        return None if unfinished else report

    def _know(self, cell: Cell, report: Report) -> None:
        self._reports[cell] = report
        self._shared.learn_dense(cell.config)


def _model_key(config: RunConfig) -> tuple:
    return config.model, config.dtype, config.mesh, config.batch


def _lighten(directory: Path, report: Report) -> Report:
    """Removes the pruned model's files: first their names in the report."""
    report = without_model(report)
    with in_turn(directory):
        keep(directory, {REPORT: encoded(report, indent=2)})
    _remove_heavy(directory)
    return report


def _remove_heavy(directory: Path) -> None:
    with writing(directory, "the cell's report is intact; remove its folders by hand"):
        for name in _HEAVY:
            remove(directory / name)
        forget(directory, [name for name in known(directory) if name.startswith(f"{ASSETS}/")])
