"""The blocks that are trained: measured, and moved by a step of Adam."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from optima_tpu.models.decoder import Head
from optima_tpu.models.family import Positions
from optima_tpu.pipeline.distill.blocks import TrainedBlock, Trainer, Tree, head_gradient, head_losses
from optima_tpu.pipeline.distill.windows import TrainingStream
from optima_tpu.pipeline.journal import Journal
from optima_tpu.runtime.processes import fetch

_HOST = "pinned_host"
"""The memory of a host, as jax names it."""


@dataclasses.dataclass
class TrainedBlocks:
    """The blocks of a model that are trained.

    Attributes:
      journal: has the blocks as they were pruned.
      head: of both models, which pruning leaves as it is.
      positions: the position data of every block.
      blocks: all of them, in order.
    """

    trainer: Trainer
    journal: Journal
    head: Head
    positions: Sequence[Positions]
    blocks: list[TrainedBlock]

    @classmethod
    def open(cls, trainer: Trainer, journal: Journal, head: Head, length: int) -> "TrainedBlocks":
        """Blocks as they were pruned, for windows of ``length`` tokens."""
        decoder = trainer.decoder
        model = cls(trainer, journal, head, [decoder.positions(index, length) for index in range(decoder.config.blocks)], [])
        model.restart()
        return model

    def restart(self) -> None:
        """Resets the blocks to their pruned weights, with moments of zero."""
        self.blocks.clear()  # so that memory holds the model once
        decoder = self.trainer.decoder
        every = range(decoder.config.blocks)
        for index, parameters in zip(every, decoder.blocks(every)):
            keep = {name.removeprefix(decoder.prefix(index)): mask for name, mask in self.journal.masks(index).items()}
            self.blocks.append(self.trainer.at(index).open(parameters, keep))

    @property
    def trainers(self) -> list[Trainer]:
        """The trainer of every block."""
        return [self.trainer.at(index) for index in range(len(self.blocks))]

    def rounded(self) -> list[Tree]:
        """Copies what moves to host memory, in the checkpoint's dtypes."""
        pairs = zip(self.trainers, self.blocks)
        return [
            on_host({name: array.astype(trainer.dtype(name)) for name, array in block.masters.items()})
            for trainer, block in pairs
        ]

    def measure(self, stream: TrainingStream) -> tuple[float, float]:
        """The mean loss of a token, and the perplexity."""
        totals, batch, loss = np.zeros(2), self.trainer.decoder.batch, self.trainer.method.loss
        for pruned, dense in zip(stream.entering.batches(batch), stream.dense.batches(batch)):
            hidden = pruned.hidden
            for trainer, block, positions in zip(self.trainers, self.blocks, self.positions):
                hidden = trainer.forward(block.masters, block.fixed, hidden, positions)
            sums = fetch(head_losses(loss, self.head, dense.hidden, hidden, pruned.place(stream.tokens), pruned.valid))
            totals += [np.sum(each, dtype=np.float64) for each in sums]
        mean, nll = totals / _terms(stream)
        return float(mean), float(np.exp(min(nll, 709.0)))

    def step(self, stream: TrainingStream, rate: float) -> float:
        """Takes one step of Adam on some windows.

        Returns the mean loss of a token before the step. Gradients add up over batches that fit the devices, so the batch of
        Adam is as large as the method says on any mesh. The last batch updates each block right behind its backward pass: if it
        is the only batch, one gradient exists at a time.
        """
        batch, count, trainers = self.trainer.decoder.batch, _terms(stream), self.trainers
        gradients, loss = dict[int, Tree](), self.trainer.method.loss
        share, total = jnp.float32(1 / count), 0.0
        for pruned, dense in zip(stream.entering.batches(batch), stream.dense.batches(batch)):
            hidden, pulls = pruned.hidden, []
            kept = self.trainer.kept(self.blocks, hidden, self.positions)
            for each, block, positions, size in zip(trainers, self.blocks, self.positions, kept):
                hidden, pull = each.ahead(block, hidden, positions, size > 0)
                pulls.append(pull)
            tokens, present = pruned.place(stream.tokens), pruned.valid
            sums, cotangent = head_gradient(loss, self.head, dense.hidden, hidden, tokens, present)
            last = pruned.rows.max() >= stream.entering.last - 1
            for index in reversed(range(len(self.blocks))):
                each, gradient = trainers[index], gradients.pop(index, None) or trainers[index].zeros()
                gradients[index], cotangent = each.backward(pulls.pop(), cotangent, gradient)
                if last:
                    self.blocks[index] = each.update(self.blocks[index], gradients.pop(index), share, jnp.float32(rate))
            total += float(np.sum(fetch(sums), dtype=np.float64))
        return total / count


def _terms(stream: TrainingStream) -> int:
    """The number of predictions: all but the last position of a window."""
    return len(stream.entering) * (stream.tokens.shape[1] - 1)


def on_host(arrays: Tree) -> Tree:
    """Copies arrays to host memory, where no step of Adam overwrites them."""

    def copy(array: Array) -> Array:
        # Shard by shard, which needs no program that all processes run.
        shards = array.addressable_shards
        moved = [jax.device_put(shard.data, SingleDeviceSharding(shard.device, memory_kind=_HOST)) for shard in shards]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding.with_memory_kind(_HOST), moved)

    return {name: copy(array) for name, array in arrays.items()}
