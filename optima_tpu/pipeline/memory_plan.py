"""Plans device memory: Hessian layouts, rows solved at once, passes.

All of it follows from one budget in bytes. The memory for pruning the matrices that read one input is modelled as

    4 bytes * f * (d_in * (hessians + 2 m - 1)  +  held * r  +  vectors * b)     (and a few panels where the Hessian is split)

A device holds ``r`` rows and solves ``b`` of them at once. Of each row it holds ``f`` features: ``d_in``, or ``d_in / model`` if
the Hessian is split over the model axis. ``hessians`` and ``vectors`` are the recipe's :class:`Footprint`. ``held`` counts the
vectors that ``prune_group`` keeps for each row before and after the solve. ``m`` matrices are held for the calibration tokens
and as many for the held-out tokens: the Hessian, and with a dense target the cross term. The numbers were fitted to XLA's report
for ``prune_group`` (arguments, outputs and temporaries; CPU, jax 0.10) and rounded up.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from optima_tpu.errors import UserError, plural
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.method.linalg.features import divided
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.resources import Footprint
from optima_tpu.method.row_sharding import ON_EVERY_DEVICE, RowLayout
from optima_tpu.method.statistics import Groups
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.experts import expert_of
from optima_tpu.pipeline.layer_groups import in_sequence
from optima_tpu.runtime.device_memory import GIB
from optima_tpu.runtime.mesh import DATA, MODEL, bytes_on_device, on_cpu, struct_on

# The share of the budget for the Hessians of a pass: while they are accumulated, products and sums of the same size exist too.
_HESSIANS_SHARE = 0.25

# The share of the budget that hidden states may take which stay on the devices.
_STATES_SHARE = 0.25

# The devices hold a block's weights twice, as read and as pruned, and its masks.
_BLOCK_COPIES = 2.5

# Fitted: 7.5 vectors a row (dense, masked, linear, solved, stored before and after).
_HELD = 8

# With a dense target: its linear term for both sets of tokens.
_HELD_FOR_TARGET = 3

# With the residual-drift correction: the drift as accumulated and as laid out for the solve, for both sets of tokens.
_HELD_FOR_RESIDUAL = 4

# A split Hessian is inverted in panels of _PANEL columns, and _PANELS of them exist at once.
_PANEL, _PANELS = 128, 4

# With fewer rows at once a device mostly waits for the bytes of the Hessian: taken only if nothing else fits.
_FEW_ROWS = 64


@dataclasses.dataclass(frozen=True)
class GroupLoad:
    """The memory that pruning the matrices of one input holds on the devices.

    Attributes:
      d_in: size of the input.
      rows: number of rows of all matrices together.
      footprint: of the recipe's methods.
      streams: number of matrices [d_in, d_in] for each set of tokens; 2 with a dense target.
      residual: whether the target includes the residual-drift correction.
    """

    d_in: int
    rows: int
    footprint: Footprint
    streams: int = 1
    residual: bool = False

    def rows_each(self, mesh: Mesh | AbstractMesh, split: bool) -> int:
        """The number of rows on a device."""
        return -(-self.rows // (mesh.shape[DATA] if split else mesh.size))

    def bytes(self, mesh: Mesh | AbstractMesh, split: bool, batch: int) -> float:
        """Bytes on a device for ``batch`` rows at once, see the module."""
        model = mesh.shape[MODEL]
        features = self.d_in / model if split else self.d_in
        # A product with split features gathers the rows: a whole row for A and one for X are ``model`` parts each.
        vectors = self.footprint.vectors + (2 * model if split else 0)
        panels = 4 * self.d_in * _PANELS * min(_PANEL, features) if split else 0
        held = _HELD + _HELD_FOR_TARGET * (self.streams - 1) + _HELD_FOR_RESIDUAL * self.residual
        matrices = self.d_in * (self.footprint.hessians + 2 * self.streams - 1)
        return panels + 4 * features * (matrices + held * self.rows_each(mesh, split) + vectors * batch)

    def can_split(self, mesh: Mesh) -> bool:
        """Whether the Hessian may be split over the model axis."""
        return self.footprint.split and self.d_in % mesh.shape[MODEL] == 0 and mesh.shape[MODEL] > 1

    def layout(self, mesh: Mesh, budget: float) -> RowLayout | None:
        """The first layout that fits the budget.

        Tries a replicated Hessian and enough rows at once, then a split Hessian, then both with few rows.

        Args:
          budget: bytes that are left for the group on a device.

        Returns:
          None if no layout fits.
        """
        if budget == math.inf:
            return ON_EVERY_DEVICE
        for few in (_FEW_ROWS, 1):
            for split in (False, True)[: 1 + self.can_split(mesh)]:
                each, most = self.rows_each(mesh, split), 0
                if self.bytes(mesh, split, min(few, each)) <= budget:
                    row = self.bytes(mesh, split, 1) - self.bytes(mesh, split, 0)
                    most = int((budget - self.bytes(mesh, split, 0)) / row)
                if most:
                    return RowLayout(split, None if most >= each else -(-each // -(-each // most)))
        return None


class Kept(NamedTuple):
    """The layers whose inputs a pass keeps for later, of each stream."""

    pruned: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


class Pass(NamedTuple):
    """A pass of tokens through a block, for layers whose Hessians fit at once.

    Attributes:
      groups: the layers, those that read one input together.
      layouts: one for each group.
      kept: the inputs that the pass keeps.
    """

    groups: Groups
    layouts: tuple[RowLayout, ...]
    kept: Kept = Kept()


def block_passes(decoder: Decoder, index: int, groups: Groups, recipe: Recipe, budget: float) -> tuple[Pass, ...]:
    """Divides a block's pruned layers into passes that fit the budget.

    The Hessians of a pass fit a share of the budget. Each group gets a layout.

    Args:
      groups: layers that read the same input.
      budget: see ``runtime.device_memory``; infinite for one pass with everything on every device.

    Raises:
      UserError: a layer does not fit the budget.
    """
    block = _Block(decoder.at(index), index, recipe, budget)
    planned = tuple(itertools.chain.from_iterable(map(block.passes, _parts(groups, recipe, block.prefix))))
    return tuple(part._replace(kept=kept) for part, kept in zip(planned, _kept_inputs(block.decoder, recipe, planned)))


def _parts(groups: Groups, recipe: Recipe, prefix: str) -> list[Groups]:
    """The parts of a block's pruned layers that need a pass each.

    With enough memory one pass is enough for all layers, or with ``recapture`` for the layers of one stage.
    """
    parts = (recipe.pruned_groups(part, prefix) for part in (in_sequence(groups) if recipe.recapture else (groups,)))
    return [part for part in parts if part]


def _kept_inputs(decoder: Decoder, recipe: Recipe, passes: Sequence[Pass]) -> tuple[Kept, ...]:
    """The inputs that each pass through the decoder's block keeps.

    Passes keep nothing without ``recapture``: all inputs come from the dense block. With it, the first pass behind attention,
    through the block as pruned so far, keeps the output of attention: no later layer changes it. The last pass keeps the input
    of its layer, if it is one layer, for the pruned block. It does so on CPU devices only, which share the memory of the host:
    on others the input, often the widest of the block, takes longer to move than to compute.
    """
    kept = [Kept()] * len(passes)
    if not recipe.recapture or not passes:
        return tuple(kept)
    attended, (names, *others) = decoder.attended, passes[-1].groups
    first = decoder.linears.index(attended)
    behind = (all(decoder.linears.index(name) >= first for names in part.groups for name in names) for part in passes)
    if (keeping := next((position for position, is_behind in enumerate(behind) if is_behind), None)) is not None:
        kept[keeping] = Kept((attended,), (attended,))
    if not others and len(names) == 1 and expert_of(names[0]) is None and on_cpu(decoder.mesh):
        kept[-1] = kept[-1]._replace(pruned=tuple(dict.fromkeys((*kept[-1].pruned, *names))))
    return tuple(kept)


def group_load(decoder: Decoder, names: tuple[str, ...], recipe: Recipe) -> GroupLoad:
    """The load of pruning some layers that read one input."""
    shapes, residuals = [decoder.block_shapes[name + ".weight"] for name in names], aimed_residuals(decoder, recipe)
    return GroupLoad(
        shapes[0][1],
        sum(d_out for d_out, _ in shapes),
        recipe.footprint(),
        recipe.target.streams,
        any(name in residuals for name in names),
    )


def aimed_residuals(decoder: Decoder, recipe: Recipe) -> Collection[str]:
    """The layers whose target includes the residual-drift correction."""
    return decoder.family.residuals if recipe.target.gamma else ()


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block whose layers are to be divided into passes."""

    decoder: Decoder
    index: int
    recipe: Recipe
    budget: float

    @property
    def prefix(self) -> str:
        return self.decoder.prefix(self.index)

    def passes(self, groups: Groups) -> tuple[Pass, ...]:
        """Divides the groups into passes, in their order."""
        try:
            return self._cut(groups, _HESSIANS_SHARE)
        except UserError:
            return self._cut(groups, 0)  # one layer input at a time leaves the most memory for it

    def _cut(self, groups: Groups, share: float) -> tuple[Pass, ...]:
        cut: list[list[tuple[str, ...]]] = []
        together = 0.0
        for names in groups:
            together += (own := self._hessians(names))
            if not cut or together > share * self.budget:
                cut.append([])
                together = own
            cut[-1].append(names)
        return tuple(map(self._pass, cut))

    def _pass(self, part: Sequence[tuple[str, ...]]) -> Pass:
        together = sum(map(self._hessians, part))  # once: a block with many experts has hundreds of groups
        return Pass(tuple(part), tuple(self._layout(names, together) for names in part))

    @functools.cached_property
    def _weights(self) -> float:
        return block_bytes(self.decoder, self.index)

    def _hessians(self, names: tuple[str, ...]) -> float:
        """Bytes of a group's calibration and held-out statistics."""
        shapes, mesh = self.decoder.block_shapes, self.decoder.mesh
        residuals = aimed_residuals(self.decoder, self.recipe)
        d_in = shapes[names[0] + ".weight"][1]
        rows = self.recipe.target.streams * d_in + sum(shapes[name + ".weight"][0] for name in names if name in residuals)
        return 2 * 4 * rows * on_model_axis(mesh, d_in)

    def _layout(self, names: tuple[str, ...], together: float) -> RowLayout:
        """A group's layout in a pass with ``together`` bytes of statistics."""
        load, mesh = group_load(self.decoder, names, self.recipe), self.decoder.mesh
        # The load counts the statistics of its own input once. But statistics that are split by columns are gathered into copies
        # while the originals stay. And a TPU that computes inverses alone needs about as much again for panels, which were not
        # fitted.
        as_they_come = mesh.shape[MODEL] == 1 and divided(load.d_in, mesh.size)
        beside = together - as_they_come * self._hessians(names)
        left = self.budget - _BLOCK_COPIES * self._weights - beside
        layout = load.layout(mesh, left)
        if layout is None:
            raise UserError(self._refusal(names[0], load, left))
        return layout

    def _refusal(self, name: str, load: GroupLoad, left: float) -> str:
        mesh, recipe = self.decoder.mesh, self.recipe
        least = load.bytes(mesh, load.can_split(mesh), 1)
        titles = [type(recipe.selector).__name__] * recipe.selector.chooses
        titles += [recipe.update(recipe.pattern).title] * (recipe.solver is not None)
        where = "split over the model axis" if load.can_split(mesh) else "on every device"
        if left <= 0:
            used = self.budget - left
            return (
                f"{self.prefix}{name} has {load.d_in} inputs, and its block with the other Hessians alone takes {used / GIB:.3g} "
                f"GiB on a device, expected less than {self.budget / GIB:.3g} GiB, the --device_memory: give at least "
                f"{(used + least) / GIB:.3g}, or a --mesh with a larger model axis that divides {load.d_in}"
            )
        return (
            f"{self.prefix}{name} has {load.d_in} inputs: with its Hessian {where}, {' and '.join(titles)} would need "
            f"{least / GIB:.3g} GiB on a device, expected at most {max(left, 0) / GIB:.3g} GiB, the part of --device_memory that "
            "weights and other Hessians leave. Use --selector wanda, --refine null and --solver cg with a damping of 1e-4 or "
            f"more, which can split a Hessian, on a --mesh with a larger model axis that divides {load.d_in}; or a larger "
            "--device_memory, or devices with more memory"
        )


