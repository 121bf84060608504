"""How the features of a layer's rows are held: whole, or sharded evenly.

Code that uses :class:`Features` works in both cases. Inside ``shard_map``, with ``n`` devices on the axis, a device holds ``d =
d_in / n`` features of its rows and the same ``d`` columns of every [d_in, d_in] matrix; without sharding ``d`` is ``d_in`` and no
function here communicates.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Shaped


def matmul(a: Float[Array, "a b"], b: Float[Array, "b c"]) -> Float[Array, "a c"]:
    """``a @ b`` in full float32, without rounding to bfloat16 or TF32."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def rough_matmul(a: Float[Array, "a b"], b: Float[Array, "b c"]) -> Float[Array, "a c"]:
    """``a @ b`` for choices, in less than full float32 on accelerators.

    A choice is the direction of a step, or which weights stay and, without a solver, how ADMM leaves them. A TPU takes three
    passes of its matrix unit, with errors of some ``2^-16``, where :func:`matmul` takes six. A GPU rounds the factors to TF32,
    with errors of some ``2^-11``. On CPUs it is the same as :func:`matmul`.
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGH)


Product = Callable[[Array, Array], Array]
"""``matmul`` or ``rough_matmul``."""


@dataclasses.dataclass(frozen=True)
class Features:
    """The sharding of features. Call methods in ``shard_map`` over ``axis``.

    Attributes:
      axis: the mesh axis or axes over which features are sharded; None if a device holds all of them.
    """

    axis: str | tuple[str, ...] | None = None

    @property
    def devices(self) -> int:
        """The number of devices that share the features."""
        return 1 if self.axis is None else jax.lax.axis_size(self.axis)

    def from_owner(self, part: Array, owner: Array) -> Array:
        """Broadcasts ``part`` from the device ``owner``, by one all-reduce."""
        if self.axis is None:
            return part
        return jax.lax.psum(jnp.where(owner == jax.lax.axis_index(self.axis), part, 0.0), self.axis)

    def whole(self, part: Shaped[Array, "... d"]) -> Shaped[Array, "... d_in"]:
        """Gathers all features: [..., d] -> [..., d_in], by one all-gather."""
        return part if self.axis is None else jax.lax.all_gather(part, self.axis, axis=part.ndim - 1, tiled=True)

    def part(self, whole: Shaped[Array, "d_in ..."]) -> Shaped[Array, "d ..."]:
        """[d_in, ...] -> [d, ...], this device's slice of the first axis."""
        if self.axis is None:
            return whole
        size = whole.shape[0] // jax.lax.axis_size(self.axis)
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(self.axis) * size, size)

    def product(self, rows: Float[Array, "rows d"], columns: Float[Array, "d_in d"]) -> Float[Array, "rows d"]:
        """``rows @ matrix`` from its columns, by one all-gather of rows."""
        return matmul(self.whole(rows), columns)

    def rough_product(self, rows: Float[Array, "rows d"], columns: Float[Array, "d_in d"]) -> Float[Array, "rows d"]:
        """As :meth:`product`, by :func:`rough_matmul`."""
        return rough_matmul(self.whole(rows), columns)

    def sums(self, *parts: Float[Array, "rows d"]) -> tuple[Float[Array, " rows"], ...]:
        """Each array's row sums over all features, by a single all-reduce."""
        sums = tuple(jnp.sum(part, axis=1) for part in parts)
        return sums if self.axis is None else tuple(jax.lax.psum(jnp.stack(sums), self.axis))

    def any(self, part: Bool[Array, "..."]) -> Bool[Array, ""]:
        """Whether any entry on any device of the axis is True."""
        return jnp.any(part) if self.axis is None else jax.lax.pmax(jnp.any(part).astype(jnp.int32), self.axis) > 0

    def maximum(self, part: Float[Array, "..."]) -> Float[Array, ""]:
        """The largest entry on any device of the axis."""
        return jnp.max(part) if self.axis is None else jax.lax.pmax(jnp.max(part), self.axis)

    def diagonal(self, columns: Float[Array, "d_in d"]) -> Float[Array, " d"]:
        """This device's part [d] of a matrix's diagonal, from its columns."""
        return jnp.diagonal(self.part(columns))

    def on_diagonal(self, columns: Float[Array, "d_in d"]) -> Bool[Array, "d_in d"]:
        """Which entries of a device's columns are on the diagonal."""
        return self.part(jnp.arange(columns.shape[0])) == jnp.arange(columns.shape[0])[:, None]

    def transpose(self, columns: Float[Array, "d_in d"]) -> Float[Array, "d_in d"]:
        """The columns of ``M'`` from columns of ``M``, by one all-to-all."""
        if self.axis is None:
            return columns.T
        size = columns.shape[1]
        blocks = jax.lax.all_to_all(columns.reshape(-1, size, size), self.axis, split_axis=0, concat_axis=0)
        return jnp.swapaxes(blocks, 1, 2).reshape(columns.shape)


WHOLE = Features()
"""All features on every device."""

# With fewer columns per device, the sequential panels would take as long as the whole inverse on one device: an estimate for a
# TPU v5e, not measured.
_FEWEST_COLUMNS = 128


def divided(size: int, devices: int) -> bool:
    """Whether TPUs share the inverse of a matrix, see ``linalg.inverses``."""
    return devices > 1 and size % devices == 0 and size >= _FEWEST_COLUMNS * devices
