"""The devices of a plan: attached devices, or a TPU slice elsewhere."""

import importlib.util
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from optima_tpu.errors import UserError, plural, refusing
from optima_tpu.method.linalg.features import rough_matmul
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.device_memory import host_memory
from optima_tpu.runtime.mesh import DATA, MODEL, make_mesh, parse_mesh, platform

GIB = 2**30
TRANSFER, READING = 8e9, 1e9
"""Bytes/s between a host and its devices, and of weights from the disk of a host."""
WRITING = 0.5e9
"""Bytes/s of the run directory, all hosts together."""
MOST_CHIPS = 1 << 16
"""Chips of a slice; the largest that Google Cloud has are below 10,000."""


class Chip(NamedTuple):
    """Memory and rates of one device. Rates are per second.

    Attributes:
      memory: bytes.
      narrow: FLOPs of bfloat16 products; if measured, of products in the model's dtype.
      wide: FLOPs of float32 products at full precision; on a TPU these are six passes of bfloat16 products.
      rough: FLOPs of float32 products that only choose, see ``linalg.features.rough_matmul``; on a TPU three passes.
      factor: FLOPs of a Cholesky factorisation and of a triangular solve.
      bandwidth: bytes of device memory.
      link: bytes from a chip to one of its neighbours, in one direction; None if unknown.
      source: the origin of the numbers.
    """

    name: str
    memory: int
    narrow: float
    wide: float
    rough: float
    factor: float
    bandwidth: float
    link: float | None
    source: str


# A blocked factorisation of one matrix keeps a systolic array mostly idle: an assumption, not a published figure.
_FACTOR_SHARE = 0.015


def _tpu(name: str, gib: int, tflops: float, gb_per_second: float, link: float | None) -> Chip:
    """A chip from Google Cloud's figures. ``link`` is in GB/s."""
    peak = tflops * 1e12
    return Chip(
        f"TPU {name}",
        gib * GIB,
        peak,
        peak / 6,
        peak / 3,
        _FACTOR_SHARE * peak,
        gb_per_second * 1e9,
        link and link * 1e9,
        f"docs.cloud.google.com/tpu/docs/{name}",
    )


CHIPS = {
    chip.name.removeprefix("TPU "): chip
    for chip in (
        _tpu("v4", 32, 275, 1200, None),
        _tpu("v5e", 16, 197, 819, 400 / 4 / 2),
        _tpu("v5p", 95, 459, 2765, 1200 / 6 / 2),
        _tpu("v6e", 32, 918, 1640, 800 / 4 / 2),
    )
}
"""Google Cloud's published figures of a chip: HBM, bfloat16 peak, HBM bandwidth, and the inter-chip bandwidth of all its ports in
both directions: four in a two-dimensional torus, six in a three-dimensional one (v4's page has none)."""


class Machine(NamedTuple):
    """The devices that a run is planned for.

    Attributes:
      name: as the user typed it, or a description of the attached devices.
      chip: one device of the mesh.
      mesh: axes ("data", "model"); an AbstractMesh if nothing can be compiled for it.
      hosts: number of machines that the devices are attached to.
      utilisation: the assumed share of ``chip``'s rates for products and bandwidth.
      notes: lines for the user, such as that nothing was compiled.
      options: options of the compiler.
      here: whether these are the attached devices.
    """

    name: str
    chip: Chip
    mesh: Mesh | AbstractMesh
    hosts: int
    utilisation: float
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None
    here: bool = False

    @property
    def platform(self) -> str:
        """The platform of the devices; "tpu" if they are not attached."""
        return jax.default_backend() if self.here else "tpu"

    def moving(self, size: float) -> float:
        """Seconds in which hosts and devices exchange so many bytes."""
        return size / (TRANSFER * self.hosts)

    @property
    def compiles(self) -> bool:
        """Whether programs can be compiled for the mesh."""
        return isinstance(self.mesh, Mesh)


def parse_topology(text: str) -> tuple[str, tuple[int, ...]]:
    """Reads "v5e:4x2" or "v5p:4x4x4" into kind and shape.

    Raises:
      UserError: the text has another form, the kind is not in :data:`CHIPS`, or the shape splits a host.
    """
    match = re.fullmatch(r"([a-z]\w*):([1-9]\d{0,8}(?:x[1-9]\d{0,8}){1,2})", text.strip().lower())
    if not match:
        raise UserError(
            f"expected a topology KIND:AxB or KIND:AxBxC, such as v5e:4x2 or v5p:4x4x4, got {text!r}{_by_count(text)}"
        )
    if match[1] not in CHIPS:
        raise UserError(f"expected a topology of {', '.join(CHIPS)}, such as v5e:4x2, got {text!r}")
    shape = tuple(map(int, match[2].split("x")))
    Bound(1, MOST_CHIPS).refuse("the chips of a topology", math.prod(shape))
    fitting = [(*(_of_hosts(size, up) for size in shape[:2]), *shape[2:]) for up in (False, True)]
    if shape not in fitting:
        near = " or ".join(f"{match[1]}:{'x'.join(map(str, each))}" for each in fitting)
        raise UserError(f"expected a slice of whole hosts, each of 2x2 chips, such as {near}, got {text!r}")
    return match[1], shape


