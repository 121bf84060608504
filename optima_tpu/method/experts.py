"""Scores of the experts of a mixture, and the choice of those that stay."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from optima_tpu.method.choice import Method


class ExpertStatistics(NamedTuple):
    """Sums over the tokens that the router sends to each expert of a block.

    The output ``f_e(t) = W_d h`` of expert e for token t counts without the share ``g_e(t)`` of the router.

    Attributes:
      tokens: number of these tokens.
      norms: ``sum_t |f_e(t)|``.
      squares: ``sum_t |f_e(t)|^2``; equals ``tr(W_d A_e W_d')`` with ``A_e = sum_t h h'`` if down has no bias.
      shared_norms: ``sum_t g_e(t) |f_e(t)|``.
      prices: see :class:`ExpertPrice`; None where the score does not read them.
    """

    tokens: Int32[Array, " experts"]
    norms: Float32[Array, " experts"]
    squares: Float32[Array, " experts"]
    shared_norms: Float32[Array, " experts"]
    prices: Float32[Array, " experts"] | None = None

    def mean(self, sums: Float32[Array, " experts"]) -> Float32[Array, " experts"]:
        """Mean over each expert's tokens; 0 for an expert without tokens."""
        return sums / jnp.maximum(self.tokens.astype(sums.dtype), 1)


class ExpertScore(Method, abc.ABC):
    """Scores the experts of a block. The experts with the highest scores stay.

    A score is a frozen dataclass.
    """

    setting: ClassVar[str] = "cut.score"
    priced: ClassVar[bool] = False
    """Whether it reads ``prices``."""

    @abc.abstractmethod
    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        """The score of each expert."""


@dataclasses.dataclass(frozen=True)
class Frequency(ExpertScore):
    """The number of tokens that the router sends to the expert."""

    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        return statistics.tokens.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class REAP(ExpertScore):
    """The mean of ``g_e(t) |f_e(t)|`` over the expert's tokens.

    Source: arXiv:2510.13999, equation 9.
    """

    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        return statistics.mean(statistics.shared_norms)


@dataclasses.dataclass(frozen=True)
class MAN(ExpertScore):
    """Mean activation norm: the mean of ``|f_e(t)|`` over the expert's tokens.

    Source: arXiv:2606.15716.
    """

    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        return statistics.mean(statistics.norms)


@dataclasses.dataclass(frozen=True)
class MSAN(ExpertScore):
    """The mean of ``|f_e(t)|^2`` over the expert's tokens.

    Equals ``tr(W_d A_e W_d') / N_e`` for ``N_e`` tokens. Source: arXiv:2606.15716.
    """

    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        return statistics.mean(statistics.squares)


@dataclasses.dataclass(frozen=True)
class ExpertPrice(ExpertScore):
    """The mixture's output error without this expert, the others refitted.

    The weights of the other experts move, and no other expert takes the tokens:

        min_V 1/n sum_t |g_e(t) W_e h_e(t) - sum_{f != e} g_f(t) (V_f - W_f) h_f(t)|^2

    with the damping of :class:`Refit`. The prices of all experts are one system of conjugate gradients, which stops after
    ``PRICE_STEPS`` steps. Its rows are ``PRICE_ROWS`` random sums of the outputs of each expert.
    """

    priced = True

    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        assert statistics.prices is not None, "a score that is priced gets prices"
        return statistics.prices


class Passes(NamedTuple):
    """Passes over the text, with the mixture's weights ``down`` replaced by D.

    The mixture's output for token t is then ``o_t = sum_e g_e(t) D_e h_e(t)``.

    Attributes:
      image: ``D -> 1/n sum_t g_e(t) o_t h_e(t)'``, [experts, d_out, d_in] float32.
      squares: ``D -> 1/n sum_t o_t^2``, [d_out] float32; half of the products of ``image``.
      dtype: the dtype of h, in which both multiply D.
    """

    image: Callable[[Array], Array]
    squares: Callable[[Array], Array]
    dtype: DTypeLike


PRICE_STEPS = 2
"""The steps of conjugate gradients in :func:`prices`."""
PRICE_ROWS = 8
"""The sums of outputs of each expert in :func:`prices`."""


def prices(
    down: Float[Array, "experts d_out d_in"],
    gram: Float32[Array, "experts d_in d_in"],
    passes: Passes,
    rows: int = PRICE_ROWS,
    steps: int = PRICE_STEPS,
) -> Float32[Array, " experts"]:
    """The prices of all experts, see :class:`ExpertPrice`.

    The prices are exact if ``rows`` is d_out and the steps are enough.

    Args:
      gram, passes, steps: as for :func:`refit`.
      rows: how many sums of each expert's outputs, at most d_out.
    """
    rows = min(rows, down.shape[1])
    own, others = _targets(down.astype(jnp.float32), rows)
    own = own.astype(passes.dtype)
    image = passes.image(own)
    moving = passes._replace(image=lambda change: others * passes.image(change))
    refitted = refit(others * image, gram, jnp.sum(own.astype(jnp.float32) * image, axis=(0, 2)), moving, steps)
    return jnp.sum(refitted.after.reshape(len(down), rows), axis=1)


@functools.partial(jax.jit, static_argnums=1)
def _targets(down: Array, rows: int) -> tuple[Array, Array]:
    """The summed outputs of each expert, and a mask of other experts' rows.

    The sums are weights [experts, experts * rows, d_in]. The second array [experts, experts * rows, 1] is 1 where a row belongs
    to another expert, else 0.
    """
    experts, width, _ = down.shape
    signs = jax.random.rademacher(jax.random.key(0), (rows, width), jnp.float32) / rows**0.5
    sums = jnp.einsum("ro,eoi->eri", jnp.eye(width) if rows == width else signs, down, precision="highest")
    same = jnp.repeat(jnp.eye(experts), rows, axis=1)[:, :, None]
    return same * jnp.tile(sums, (1, experts, 1)), 1 - same


SCORES: Mapping[str, type[ExpertScore]] = MappingProxyType(
    {"price": ExpertPrice, "reap": REAP, "frequency": Frequency, "man": MAN, "msan": MSAN}
)
"""The scores by their names in YAML files and on the command line."""


def kept_experts(scores: np.ndarray, kept: int, groups: int = 1) -> np.ndarray:
    """Indices of the experts with the highest scores, ascending, [kept] int.

    Of equal scores, the expert with the lower index stays.

    Args:
      scores: [experts].
      kept: their number, the same from each group.
      groups: number of equal groups of neighbouring experts.
    """
    inside = np.argsort(-scores.reshape(groups, -1), axis=1, kind="stable")[:, : kept // groups]
    return np.sort(inside + np.arange(groups)[:, None] * (len(scores) // groups), axis=None)


class Refit(NamedTuple):
    """The kept experts' ``down``, solved toward the whole mixture's output.

    With the shares ``g_e(t)`` of the new routing and the inputs ``h_e(t)`` of down, the weights V minimise

        1/n sum_t |y_t - sum_e g_e(t) V_e h_e(t)|^2 + d sum_e sum_j A_e,jj |v_e,j - w_e,j|^2,    A_e = 1/n sum_t g_e(t)^2 h h'

    over all experts jointly, where ``y`` is the output of the whole mixture for the same input and W are the dense weights. The
    rows are independent problems.

    Attributes:
      change: ``V - W``, [experts, d_out, d_in] float32.
      before: ``1/n sum_t (y_t - yhat_t)^2`` with the dense weights.
      after: the same with the new weights.
    """

    change: Float32[Array, "experts d_out d_in"]
    before: Float32[Array, " d_out"]
    after: Float32[Array, " d_out"]


DAMPING = 0.1
"""``d`` of :class:`Refit`."""


def refit(
    pull: Float32[Array, "experts d_out d_in"],
    gram: Float32[Array, "experts d_in d_in"],
    before: Float32[Array, " d_out"],
    passes: Passes,
    steps: int,
) -> Refit:
    """Solves for all experts jointly by preconditioned conjugate gradients.

    The preconditioner is the exact solution of each expert alone. Each step lowers the objective of each row: no row ends above
    its dense weights. The last step needs no new residual, so it takes ``passes.squares`` alone.

    Args:
      pull: ``1/n sum_t g_e(t) (y_t - yhat_t) h_e(t)'``.
      gram: ``A``.
      before: as in :class:`Refit`.
      passes: over the text, with the experts that move.
      steps: at least 1.
    """
    factor = _factor(gram)
    state = _start(factor, pull, passes.dtype)
    for _ in range(steps - 1):
        state = _turned(factor, gram, state, passes.image(state.direction))
    return _last(gram, before, state, passes.squares(state.direction))


class _Gradients(NamedTuple):
    """The state of conjugate gradients.

    Attributes:
      change: the solution so far, float32.
      residual: minus half of the objective's gradient.
      direction: of the next step, in the dtype of the passes: a step is as long as is best for the rounded direction.
      slope: the product r'z of each row, [1, d_out, 1].
      gain: how far each row's objective has fallen, [1, d_out, 1].
    """

    change: Array
    residual: Array
    direction: Array
    slope: Array
    gain: Array


def _diagonal(gram: Array) -> Array:
    """The diagonals [experts, 1, d_in] of the Gram matrices."""
    return jnp.diagonal(gram, axis1=1, axis2=2)[:, None]


@jax.jit
def _factor(gram: Array) -> Array:
    """Cholesky factors of ``A_e + d diag A_e``, with 1 for dead inputs."""
    diagonal = _diagonal(gram)
    return jnp.linalg.cholesky(gram + jnp.eye(gram.shape[1]) * jnp.where(diagonal > 0, DAMPING * diagonal, 1))


def _solved(factor: Array, residual: Array) -> Array:
    half = jax.scipy.linalg.solve_triangular(factor, jnp.swapaxes(residual, 1, 2), lower=True)
    return jnp.swapaxes(jax.scipy.linalg.solve_triangular(factor, half, lower=True, trans=1), 1, 2)


def _dot(left: Array, right: Array) -> Array:
    return jnp.sum(left * right, axis=(0, 2))[None, :, None]


def _ratio(above: Array, below: Array) -> Array:
    """0 where a row is solved: its residual is 0."""
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)


@functools.partial(jax.jit, static_argnums=2)
def _start(factor: Array, pull: Array, dtype: DTypeLike) -> _Gradients:
    direction = _solved(factor, pull)
    slope = _dot(pull, direction)
    return _Gradients(jnp.zeros_like(pull), pull, direction.astype(dtype), slope, jnp.zeros_like(slope))


def _moved(state: _Gradients, size: Array) -> _Gradients:
    direction = state.direction.astype(jnp.float32)
    return state._replace(change=state.change + size * direction, gain=state.gain + size * _dot(state.residual, direction))


@jax.jit
def _turned(factor: Array, gram: Array, state: _Gradients, image: Array) -> _Gradients:
    """The state after a step along its direction, whose image is given."""
    before = state.direction.astype(jnp.float32)
    image += DAMPING * _diagonal(gram) * before
    size = _ratio(_dot(state.residual, before), _dot(before, image))
    residual = state.residual - size * image
    solved = _solved(factor, residual)
    slope = _dot(residual, solved)
    direction = (solved + _ratio(slope, state.slope) * before).astype(state.direction.dtype)
    return _moved(state, size)._replace(residual=residual, direction=direction, slope=slope)


@jax.jit
def _last(gram: Array, before: Array, state: _Gradients, squares: Array) -> Refit:
    ridge, direction = DAMPING * _diagonal(gram), state.direction.astype(jnp.float32)
    curvature = squares[None, :, None] + _dot(ridge * direction, direction)
    final = _moved(state, _ratio(_dot(state.residual, direction), curvature))
    return Refit(final.change, before, before - (final.gain + _dot(ridge * final.change, final.change))[0, :, 0])
