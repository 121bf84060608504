"""The mesh, and how arrays lie on it.

Two axes: ``data`` splits calibration samples, ``model`` splits weights and the columns of Hessians. The rows of a layer's
problems are split over both, so that every device solves its own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.features import WHOLE, Features
from optima_tpu.problem import LayerProblem, Pruned, Solution

DATA, MODEL = "data", "model"
ROWS = P((DATA, MODEL))
"""The spec of an array whose first axis is the rows of a layer."""


def parse_mesh(text: str) -> tuple[int, int]:
    """Reads "4x2" or "data=4,model=2" into (data, model).

    Raises:
      UserError: the text is neither.
    """
    try:
        if "=" in text:
            sizes = dict(part.split("=") for part in text.split(","))
            if set(sizes) - {DATA, MODEL}:
                raise ValueError
            data, model = (int(sizes.get(axis, 1)) for axis in (DATA, MODEL))
        else:
            data, model = (int(part) for part in text.lower().split("x"))
        if data < 1 or model < 1:
            raise ValueError
    except ValueError:
        raise UserError(f"expected a mesh such as 4x2 or data=4,model=2, got {text!r}") from None
    return data, model


def make_mesh(text: str | None) -> Mesh:
    """The device mesh with axes ("data", "model").

    Args:
      text: see :func:`parse_mesh`; None puts all devices on the data axis.

    Raises:
      UserError: the mesh does not use exactly the devices there are.
    """
    count = jax.device_count()
    data, model = parse_mesh(text) if text else (count, 1)
    if data * model != count:
        kind = jax.devices()[0].platform
        each, left = divmod(data * model, jax.process_count())
        where = " in every process" if jax.process_count() > 1 else ""
        hint = f", or --cpu-devices {each}{where} to simulate it" if kind == "cpu" and each and not left else ""
        raise UserError(f"mesh {data}x{model} needs {data * model} devices, there are {count} ({kind}): "
                        f"choose a mesh whose product is {count}{hint}")
    # Auto axes: the model code is written without shardings and XLA places its collectives. make_mesh's default is Explicit.
    auto = (AxisType.Auto,) * 2
    try:
        grid = _between_hosts(data, model)
        return jax.make_mesh((data, model), (DATA, MODEL), auto) if grid is None else Mesh(grid, (DATA, MODEL), axis_types=auto)
    except NotImplementedError:  # an axis takes whole dimensions of a TPU slice
        raise UserError(f"mesh {data}x{model} cannot be laid on this slice of {count} chips, whose dimensions it would cut: "
                        "choose one whose numbers are products of them; optima_tpu.plan names the nearest") from None


def _between_hosts(data: int, model: int) -> np.ndarray | None:
    """All devices [data, model] where ``jax.make_mesh`` does not do it: they belong to several slices. Else None."""
    devices = jax.devices()
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        return None
    if devices[0].platform != "tpu":  # XLA numbers hosts of GPUs so; NCCL reaches them all, those of one host are consecutive
        return np.array(devices).reshape(data, model)
    # TPU slices, which reach each other through the data centre's network: only sums over data cross it.
    if data % len(slices):
        raise UserError(f"mesh {data}x{model} does not fit {len(slices)} slices of {len(devices) // len(slices)} devices: "
                        f"choose one whose first number is a multiple of {len(slices)}")
    return mesh_utils.create_hybrid_device_mesh((data // len(slices), model), (len(slices), 1), devices)


def simulate_devices(count: int | None) -> None:
    """Makes this process see ``count`` devices of the CPU and no other of its own; None changes nothing.

    To be called before the first array exists: the number of devices is fixed from then on.
    """
    if count is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)


def divisible(mesh: Mesh, shape: tuple[int, ...], spec: P) -> P:
    """``spec`` without the axes that do not divide ``shape``: such a dimension is replicated instead."""
    def fit(size: int, axes):
        names = (axes,) if isinstance(axes, str) else (axes or ())
        return axes if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None
    return P(*(fit(size, axes) for size, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)))))


def spread(mesh: Mesh, shape: tuple[int, ...], spec: P = P()) -> P:
    """``spec`` with the axes that it leaves out added where they divide a dimension.

    No two devices have the same part of such an array; from there, one all-gather over the added axes leads to ``spec``.
    """
    names = [[axes] if isinstance(axes, str) else list(axes or ()) for axes in divisible(mesh, shape, spec)]
    for axis in (MODEL, DATA):
        if not any(axis in dimension for dimension in names):
            for size, dimension in zip(shape, names):
                if size % math.prod(mesh.shape[name] for name in (*dimension, axis)) == 0:
                    dimension.append(axis)
                    break
    return P(*(tuple(dimension) or None for dimension in names))


def place(mesh: Mesh, array: np.ndarray, spec: P) -> jax.Array:
    """Puts a host array, the same in every process, on the mesh; dimensions that do not divide are replicated."""
    sharding = NamedSharding(mesh, divisible(mesh, array.shape, spec))
    # device_put would gather the whole array from every process to compare them.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def struct_on(mesh: Mesh, shape: tuple[int, ...], dtype: np.dtype, spec: P) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of an array that :func:`place` would put there."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, divisible(mesh, shape, spec)))


def bytes_on_device(*arrays: jax.ShapeDtypeStruct) -> int:
    """What arrays take on each device."""
    return sum(math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in arrays)


def padded(count: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the problems of a layer input lie on the mesh while they are solved.

    Attributes:
      split: one device does not hold the Hessian: its columns, and the features of all rows, are split over the model axis,
        which must divide d_in; rows are split over the data axis. Otherwise rows are split over both and the Hessian is on
        every device.
      rows: how many rows a device solves at once, at most; None stands for all that it has.
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
        """Where a device's features are."""
        return Features(MODEL) if self.split else WHOLE


