"""A block that is known by the shapes of its layers alone."""

from types import SimpleNamespace

import numpy as np
from jax.sharding import Mesh, PartitionSpec


def block_of(shapes: dict[str, tuple[int, int]], mesh: Mesh, residuals: tuple[str, ...] = ()) -> SimpleNamespace:
    """Makes a decoder as far as ``memory_plan`` reads one.

    All blocks have these layers in float32.

    Args:
      shapes: [d_out, d_in] by the layer's name.
      residuals: layers that add to the residual stream.
    """
    block = SimpleNamespace(
        mesh=mesh,
        prefix=lambda index: f"layers.{index}.",
        block_shapes={name + ".weight": shape for name, shape in shapes.items()},
        family=SimpleNamespace(residuals=residuals),
        tensors=SimpleNamespace(dtype=lambda name: np.dtype("float32")),
        sharding=lambda name: PartitionSpec(),
    )
    block.at = lambda index: block  # all blocks are alike
    return block
