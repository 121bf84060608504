"""The base class of the forms of an export, and what they share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.checkpoints.packed import MASKS, write_masks
from optima_tpu.models.checkpoints.stacks import stacks_among, stacks_of
from optima_tpu.report.contents import ExportForm
from optima_tpu.runtime.files import written_here

PLAIN, PACKED = "plain", "packed"
"""The names of the forms that store tensors as the source has them."""

Zeros = dict[str, int]
"""Name of a pruned weight -> the number of its zeros, counted in the file."""


class Options(NamedTuple):
    """The options of a form.

    Attributes:
      max_shard_size: largest size of a safetensors file: bytes, or a text such as "5GB". One is in memory at a time.
      scan_layers: whether all blocks are stacked, for maxtext.
    """

    max_shard_size: int | str = "5GB"
    scan_layers: bool = True


class Form:
    """One form of an export of one run.

    Making a form raises UserError if the run cannot have it.

    Attributes:
      text: what the form stores, for the help of ``--format``.
      card: the paragraph of the model card on the files and their use; empty for the one on safetensors.
      weights: the suffixes of the files of weights, whose bytes the command prints where the form is ``compact``.
      buckets: whether the folder may be in a bucket.
      stacks: whether the form can store one parameter of all experts as one tensor.
      compact: whether people choose the form for its size, so that the command prints it.
      library: the library that loads the folder, for its model card.
      next: what to type next, with FOLDER for the whole path of the folder; empty if the folder loads as it is.
      shards: the names of the safetensors files that a plain folder has.
      masks_apart: whether the masks of pruned weights are a file of their own.
    """

    name: ClassVar[str]
    text: ClassVar[str]
    card: ClassVar[str] = ""
    weights: ClassVar[Sequence[str]] = (".safetensors",)
    buckets: ClassVar[bool] = True
    stacks: ClassVar[bool] = False
    compact: ClassVar[bool] = False
    library: ClassVar[str] = "transformers"
    next: ClassVar[str] = ""
    shards: Sequence[str] = ()
    masks_apart: bool = True

    def __init__(self, run: Exported, written_as: ExportForm):
        self.run, self.stacked = run, stacks_among(run.source.stacked, stacks_of(run.architectures()))
        if self.stacked and not self.stacks:
            raise UserError(
                f"expected --format {PLAIN} or {PACKED} for a model that stores its experts in one tensor, or its matrices "
                f"as [inputs, outputs], got {self.name}: not supported"
            )

    def write(self, folder: Path) -> Zeros:
        """Writes weights and masks beside the run's assets, and checks them.

        Returns:
          The zeros of each pruned weight.

        Raises:
          RuntimeError: what was written does not match checkpoint, masks or patterns.
        """
        zeros = self.write_weights(folder)
        source = self.run.source
        names = source.pruned() if self.masks_apart else ()
        if names:  # none where every pruned matrix lost whole inputs
            with written_here(folder / MASKS) as here:
                write_masks(here, ((name, source.mask(name)) for name in names))
        return zeros

    def write_weights(self, folder: Path) -> Zeros:
        """The part of :meth:`write` that forms differ in."""
        raise NotImplementedError

    def finish(self, names: Iterable[str]) -> None:
        """Called when all other files, ``names``, have been written."""


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))  # NaN included
