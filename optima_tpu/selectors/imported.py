"""Masks that were made elsewhere."""

import dataclasses
from typing import ClassVar

from optima_tpu.errors import UserError


@dataclasses.dataclass(frozen=True)
class Imported:
    """Keeps what a given mask keeps: MaskLLM, ProxSparse, another run, or the zeros of any pruned checkpoint.

    Computes nothing: the masks are checked against model and pattern before the run (``optima_tpu.masks``), and the
    walk takes them as arrays. The kept weights do not move.

    Attributes:
      path: the masks: a MaskLLM .npz, an .npz or .safetensors of 0/1 matrices, pruning_masks.npz, a run directory, a
        folder of ProxSparse's .pt files, or a pruned checkpoint (folder, .gguf file or hub id). Must be given.
    """

    group: ClassVar[str] = "layer"
    path: str | None = None

    def __post_init__(self):
        # None is what the settings hold until one is given; open_masks refuses it.
        if self.path is not None and not self.path.strip():
            raise UserError("expected selector.path to name masks, got an empty text; see --selector imported --help")
