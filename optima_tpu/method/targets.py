"""Targets: what a pruned layer must reproduce.

One stream of hidden states runs through the pruned blocks. A second stream of the same tokens may run through the dense blocks.
Let ``X`` and ``X_d`` be the inputs of a layer in the two streams, ``D = X_d - X`` and ``B = D'X / n_tokens``. The target of a row
lies a share ``alpha`` of the way from its own outputs to the dense model's. The mean squared distance from this target is

    mean (X v - X w - alpha D w)^2  =  (v - w) H (v - w)' - 2 alpha (w B) (v - w)'  +  alpha^2 mean (D w)^2

This is the objective of ``problem.LayerProblem`` with ``g = w H + alpha w B``, up to a constant. ``B`` is accumulated directly
and not computed from ``X_d'X``, because it would be a small difference of large numbers. For layers with few outputs
``W B = (D W')'X`` takes fewer operations.

A layer whose output is added to the residual stream can also correct the drift of that stream. With ``s = R_d - R`` the drift of
the one feature that a row adds to, and ``q`` the row of ``Q = (R_d - R)'X / n_tokens`` that belongs to it,

    mean (X v - X w - alpha D w - gamma s)^2  =  (v - w) H (v - w)' - 2 (alpha w B + gamma q) (v - w)'  +  terms without v

A norm follows such a layer and divides every token by the token's size, so the relative error of a token matters. A few tokens
with massive activations are hundreds of times as large as the others and dominate all the means above. If each token is weighed
by ``1 / mean(R_d^2)``, with ``R_d`` the stream after the layer, the means are means of relative errors.
"""

import abc
import dataclasses
from typing import Annotated, ClassVar, NamedTuple

from jax import Array
from jaxtyping import Float32

from optima_tpu.method.choice import Method
from optima_tpu.runtime.bounds import Bound


class Target(Method, abc.ABC):
    """What a layer's outputs should match. A target is a frozen dataclass.

    Attributes:
      dense_stream: whether the tokens also run through the dense blocks. If False, ``alpha``, ``gamma`` and ``weigh_tokens`` are
        0, 0 and False; see :class:`DenseTarget` for their meaning.
    """

    setting: ClassVar[str] = "target"
    dense_stream: ClassVar[bool]
    alpha: float = 0.0
    gamma: float = 0.0
    weigh_tokens: bool = False

    @property
    def streams(self) -> int:
        """The number of streams, and of [d_in, d_in] matrices a token set."""
        return 1 + self.dense_stream

    def pull(self, term: "LinearTerm", alpha: float) -> Float32[Array, "rows d_in"]:
        """``e`` [rows, d_in]: what the target adds to the layer's own outputs.

        Args:
          term: the linear term of the rows.
          alpha: the target's own.
        """
        return alpha * term.outputs if term.stream is None else alpha * term.outputs + term.stream


@dataclasses.dataclass(frozen=True)
class SelfTarget(Target):
    """The layer's own outputs on inputs from pruned blocks, as in OPTIMA."""

    dense_stream: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class DenseTarget(Target):
    """A share of the way from the layer's own outputs to the dense model's.

    It corrects the errors of earlier layers. With alpha 1, or without damping, it overfits small calibration sets. Use it with
    ``recapture``: otherwise every layer of a block corrects the same error again (configs/tables/levers.md). All tokens also run
    through the dense blocks, and the report has every layer's error against the dense model on the held-out tokens. A token that
    only one of the two models routes to an expert does not count in the drift of that expert.

    Attributes:
      alpha: the share: 0 aims at the layer's own outputs and only measures, 1 aims at the dense model's.
      gamma: layers that add to the residual stream also correct this share of the stream's drift. It has no effect in families
        with a norm after these layers (Gemma 2 to 4, OLMo 2 and 3, GLM-4-0414, EXAONE 4), and none on routed experts.
      weigh_tokens: for these layers, divide a token's squared error by the mean square of the dense model's stream after them, as
        the next norm does. Their reported errors are weighed too.
    """

    dense_stream: ClassVar[bool] = True

    alpha: Annotated[float, Bound(0, 1)] = 0.25
    gamma: Annotated[float, Bound(0, 1)] = 0.0
    weigh_tokens: bool = False


class LinearTerm(NamedTuple):
    """What a dense target adds to the linear term ``g`` of some rows.

    Attributes:
      outputs: [rows, d_in] float32, ``W B``: all of the way to the dense model's outputs.
      stream: [rows, d_in] float32, ``gamma Q``: the residual-drift correction, 0 for rows that do not add to the stream. None if
        no row does, or if the target has no such correction.
    """

    outputs: Float32[Array, "rows d_in"]
    stream: Float32[Array, "rows d_in"] | None
