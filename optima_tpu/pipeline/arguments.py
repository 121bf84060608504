"""Reads the arguments of a run or a recovery and refuses wrong ones.

The checks read the arguments and the paths in them. The commands call these functions by ``runtime.light``, first without the
libraries that a run needs.
"""

from collections.abc import Sequence

from optima_tpu import data
from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.evaluate.arguments import refuse_wrong
from optima_tpu.pipeline.recover import config as recover


def read_run(argv: Sequence[str]) -> RunConfig:
    """The run that a command line asks for, see :func:`parse`.

    Raises:
      UserError: a setting is wrong; the model or a file of text is missing; the texts, or mesh and devices, contradict each
        other.
    """
    config = parse(argv)
    if refuse_wrong(config, [config.model], config.texts):
        texts_of(config)
    return config


def texts_of(config: RunConfig) -> tuple[data.Source, data.Source]:
    """The texts that a run calibrates and evaluates on.

    Raises:
      UserError: both are the same.
    """
    source = data.parse_source(config.calibration.source)
    other = data.parse_source(config.evaluation.source or config.calibration.source)
    data.refuse_overlap(source, other, config.evaluation.source is not None)
    return source, other


def read_recovery(argv: Sequence[str]) -> recover.RecoverConfig:
    """The recovery in a command line. Raises UserError as :func:`read_run`."""
    config = recover.parse(argv)
    if refuse_wrong(config, (config.model, config.against), config.texts) and config.source:
        recovery_texts(config.source, config.evaluation)
    return config


def recovery_texts(source: str, evaluation: str | None) -> tuple[data.Source, data.Source]:
    """The texts that a recovery trains on and measures on.

    Args:
      evaluation: None stands for the evaluation part of ``source``.

    Raises:
      UserError: both are the same, or nothing can be trained on the first.
    """
    parsed, other = data.parse_source(source), data.parse_source(evaluation or source)
    if parsed.by_model:
        raise UserError(
            f"expected --source with a stored text, got {source}, which the model writes: c4, wikitext2, pydoc or file:PATH"
        )
    data.refuse_overlap(parsed, other, evaluation is not None, "training and evaluation", "--evaluation")
    return parsed, other
