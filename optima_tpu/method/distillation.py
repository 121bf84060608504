"""Distillation: training of the pruned model with its masks held."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32

from optima_tpu.errors import UserError
from optima_tpu.method.choice import Method
from optima_tpu.runtime.bounds import Bound

if TYPE_CHECKING:
    import optax

    from optima_tpu.method.recipe import Recipe

BETAS = 0.9, 0.95
"""The decay rates of Adam's moments."""
Kind = Literal["weights", "norms", "routers"]
"""A kind of parameters that a training moves."""
_LEAST = 0.1
"""The learning rate at the end, as a share of the peak."""
_FEWEST_CHECKS, _MOST_CHECKS = 4, 1000
"""Of a training that does not say how many."""
TRIALS = 4
"""How many rates :func:`rate_of_descent` usually tries."""
_FIRST, _APART, _LOWEST, _HIGHEST = 1e-4, 3.0, -9, 8
"""The rate that is tried first, the ratio of one to the next, and how many of them it goes down and up: from 5e-9 to 0.7."""


def divergence(dense: Float32[Array, "*tokens vocab"], pruned: Float32[Array, "*tokens vocab"]) -> Float32[Array, "*tokens"]:
    """``KL(p || q)`` of each token in nats, from logits of ``p`` and ``q``."""
    return log_divergence(jax.nn.log_softmax(dense, axis=-1), jax.nn.log_softmax(pruned, axis=-1))


def log_divergence(p: Float32[Array, "*tokens vocab"], q: Float32[Array, "*tokens vocab"]) -> Float32[Array, "*tokens"]:
    """``KL(p || q) = sum_v p_v log(p_v / q_v)`` in nats, from logarithms."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def cross_entropy(pruned: Float32[Array, "*tokens vocab"], targets: Int32[Array, "*tokens"]) -> Float32[Array, "*tokens"]:
    """``-log q(target)`` in nats of each token, from the logits of ``q``."""
    return -jnp.take_along_axis(jax.nn.log_softmax(pruned, axis=-1), targets[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Distillation(Method, abc.ABC):
    """Trains the pruned model by gradients through blocks, with masks held.

    Attributes:
      windows: number of training windows of calibration.length tokens, from the calibration text, or written by the model where
        that is self; in addition to the calibration windows. More tokens help most.
      written: number of further training windows that the dense model writes itself, which need no text. The whole model must fit
        the devices.
      passes: how often training reads each window. A second and a third pass over few windows still lower the held-out loss a
        little.
      batch: windows in one step of Adam. More steps from the same text lower the held-out loss more. On a mesh whose data axis
        has more devices than this, some compute padding: take at least as many.
      learning_rate: the peak learning rate of kept weights. The learning rate rises over the first steps and then falls along a
        cosine. null takes the one whose first step lowers the held-out loss most, by trying a few.
      norm_factor: the learning rate of the norms' gains and of biases, as a multiple of learning_rate; 0 leaves them as they are.
      train: the parameters that are trained: "norms" only the norms' gains and biases, "weights" only the kept weights, "all"
        both. "routers" trains only the routers of a mixture, which do not know that experts were removed or pruned.
      warmup: number of steps in which the learning rate rises.
      checks: how often the held-out loss is measured; the state of the best check is kept. null takes one check for every 128
        steps, at least 4.
    """

    words: ClassVar[str]
    """What the loss is called."""
    done: ClassVar[str]
    """What was done with the model, in its recipe."""
    reads_dense: ClassVar[bool]
    """Whether the loss reads what the dense model predicts."""

    setting: ClassVar[str] = "distill"
    by_held_out: ClassVar[bool] = True

    windows: Annotated[int, Bound(1)] = 128
    written: Annotated[int, Bound(0)] = 0
    passes: Annotated[int, Bound(1)] = 1
    batch: Annotated[int, Bound(1)] = 2
    learning_rate: Annotated[float | None, Bound(above=0, most=1, hint="null finds one")] = None
    norm_factor: Annotated[float, Bound(0)] = 10.0
    train: Literal["all", Kind] = "all"
    warmup: Annotated[int, Bound(0)] = 3
    checks: Annotated[int | None, Bound(1)] = None

    @staticmethod
    @abc.abstractmethod
    def loss(dense: Array, pruned: Array, targets: Array) -> Array:
        """The loss of each token [...] in nats.

        ``dense`` and ``pruned`` are logits [..., vocab] float32, ``targets`` the next tokens [...] int32.
        """

    def needs(self, recipe: "Recipe") -> None:
        """Raises UserError for quantised weights."""
        if recipe.quantize:
            raise UserError(
                f"expected quantize null where {self.in_words}, got both: training moves the weights off their integers; "
                "take --distill null"
            )

    @property
    def pass_windows(self) -> int:
        """The windows of a pass: from the text and written by the model."""
        return self.windows + self.written

    @property
    def steps(self) -> int:
        """The number of Adam steps. A pass drops windows that fill no step."""
        return self.passes * max(1, self.pass_windows // self.batch)

    def filled(self, windows: int) -> int:
        """How many of ``windows`` are read: whole batches, or all if fewer."""
        return windows - windows % self.batch if windows > self.batch else windows

    def tokens(self, length: int) -> int:
        """The number of tokens that all passes read, ``length`` a window."""
        return self.passes * self.filled(self.pass_windows) * length

    def check_steps(self) -> tuple[int, ...]:
        """Steps after which held-out loss is measured, including the last."""
        count = min(self.checks or max(_FEWEST_CHECKS, min(self.steps // 128, _MOST_CHECKS)), self.steps)
        return tuple(round(self.steps * (index + 1) / count) for index in range(count))

    @property
    def trials(self) -> int:
        """How many learning rates are tried, usually."""
        return TRIALS if self.learning_rate is None else 0

    def rate(self, peak: float, step: int) -> float:
        """The learning rate of kept weights in a step, counted from 0."""
        import optax  # here, as in :func:`optimizer`: pruning without a training needs no optax

        warmup = min(self.warmup, self.steps - 1)
        schedule = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, self.steps, peak * _LEAST)
        return float(schedule(step))

    def factor(self, kind: Kind) -> float:
        """The learning rate of a kind of parameters, relative to :meth:`rate`.

        0 if the kind is not trained. All vectors count as norms, also biases, sinks and decays.
        """
        trained = kind == self.train or (self.train == "all" and kind != "routers")
        return trained * (self.norm_factor if kind == "norms" else 1.0)


@dataclasses.dataclass(frozen=True)
class KL(Distillation):
    """Trains the pruned model toward the dense one's next-token distributions.

    Training reads more windows of the calibration text. The run is then no longer one-shot pruning: gradients pass through all
    blocks. Adam minimises the mean over tokens of ``KL(p || q) = sum_v p(v) log(p(v) / q(v))``, with ``p`` the dense model's
    distribution and ``q`` the pruned one's (Hinton et al., 2015, at temperature 1). Pruned weights stay zero; embedding and
    head stay as they are. Held-out windows decide which step is kept; if their divergence never falls, the model stays as it
    was pruned.
    """

    words, done = "divergence from the dense model", "distilled"
    reads_dense = True

    @staticmethod
    def loss(dense: Array, pruned: Array, targets: Array) -> Array:
        return divergence(dense, pruned)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Distillation):
    """Trains the pruned model on the next tokens, without the dense model.

    Training reads more windows of the calibration text, as with ``kl``, but Adam minimises the mean of ``-log q(next token)``.
    This needs no pass through the dense model, and moves the pruned model farther from it.
    """

    words, done = "cross-entropy", "trained"
    reads_dense = False

    @staticmethod
    def loss(dense: Array, pruned: Array, targets: Array) -> Array:
        return cross_entropy(pruned, targets)


def rate_of_descent(loss: Callable[[float], float], before: float) -> float:
    """The learning rate whose single step lowers a loss most.

    Rates three times apart are tried: from 1e-4 downward until the next lower one lowers the loss less, or upward as long as the
    next higher one lowers it more. The parabola ``before + a r + b r^2`` through the losses of no step, of the best rate and of
    the one below it has its minimum at ``-a / 2b``, which is returned, though at least half and at most twice the best rate.

    Args:
      loss: the loss after one step with a rate, from the same weights each time; infinite where it cannot be computed.
      before: the loss without a step.
    """

    @functools.cache
    def lost(rung: int) -> float:
        return loss(_FIRST * _APART**rung)

    best = 0
    while best > _LOWEST and (lost(best) >= before or lost(best - 1) < lost(best)):
        best -= 1
    while 0 <= best < _HIGHEST and lost(best + 1) < lost(best):
        best += 1
    rate, below = _FIRST * _APART**best, _FIRST * _APART ** (best - 1)
    slopes = (lost(best) - before) / rate, (lost(best - 1) - before) / below
    curvature = (slopes[0] - slopes[1]) / (rate - below)
    slope = slopes[0] - curvature * rate
    # Where the parabola falls for ever, or rises at once, the rate that was tried is the best that is known.
    return min(max(-slope / (2 * curvature), rate / 2), 2 * rate) if slope < 0 < curvature else rate


def optimizer() -> "optax.GradientTransformation":
    """Adam without its learning rate, with float32 moments."""
    import optax

    return optax.scale_by_adam(*BETAS)
