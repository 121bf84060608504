"""The device mesh, and how arrays are sharded over it.

Two axes: ``data`` splits calibration windows, ``model`` splits weights and the columns of Hessians. The rows of a layer's
problems are split over both, so that every device solves its own.
"""

import math
from typing import cast

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError, plural, refusing
from optima_tpu.runtime.bounds import MOST, Bound, whole

DATA, MODEL = "data", "model"

MOST_DEVICES = 4096
"""Simulated devices of one process."""

ROWS = P((DATA, MODEL))
"""The spec of an array whose first axis is the rows of a layer."""


def devices_words(mesh: Mesh) -> str:
    """Devices, mesh and processes, as a command prints them about itself."""
    several = f" in {plural(jax.process_count(), 'process')}" if jax.process_count() > 1 else ""
    return f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {mesh.shape[DATA]}x{mesh.shape[MODEL]}{several}"


def parse_mesh(text: str) -> tuple[int, int]:
    """Reads "4x2" or "data=4,model=2" into (data, model).

    Raises:
      UserError: the text is neither.
    """
    try:
        if "=" in text:
            pairs = [part.split("=") for part in text.split(",")]
            sizes = dict(pairs)
            if set(sizes) - {DATA, MODEL}:
                raise ValueError
            if len(sizes) < len(pairs):
                raise UserError(f"expected a mesh with each axis once, such as data=4,model=2, got {text!r}")
            data, model = (whole(sizes.get(axis, "1")) for axis in (DATA, MODEL))
        else:
            data, model = (whole(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(f"expected a mesh such as 4x2 or data=4,model=2, got {text!r}") from None
    if data < 1 or model < 1:
        raise UserError(f"expected a mesh with at least 1 device on each axis, such as 4x2, got {text!r}")
    Bound(most=MOST).refuse("the devices of a mesh", data * model)
    return data, model


def on_cpu(mesh: Mesh | AbstractMesh) -> bool:
    """Whether a mesh has devices that are CPUs and use the host's memory."""
    return isinstance(mesh, Mesh) and all(device.platform == "cpu" for device in mesh.devices.flat)


def on_tpu(mesh: Mesh | AbstractMesh) -> bool:
    """Whether a mesh is known to be of TPUs, which need not be attached."""
    if isinstance(mesh, AbstractMesh):
        return mesh.abstract_device is not None and mesh.abstract_device.platform == "tpu"
    return all(device.platform == "tpu" for device in mesh.devices.flat)


def make_mesh(text: str | None) -> Mesh:
    """The device mesh with axes ("data", "model").

    Args:
      text: see :func:`parse_mesh`; None puts all devices on the data axis.

    Raises:
      UserError: the mesh does not use all devices, or uses more.
    """
    count = jax.device_count()
    data, model = parse_mesh(text) if text else (count, 1)
    refuse_count((data, model), count, jax.devices()[0].platform, jax.process_count())
    # Auto axes: the model code is written without shardings and XLA inserts collectives. make_mesh's default is Explicit.
    auto = (AxisType.Auto,) * 2
    unfit = (
        f"mesh {data}x{model} does not fit this slice of {count} chips: each axis must be a product of whole dimensions of "
        "the slice. Choose such a mesh; optima plan with --topology, such as v5e:4x2, and --mesh names the nearest"
    )
    with refusing(NotImplementedError, unfit):  # an axis takes whole dimensions of a TPU slice
        grid = _between_hosts(data, model)
        return jax.make_mesh((data, model), (DATA, MODEL), auto) if grid is None else Mesh(grid, (DATA, MODEL), axis_types=auto)


def refuse_count(mesh: tuple[int, int], count: int, kind: str, processes: int) -> None:
    """Raises UserError for a mesh of more or fewer than ``count`` devices."""
    data, model = mesh
    if data * model != count:
        each, left = divmod(data * model, processes)
        where = " in every process" if processes > 1 else ""
        simulates = kind == "cpu" and not left and 0 < each <= MOST_DEVICES
        hint = f", or --cpu_devices {each}{where} to simulate it" if simulates else ""
        raise UserError(
            f"mesh {data}x{model} needs {plural(data * model, 'device')}, there {'is' if count == 1 else 'are'} {count} "
            f"({kind}): choose a mesh whose product is {count}{hint}"
        )


def _between_hosts(data: int, model: int) -> np.ndarray | None:
    """All devices [data, model] of several slices; None for a single slice."""
    devices = jax.devices()
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        return None  # jax.make_mesh takes the devices of one slice alone
    if devices[0].platform != "tpu":  # XLA gives each GPU host a slice index; NCCL connects all, and a host's are consecutive
        return np.array(devices).reshape(data, model)
    # The data centre's network connects TPU slices: only sums over the data axis cross it.
    if data % len(slices):
        raise UserError(
            f"mesh {data}x{model} does not fit {len(slices)} slices of {plural(len(devices) // len(slices), 'device')}: "
            f"choose one whose first number is a multiple of {len(slices)}"
        )
    return mesh_utils.create_hybrid_device_mesh((data // len(slices), model), (len(slices), 1), devices)


def platform() -> str:
    """The platform of the devices: cpu, gpu or tpu. Starts JAX.

    Raises:
      UserError: JAX was told to use a platform that it cannot use here.
    """
    what = f"expected devices of JAX_PLATFORMS={jax.config.values['jax_platforms']}, but JAX finds none"
    remedy = (
        "install JAX for them (pip install '.[gpu]' or '.[tpu]' in the directory of the repository) on a machine that has them, "
        "or unset JAX_PLATFORMS"
    )
    with refusing((RuntimeError, AssertionError), what, remedy):  # jax 0.10 asserts that there is a GPU
        return jax.default_backend()


def simulate_devices(count: int | None) -> None:
    """Gives this process ``count`` simulated CPU devices alone, unless None.

    Raises:
      UserError: JAX has its devices already, since the first array exists, and another number of them.
    """
    if count is None:
        return
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise UserError(
            f"expected cpu_devices before JAX has started, which has {plural(jax.device_count(), 'device')} now: restart Python, "
            "or leave cpu_devices out"
        ) from None


def has_devices() -> bool:
    """Whether JAX has taken its devices."""
    # No function of JAX says so, but from then on JAX refuses another number of CPU devices.
    count = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_num_cpu_devices", count + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", count)
    return False


def divisible(mesh: Mesh, shape: tuple[int, ...], spec: P) -> P:
    """``spec`` without the mesh axes that do not divide their dimension."""

    def fit(size: int, axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else (axes or ())
        return axes if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return P(*(fit(size, axes) for size, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)))))


def spread(mesh: Mesh, shape: tuple[int, ...], spec: P = P()) -> P:
    """``spec`` plus each unused mesh axis, on the first dimension it divides.

    If all axes are used, each device holds a different part of the array. One all-gather over the added axes restores ``spec``.
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
    """Puts a host array that is equal in every process on the mesh."""
    sharding = NamedSharding(mesh, divisible(mesh, array.shape, spec))
    # device_put would gather the whole array from every process, to compare the copies.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def struct_on(mesh: Mesh, shape: tuple[int, ...], dtype: np.dtype, spec: P) -> jax.Array:
    """Shape, dtype and sharding of the array that :func:`place` would make.

    A ``jax.ShapeDtypeStruct``. Its declared type is ``jax.Array``, as for a tracer, so that the same trees can hold both.
    """
    axes = list(divisible(mesh, shape, spec))
    # Without a None at the end, as jit writes the sharding of a result: for one sharding written in two ways it compiles twice.
    while axes and axes[-1] is None:
        axes.pop()
    return cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes))))


def bytes_on_device(*arrays: jax.Array) -> int:
    """The bytes that arrays take on each device."""
    return sum(math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in arrays)


def padded(count: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple
