"""The blocks of a model in training, and the programs that they run.

The backward pass goes block by block. On CPU devices a block's forward pass keeps what its backward pass reads, for as many
blocks as memory has room for. Otherwise the backward pass does the forward pass again, from the block's input, so that of a
batch of windows only the inputs of the blocks are kept (rematerialisation at every block). All blocks run the same compiled
programs, whatever the depth of the model.

Masters, moments and gradients are float32 and split over all devices of the mesh. A block gathers what its forward pass wants
and rounds it to the checkpoint's dtype; its gradient is reduced back to the same shards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import plural
from optima_tpu.evaluate.predictions import per_token, sum_over_windows
from optima_tpu.method.distillation import Distillation, Kind, cross_entropy, optimizer
from optima_tpu.method.zeros import keep_zeros
from optima_tpu.models.decoder import Decoder, Head, forward, head_logits
from optima_tpu.models.family import ExpertNames, Positions
from optima_tpu.runtime.mesh import DATA, bytes_on_device, divisible, on_cpu, spread, struct_on

Tree = dict[str, Array]
Pull = Callable[[Array], tuple[Tree, Array]]
"""From the cotangent of a block's output to those of its masters and of its input: a pytree of what it reads."""


class TrainedBlock(NamedTuple):
    """A block that is trained.

    Attributes:
      masters: the parameters that move, float32, by name inside the block.
      fixed: the other parameters, in the checkpoint's dtype.
      keep: masks of the pruned weights, bool, True where a weight stays.
    """

    masters: Tree
    fixed: Tree
    keep: Tree
    moments: optax.OptState


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Opens blocks and runs them, forward and backward.

    Attributes:
      budget: bytes that may be used of each device.
    """

    decoder: Decoder
    method: Distillation
    budget: float = 0.0

    def at(self, index: int) -> "Trainer":
        """The trainer of the blocks like block ``index``."""
        kind = self.decoder.config.kind_of(index)
        if kind != self.decoder.config.kind and kind not in self._others:
            self._others[kind] = Trainer(self.decoder.at(index), self.method, self.budget)
        return self if kind == self.decoder.config.kind else self._others[kind]

    @functools.cached_property
    def _others(self) -> dict[int, "Trainer"]:
        return {}

    @functools.cached_property
    def factors(self) -> Mapping[str, float]:
        """Multiples of the learning rate, for the parameters that move."""
        shapes, experts = self.decoder.block_shapes, self.decoder.family.experts
        kinds: dict[Kind, set[str]] = {
            "weights": {name + ".weight" for name in self.decoder.linears},
            # Norms of queries and keys may have gains for every head.
            "norms": {name for name, shape in shapes.items() if len(shape) == 1 or name.endswith("norm.weight")},
            "routers": set(experts.router) if isinstance(experts, ExpertNames) else set(),
        }
        multiples = {name: sum(self.method.factor(kind) for kind, names in kinds.items() if name in names) for name in shapes}
        return {name: factor for name, factor in multiples.items() if factor}

    def shards(self, name: str) -> NamedSharding:
        """How a master, its mask and its moments are split over devices."""
        shape = self.decoder.block_shapes[name]
        return NamedSharding(self.decoder.mesh, spread(self.decoder.mesh, shape, self.decoder.sharding(name)))

    @property
    def accumulates(self) -> bool:
        """Whether a step adds up the gradients of all blocks over batches."""
        windows = min(self.method.batch, self.method.pass_windows)
        return windows > self.decoder.batch * self.decoder.mesh.shape[DATA]

    @property
    def idle(self) -> str:
        """A note on data slices without a window; empty if all have one."""
        windows, slices = min(self.method.batch, self.method.pass_windows), self.decoder.mesh.shape[DATA]
        if windows >= slices:
            return ""
        return (
            f"{slices - windows} of {slices} slices of the data axis compute padding, for a step trains on "
            f"{plural(windows, 'window')}: take --distill.batch "
            f"{slices}{' and more windows' * (self.method.pass_windows < slices)}, or a mesh with a smaller data axis"
        )

    def bytes_on_device(self) -> int:
        """Bytes that the blocks take on each device, at most.

        These are the master, two moments and the mask of each parameter that moves, in float32 except for the mask; the
        gradients that exist at a time; and the other parameters as they are.
        """
        trainers = [self.at(index) for index in range(self.decoder.config.blocks)]
        gradients = [4 * trainer._moving for trainer in trainers]
        return sum(trainer._bytes_of_a_block for trainer in trainers) + (sum if self.accumulates else max)(gradients)

    @property
    def room(self) -> float:
        """Bytes on each device for what blocks keep for backward passes.

        0 except on CPU devices: by the estimate of the TPU's compiler, moving it takes longer than doing the forward pass
        again.
        """
        return max(0.0, self.budget - self.bytes_on_device()) if on_cpu(self.decoder.mesh) else 0.0

    @functools.cached_property
    def _moving(self) -> int:
        """How many numbers of a block that move are on each device."""
        return sum(math.prod(self.shards(name).shard_shape(self.decoder.block_shapes[name])) for name in self.factors)

    @functools.cached_property
    def _bytes_of_a_block(self) -> int:
        """Bytes of a block on each device, without the gradient."""
        return bytes_on_device(*jax.tree.leaves(self.struct()))

    def open(self, parameters: Mapping[str, Array], keep: Mapping[str, np.ndarray | Array]) -> TrainedBlock:
        """A block that nothing has moved yet.

        Args:
          parameters: of the pruned block, by name inside the block, on the mesh.
          keep: the masks of its pruned weights, by the same names.
        """
        masters = {name: jax.device_put(parameters[name], self.shards(name)).astype(jnp.float32) for name in self.factors}
        fixed = {name: array for name, array in parameters.items() if name not in masters}
        masks = {name: self.place(name, np.asarray(keep[name])) for name in masters if name in keep}
        return TrainedBlock(masters, fixed, masks, _start(masters))

    def struct(self) -> TrainedBlock:
        """Shapes, dtypes and shardings of a block from :meth:`open`.

        All its matrices have masks. No weight is read.
        """

        def split(name: str, dtype: Any) -> Array:
            return struct_on(self.decoder.mesh, self.decoder.block_shapes[name], np.dtype(dtype), self.shards(name).spec)

        masters = {name: split(name, jnp.float32) for name in self.factors}
        fixed = {
            name: struct_on(self.decoder.mesh, shape, self.dtype(name), self.decoder.sharding(name))
            for name, shape in self.decoder.block_shapes.items()
            if name not in masters
        }
        keep = {name: split(name, jnp.bool_) for name in masters if name.removesuffix(".weight") in self.decoder.linears}
        started: Any = jax.eval_shape(_start, masters)
        count = struct_on(self.decoder.mesh, (), started.count.dtype, P())
        return TrainedBlock(masters, fixed, keep, started._replace(count=count, mu=masters, nu=masters))

    def place(self, name: str, array: np.ndarray) -> Array:
        """Splits an array of the host like the master of the same shape."""
        return jax.make_array_from_callback(array.shape, self.shards(name), lambda index: array[index])

    def zeros(self) -> Tree:
        """A gradient to which nothing was added yet."""
        return {name: jnp.zeros(self.decoder.block_shapes[name], jnp.float32, device=self.shards(name)) for name in self.factors}

    def dtype(self, name: str) -> np.dtype:
        """The checkpoint's dtype of a parameter."""
        return self.decoder.tensors.dtype(self.decoder.prefix(self.decoder.config.kind) + name)

    def _parameters(self, masters: Tree, fixed: Tree) -> Tree:
        """The parameters of the forward pass."""
        decoder = self.decoder

        def gathered(name: str) -> Array:
            wanted = NamedSharding(decoder.mesh, divisible(decoder.mesh, decoder.block_shapes[name], decoder.sharding(name)))
            return jax.lax.with_sharding_constraint(masters[name].astype(self.dtype(name)), wanted)

        return fixed | {name: gathered(name) for name in masters}

    def _run(self, masters: Tree, fixed: Tree, hidden: Array, positions: Positions) -> Array:
        return forward(self.decoder.graph, self.decoder.state(self._parameters(masters, fixed)), hidden, positions)[0]

    @functools.cached_property
    def forward(self) -> Any:
        """The compiled forward pass of a block.

        ``(masters, fixed, hidden [batch, length, d_model], positions) -> hidden``, the hidden states behind the block.
        """
        return jax.jit(self._run)

    def ahead(self, block: TrainedBlock, hidden: Array, positions: Positions, keep: bool) -> tuple[Array, Pull]:
        """What leaves a block, and the pull that :attr:`backward` takes.

        Args:
          keep: whether the pull holds all that the backward pass reads; otherwise the backward pass does the forward pass
            again. The two round differently.
        """
        inside = block.masters, block.fixed, hidden, positions
        return self._kept(*inside) if keep else (self.forward(*inside), self.again(*inside))

    def bytes_kept(self, block: TrainedBlock, hidden: Array, positions: Positions) -> int:
        """A bound on the bytes that :meth:`ahead` keeps on each device."""
        if hidden.shape not in self._kept_bytes:
            pull = jax.eval_shape(self._linearised, block.masters, block.fixed, hidden, positions)[1]
            self._kept_bytes[hidden.shape] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
        return self._kept_bytes[hidden.shape]

    def kept(self, blocks: Sequence[TrainedBlock], hidden: Array, positions: Sequence[Positions]) -> list[int]:
        """The :meth:`bytes_kept` of each block; 0 where memory has no room."""
        room, sizes = self.room, list[int]()
        for index, (block, where) in enumerate(zip(blocks, positions)):
            size = self.at(index).bytes_kept(block, hidden, where) if room > 0 else 0
            sizes.append(size if size <= room else 0)
            room -= sizes[-1]
        return sizes

    @functools.cached_property
    def _kept_bytes(self) -> dict[tuple[int, ...], int]:
        return {}

    def again(self, masters: Tree, fixed: Tree, hidden: Array, positions: Positions) -> Pull:
        """A pull that does the forward pass of a block again."""
        return jax.tree_util.Partial(self._repeated, masters, fixed, hidden, positions)

    def _linearised(self, masters: Tree, fixed: Tree, hidden: Array, positions: Positions) -> tuple[Array, Pull]:
        linearised: tuple[Array, Pull] = jax.vjp(
            lambda *moving: self._run(moving[0], fixed, moving[1], positions), masters, hidden
        )
        return linearised

    @functools.cached_property
    def _kept(self) -> Any:
        return jax.jit(self._linearised)

    @functools.cached_property
    def _repeated(self) -> Any:
        # One function for all blocks: what is jitted with it as an argument is compiled once.
        def repeated(masters: Tree, fixed: Tree, hidden: Array, positions: Positions, cotangent: Array) -> tuple[Tree, Array]:
            return self._linearised(masters, fixed, hidden, positions)[1](cotangent)

        return repeated

    @functools.cached_property
    def backward(self) -> Any:
        """The compiled backward pass of a block, by a pull of :meth:`ahead`.

        ``(pull, cotangent, gradient) -> (gradient, cotangent)``. The first cotangent is of the block's output, the second of
        its input. The gradient of the masters is added to the given one, whose memory the sum takes.
        """

        def backward(pull: Pull, cotangent: Array, gradient: Tree) -> tuple[Tree, Array]:
            added, back = pull(cotangent)
            total = {name: jax.lax.with_sharding_constraint(gradient[name] + added[name], self.shards(name)) for name in gradient}
            return total, back

        return jax.jit(backward, donate_argnums=(2,))

    @functools.cached_property
    def update(self) -> Any:
        """One step of Adam on a block; pruned weights stay exactly zero.

        ``(block, gradient, share, rate) -> block``. ``share`` times the gradient is the gradient of the mean. In float16 the
        gradient of a mean over thousands of tokens would be zero, so the factor comes here, in float32.
        """

        def update(block: TrainedBlock, gradient: Tree, share: Array, rate: Array) -> TrainedBlock:
            gradient = {name: share * total for name, total in gradient.items()}
            masks = {name: block.keep.get(name, True) for name in gradient}
            moved, moments = keep_zeros(optimizer(), masks).update(gradient, block.moments)
            masters = {name: master - rate * self.factors[name] * moved[name] for name, master in block.masters.items()}
            return block._replace(masters=masters, moments=moments)

        return jax.jit(update, donate_argnums=(0,))


def _start(masters: Tree) -> optax.OptState:
    return optimizer().init(masters)


Loss = Callable[[Array, Array, Array], Array]
"""``Distillation.loss``."""


@functools.partial(jax.jit, static_argnums=0)
def head_losses(loss: Loss, head: Head, dense: Array, pruned: Array, tokens: Array, valid: Array) -> tuple[Array, Array]:
    """The sums of the loss and of ``-log q(next token)`` in every window.

    Each is [windows] float32, a sum over the predictions of a window.

    Args:
      loss: ``Distillation.loss``.
      head: of both models, which pruning leaves as it is.
      dense, pruned: [windows, length, d_model], what leaves the last block of each model.
      tokens: [windows, length] int32.
      valid: [windows] bool, False for padding, whose sums are 0.
    """

    def score(targets: Array, dense: Array, pruned: Array) -> tuple[Array, Array]:
        logits = head_logits(head, pruned)
        return loss(head_logits(head, dense), logits, targets), cross_entropy(logits, targets)

    sums: tuple[Array, Array] = jax.tree.map(
        lambda each: jnp.where(valid, each, 0), sum_over_windows(score, tokens, dense, pruned)
    )
    return sums


@functools.partial(jax.jit, static_argnums=0)
def head_gradient(loss: Loss, head: Head, dense: Array, pruned: Array, tokens: Array, valid: Array) -> tuple[Array, Array]:
    """The sums of the loss as in :func:`head_losses`, and their gradient.

    The gradient is of the total of these sums, with respect to ``pruned``.
    """

    # Forward and backward at once for each stretch of positions: the logits of a batch would be the largest arrays of the pass,
    # and computing those of a stretch again would take five products with the vocabulary for three.
    def score(targets: Array, dense: Array, pruned: Array) -> tuple[Array, Array]:
        target = head_logits(head, dense)
        losses, pull = jax.vjp(lambda pruned: loss(target, head_logits(head, pruned), targets), pruned)
        return losses, pull(jnp.ones_like(losses))[0]

    losses, gradient = per_token(score, tokens, dense, pruned)
    sums = jnp.where(valid, jnp.sum(losses, axis=1), 0)
    gradient = jnp.where(valid[:, None, None], gradient, 0)
    return sums, jnp.pad(gradient, ((0, 0), (0, 1), (0, 0)))  # the last position predicts nothing
