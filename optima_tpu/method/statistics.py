"""What is known of the inputs of layers, from the tokens that ran through a block."""

from collections.abc import Sequence
from typing import NamedTuple

from jax import Array

Groups = tuple[tuple[str, ...], ...]
"""The linear layers of a block, those that read the same input together: (("self_attn.q_proj", ...), ...)."""


class Statistics(NamedTuple):
    """What is known of the inputs of a group of layers.

    Attributes:
      hessian: ``H = X'X / n_tokens`` [d_in, d_in] float32, columns over the model axis; the mean over tokens is a weighted one
        where they are weighed.
      tokens: how many inputs were not zero, int32: all tokens, or those that were routed to an expert.
    """

    hessian: Array
    tokens: Array


class Drift(NamedTuple):
    """How far the inputs ``X`` of a group of layers are from those in the dense model: ``D = X_d - X``.

    Attributes:
      cross: ``B = D'X / n_tokens`` [d_in, d_in] float32, columns over the model axis.
      energy: of each layer of the group, each row's mean of ``(D w')^2`` with its dense weights ``w``, [d_out] float32; empty
        where it was not asked for.
      residual: of each layer of the group ``Q = (R_d - R)'X / n_tokens`` [d_out, d_in] float32, columns over the model axis, with
        ``R`` the residual stream that the layer's output is added to; None for a layer that adds to none, empty where it was not
        asked for.
    """

    cross: Array
    energy: tuple[Array, ...] = ()
    residual: tuple[Array | None, ...] = ()

    def of(self, places: Sequence[int]) -> "Drift":
        """That of some layers of the group, by their places in it."""
        energy, residual = (tuple(values[place] for place in places) if values else () for values in self[1:])
        return Drift(self.cross, energy, residual)