def _by_count(text: str) -> str:
    """What to type instead of an accelerator type such as v5litepod-8.

    Such a type names a number of chips. Empty for any other text.
    """
    match = re.fullmatch(r"(v5litepod|v5e|v6e)-(\d{1,3})", text.strip().lower())
    chips = int(match[2]) if match else 0
    if not match or chips & (chips - 1) or not 1 <= chips <= 256:
        return ""
    short = 1 << (chips.bit_length() - 1) // 2
    return f"; type {match[1].replace('v5litepod', 'v5e')}:{short}x{chips // short}"


def _of_hosts(size: int, up: bool) -> int:
    """A dimension that hosts fill: ``size``, or the next power of two."""
    return 1 << size.bit_length() - (not up) if size > 1 and size % 2 else size


def has_libtpu() -> bool:
    """Whether the TPU's compiler is installed; no TPU is needed for it."""
    return importlib.util.find_spec("libtpu") is not None


# JAX 0.12 has levels in the place of efforts.
_HAS_EFFORTS = hasattr(jax.config, "jax_exec_time_optimization_effort")
QUICK: Mapping[str, Any] = MappingProxyType(
    {"exec_time_optimization_effort": -1.0} if _HAS_EFFORTS else {"optimization_level": "O1"}
)
"""The TPU compiler's least effort: a minute or two for a plan, where full effort took more than five minutes for one solver.
With full effort, programs needed 0.65 to 1.27 times the memory."""


_UNCOMPILED = "nothing was compiled (--no-compile): memory comes from a simple model"


