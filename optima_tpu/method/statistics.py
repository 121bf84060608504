"""Statistics of layers' inputs, from tokens that ran through a block."""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jax import Array
from jaxtyping import Float32, Int32

Groups = tuple[tuple[str, ...], ...]
"""The linear layers of a block, grouped by the input that they read: (("self_attn.q_proj", ...), ...)."""


class Drift(NamedTuple):
    """The drift ``D = X_d - X`` of a group's inputs from the dense model's.

    ``X`` are the inputs of a group of layers, ``X_d`` the same layers' inputs in the dense model.

    Attributes:
      cross: ``B = D'X / n_tokens`` [d_in, d_in] float32, columns over the model axis; None if ``outputs`` replaces it.
      energy: for each layer of the group, each row's mean of ``(D w')^2`` with its dense weights ``w``, [d_out] float32; empty if
        it was not requested.
      residual: for each layer of the group ``Q = (R_d - R)'X / n_tokens`` [d_out, d_in] float32, columns over the model axis,
        with ``R`` the residual stream that the layer's output is added to. None for a layer that does not add to the stream,
        empty if it was not requested.
      outputs: for each layer of the group ``W B = (D W')'X / n_tokens`` [d_out, d_in] float32 with its dense weights ``W``,
        columns over the model axis; empty if ``cross`` is held.
    """

    cross: Float32[Array, "d_in d_in"] | None
    energy: tuple[Float32[Array, " d_out"], ...] = ()
    residual: tuple[Float32[Array, "d_out d_in"] | None, ...] = ()
    outputs: tuple[Float32[Array, "d_out d_in"], ...] = ()

    def of(self, layers: Sequence[int]) -> "Drift":
        """The drift of some layers of the group, by their indices in it."""

        def some(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(arrays[index] for index in layers) if arrays else ()

        return Drift(self.cross, some(self.energy), some(self.residual), some(self.outputs))


class TokenStatistics(NamedTuple):
    """Statistics of one set of tokens, for the inputs of a group of layers.

    Attributes:
      hessian: ``H = X'X / n_tokens`` [d_in, d_in] float32, columns over the model axis; a weighted mean over tokens if tokens are
        weighed.
      tokens: number of inputs that were not zero, int32: all tokens, or the tokens that were routed to an expert.
      drift: the drift from the inputs in the dense model; None if the target does not need it.
    """

    hessian: Float32[Array, "d_in d_in"]
    tokens: Int32[Array, ""]
    drift: Drift | None = None

    def of(self, layers: Sequence[int]) -> "TokenStatistics":
        """The statistics of some layers of the group, by their indices."""
        return self._replace(drift=None if self.drift is None else self.drift.of(layers))


S = TypeVar("S")


class TokenSets(NamedTuple, Generic[S]):
    """One value for each of the two sets of tokens.

    Attributes:
      calibration: the tokens that weights are fitted to.
      held_out: tokens that no weight is fitted to; None if there are none.
    """

    calibration: S
    held_out: S | None = None
