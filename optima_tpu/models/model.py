"""An open model: its checkpoint, and its decoder on the mesh."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from optima_tpu.config.run_config import LENGTH
from optima_tpu.errors import UserError
from optima_tpu.models import family_of
from optima_tpu.models.checkpoints import Pretrained
from optima_tpu.models.checkpoints.fewer_blocks import assets_without, last_blocks, renumbered
from optima_tpu.models.checkpoints.fewer_experts import ExpertCut, assets_with, fewer_experts
from optima_tpu.models.checkpoints.source import TensorSource, read_config
from optima_tpu.models.decoder import Decoder


class Model(NamedTuple):
    """A checkpoint and its decoder on the mesh.

    Runs of one model share it, and with it the compiled programs.
    """

    pretrained: Pretrained
    decoder: Decoder


def without_experts(model: Model, cut: ExpertCut, kept: Sequence[Sequence[int]], solved: TensorSource | None = None) -> Model:
    """The model whose mixtures have only some experts.

    Args:
      kept: these experts, for each block; empty for a block without a mixture.
      solved: their tensors that have other values than in the model, by their new names.
    """
    pretrained, decoder = model
    stay = {decoder.prefix(index): experts for index, experts in enumerate(kept) if experts}
    tensors = fewer_experts(pretrained.tensors, cut.names, stay, solved)
    return smaller(model, assets_with(pretrained.assets, cut.kept), tensors)


def without_blocks(model: Model, left_out: Collection[int]) -> Model:
    """The model without some of its blocks; the others have new numbers."""
    if not left_out:
        return model
    pretrained, decoder = model
    tensors = renumbered(pretrained.tensors, decoder.root + decoder.family.layers, left_out)
    return smaller(model, assets_without(pretrained.assets, left_out), tensors)


def without_last(model: Model, count: int) -> Model:
    """The model without its last ``count`` blocks.

    It has the size of the model of a run that has not chosen its blocks yet.
    """
    return without_blocks(model, last_blocks(model.pretrained.config, count))


def smaller(model: Model, assets: Mapping[str, bytes], tensors: TensorSource) -> Model:
    """The model of other tensors and of the config.json among the assets."""
    (pretrained, decoder), (config, _) = model, read_config(assets["config.json"], model.pretrained.origin)
    by_torch = decoder.family is not family_of(pretrained.config)  # such a family is made anew, since it has the model's sizes
    opened = Decoder.open(config, tensors, decoder.mesh, decoder.batch, by_torch)
    return Model(dataclasses.replace(pretrained, config=config, tensors=tensors, assets=assets), opened)


def window_length(model: PretrainedConfig, name: str, given: int | None) -> int:
    """The tokens in a window: ``given``, or 2048, or a shorter context.

    Raises:
      UserError: the given number is beyond the context that config.json names.
    """
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)
    if given and limit and given > limit:
        raise UserError(f"expected {name} of at most {limit}, the model's context, got {given}: take {name} {limit}")
    return given or min(LENGTH, limit or LENGTH)


def window_bos(model: Model, tokenizer: PreTrainedTokenizerBase, where: Literal["text", "window"] | None = None) -> int | None:
    """The BOS token that every window begins with.

    None if only the tokenizer adds one. See ``config.Evaluation.bos``.

    Raises:
      UserError: a BOS token is needed, and the tokenizer has none.
    """
    needed = model.decoder.family.needs_bos
    if where == "text" or (where is None and not needed):
        return None
    if tokenizer.bos_token_id is None:
        reason = "without which this family does not work" if needed else "for evaluation.bos window"
        raise UserError(
            f"expected a tokenizer with a BOS token, {reason}; its tokenizer_config.json names none: add it, or take "
            "the tokenizer that was published with the model"
        )
    return tokenizer.bos_token_id


def check_ids(ids: Iterable[np.ndarray], model: Model) -> None:
    """Raises UserError for tokens that the model has no embedding for."""
    largest, vocab = max(int(each.max()) for each in ids), model.decoder.config.vocab
    if largest >= vocab:
        raise UserError(
            f"expected token ids below {vocab}, the rows of the model's embedding, got {largest}: tokenizer and "
            "model do not belong together"
        )
