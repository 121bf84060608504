"""A run whose inputs are open and checked."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optima_tpu.config.run_config import RunConfig
from optima_tpu.models.checkpoints.orbax import CHECKPOINT
from optima_tpu.models.model import Model
from optima_tpu.pipeline.inputs import Texts
from optima_tpu.runtime.files import complete
from optima_tpu.runtime.processes import from_first


class TextPerplexity(NamedTuple):
    """What a model makes of the evaluation text.

    Attributes:
      losses: [windows, length - 1] float32, of the tokens of the first windows; None where only the perplexity is known.
    """

    perplexity: float
    losses: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run whose inputs are open and checked. Nothing of it is written yet.

    Attributes:
      manifest: all that decides the pruned weights; see ``inputs.manifest_of``.
      configuration: the settings as they are recorded.
      dense: what the dense model makes of the evaluation text, if the caller knows it.
    """

    config: RunConfig
    model: Model
    texts: Texts
    manifest: dict[str, Any]
    configuration: dict[str, Any]
    directory: Path
    dense: TextPerplexity | None = None

    @property
    def held_out(self) -> np.ndarray:
        """The held-out windows of the run, [windows, length] int32."""
        return self.texts.calibration.ids[self.config.calibration.fitted :]

    @property
    def checkpointed(self) -> bool:
        """Whether the run has its pruned model. Every process calls it."""
        done: bool = from_first(lambda: complete(self.directory / CHECKPOINT))
        return done
