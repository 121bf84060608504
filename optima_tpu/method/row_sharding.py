"""How the rows of a layer are sharded over the mesh while they are solved."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32, Shaped

from optima_tpu.method.linalg.features import WHOLE, Features
from optima_tpu.method.problem import LayerProblem, Pruned, Solution
from optima_tpu.method.solvers import Solver
from optima_tpu.runtime.mesh import DATA, MODEL, ROWS, divisible, padded

Outputs = TypeVar("Outputs")


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How Hessian and rows are sharded over the mesh while they are solved.

    Attributes:
      split: for Hessians that do not fit one device. The Hessian's columns and the features of all rows are sharded over the
        model axis, which must divide d_in, and rows over the data axis. If False, rows are sharded over both axes and the Hessian
        is replicated.
      rows: the largest number of rows that a device solves at once; None means all its rows.
    """

    split: bool = False
    rows: int | None = None

    @property
    def hessian(self) -> P:
        """The spec of a Hessian [d_in, d_in]."""
        return P(None, MODEL) if self.split else P()

    @property
    def matrix(self) -> P:
        """The spec of rows [d_out, d_in]."""
        return P(DATA, MODEL) if self.split else ROWS

    @property
    def vector(self) -> P:
        """The spec of one number a row [d_out]."""
        return P(DATA) if self.split else ROWS

    @property
    def features(self) -> Features:
        """Whether features are sharded over the model axis."""
        return Features(MODEL) if self.split else WHOLE


ON_EVERY_DEVICE = RowLayout()
"""The default layout: the Hessian replicated, all rows of a device at once."""


@dataclasses.dataclass(frozen=True)
class RowSharding:
    """How the rows of a layer are sharded over a mesh.

    Attributes:
      mesh: axes ("data", "model").
      layout: the sharding of Hessian and rows, and how many rows a device solves at once.
    """

    mesh: Mesh
    layout: RowLayout = ON_EVERY_DEVICE

    def rows(self, weight: Array) -> NamedSharding:
        """The sharding of a matrix [d_out, d_in] while its mask is chosen.

        Its rows are sharded over all mesh axes that divide them.
        """
        return NamedSharding(self.mesh, divisible(self.mesh, weight.shape, ROWS))

    def place(self, matrix: Float32[Array, "d_in d_in"]) -> Float32[Array, "d_in d_in"]:
        """Constrains [d_in, d_in] to the layout's sharding of a Hessian."""
        return jax.lax.with_sharding_constraint(matrix, NamedSharding(self.mesh, self.layout.hessian))

    def product(self, matrix: Float32[Array, "d_in d_in"], rows: Float32[Array, "rows d_in"]) -> Float32[Array, "rows d_in"]:
        """``rows @ matrix`` in float32, each device on its own rows."""
        return self.map(lambda part, features: lambda own_rows: features.product(own_rows, part), self.layout.matrix)(
            matrix, rows
        )

    def map(self, prepare: Callable[[Array, Features], Callable[..., Outputs]], out_specs: Any) -> Callable[..., Outputs]:
        """Returns ``(hessian, *rows) -> outputs``, which runs on the mesh.

        Every array of rows is [d_out, d_in]. Each device runs the function on its own rows, in equal batches if the layout
        limits the rows at once. If the number of rows does not divide evenly, rows of zeros are appended, and cut off the
        outputs.

        Args:
          prepare: ``(hessian, features) -> (*rows -> outputs)``. Called once on every device, with the device's part of the
            Hessian. The function it returns is called for every batch.
          out_specs: the spec of each output, ``layout.matrix`` or ``layout.vector``.
        """
        mesh, layout = self.mesh, self.layout
        shares = mesh.size if not layout.split else mesh.shape[DATA]

        def mapped(hessian: Float32[Array, "d_in d_in"], *arrays: Shaped[Array, "rows d_in"]) -> Outputs:
            count = arrays[0].shape[0]
            each = -(-count // shares)
            batches = -(-each // (layout.rows or each))
            extra = padded(count, shares * batches) - count

            def local(hessian: Float32[Array, "d_in d"], *arrays: Shaped[Array, "rows d"]) -> Outputs:
                run = prepare(hessian, layout.features)
                if batches == 1:
                    return run(*arrays)
                parts = tuple(array.reshape(batches, -1, array.shape[1]) for array in arrays)
                outputs = jax.lax.map(lambda part: run(*part), parts)
                return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), outputs)

            # check_vma: MPAX's loops carry values that vary over the mesh beside constants, which the checker refuses.
            outputs = jax.shard_map(
                local, mesh=mesh, in_specs=(layout.hessian, *[layout.matrix] * len(arrays)), out_specs=out_specs, check_vma=False
            )(hessian, *(jnp.pad(array, ((0, extra), (0, 0))) if extra else array for array in arrays))
            return jax.tree.map(lambda array: array[:count], outputs)

        return mapped

    def on_rows(
        self, prepare: Callable[[Array, float, Features], Callable[[LayerProblem, Pruned], Outputs]], out_specs: Any
    ) -> Callable[[LayerProblem, Pruned], Outputs]:
        """Runs a method of pruned rows on the mesh, see :meth:`map`.

        Padded rows have zero weights and an empty mask.

        Args:
          prepare: ``(hessian, damping, features) -> ((problem, pruned) -> outputs)``.
        """

        def run(problem: LayerProblem, pruned: Pruned) -> Outputs:
            def on_device(hessian: Array, features: Features) -> Callable[..., Outputs]:
                ready = prepare(hessian, problem.damping, features)

                def run_rows(weight: Array, *rest: Array) -> Outputs:
                    *pull, start, keep = rest
                    part = LayerProblem(weight, hessian, pull[0] if pull else None, problem.damping)
                    return ready(part, Pruned(start, keep))

                return run_rows

            pull = () if problem.pull is None else (problem.pull,)
            return self.map(on_device, out_specs)(problem.hessian, problem.weight, *pull, *pruned)

        return run

    def solve(self, solver: Solver) -> Callable[[LayerProblem, Pruned], Solution]:
        """A solver whose rows are sharded over the mesh.

        Each device runs the solver's loop on its own rows and stops independently. With a replicated Hessian the loop does not
        communicate; only the inverses before the loop may (``linalg.inverses``). With a sharded Hessian, the devices of one row
        of the mesh iterate in step.
        """
        layout = self.layout
        mask = layout.matrix if solver.changes_masks else None
        specs = Solution._make((layout.matrix, layout.vector, layout.vector, layout.vector, mask, None))

        def prepare(hessian: Array, damping: float, features: Features) -> Callable[[LayerProblem, Pruned], Solution]:
            ready = solver.prepare(hessian, damping, features)
            return lambda problem, pruned: ready(problem)(pruned)._replace(end=None)

        return self.on_rows(prepare, specs)
