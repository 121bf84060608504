"""Whether a checkpoint holds the model that its config.json describes."""

import numpy as np

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints import TensorSource, check_dtypes, check_names
from optima_tpu.models.decoder import Decoder

_ROWS = 4096  # compared at a time: 128 MiB of a model of width 8192 in float32


def check_checkpoint(decoder: Decoder) -> None:
    """Compares the tensors that a model reads with its checkpoint's.

    Reads no weights, except a stored head that should be a copy of the embedding.

    Raises:
      UserError: tensors are missing, unexpected or stored as float64, or the head is tied to the embedding and the checkpoint
        stores another head.
    """
    names = decoder.tensor_names()
    check_names(names, decoder.tensors, decoder.family.ignored)
    check_dtypes(names, decoder.tensors)
    head, embedding = decoder.family.head, decoder.root + decoder.family.embedding
    # Such a checkpoint is ambiguous: transformers 5 takes the stored head, earlier versions take the embedding.
    tensors = decoder.tensors
    if decoder.config.tied and head in tensors.names() and not same_values(tensors, head, tensors, embedding):
        raise UserError(
            f"config.json ties {head} to {embedding}, but the checkpoint holds other values for it: set "
            "tie_word_embeddings to false in config.json to use these values, or remove them from the checkpoint"
        )


def same_values(source: TensorSource, name: str, other: TensorSource, its_name: str) -> bool:
    """Whether two tensors have the same shape and values; reads in parts."""
    parts = [(slice(start, start + _ROWS),) for start in range(0, source.shape(name)[0], _ROWS)]
    return source.shape(name) == other.shape(its_name) and all(
        np.array_equal(source.read(name, part), other.read(its_name, part)) for part in parts
    )
