"""What a pruned layer is to reproduce.

Beside the stream of hidden states that went through the pruned blocks there may be a second one, of the same tokens, that went
through the dense blocks. With ``X`` and ``X_d`` the inputs of a layer in both, ``D = X_d - X`` and ``B = D'X / n_tokens``, the
mean squared distance of a row's outputs from a share ``alpha`` of the way to the dense model's is

    mean (X v - X w - alpha D w)^2  =  (v - w) H (v - w)' - 2 alpha (w B) (v - w)'  +  alpha^2 mean (D w)^2

which is ``problem.objective`` with ``g = w H + alpha w B``. Only the small matrix ``B`` is accumulated, not ``X_d'X``: the drift
would be a difference of large numbers.

A layer whose output is added to the residual stream can make up for the drift of that stream too. With ``s = R_d - R`` the drift
of the one feature that a row adds to, and ``q`` the row of ``Q = (R_d - R)'X / n_tokens`` that belongs to it,

    mean (X v - X w - alpha D w - gamma s)^2  =  (v - w) H (v - w)' - 2 (alpha w B + gamma q) (v - w)'  +  what v does not change

Behind such a layer comes a norm, which divides every token by its own size, so an error is worth what it is in relation to that.
A few tokens with massive activations are hundreds of times as large as the others and rule all the means above. With the tokens
weighed by ``1 / mean(R_d^2)``, of the stream behind the layer, the means are those of relative errors.
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from optima_tpu.errors import UserError


class Target(abc.ABC):
    """What the outputs of a layer are to come close to. A target is a frozen dataclass.

    Attributes:
      dense_stream: whether the tokens also run through the dense blocks: ``alpha``, ``gamma`` and ``weigh_tokens`` are those of
        :class:`DenseTarget`, and 0, 0 and False without it.
    """

    dense_stream: ClassVar[bool]
    alpha: float = 0.0
    gamma: float = 0.0
    weigh_tokens: bool = False

    @property
    def streams(self) -> int:
        """How many streams of hidden states there are, and matrices [d_in, d_in] of every set of tokens."""
        return 1 + self.dense_stream

    def pull(self, term: "LinearTerm", alpha: Float[Array, ""] | float) -> Float32[Array, "rows d_in"]:
        """``e``, [rows, d_in] float32: what the target asks for beyond the layer's own outputs.

        Args:
          term: of the rows.
          alpha: the target's own, or another one where that is tuned.
        """
        return alpha * term.outputs if term.stream is None else alpha * term.outputs + term.stream


@dataclasses.dataclass(frozen=True)
class SelfTarget(Target):
    """The layer's own outputs on the inputs that it sees behind the pruned blocks, as in the paper."""

    dense_stream: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class DenseTarget(Target):
    """A share of the way from the layer's own outputs to those of the dense model.

    It makes up for what the layers before have lost; the whole way, or without damping, fits small calibration sets too well.
    Belongs with ``recapture``: without it every layer of a block makes up for the same loss again (configs/tables/levers.md). All
    tokens run through the dense blocks too, and the report has every layer's error against the dense model on the held-out ones.
    Tokens that only one of both models sends to an expert have no part in its drift.

    Attributes:
      alpha: the share: 0 aims at the layer's own outputs and only measures, 1 aims at the dense model's.
      gamma: layers that add to the residual stream also make up for this share of the stream's own drift. Families that have a
        norm behind these layers (Gemma, OLMo 2) and routed experts have no such layers.
      weigh_tokens: of these layers, weigh a token's error by one over the mean square of the dense model's stream behind them,
        as the next norm does. Their reported errors are weighed too.
    """

    dense_stream: ClassVar[bool] = True

    alpha: float = 0.25
    gamma: float = 0.0
    weigh_tokens: bool = False

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("gamma", self.gamma)):
            if not 0 <= value <= 1:
                raise UserError(f"expected the target's {name} in [0, 1], got {value}")


class LinearTerm(NamedTuple):
    """What a dense target adds to the linear term ``g`` of some rows.

    Attributes:
      outputs: [rows, d_in] float32, ``W B``: all of the way to the dense model's outputs.
      stream: [rows, d_in] float32, ``gamma Q``: the share of the residual stream's drift, 0 for rows that add to none; None where
        no row does, or it is not aimed at.
    """

    outputs: Float32[Array, "rows d_in"]
    stream: Float32[Array, "rows d_in"] | None

    def of(self, rows: slice) -> "LinearTerm":
        """The term of some of the rows."""
        return LinearTerm(self.outputs[rows], None if self.stream is None else self.stream[rows])


def pulled(
    pull: Float32[Array, "rows d_in"], dense: Float32[Array, "rows d_in"], weight: Float32[Array, "rows d_in"]
) -> Float32[Array, " rows"]:
    """Each row's ``2 e (v - w)'``, [d_out]: what an objective loses by moving towards a target with drift ``e``.

    Args:
      pull: [d_out, d_in], ``e``.
      dense: [d_out, d_in], ``w``.
      weight: [d_out, d_in], ``v``.
    """
    return 2 * jnp.sum(pull * (weight - dense), axis=1)
