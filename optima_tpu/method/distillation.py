"""Distillation: the pruned model is trained, toward the dense one or on text alone, with its masks held."""

import abc
import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32

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
_MOST_CHECKS = 1000
"""Of a training that does not say how many."""


def divergence(dense: Float32[Array, "*tokens vocab"], pruned: Float32[Array, "*tokens vocab"]) -> Float32[Array, "*tokens"]:
    """``KL(p || q)`` in nats of each token, from the logits of ``p`` and ``q``."""
    p, q = jax.nn.log_softmax(dense, axis=-1), jax.nn.log_softmax(pruned, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def cross_entropy(pruned: Float32[Array, "*tokens vocab"], targets: Int32[Array, "*tokens"]) -> Float32[Array, "*tokens"]:
    """``-log q(target)`` in nats of each token, from the logits of ``q``."""
    return -jnp.take_along_axis(jax.nn.log_softmax(pruned, axis=-1), targets[..., None], axis=-1)[..., 0]


def hidden_error(dense: Float[Array, "*tokens d_model"], pruned: Float[Array, "*tokens d_model"]) -> Float32[Array, "*tokens"]:
    """``|pruned - dense|^2 / |dense|^2`` of the hidden state of each token, in float32; 0 where the dense model's is zero.

    Relative for each token, since the next norm divides by the token's own size: a sum over tokens would be the error of the few
    that are a thousand times larger than the others (Sun et al., 2024, massive activations).
    """
    wanted = dense.astype(jnp.float32)
    energy = jnp.sum(wanted**2, axis=-1)
    error = jnp.sum((pruned.astype(jnp.float32) - wanted) ** 2, axis=-1)
    return jnp.where(energy > 0, error / jnp.where(energy > 0, energy, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class Distillation(Method, abc.ABC):
    """Training of the pruned model, with gradients through blocks and the masks held.

    Attributes:
      windows: number of training windows of calibration.length tokens, drawn in addition to the calibration windows. More tokens
        help most.
      passes: how often training reads each window. From the second pass on, the model begins to overfit the windows.
      batch: windows in one step of Adam. More steps from the same text lower the held-out loss more. On a mesh whose data axis has more
        devices than this, some compute padding: take at least as many.
      learning_rate: the peak learning rate of kept weights. The learning rate rises over the first steps and then falls along a
        cosine.
      norm_factor: the learning rate of the norms' gains and of biases, as a multiple of learning_rate; 0 leaves them as they are.
      train: the parameters that are trained: "norms" only the norms' gains and biases, "weights" only the kept weights, "all" both.
        "routers" trains only the routers of a mixture, which do not know that experts were removed or pruned.
      warmup: number of steps in which the learning rate rises.
      checks: how often the held-out loss is measured; the state of the best check is kept. null takes one check for every 128 steps, at
        least 4.
    """

    words: ClassVar[str]
    """What the loss is called."""
    done: ClassVar[str]
    """What was done with the model, in its recipe."""
    reads_dense: ClassVar[bool]
    """Whether the loss reads what the dense model predicts."""
    by_spans: ClassVar[bool] = False
    """Whether spans of blocks are trained one after the other toward the dense model's hidden states, and not all by ``loss``."""
    fewest_checks: ClassVar[int] = 4
    """The checks of a short training."""

    setting: ClassVar[str] = "distill"
    by_held_out: ClassVar[bool] = True

    windows: Annotated[int, Bound(1)] = 128
    passes: Annotated[int, Bound(1)] = 1
    batch: Annotated[int, Bound(1)] = 2
    learning_rate: Annotated[float, Bound(above=0, most=1, hint="7e-5 is usual")] = 7e-5
    norm_factor: Annotated[float, Bound(0)] = 10.0
    train: Literal["all", Kind] = "all"
    warmup: Annotated[int, Bound(0)] = 3
    checks: Annotated[int | None, Bound(1)] = None

    @staticmethod
    @abc.abstractmethod
    def loss(dense: Array, pruned: Array, targets: Array) -> Array:
        """The loss of each token [...] in nats, from logits [..., vocab] float32 and the next tokens [...] int32."""

    def needs(self, recipe: "Recipe") -> None:
        """Raises UserError for quantised weights."""
        if recipe.quantize:
            raise UserError(
                f"expected quantize null where {self.in_words}, got both: training moves the weights off their integers; "
                "take --distill null"
            )

    @property
    def smaller(self) -> str:
        """What to type to train less of the model at once; empty if nothing does."""
        return "--distill blocks"

    def spans(self, blocks: int) -> tuple[range, ...]:
        """Which of a model's blocks are trained together, one span after the other."""
        return (range(blocks),)

    @property
    def steps(self) -> int:
        """The number of Adam steps of a span; the last windows of a pass are left out if they do not fill a batch."""
        return self.passes * max(1, self.windows // self.batch)

    def filled(self, windows: int) -> int:
        """How many of so many windows a training reads: those that fill a step. Fewer than a batch are one step."""
        return windows - windows % self.batch if windows > self.batch else windows

    def tokens(self, length: int) -> int:
        """How many tokens the steps read, in all passes over windows of ``length``."""
        return self.passes * self.filled(self.windows) * length

    def check_steps(self) -> tuple[int, ...]:
        """The steps after which the held-out loss is measured, the last one among them."""
        count = min(self.checks or max(self.fewest_checks, min(self.steps // 128, _MOST_CHECKS)), self.steps)
        return tuple(round(self.steps * (index + 1) / count) for index in range(count))

    def rate(self, step: int) -> float:
        """The learning rate of kept weights in a step, counted from 0."""
        import optax  # here, as in :func:`optimizer`: pruning without a training needs no optax

        warmup = min(self.warmup, self.steps - 1)
        schedule = optax.warmup_cosine_decay_schedule(
            self.learning_rate / (warmup + 1), self.learning_rate, warmup, self.steps, self.learning_rate * _LEAST
        )
        return float(schedule(step))

    def factor(self, kind: Kind) -> float:
        """The learning rate of a kind of parameters as a multiple of :meth:`rate`; 0 if it is not trained.

        All vectors count as norms, also biases, sinks and decays.
        """
        trained = kind == self.train or (self.train == "all" and kind != "routers")
        return trained * (self.norm_factor if kind == "norms" else 1.0)


@dataclasses.dataclass(frozen=True)
class KL(Distillation):
    """Trains the whole pruned model toward the dense model's next-token distributions, on more windows of the calibration text.

    The run is then no longer one-shot pruning: gradients pass through all blocks. Adam minimises the mean over tokens of
    ``KL(p || q) = sum_v p(v) log(p(v) / q(v))``, with ``p`` the dense model's distribution and ``q`` the pruned one's (Hinton et
    al., 2015, at temperature 1). Pruned weights stay zero; embedding and head stay as they are. Held-out windows decide which step
    is kept; if their divergence never falls, the model stays as it was pruned.
    """

    words, done = "divergence from the dense model", "distilled"
    reads_dense = True

    @staticmethod
    def loss(dense: Array, pruned: Array, targets: Array) -> Array:
        return divergence(dense, pruned)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Distillation):
    """Trains the whole pruned model on the next tokens of more windows of the calibration text, without the dense model.

    As ``kl``, but Adam minimises the mean of ``-log q(next token)``. It needs no pass through the dense model, and moves farther
    from it.
    """

    words, done = "cross-entropy", "trained"
    reads_dense = False

    @staticmethod
    def loss(dense: Array, pruned: Array, targets: Array) -> Array:
        return cross_entropy(pruned, targets)


@dataclasses.dataclass(frozen=True)
class Blocks(KL):
    """Trains the pruned blocks one after the other toward the dense model's hidden states, in the memory of one block.

    For a model that is too large to be trained as a whole: only the blocks of one span are on the devices, with their gradients and
    moments. In order, each span reads what leaves the trained spans before it. Adam minimises the mean over tokens of
    ``|y - d|^2 / |d|^2``, with ``y`` what leaves the span and ``d`` what leaves the same block of the dense model, which reads what
    leaves its own blocks. Pruned weights stay zero. Held-out windows decide which step of a span is kept; a span whose error there
    never falls keeps its weights. If the divergence from the dense model, as ``kl`` measures it, did not fall in the end, the model
    stays as it was pruned.

    Related: block reconstruction (Shin et al., 2024, "Rethinking Pruning Large Language Models", with its global propagation; Guo et
    al., 2024, EBFT) and transformer matching (3BASiL, 2025, mazumder-lab/3BASiL ``pipeline.py``), whose target is the dense block on
    the *pruned* model's hidden states, and whose loss is a sum over tokens that are not weighed.

    Attributes:
      checks: how often the held-out error of a span is measured; the state of the best check is kept. null takes one check for every 128
        steps, at least 2.
      span: number of consecutive blocks that are trained together. A larger span sees more of what its blocks do to each other, and
        needs so many times the memory.
    """

    done, by_spans, fewest_checks = "trained block by block", True, 2

    span: Annotated[int, Bound(1)] = 1

    @property
    def smaller(self) -> str:
        return "a smaller --distill.span" if self.span > 1 else ""

    def spans(self, blocks: int) -> tuple[range, ...]:
        return tuple(range(first, min(first + self.span, blocks)) for first in range(0, blocks, self.span))


def optimizer() -> "optax.GradientTransformation":
    """Adam without its learning rate, with float32 moments."""
    import optax

    return optax.scale_by_adam(*BETAS)