def block_bytes(decoder: Decoder, index: int) -> float:
    """The bytes of a block's parameters on each device, as read."""
    decoder = decoder.at(index)
    prefix, tensors = decoder.prefix(index), decoder.tensors
    return bytes_on_device(
        *(
            struct_on(decoder.mesh, shape, tensors.dtype(prefix + name), decoder.sharding(name))
            for name, shape in decoder.block_shapes.items()
        )
    )


class Fitted(NamedTuple):
    """How a run fits the devices.

    Attributes:
      passes: of every block.
      words: what is split or done in parts; empty if nothing is.
      states: bytes of a device for hidden states, and for the inputs that passes keep; 0 where they stay on the hosts.
    """

    passes: tuple[tuple[Pass, ...], ...]
    words: str
    states: int = 0


def fitted(decoder: Decoder, groups: Sequence[Groups], recipe: Recipe, windows: tuple[int, int], budget: float) -> Fitted:
    """Fits a run to the devices, with its hidden states there if they fit.

    Args:
      groups: of every block.
      windows: their number and their length.

    Raises:
      UserError: a layer does not fit.
    """
    if states := _states_on_devices(decoder, recipe, windows, budget):
        with contextlib.suppress(UserError):
            return _fitted(decoder, groups, recipe, budget - states)._replace(states=states)
    return _fitted(decoder, groups, recipe, budget)