def topology_machine(text: str, mesh: str | None, compiling: bool = True, quick: bool = False) -> Machine:
    """A TPU slice that need not be attached.

    Without libtpu nothing is compiled for the slice, and a note says so.

    Args:
      text: see :func:`parse_topology`.
      mesh: as for a run.
      quick: compile with :data:`QUICK`.

    Raises:
      UserError: see :func:`parse_topology`; the compiler knows no such slice; or the mesh does not fit the slice.
    """
    kind, shape = parse_topology(text)
    chip, devices, count = CHIPS[kind], None, math.prod(shape)
    hosts, notes = -(-count // 4), []
    # docs.cloud.google.com/tpu/docs/v5e and v6e; the compiler knows more slices
    if kind in ("v5e", "v6e") and count & (count - 1):
        notes.append(f"Google Cloud has {kind} slices of 1, 4, 8, 16, 32, 64, 128 and 256 chips, and none of {count}")
    if not compiling:
        notes.append(_UNCOMPILED)
    elif not has_libtpu():
        notes.append(
            "libtpu is not installed, so nothing was compiled: memory comes from a simple model; "
            "for the compiler's own figures: pip install '.[tpu]' in the directory of the repository"
        )
    else:
        described = _describe(text, kind, shape)
        devices = described.devices
        hosts = len({device.process_index for device in devices})  # type: ignore[attr-defined]  # jax declares no attributes
        if len(devices) > count:  # cores of a chip that jax sees one by one
            cores = len(devices) // count
            chip = chip._replace(
                memory=chip.memory // cores,
                **{rate: getattr(chip, rate) / cores for rate in ("narrow", "wide", "rough", "factor", "bandwidth")},
            )
            notes.append(f"a {kind} chip counts as {plural(cores, 'device')}: figures are per device")
    cores = len(devices) // count if devices else 1
    # jax.make_mesh splits the dimensions of a v5e slice as needed, but of no other kind.
    sizes = fitting_mesh(mesh, _primes(count) if kind == "v5e" else (*shape, cores), text)
    made: Mesh | AbstractMesh
    if devices:
        made = jax.make_mesh(sizes, (DATA, MODEL), (AxisType.Auto,) * 2, devices=devices)
    else:
        made = AbstractMesh(sizes, (DATA, MODEL), abstract_device=AbstractDevice(chip.name, None, "tpu"))
    if devices and quick:
        notes.append(
            "compiled with the least effort (--quick): with full effort, as in runs, programs took 0.65 to 1.27 times the memory"
        )
    return Machine(text, chip, made, hosts, 0.5, tuple(notes), QUICK if quick else None)


def _describe(text: str, kind: str, shape: tuple[int, ...]) -> topologies.TopologyDescription:
    """The slice as libtpu knows it."""
    # Otherwise libtpu would query the machine it runs on, and refuse to be loaded by two processes. What jax found out about this
    # machine when it was imported does not matter here.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    slice_name = f"{kind}:{'x'.join(map(str, shape))}"
    # A host has 2x2 chips; in a smaller slice it has all chips of the slice.
    host = [min(2, size) for size in shape[:2]] + [1]
    options: dict[str, str | list[int]] = {} if math.prod(host) == 4 else {"chips_per_host_bounds": host}
    if kind == "v4":  # a real slice shows the two cores of a chip as one device; by default this description does not
        options["chip_config_name"] = "megacore"
    what = f"expected a TPU slice that exists, got {text!r}"
    with refusing(jax.errors.JaxRuntimeError, what, f"give one such as {kind}:2x2"):
        return topologies.get_topology_desc(slice_name, platform="tpu", **options)


def fitting_mesh(text: str | None, shape: tuple[int, ...], where: str) -> tuple[int, int]:
    """The requested mesh (data, model), over all devices of a slice.

    Args:
      text: see ``mesh.parse_mesh``; None puts all devices on the data axis.
      shape: of the devices; an axis of the mesh is a product of whole dimensions of it.
      where: the name of the slice.

    Raises:
      UserError: the mesh does not fit. The message names the nearest one that fits, by the least sum of squares of
        ``log(new / requested)`` over both axes. Of two at the same distance it is the one with the larger model axis, which needs
        less memory.
    """
    count = math.prod(shape)
    requested = parse_mesh(text) if text else (count, 1)
    models = {math.prod(part) for size in range(len(shape) + 1) for part in itertools.combinations(shape, size)}
    pairs = [(count // model, model) for model in models]
    best = min(pairs, key=lambda pair: (sum(math.log(new / old) ** 2 for new, old in zip(pair, requested)), -pair[1]))
    if best == requested:
        return best
    why = (
        f"needs {plural(math.prod(requested), 'device')}, {where} has {count}"
        if math.prod(requested) != count
        else f"splits a dimension of {where}, which jax.make_mesh does not do there"
    )
    raise UserError(f"mesh {requested[0]}x{requested[1]} {why}: the nearest that fits is --mesh {best[0]}x{best[1]}")


def _primes(number: int) -> tuple[int, ...]:
    """The prime factors, each as often as it divides."""
    factor = next((factor for factor in range(2, number + 1) if number % factor == 0), None)
    return (factor, *_primes(number // factor)) if factor else ()


def local_machine(mesh: str | None, dtype: jnp.dtype, compiling: bool = True) -> Machine:
    """The attached devices. Measures their rates, which takes a second.

    Args:
      mesh: as for a run.
      dtype: the dtype of the model.

    Raises:
      UserError: the mesh does not fit the devices.
    """
    platform()
    made = make_mesh(mesh)
    count, first = jax.device_count(), jax.devices()[0]
    where = f"{plural(count, f'{first.platform} device')} here"
    stats = first.memory_stats() or {}
    # Simulated devices share the memory and the cores of the host.
    sharing = count if first.platform == "cpu" else 1
    memory = stats.get("bytes_limit") or host_memory() // sharing
    cores, clock, notes = os.cpu_count() or 1, time.perf_counter, list[str]()
    if first.platform == "cpu" and (load := os.getloadavg()[0]) > cores:
        clock = _computed
        notes.append(
            f"other programs keep the {plural(cores, 'core')} of this machine busy (load {load:.1f}): the times are those of a "
            f"machine without them, but for compiling. Beside them a run takes about {1 + load / cores:.0f} times as long"
        )
    narrow, wide, rough, bandwidth = (rate / sharing for rate in _measure(dtype, clock))
    chip = Chip(first.device_kind, memory, narrow, wide, rough, 0.3 * wide, bandwidth, None, "measured here")
    if not compiling:
        notes.append(_UNCOMPILED)
    return Machine(where, chip, made if compiling else made.abstract_mesh, jax.process_count(), 0.8, tuple(notes), here=True)


def _computed() -> float:
    """A clock of the processor time of this process, divided by all cores.

    It stands still while the process waits for a core.
    """
    return time.process_time() / (os.cpu_count() or 1)


def _measure(dtype: jnp.dtype, clock: Callable[[], float], size: int = 1024) -> tuple[float, float, float, float]:
    """Measures the rates of the first device.

    Returns FLOP/s of products in ``dtype``, in full float32 and in rough float32, and bytes/s of a sum of two arrays.
    """

    def seconds(function: Callable[..., Array], *arrays: Array) -> float:
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(*arrays))
        best = math.inf
        for _ in range(20):  # what runs beside it slows some of them
            start = clock()
            jax.block_until_ready(compiled(*arrays))
            best = min(best, clock() - start)
        return best

    def product(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)

    wide = jnp.ones((size, size))
    narrow, large = wide.astype(dtype), jnp.ones((32, size, size))
    other = large + 1  # a sum of an array and itself reads one array
    flops = 2 * size**3
    return (
        flops / seconds(product, narrow, narrow),
        flops / seconds(product, wide, wide),
        flops / seconds(rough_matmul, wide, wide),
        3 * large.nbytes / seconds(jnp.add, large, other),
    )
