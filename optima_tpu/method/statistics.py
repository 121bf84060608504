"""What is known of the inputs of layers, from the tokens that ran through a block."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from jax import Array
from jaxtyping import Float32, Int32

Groups = tuple[tuple[str, ...], ...]
"""The linear layers of a block, those that read the same input together: (("self_attn.q_proj", ...), ...)."""


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

    cross: Float32[Array, "d_in d_in"]
    energy: tuple[Float32[Array, " d_out"], ...] = ()
    residual: tuple[Float32[Array, "d_out d_in"] | None, ...] = ()

    def of(self, layers: Sequence[int]) -> "Drift":
        """The drift of some layers of the group, by their indices in it."""
        energy = tuple(self.energy[index] for index in layers) if self.energy else ()
        residual = tuple(self.residual[index] for index in layers) if self.residual else ()
        return Drift(self.cross, energy, residual)


class TokenStatistics(NamedTuple):
    """What one set of tokens says of the inputs of a group of layers.

    Attributes:
      hessian: ``H = X'X / n_tokens`` [d_in, d_in] float32, columns over the model axis; the mean over tokens is a weighted one
        where they are weighed.
      tokens: how many inputs were not zero, int32: all tokens, or those that were routed to an expert.
      drift: from the inputs in the dense model; None where the target does not need it.
    """

    hessian: Float32[Array, "d_in d_in"]
    tokens: Int32[Array, ""]
    drift: Drift | None = None

    def of(self, layers: Sequence[int]) -> "TokenStatistics":
        """The statistics of some layers of the group, by their indices in it."""
        return self._replace(drift=None if self.drift is None else self.drift.of(layers))


S = TypeVar("S")


class TokenSets(NamedTuple, Generic[S]):
    """The same of both sets of tokens.

    Attributes:
      calibration: the tokens that weights are fitted to.
      held_out: tokens that no weight is fitted to; None where there are none.
    """

    calibration: S
    held_out: S | None = None
