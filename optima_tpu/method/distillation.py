"""Distillation: the pruned model as a whole is trained, toward the dense one or on text alone, with its masks held."""

import abc
import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float32, Int32

from optima_tpu.errors import UserError

BETAS = 0.9, 0.95
"""The decay rates of Adam's moments."""
_LEAST = 0.1
"""The learning rate at the end, as a share of the peak."""


def divergence(dense: Float32[Array, "*tokens vocab"], pruned: Float32[Array, "*tokens vocab"]) -> Float32[Array, "*tokens"]:
    """``KL(p || q)`` in nats of each token, from the logits of ``p`` and ``q``."""
    p, q = jax.nn.log_softmax(dense, axis=-1), jax.nn.log_softmax(pruned, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def cross_entropy(pruned: Float32[Array, "*tokens vocab"], targets: Int32[Array, "*tokens"]) -> Float32[Array, "*tokens"]:
    """``-log q(target)`` in nats of each token, from the logits of ``q``."""
    return -jnp.take_along_axis(jax.nn.log_softmax(pruned, axis=-1), targets[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Distillation(abc.ABC):
    """Training of the whole pruned model, with gradients through all blocks and the masks held.

    Attributes:
      windows: number of training windows of calibration.length tokens, drawn in addition to the calibration windows. More tokens
        help most.
      passes: how often training reads each window. From the second pass on, the model begins to overfit the windows.
      batch: windows in one step of Adam.
      learning_rate: the peak learning rate of kept weights. The learning rate rises over the first steps and then falls along a
        cosine.
      norm_factor: the learning rate of the norms' gains and of biases, as a multiple of learning_rate; 0 leaves them as they are.
      train: the parameters that are trained: "norms" only the norms' gains and biases, "weights" only the kept weights, "all" both.
      warmup: number of steps in which the learning rate rises.
      checks: how often the held-out loss is measured; the state of the best check is kept.
    """

    words: ClassVar[str]
    """What the loss is called."""
    done: ClassVar[str]
    """What was done with the model, in its recipe."""
    reads_dense: ClassVar[bool]
    """Whether the loss reads what the dense model predicts."""

    windows: int = 64
    passes: int = 1
    batch: int = 4
    learning_rate: float = 1e-4
    norm_factor: float = 20.0
    train: Literal["all", "weights", "norms"] = "all"
    warmup: int = 3
    checks: int = 4

    @staticmethod
    @abc.abstractmethod
    def loss(dense: Array, pruned: Array, targets: Array) -> Array:
        """The loss of each token [...] in nats, from logits [..., vocab] float32 and the next tokens [...] int32."""

    def __post_init__(self) -> None:
        for name in ("windows", "passes", "batch", "checks"):
            if getattr(self, name) < 1:
                raise UserError(f"expected distill.{name} of at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate <= 1:
            raise UserError(f"expected distill.learning_rate above 0 and at most 1, got {self.learning_rate}; 1e-4 is usual")
        if self.norm_factor < 0 or self.warmup < 0:
            raise UserError(
                f"expected distill.norm_factor and distill.warmup of at least 0, got {self.norm_factor} and {self.warmup}"
            )

    @property
    def steps(self) -> int:
        """The number of Adam steps; the last windows of a pass are left out if they do not fill a batch."""
        return self.passes * max(1, self.windows // self.batch)

    def check_steps(self) -> tuple[int, ...]:
        """The steps after which the held-out loss is measured, the last one among them."""
        count = min(self.checks, self.steps)
        return tuple(round(self.steps * (index + 1) / count) for index in range(count))

    def rate(self, step: int) -> float:
        """The learning rate of kept weights in a step, counted from 0."""
        warmup = min(self.warmup, self.steps - 1)
        schedule = optax.warmup_cosine_decay_schedule(
            self.learning_rate / (warmup + 1), self.learning_rate, warmup, self.steps, self.learning_rate * _LEAST
        )
        return float(schedule(step))

    def factor(self, is_vector: bool) -> float:
        """The learning rate of a parameter as a multiple of :meth:`rate`; 0 if it is not trained. Vectors are gains and biases."""
        if is_vector:
            return 0.0 if self.train == "weights" else self.norm_factor
        return 0.0 if self.train == "norms" else 1.0


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


def optimizer() -> optax.GradientTransformation:
    """Adam without its learning rate, with float32 moments."""
    return optax.scale_by_adam(*BETAS)
