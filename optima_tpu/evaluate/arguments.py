"""Reads the arguments of an evaluation, and refuses all that they and the paths in them show to be wrong."""

from collections.abc import Iterable, Sequence

from optima_tpu.config.model_spec import refuse_early
from optima_tpu.data import check_files, check_sources
from optima_tpu.evaluate.config import EvaluateConfig, parse
from optima_tpu.runtime.devices import Devices
from optima_tpu.runtime.processes import may_join


def refuse_wrong(config: Devices, models: Iterable[str | None], texts: Iterable[str | None]) -> bool:
    """Refuses what the names of models and texts, the paths in them, mesh and devices show to be wrong.

    Returns:
      Whether this process may look at files: others would wait for this one, which has perhaps not all of them.

    Raises:
      UserError: a model or a file of text is missing; or mesh and devices contradict each other.
    """
    texts = tuple(texts)
    refuse_early(config.coordinator, *models)
    check_sources(*texts)
    config.refuse_impossible()
    if alone := not may_join(config.coordinator):
        check_files(*texts)
    return alone


def read(argv: Sequence[str]) -> EvaluateConfig:
    """The evaluation that a command line asks for, see :func:`parse`. Called by ``runtime.light``.

    Raises:
      UserError: a setting is wrong; or as :func:`refuse_wrong`.
    """
    config = parse(argv)
    refuse_wrong(config, (config.model, config.against), config.texts)
    return config
