"""Reads the arguments of an evaluation and refuses what is wrong."""

from collections.abc import Iterable, Sequence

from optima_tpu.config.model_spec import refuse_early
from optima_tpu.data import check_files, check_sources
from optima_tpu.evaluate.config import EvaluateConfig, parse
from optima_tpu.runtime.devices import Devices
from optima_tpu.runtime.processes import may_join


def refuse_wrong(config: Devices, models: Iterable[str | None], texts: Iterable[str | None]) -> bool:
    """Refuses models, texts, mesh and devices that are plainly wrong.

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
    """Reads the arguments of an evaluation. ``runtime.light`` calls it.

    Raises:
      UserError: a setting is wrong; or as :func:`refuse_wrong`.
    """
    config = parse(argv)
    refuse_wrong(config, (config.model, config.against), config.texts)
    return config
