"""Compares what this program computes for a whole model with torch."""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
import transformers

from optima_tpu.errors import UserError, plural, some
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.models import family_named
from optima_tpu.models.check import check_checkpoint
from optima_tpu.models.checkpoints import hub, open_model
from optima_tpu.models.decoder import Decoder, head_logits
from optima_tpu.models.general.build import NEAR
from optima_tpu.runtime.mesh import make_mesh


class Agreement(NamedTuple):
    """How a model here compares with torch.

    Attributes:
      lines: what to print.
      agrees: whether a way to run it here agrees with torch.
    """

    lines: tuple[str, ...]
    agrees: bool


def compared(model: str, length: int) -> Agreement:
    """Compares torch with each way in which this program runs the model.

    All run one window of random tokens in float32.

    Args:
      model: a folder or a hub id.

    Raises:
      UserError: the model cannot be opened, or torch cannot run it.
    """
    pretrained = open_model(model, "float32")
    (name, *_) = pretrained.config.architectures or [""]  # an opened model names one
    limit = getattr(pretrained.config.get_text_config(), "max_position_embeddings", None) or length
    tokens = np.random.default_rng(0).integers(0, pretrained.config.get_text_config().vocab_size, (1, min(length, limit)))
    expected = _torch_logits(Path(model).expanduser() if Path(model).exists() else hub.download(model), name, tokens)
    lines, agrees = [f"model        {model}: {name}"], False
    for way in ("family", "general") if family_named([name]) else ("general",):
        try:
            decoder = Decoder.open(pretrained.config, pretrained.tensors, make_mesh(None), general=way == "general")
            check_checkpoint(decoder)
            apart = float(np.abs(logits(decoder, tokens.astype(np.int32)) - expected).max() / np.abs(expected).max())
        except UserError as error:
            lines.append(f"{way:<12} refused: {error}")
            continue
        agrees |= apart < NEAR
        verdict = "agree with torch" if apart < NEAR else "DIFFER from torch"
        least = f"apart by at most {apart:.2g} of the largest logit, at {tokens.shape[1]} tokens in float32"
        lines.append(f"{way:<12} the logits {verdict}: {least}")
        lines.append(f"             {_pruned(decoder)}")
    return Agreement(tuple(lines), agrees)


def _torch_logits(folder: Path, name: str, tokens: np.ndarray) -> np.ndarray:
    made = getattr(transformers, name, None)
    if made is None:
        raise UserError(f"the installed transformers {transformers.__version__} has no {name}: install a release that has it")
    transformers.utils.logging.disable_progress_bar()
    model = made.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()


def logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """The logits [windows, length, vocab] of tokens."""
    hidden = decoder.embed(tokens)
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        decoder.apply(index, parameters, hidden)
    head, run = decoder.head(), jax.jit(head_logits)
    return np.concatenate([np.asarray(run(head, batch.hidden))[batch.filled] for batch in hidden.batches(decoder.batch)])


def _pruned(decoder: Decoder) -> str:
    """The layers that a run prunes, and the memory of the largest block."""
    kinds = [decoder.at(kind) for kind in decoder.config.kinds]
    names = dict.fromkeys(kind_name(name) for alike in kinds for name in alike.linears)
    blocks = [decoder.at(index) for index in range(decoder.config.blocks)]
    weights = sum(math.prod(alike.block_shapes[f"{name}.weight"]) for alike in blocks for name in alike.linears)
    largest = max(sum(map(math.prod, alike.block_shapes.values())) for alike in kinds)
    return (
        f"{plural(decoder.config.blocks, 'block')} of {plural(len(kinds), 'kind')}, {weights:,} weights to prune in "
        f"{some(names, 12)}; the largest block has {4 * largest / 2**20:,.1f} MiB in float32"
    )