ON_EVERY_DEVICE = Layout()
"""The ordinary layout: the Hessian on every device, all rows of a device at once."""


def map_rows(prepare: Callable, mesh: Mesh, layout: Layout, out_specs) -> Callable:
    """Runs a function of rows on the mesh: ``(hessian, *rows) -> outputs``, every array of rows [d_out, d_in].

    Each device runs it on its own rows, in equal batches where the layout says so. A row count that does not divide is padded
    with rows of zeros and cut again.

    Args:
      prepare: ``(hessian, features) -> (*rows -> outputs)``. Called once on every device, with what it has of the Hessian; the
        function it returns is called for every batch.
      mesh: axes ("data", "model").
      out_specs: of the outputs, ``layout.matrix`` or ``layout.vector`` for each.
    """
    shares = mesh.size if not layout.split else mesh.shape[DATA]

    def mapped(hessian, *arrays):
        count = arrays[0].shape[0]
        each = -(-count // shares)
        batches = -(-each // (layout.rows or each))
        extra = padded(count, shares * batches) - count

        def local(hessian, *arrays):
            run = prepare(hessian, layout.features)
            if batches == 1:
                return run(*arrays)
            parts = tuple(array.reshape(batches, -1, array.shape[1]) for array in arrays)
            found = jax.lax.map(lambda part: run(*part), parts)
            return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found)

        # check_vma: MPAX's loops carry values that vary over the mesh beside constants, which the checker refuses.
        found = jax.shard_map(local, mesh=mesh, in_specs=(layout.hessian, *[layout.matrix] * len(arrays)), out_specs=out_specs,
                              check_vma=False)(
            hessian, *(jnp.pad(array, ((0, extra), (0, 0))) if extra else array for array in arrays))
        return jax.tree.map(lambda array: array[:count], found)

    return mapped


def over_rows(solve: Callable, mesh: Mesh, layout: Layout = ON_EVERY_DEVICE, out_specs: Any = None) -> Callable:
    """Runs a row solver with its rows split over the mesh: ``(problem, pruned) -> Solution``.

    Each device runs the solver's loop on its own rows and stops on its own. There is no communication inside where every device
    has the Hessian, but for inverses that are made before it (``solvers.inverse``); where it is split, the devices of one row of
    the mesh step together. Rows that are padded have nothing to solve: weights and mask are all zero.

    Args:
      solve: ``(problem, pruned) -> Solution``; see ``optima_tpu.solvers.Solver``.
      mesh: axes ("data", "model").
      layout: one that splits the Hessian needs a solver with ``prepare``.
      out_specs: of what the solver returns; None stands for a Solution.
    """
    def prepare(hessian, features):
        ready = prepared(solve, hessian, features)
        return lambda weight, linear, *pruned: ready(LayerProblem(weight, hessian, linear), Pruned(*pruned))

    run = map_rows(prepare, mesh, layout, out_specs or solution_specs(layout))
    return lambda problem, pruned: run(problem.hessian, problem.weight, problem.linear, *pruned)


def prepared(solve: Callable, hessian: jax.Array, features: Features) -> Callable:
    """The solver of any rows of a Hessian, with what depends on it alone already done where the solver can; see ``Solver``."""
    return solve.prepare(hessian, features) if hasattr(solve, "prepare") else solve


def solution_specs(layout: Layout) -> Solution:
    """Where the parts of a Solution lie."""
    return Solution(layout.matrix, layout.vector, layout.vector, layout.vector)
