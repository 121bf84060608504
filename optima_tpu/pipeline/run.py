"""One run, from a dense checkpoint to a pruned one, after the command line was read."""

import contextlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from optima_tpu.config.flat import flat
from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.models.checkpoints.orbax import CHECKPOINT
from optima_tpu.models.model import Model
from optima_tpu.pipeline.inputs import Texts, on_context, open_model_on_mesh, pruned_layers, read_texts
from optima_tpu.pipeline.journal import refuse_unusable
from optima_tpu.pipeline.repair import mend
from optima_tpu.pipeline.stages import STAGES, Opened, Run, Stage, finished_report
from optima_tpu.report.progress import Progress, Terminal, say
from optima_tpu.report.sinks import check_sinks
from optima_tpu.report.table import print_summary
from optima_tpu.runtime.files import complete, only_program
from optima_tpu.runtime.processes import agree, check_signals, first_only, from_first, is_first, together
from optima_tpu.runtime.version import code_version


def run(
    config: RunConfig,
    console: Console | None = None,
    model: Model | None = None,
    texts: Texts | None = None,
    dense: float | None = None,
) -> dict[str, Any]:
    """Prunes a model as ``config`` says, or resumes the same run where it was stopped.

    For a finished run it prints the summary again and changes nothing. All input is checked before the first block: model, mesh,
    pattern, texts, output.

    Args:
      model: from :func:`open_model_on_mesh`, if several runs share it.
      texts: from :func:`read_texts`.
      dense: the perplexity of the dense model on these texts, if it is known.

    Returns:
      The contents of report.json.

    Raises:
      UserError: a mistake that the user can correct. Nothing of an earlier run was overwritten.
    """
    console = console or Terminal(quiet=not is_first())
    agree("settings and code", flat(to_dict(config) | {"process_id": None, "code": code_version()}))
    first_only(lambda: check_sinks(config.sinks))
    refuse_unusable(together(lambda: config.run_directory))
    check_signals()
    model = model or open_model_on_mesh(config)
    check_signals()
    found = model.pretrained.config
    config = together(lambda: on_context(config, found, console))
    together(lambda: pruned_layers(config, model.decoder))  # a pattern that does not fit is refused before the texts are read
    opened = Opened.of(config, model, texts or read_texts(config, model, console), console)
    return finish(opened, STAGES, console, dense)


def finish(opened: Opened, stages: Sequence[Stage], console: Console, dense: float | None = None) -> dict[str, Any]:
    """Takes the stages that are left of an opened run, prints the summary, and returns the contents of report.json.

    Args:
      dense: as for :func:`run`.
    """
    check_signals()
    if from_first(lambda: complete(opened.directory / CHECKPOINT)):
        say(console, "checking     the files that an earlier start of this run wrote, by their checksums")
    report = from_first(lambda: finished_report(opened))
    if report is not None:
        say(console, "finished     nothing is left to do")
    console.print()
    if report is None:
        with only_program(opened.directory), Progress(console) as progress, contextlib.ExitStack() as sinks:
            for line in from_first(lambda: mend(opened.directory)):
                progress.note(line)
            started = Run(opened, progress, sinks, dense)
            progress.note(f"stages: {', '.join(stage.name for stage in stages if stage.steps(started))}")
            for index, stage in enumerate(stages):
                stage.take(started, stages[index + 1 :])
        report = started.report
        assert report is not None, "the last stage writes it"
        console.print()
    print_summary(console, report, opened.directory)
    return report