def _fitted(decoder: Decoder, groups: Sequence[Groups], recipe: Recipe, budget: float) -> Fitted:
    passes = tuple(block_passes(decoder, index, each, recipe, budget) for index, each in enumerate(groups))
    ordinary = (len(_parts(each, recipe, decoder.prefix(index))) for index, each in enumerate(groups))
    # Most blocks are alike: each text appears once.
    return Fitted(passes, "; ".join(filter(None, dict.fromkeys(map(described, passes, ordinary)))))


def _states_on_devices(decoder: Decoder, recipe: Recipe, windows: tuple[int, int], budget: float) -> int:
    """A device's bytes for the hidden states and the kept inputs of a run.

    0 where they stay on the hosts: on CPU devices, which share the memory of the host, and where they would take more than a
    quarter of the budget.
    """
    widths = [decoder.config.d_model]
    if recipe.recapture:
        widths.append(max(decoder.at(kind).input_width(decoder.at(kind).attended) for kind in decoder.config.kinds))
    dtype = decoder.tensors.dtype(decoder.root + decoder.family.embedding)
    token = recipe.target.streams * sum(on_model_axis(decoder.mesh, width) for width in widths) * dtype.itemsize
    return 0 if on_cpu(decoder.mesh) else _of_windows(decoder, windows, budget, token)


