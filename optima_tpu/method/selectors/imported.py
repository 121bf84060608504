"""Masks that were made elsewhere."""

import dataclasses
from typing import ClassVar

from optima_tpu.errors import UserError


@dataclasses.dataclass(frozen=True)
class Imported:
    """Keeps what a given mask keeps: MaskLLM, ProxSparse, another run, or the zeros of any pruned checkpoint.

    Computes nothing: the masks are checked against model and pattern before the run (``optima_tpu.models.masks``), and the
    walk takes them as arrays. The kept weights are the dense ones; with ``weights`` they are those of the pruned model, so
    that without a solver it is its method's own row of a table.

    Attributes:
      path: the masks: a MaskLLM .npz, an .npz or .safetensors of 0/1 matrices, pruning_masks.npz, a run directory, a
        folder of ProxSparse's .pt files, or a pruned checkpoint (folder, .gguf file or hub id). Must be given.
      weights: take the pruned matrices' weights from there too. Needs a run directory or a checkpoint.
    """

    group: ClassVar[str] = "layer"
    path: str | None = None
    weights: bool = False

    def __post_init__(self) -> None:
        # None is what the settings hold until one is given; open_masks refuses it.
        if self.path is not None and not self.path.strip():
            raise UserError("expected selector.path to name masks, got an empty text; see --selector imported --help")
