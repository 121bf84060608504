"""Does one run, from a dense checkpoint to a pruned one."""

import functools

from rich.console import Console

from optima_tpu.config.flat import flat
from optima_tpu.config.model_spec import opening
from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.method.selectors import Imported
from optima_tpu.models.checkpoints.hub import WANTED
from optima_tpu.models.masks import open_given
from optima_tpu.models.model import Model, without_last
from optima_tpu.pipeline import stages
from optima_tpu.pipeline.allocate import allocating, allocation_steps
from optima_tpu.pipeline.continuations import CONTINUING, continues
from optima_tpu.pipeline.cutting import cutting
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.distill.stages import TRAINING, UNTRAINED
from optima_tpu.pipeline.distill.train import refuse_large
from optima_tpu.pipeline.inputs import Texts, manifest_of, on_model, open_model_on_mesh, pruned_layers, read_texts
from optima_tpu.pipeline.journal import Journal, prepare_directory, refuse_unusable
from optima_tpu.pipeline.keeping import Keep, Summary, finish
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.memory_plan import fitted
from optima_tpu.pipeline.opened import Opened, TextPerplexity
from optima_tpu.pipeline.opening_lines import greet
from optima_tpu.pipeline.plan.model import config_apart, open_declared
from optima_tpu.pipeline.self_calibration import written_windows
from optima_tpu.pipeline.speed import SPEED, cuts
from optima_tpu.pipeline.stages import Results
from optima_tpu.pipeline.walk import Walk
from optima_tpu.report.contents import Allocated, Report
from optima_tpu.report.progress import Terminal, say
from optima_tpu.report.sinks import Steps, check_sinks
from optima_tpu.report.summary import print_summary
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.processes import agree, check_signals, first_only, is_first, together
from optima_tpu.runtime.version import code_version


def run(
    config: RunConfig,
    console: Console | None = None,
    model: Model | None = None,
    texts: Texts | None = None,
    dense: TextPerplexity | None = None,
    summary: Summary = print_summary,
) -> Report:
    """Prunes a model as ``config`` says, or resumes a stopped run.

    For a finished run it prints the summary again and changes nothing. All input is checked before the first block: model, mesh,
    pattern, texts, output.

    Args:
      model: from :func:`open_model_on_mesh`, if several runs share it.
      texts: from :func:`read_texts`.
      dense: what the dense model makes of the evaluation text, if it is known.
      summary: prints the report, and the directory that it is in.

    Raises:
      UserError: a mistake that the user can correct. Nothing of an earlier run was overwritten.
    """
    console = console or Terminal(quiet=not is_first())
    agree("settings and code", flat(to_dict(config) | {"process_id": None, "code": code_version()}))
    first_only(lambda: check_sinks(config.sinks))
    refuse_unusable(together(lambda: config.run_directory))
    check_signals()
    if model is None:
        say(console, opening(config.model))
        if config_apart(config.model):
            # What config.json alone refuses is refused before weights are downloaded, and compared with their checksums.
            together(lambda: on_model(config, open_declared(config.model, config.dtype, config.batch, needed=WANTED).config))
        model = open_model_on_mesh(config)
    check_signals()
    model_config = model.pretrained.config
    config = together(lambda: on_model(config, model_config, console))
    # A pattern or a block that does not fit is refused before the texts are read.
    together(lambda: pruned_layers(config, without_last(model, config.cut.blocks).decoder))
    for kind in model.decoder.config.kinds:
        model.decoder.positions(kind, config.calibration.window_length)
    opened, walk = _opened(config, model, texts or read_texts(config, model, console), console, dense)
    return finish(opened, functools.partial(pruning, config, walk), console, summary)


def _opened(config: RunConfig, model: Model, texts: Texts, console: Console, dense: TextPerplexity | None) -> tuple[Opened, Walk]:
    """Checks the inputs against each other and the devices; prints the run.

    Returns:
      The run, and what it does to every block, with the pattern's sparsity.

    Raises:
      UserError: pattern, rules, masks or allocation do not fit the model, a layer does not fit the devices, or the directory
        holds something else.
    """
    decoder, recipe, left = model.decoder, config.recipe, without_last(model, config.cut.blocks).decoder
    manifest = manifest_of(config, model, texts)
    if config.allocation.measures:
        allocation_steps(left, recipe, config.allocation)
    given = open_given(config.recipe.selector) if isinstance(config.recipe.selector, Imported) else None
    budget, groups = device_budget(config.device_memory), groups_of_blocks(decoder)
    fit = fitted(decoder, groups, recipe, texts.calibration.ids.shape, budget)
    walk = Walk(decoder, recipe, groups, config.calibration.fitted, budget - fit.states, given, fit.states > 0)
    if config.distill:
        refuse_large(Trainer(left, config.distill, budget), "--distill null")
    directory = prepare_directory(config.run_directory, manifest, to_dict(config))
    greet(console, config, model, texts, directory, fit.words)
    return Opened(config, model, texts, manifest, to_dict(config), directory, dense), walk


def pruning(config: RunConfig, walk: Walk, keep: Keep) -> Report:
    """The stages of a run."""
    opened = keep(stages.WRITTEN_TEXT) if written_windows(config) else None
    dense = keep(stages.DENSE_PERPLEXITY)
    journal = keep(stages.JOURNAL, dense, opened)
    sinks = keep(stages.SINKS, journal)
    for choice in cutting(config):
        keep(choice, journal)
    allocation = keep(allocating(walk), journal) if config.allocation.measures else None
    blocks = keep(stages.pruning(walk), journal, sinks, allocation)
    return measuring(config, keep, dense, blocks, sinks, allocation)


def measuring(
    config: RunConfig, keep: Keep, dense: TextPerplexity, blocks: Journal, sinks: Steps, allocation: Allocated | None = None
) -> Report:
    """The stages of a run and of a recovery behind the last block.

    Args:
      dense: what the dense model makes of the evaluation text.
      blocks: the journal with every block.
      sinks: the services that receive records, in addition to the run directory.
      allocation: the sparsity of every block; None where all blocks have the pattern's.
    """
    outcome = keep(UNTRAINED, blocks, keep(TRAINING, blocks)) if config.distill else None
    pruned = keep(stages.CHECKPOINTING, blocks, outcome, allocation)
    perplexity, memory = keep(stages.PRUNED_PERPLEXITY, pruned), keep(stages.MEMORY)
    speed = keep(SPEED, pruned) if cuts(config) else None
    results = Results(dense, perplexity, outcome, allocation, speed)
    keep(stages.SENDING, sinks, results)
    if config.export:
        keep(stages.EXPORTING, results)
    entries = {"memory": memory, "continuations": keep(CONTINUING, pruned) if continues(config) else None}
    return keep(stages.REPORTING, results, pruned, entries)
