"""Masks that another program or another run made."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors.base import Selector
from optima_tpu.runtime.bounds import Filled


@dataclasses.dataclass(frozen=True)
class Imported(Selector):
    """Keeps what a given mask keeps, from another method, run or checkpoint.

    It computes nothing: the masks are checked against model and pattern before the run (``optima_tpu.models.masks``), and the
    walk takes them as arrays. The kept weights are the dense ones; with ``weights`` they come from the pruned model. Without a
    solver, this then reproduces the result of the method that made the masks.

    Attributes:
      path: the masks: a MaskLLM .npz, an .npz or .safetensors of 0/1 matrices, pruning_masks.npz, a run directory, a
        folder of ProxSparse's .pt files, or a pruned checkpoint (folder, .gguf file or hub id). Must be given.
      weights: take the kept weights from path too. Needs a run directory or a checkpoint.
    """

    group: ClassVar[Literal["row", "layer"]] = "layer"
    hessians: ClassVar[int] = 0
    chooses: ClassVar[bool] = False

    # None until the user gives a path; open_masks refuses None.
    path: Annotated[str | None, Filled("the path of masks", "see --selector imported --help")] = None
    weights: bool = False

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        raise ValueError("imported masks are given as arrays, not chosen")
