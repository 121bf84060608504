"""A run whose inputs are open and checked."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.method.selectors import Imported
from optima_tpu.models.masks import open_given
from optima_tpu.models.model import Model, without_last
from optima_tpu.pipeline.allocate import allocation_steps
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.distill.train import refuse_large
from optima_tpu.pipeline.greeting import greet
from optima_tpu.pipeline.inputs import Texts, manifest_of
from optima_tpu.pipeline.journal import prepare_directory
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.memory_plan import fitted
from optima_tpu.pipeline.walk import Walk
from optima_tpu.runtime.device_memory import device_budget


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run whose inputs are open and checked. Nothing of it is written yet.

    Attributes:
      manifest: all that decides the pruned weights; see ``inputs.manifest_of``.
      configuration: the settings as they are recorded.
      walk: what is done to every block, with the pattern's sparsity; None where the blocks are pruned already.
      dense: the perplexity of the dense model on the evaluation text, if the caller knows it.
    """

    config: RunConfig
    model: Model
    texts: Texts
    manifest: dict[str, Any]
    configuration: dict[str, Any]
    directory: Path
    walk: Walk | None = None
    dense: float | None = None

    @classmethod
    def of(cls, config: RunConfig, model: Model, texts: Texts, console: Console, dense: float | None = None) -> "Opened":
        """Checks that all inputs fit together and fit the devices, and prints what the run will do.

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
        greet(console, config, model, texts, directory, fit.told)
        return cls(config, model, texts, manifest, to_dict(config), directory, walk, dense)

    @property
    def held_out(self) -> np.ndarray:
        """The windows behind those that weights are fitted to, [windows, length] int32."""
        return self.texts.calibration.ids[self.config.calibration.fitted :]