def _of_windows(decoder: Decoder, windows: tuple[int, int], budget: float, token: float) -> int:
    """A device's bytes for all windows, at ``token`` bytes a token.

    0 where they would take more than a quarter of the budget.
    """
    count, length = windows
    size = round((-(-count // decoder.mesh.shape[DATA]) + decoder.batch) * length * token)
    return 0 if size > _STATES_SHARE * budget else size


def on_model_axis(mesh: Mesh | AbstractMesh, width: int) -> int:
    """A device's part of ``width``; all if the model axis cannot split it."""
    model = mesh.shape[MODEL]
    return width // model if width % model == 0 else width


def kept_of_mixture(decoder: Decoder, down: str, windows: tuple[int, int], budget: float) -> int:
    """A device's bytes for what the removal of experts keeps between passes.

    It keeps the hidden states, the output of attention, the inputs of the experts' down, and the output of the whole mixture. 0
    where they would take more than a quarter of the budget: passes then compute them again.

    Args:
      down: the name of the experts' down, with ``*`` for their number.
      windows: their number and their length.
    """
    item = decoder.tensors.dtype(decoder.root + decoder.family.embedding).itemsize

    def of_token(alike: Decoder) -> float:
        read = (alike.config.reach(name) * alike.input_width(name) for name in alike.linears if kind_name(name) == down)
        d_model, attended = (
            on_model_axis(alike.mesh, width) for width in (alike.config.d_model, alike.input_width(alike.attended))
        )
        return item * (d_model + attended + sum(read)) + 4 * d_model

    return _of_windows(decoder, windows, budget, max(of_token(decoder.at(kind)) for kind in decoder.config.kinds))


def described(passes: Sequence[Pass], ordinary: int = 1) -> str:
    """Describes what is split or done in parts; empty if nothing is.

    Args:
      passes: of a block.
      ordinary: the number of passes with enough memory.
    """
    texts: dict[str, None] = {}  # in the order of the layers, each once
    for names, where in (pair for each in passes for pair in zip(each.groups, each.layouts)):
        words = ([] if where.rows is None else [f"{plural(where.rows, 'row')} at once"]) + [
            "Hessian split over model"
        ] * where.split
        if words:
            texts[f"{names[0]}: {', '.join(words)}"] = None
    if len(passes) > ordinary:
        texts[f"Hessians of a block in {plural(len(passes), 'pass')}"] = None
    return "; ".join(texts)
