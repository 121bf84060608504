"""Reads the arguments of an evaluation, and refuses all that they and the paths in them show to be wrong."""

from collections.abc import Sequence

from optima_tpu.config.model_spec import refuse_early
from optima_tpu.data import check_files, check_sources
from optima_tpu.evaluate.config import EvaluateConfig, parse
from optima_tpu.runtime.processes import may_join


def read(argv: Sequence[str]) -> EvaluateConfig:
    """The evaluation that a command line asks for, see :func:`parse`. Called by ``runtime.light``.

    Raises:
      UserError: a setting is wrong, a model or a file of text is missing, or mesh and devices contradict each other.
    """
    config = parse(argv)
    refuse_early(config.coordinator, config.model, config.against)
    check_sources(*config.texts)
    config.refuse_impossible()
    if not may_join(config.coordinator):  # other processes would wait for this one, which has perhaps not all files
        check_files(*config.texts)
    return config
