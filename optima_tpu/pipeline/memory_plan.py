"""What fits on a device: where a layer's Hessian lies, how many rows are solved at once, how many Hessians are held at once.

All of it follows from one budget of bytes. What pruning the matrices of one layer input takes is modelled as

    4 bytes * f * (d_in * (hessians + 2 m - 1)  +  held * r  +  vectors * b)     (and a few panels where the Hessian is split)

with ``r`` rows on a device, ``b`` of them at once and ``f`` features of each: ``d_in``, or ``d_in / model`` where the Hessian is
split over the model axis. ``hessians`` and ``vectors`` are the solver's :class:`Footprint`, ``held`` are the rows that
``prune.prune_group`` keeps before and after the solve, and ``m`` matrices are held of the calibration and of the held-out tokens
each: the Hessian, and with a dense target the cross term. The numbers were fitted to what XLA reports for ``prune_group``
(arguments, outputs and temporaries; CPU, jax 0.10) and rounded up.
"""

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from optima_tpu.errors import UserError
from optima_tpu.method.footprint import Footprint, footprint_of
from optima_tpu.method.linalg.features import divided
from optima_tpu.method.row_sharding import ON_EVERY_DEVICE, Layout
from optima_tpu.runtime.device_memory import GIB
from optima_tpu.runtime.mesh import DATA, MODEL, bytes_on_device, struct_on

# Of the budget, for the Hessians of a pass: while they are accumulated, products and sums of the same size lie beside them.
_HESSIANS_SHARE = 0.25

# A block's weights lie on the devices as they were read and as they are pruned, with their masks.
_BLOCK_COPIES = 2.5

# Fitted: 7.5 vectors a row (dense, masked, linear, solved, stored before and after).
_HELD = 8

# With a dense target: its pull on both sets of tokens, and the best so far where it is tuned.
_HELD_FOR_TARGET = 3

# Where the drift of the residual stream is aimed at: as it comes and as it is laid out, of both sets of tokens.
_HELD_FOR_RESIDUAL = 4

# Where the Hessian is split, its inverse is made with panels of so many columns, and this many of them exist at once.
_PANEL, _PANELS = 128, 4

# Fewer rows at once leave a device waiting for the bytes of the Hessian; it is done where nothing else fits.
_FEW_ROWS = 64


def needed(
    d_in: int, rows: int, batch: int, mesh: Mesh, footprint: Footprint, split: bool, matrices: int = 1, residual: bool = False
) -> float:
    """The bytes on a device of pruning ``rows`` rows on a mesh, ``batch`` of a device's at once: the equation of the module."""
    model = mesh.shape[MODEL]
    features = d_in / model if split else d_in
    # A product with split features gathers the rows: a whole row for A and one for X are ``model`` parts each.
    vectors = footprint.vectors + (2 * model if split else 0)
    panels = 4 * d_in * _PANELS * min(_PANEL, features) if split else 0
    held = _HELD + _HELD_FOR_TARGET * (matrices - 1) + _HELD_FOR_RESIDUAL * residual
    return panels + 4 * features * (
        d_in * (footprint.hessians + 2 * matrices - 1) + held * _each(rows, mesh, split) + vectors * batch
    )


