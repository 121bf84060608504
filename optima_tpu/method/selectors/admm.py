"""ADMM: mask and weights together, by operator splitting.

After ALPS (Meng et al., 2024, algorithm 1) and Boza (2024).
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.method.linalg.features import rough_matmul
from optima_tpu.method.linalg.inverses import inverse
from optima_tpu.method.linalg.scaling import ridged, unit_diagonal
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned, pull_of
from optima_tpu.method.selectors.base import Selector
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.loops import usual_turns


class ADMMStage(NamedTuple):
    """The levels that share an inverse.

    Attributes:
      penalties: ``rho`` of each level.
      sigma: the ridge of the inverse, the middle of the first and the last ``damping + rho``.
    """

    penalties: tuple[float, ...]
    sigma: float


@dataclasses.dataclass(frozen=True)
class ADMM(Selector):
    """Minimises a layer's error over mask and weights at once, iteratively.

    Every iteration revises the mask. In variables that give the Hessian a unit diagonal (``v_j sqrt(H_jj)``), with ``A`` the
    scaled Hessian, all rows minimise

        1/2 v A v' - v g' + damping/2 |v - w|^2  +  [z obeys the pattern]      subject to   v = z

    by three steps, with a dual ``y`` and a penalty ``rho``, from ``z = w`` and ``y = 0``, so that the first mask is Wanda's
    where the target is the layer's own output:

        v = (g + damping w + rho z - y) (A + (damping + rho) I)^-1
        z = v + y / rho  where that is largest in its comparison group, 0 elsewhere
        y = y + rho (v - z)

    Neighbouring levels may share an inverse, at ``sigma`` in the middle of their ``damping + rho``. The first step is then one
    step of Richardson's iteration from the last ``v``, with this inverse as its preconditioner:

        v = (g + damping w + rho z - y + (sigma - damping - rho) v_last) (A + sigma I)^-1

    It costs one product too, comes nearer to the exact ``v`` for such a ``sigma``, and has the same fixed points.

    A small ``rho`` lets the mask move far, a large one makes it settle: ``rho`` rises from ``rho_first`` to ``rho_last`` in
    ``levels`` equal ratios. For uncorrelated inputs, a mask stops changing once every kept ``|w_j|`` is at least ``(1 + damping)
    / rho`` times every pruned one. At ``rho = 1`` this is about the best mask. At a larger ``rho`` worse masks stop changing too,
    and at a much smaller one no mask stops. All matrices that read one input share the inverses. Every iteration costs one
    product for all rows of the matrix.

    ``problem.pull`` defines the target. The returned weights are ``z`` after the last iteration. If the mask has stopped
    changing, they are near the damped optimum for this mask. ``CG`` continues from them and certifies the remaining gap.

    Dead inputs (``scaling.live_features``) score 0: they are pruned first, and those that stay keep their weights. Of equal
    scores the lower index is pruned first. But a weight that was just pruned scores differently from an equal weight that was
    kept, so the iteration, not the index, decides between equal weights.

    Only the rounding of products depends on the mesh. If rounding decides between two scores, the iterations spread the
    difference over the whole comparison group. With the group "row" it stays in one row, which then has another mask that is
    equally good.

    It differs from the published code (mazumder-lab/ALPS ``alps.py``) in these points; ``configs/alps.yaml`` has the published
    settings as far as they can be stated here:

    - The penalty follows a fixed plan. The published code adapts it to how much of the mask changed, for up to 300 iterations.
      With the fixed plan no row waits for another, and no eigendecomposition is needed.
    - Damping is a share of each input's own energy; in the published code, of the mean energy. Both pull toward the dense
      weights.
    - It starts from ``z = w``, the published code from the pruned ``w``. It returns the mask of ``z``, the published code the
      mask of ``v``.
    - It does not end with conjugate gradients. To compare with ALPS in full, take ``CG`` as the solver.
    - Unstructured masks may also be chosen row by row; the published code compares over the layer.

    Attributes:
      damping: ridge that pulls a row toward its *dense* weights, as a share of the Hessian's diagonal.
      rho_first: the first penalty, as a share of the Hessian's diagonal. A smaller one finds better masks if inputs are strongly
        correlated, but needs more levels.
      rho_last: the last penalty. Below 1 the mask may keep changing until the end.
      levels: number of penalties from the first to the last.
      iterations: number of iterations at each penalty.
      inverses: number of inverses. The last level has its own, and the others share the rest equally. With null every level has
        its own. Sharing suits a large damping, beside which the penalties differ little.
    """

    group: ClassVar[Literal["row", "layer"]] = "layer"
    hessians: ClassVar[int] = 5

    damping: Annotated[float, Bound(0)] = 0.01
    rho_first: Annotated[float, Bound(above=0)] = 0.03
    rho_last: Annotated[float, Bound(above=0)] = 1.0
    levels: Annotated[int, Bound(1)] = 12
    iterations: Annotated[int, Bound(1)] = 3
    inverses: Annotated[int | None, Bound(1)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho_first > self.rho_last:
            raise UserError(f"expected selector.rho_first of at most rho_last, {self.rho_last}, got {self.rho_first}")
        if self.inverses is not None and self.inverses > self.levels:
            raise UserError(f"expected selector.inverses of at most the number of levels, {self.levels}, got {self.inverses}")

    def stages(self) -> "tuple[ADMMStage, ...]":
        """All levels in order, grouped by the inverse that they share."""
        penalties, count = np.geomspace(self.rho_first, self.rho_last, self.levels), self.inverses or self.levels
        parts = [penalties] if count == 1 else [*np.array_split(penalties[:-1], count - 1), penalties[-1:]]
        return tuple(ADMMStage(tuple(part.tolist()), self.damping + float(part[0] + part[-1]) / 2) for part in parts)

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        return self.choose((problem,), (pattern,))[0]

    def choose(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> tuple[Pruned, ...]:
        matrix, scale, live = unit_diagonal(problems[0].hessian)
        matrices = [_Matrix.of(problem, pattern, scale, live) for problem, pattern in zip(problems, patterns)]
        stages = self.stages()
        penalties = jnp.asarray([rho for stage in stages for rho in stage.penalties], jnp.float32)
        ends = np.cumsum([0, *(len(stage.penalties) * self.iterations for stage in stages)])

        def through(states: tuple[_State, ...], stage: tuple[Array, Array, Array]) -> tuple[tuple[_State, ...], None]:
            sigma, first, last = stage
            solve = inverse(ridged(matrix, sigma), self.damping + self.rho_first)

            def iteration(index: int | Array, states: tuple[_State, ...]) -> tuple[_State, ...]:
                rho = penalties[index // self.iterations]
                return tuple(
                    each.iterated(state, rho, sigma - self.damping - rho, solve) for each, state in zip(matrices, states)
                )

            with usual_turns(self.levels * self.iterations / len(stages)):
                return jax.lax.fori_loop(first, last, iteration, states), None

        plan = (np.asarray([stage.sigma for stage in stages], np.float32), ends[:-1], ends[1:])
        states, _ = jax.lax.scan(through, tuple(each.start() for each in matrices), jax.tree.map(jnp.asarray, plan))
        return tuple(
            Pruned(jnp.where(state.keep, problem.weight + state.move / scale, 0.0), state.keep)
            for problem, state in zip(problems, states)
        )


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """One matrix in the scaled variables.

    Its states are differences from the dense weights, so that rounding moves no weight.
    """

    weight: Array  # [d_out, d_in]
    pull: Array  # [d_out, d_in]
    pattern: Pattern

    @classmethod
    def of(cls, problem: LayerProblem, pattern: Pattern, scale: Array, live: Array) -> "_Matrix":
        weight = jnp.where(live, problem.weight * scale, 0.0)
        return cls(weight, jnp.where(live, pull_of(problem) / scale, 0.0), pattern)

    def start(self) -> "_State":
        zero = jnp.zeros_like(self.weight)
        return _State(zero, zero, zero, jnp.ones(zero.shape, bool))

    def iterated(self, state: "_State", rho: Array, slack: Array, solve: Array) -> "_State":
        """One iteration; ``solve`` has the ridge ``damping + rho + slack``."""
        solved = rough_matmul(self.pull + rho * state.move - state.dual + slack * state.solved, solve)
        move = solved + state.dual / rho
        # Squares: where rows lose the same inputs, the nearest z keeps the largest sums of squares.
        keep = self.pattern.keep_mask(jnp.square(self.weight + move))
        return _State(solved, jnp.where(keep, move, -self.weight), jnp.where(keep, 0.0, rho * (self.weight + move)), keep)


class _State(NamedTuple):
    """The state between two iterations; every array is [d_out, d_in]."""

    solved: Array  # v - w
    move: Array  # z - w
    dual: Array  # y
    keep: Array  # bool, where z may differ from 0
