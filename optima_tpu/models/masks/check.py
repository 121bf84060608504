"""Checks that imported masks fit the model and the pattern of a run."""

import hashlib
from collections.abc import Mapping

import numpy as np

from optima_tpu.errors import UserError, naming, plural, some
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import ReadGiven
from optima_tpu.models.checkpoints import TensorSource
from optima_tpu.models.masks.source import MaskSource

_FLIPPED = 0.9
"""A mask is flipped if its kept weights have less than this share of the dropped ones' mean magnitude. In every layer of
SmolLM2-135M, Wanda's kept weights have at least 2.6 times the mean of the dropped ones; with random masks both means are about
equal."""


def check_masks(
    source: MaskSource, shapes: Mapping[str, tuple[int, int]], patterns: Mapping[str, Pattern], weights: TensorSource
) -> str:
    """Reads masks one by one, and compares each with model and pattern.

    An N:M group must keep exactly N; in masks from a checkpoint's zeros it may keep fewer, since a kept weight may be zero.
    Unstructured sparsity is compared over the layer, whatever the pattern's comparison group, with a tolerance of one percentage
    point. If the inverse of a mask fits the pattern as well (half of the weights), the magnitudes decide whether the mask is
    flipped.

    A file with masks for other layers is refused, since they would have no effect. A checkpoint has every layer; only the pruned
    ones are checked.

    Args:
      shapes: name of each weight to prune -> [d_out, d_in].
      patterns: the same names -> the pattern of the mask.

    Returns:
      SHA-256 over names, shapes and packed masks, in order of name: the same masks have the same digest in any file.

    Raises:
      UserError: a mask is missing, belongs to no pruned layer, has another shape, violates its pattern or is flipped.
        The message names the tensor.
    """
    _check_names(source, shapes)
    digest = hashlib.sha256()
    for name in sorted(shapes):
        keep = source.read(name, shapes[name])
        _check_mask(keep, name, patterns[name], source, weights)
        digest.update(f"{name} {tuple(keep.shape)}\n".encode() + np.packbits(keep).tobytes())
    return digest.hexdigest()


def check_weights(read: ReadGiven, shapes: Mapping[str, tuple[int, int]]) -> str:
    """Reads the weights that come with masks once, one matrix at a time.

    Returns:
      SHA-256 over names and weights in float32, zero where they are pruned.

    Raises:
      UserError: a weight is missing, has another shape or is not finite. The message names the tensor.
    """
    digest = hashlib.sha256()
    for name in sorted(shapes):
        keep, weight = read(name, shapes[name])
        assert weight is not None, "only called for masks that come with weights"
        weight = np.where(keep, weight.astype(np.float32), 0)
        if not np.isfinite(weight).all():
            raise UserError(
                f"{name}: expected finite weights where selector.weights is true, got "
                f"{weight[~np.isfinite(weight)][0]}; take another pruned model, or --selector.weights false for its "
                "masks alone"
            )
        digest.update(name.encode() + weight.tobytes())
    return digest.hexdigest()


def _check_names(source: MaskSource, shapes: Mapping[str, tuple[int, int]]) -> None:
    present, wanted = set(source.names()), set(shapes)
    report = []
    if missing := wanted - present:
        report.append(f"no mask for {plural(len(missing), 'pruned layer')} ({some(missing)}); it holds {some(present)}")
    if (unexpected := present - wanted) and not source.from_zeros:
        report.append(
            f"masks for {plural(len(unexpected), 'layer')} beside those that are pruned ({some(unexpected)}): "
            "prune more, or take the masks out of the file"
        )
    if report:
        raise UserError(f"{_called(source)} does not fit the layers to prune: {'; '.join(report)}")


def _check_mask(keep: np.ndarray, name: str, pattern: Pattern, source: MaskSource, weights: TensorSource) -> None:
    with naming(name):
        violation, inverse_fits = pattern.violation(keep, source.from_zeros), not pattern.violation(~keep)
    if violation and inverse_fits and not source.from_zeros:
        raise UserError(
            f"{name}: the mask looks flipped, its inverse fits the pattern ({violation}): "
            f"write {_called(source)} again with 1 where a weight is kept"
        )
    if violation:
        raise UserError(f"{name}: {violation} in {_called(source)}; give other masks, or choose their pattern")
    if inverse_fits and not source.from_zeros:
        size = np.abs(weights.read(name).astype(np.float32))
        # BLAS products: several times as fast as numpy's means over a mask, and exact enough for this comparison.
        kept, dropped = (np.vdot(size, chosen.astype(np.float32)) / chosen.sum() for chosen in (keep, ~keep))
        if kept < _FLIPPED * dropped:
            raise UserError(
                f"{name}: the mask looks flipped: keeps the smaller weights (mean magnitude {kept:.3g}, "
                f"pruned {dropped:.3g}); write {_called(source)} again with 1 where one is kept"
            )


def _called(source: MaskSource) -> str:
    return f"{source.origin} ({source.how})"