def layout(
    name: str,
    d_in: int,
    rows: int,
    budget: float,
    mesh: Mesh,
    solver: Any,
    selector: Any,
    matrices: int = 1,
    residual: bool = False,
) -> Layout:
    """The layout of the matrices that read one input: the first that fits of

    the Hessian on every device and enough rows at once, the Hessian split, and both with few rows.

    Args:
      name: of a layer that reads it, for messages.
      rows: of all matrices together.
      budget: bytes of a device that are left for them.
      solver, selector: of the recipe, None where it has none. A solver tells its ``footprint``; a selector tells as
        ``hessians`` how many matrices of that size it holds, 0 where it reads the diagonal alone.
      matrices: of that size that are held of each set of tokens.
      residual: whether the drift of the residual stream is aimed at.

    Raises:
      UserError: none fits.
    """
    if budget == math.inf:
        return ON_EVERY_DEVICE
    footprint = footprint_of(solver, selector)
    take = functools.partial(needed, d_in, rows, mesh=mesh, footprint=footprint, matrices=matrices, residual=residual)
    can_split = footprint.split and d_in % mesh.shape[MODEL] == 0 and mesh.shape[MODEL] > 1
    for few in (_FEW_ROWS, 1):
        for split in (False, True)[: 1 + can_split]:
            each = _each(rows, mesh, split)
            most = 0
            if take(min(few, each), split=split) <= budget:
                row = take(1, split=split) - take(0, split=split)
                most = int((budget - take(0, split=split)) / row)
            if most:
                return Layout(split, None if most >= each else -(-each // -(-each // most)))
    least = take(1, split=can_split)
    methods = " and ".join(_named(method) for method in (selector, solver) if method is not None)
    where = "split over the model axis" if can_split else "on every device"
    raise UserError(
        f"{name} has {d_in} inputs: with its Hessian {where}, {methods} would take {least / GIB:.3g} GiB a device, expected "
        f"at most {max(budget, 0) / GIB:.3g} GiB, what --device_memory leaves beside weights and Hessians. Take --selector "
        "wanda, --refine null and --solver cg with a damping of 1e-4 or more, for which a Hessian can be split, on a --mesh "
        f"with a larger model axis that divides {d_in}; or a larger --device_memory, or devices with more memory"
    )


def _named(method: Any) -> str:
    """A selector or a solver, also one with exchanges around it."""
    inner = getattr(method, "solver", None)
    return type(method).__name__ if inner is None else f"{type(inner).__name__} with exchanges"


class Pass(NamedTuple):
    """Layers whose Hessians are on the devices at the same time."""

    groups: tuple[tuple[str, ...], ...]
    layouts: tuple[Layout, ...]  # one for each group


def passes(
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    groups: Sequence[tuple[str, ...]],
    weights: float,
    budget: float,
    mesh: Mesh,
    solver: Any,
    selector: Any,
    matrices: int = 1,
    residuals: Collection[str] = (),
) -> tuple[Pass, ...]:
    """Cuts the groups of a block, in their order, into passes whose Hessians fit a share of the budget.

    Args:
      prefix: of the block's layers, for messages.
      shapes: of the block's parameters, by name.
      groups: layers that read one input together.
      weights: bytes of the block's parameters on a device; see :func:`block_bytes`.
      budget: see :func:`device_budget`; infinite for one pass with everything on every device.
      matrices: see :func:`layout`.
      residuals: layers whose target holds the drift of the residual stream, by name.

    Raises:
      UserError: see :func:`layout`.
    """

    def hessians(names: tuple[str, ...]) -> float:
        d_in = shapes[names[0] + ".weight"][1]
        rows = matrices * d_in + sum(shapes[name + ".weight"][0] for name in names if name in residuals)
        # Of the calibration and of the held-out tokens.
        return 2 * 4 * rows * d_in / (mesh.shape[MODEL] if d_in % mesh.shape[MODEL] == 0 else 1)

    def beside(names: tuple[str, ...], part: Sequence[tuple[str, ...]]) -> float:
        """Bytes of the pass' Hessians that are not counted by :func:`needed`."""
        # Those of the input itself are counted there. But in columns they are gathered from others that stay, and a TPU that
        # makes its inverses alone takes about as much again for panels, which were not fitted.
        as_they_come = mesh.shape[MODEL] == 1 and divided(shapes[names[0] + ".weight"][1], mesh.size)
        return sum(hessians(other) for other in part if other != names or not as_they_come)

    def fitted(share: float) -> tuple[Pass, ...]:
        cut: list[list[tuple[str, ...]]] = []
        for names in groups:
            if not cut or sum(map(hessians, [*cut[-1], names])) > share * budget:
                cut.append([])
            cut[-1].append(names)
        return tuple(
            Pass(
                tuple(part),
                tuple(
                    layout(
                        prefix + names[0],
                        shapes[names[0] + ".weight"][1],
                        sum(shapes[name + ".weight"][0] for name in names),
                        budget - _BLOCK_COPIES * weights - beside(names, part),
                        mesh,
                        solver,
                        selector,
                        matrices,
                        any(name in residuals for name in names),
                    )
                    for names in part
                ),
            )
            for part in cut
        )

    try:
        return fitted(_HESSIANS_SHARE)
    except UserError:
        return fitted(0)  # one layer input at a time leaves it the most


def block_bytes(decoder: Any, index: int) -> float:
    """The bytes on each device of a block's parameters as they are read."""
    prefix, tensors = decoder.prefix(index), decoder.tensors
    return bytes_on_device(
        *(
            struct_on(decoder.mesh, shape, tensors.dtype(prefix + name), decoder.sharding(name))
            for name, shape in decoder.block_shapes.items()
        )
    )


def described(found: Sequence[Pass], ordinary: int = 1) -> str:
    """What is split or done in parts, for the person who reads; empty in the ordinary case.

    Args:
      found: of a block.
      ordinary: how many passes there are with memory enough.
    """
    told = {}  # in the order of the layers, each once
    for names, where in (pair for each in found for pair in zip(*each)):
        words = [f"{where.rows} rows at once"] * (where.rows is not None) + ["Hessian split over model"] * where.split
        if words:
            told[f"{names[0]}: {', '.join(words)}"] = None
    if len(found) > ordinary:
        told[f"Hessians of a block in {len(found)} passes"] = None
    return "; ".join(told)


def _each(rows: int, mesh: Mesh, split: bool) -> int:
    return -(-rows // (mesh.shape[DATA] if split else mesh.size))
