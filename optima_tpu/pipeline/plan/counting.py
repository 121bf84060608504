"""Counts the work of a program from its jaxpr, without a compiler.

The devices need not be attached. Products and factorisations count as they are written; a loop counts as often as it runs. A
loop of unknown length states how often it usually runs, see ``runtime.loops``; if it does not, it counts once, and
:class:`Counted` lists it.

The bytes of device memory follow from one assumption about fusion: what is computed element by element between two products or
reductions is one pass over memory. It reads each array once, and writes the arrays that a later pass reads. A product, a sort,
a factorisation or a collective reads its operands from memory; the result of a product or a reduction stays in the next pass. A
slice, and what is written into a part of an array, counts as large as the part. An array that is converted to a wider dtype
counts as large as before, and a product of such arrays counts as one of the narrow dtype.

Outside ``shard_map`` the shapes are those of all devices together. An equation there is split over the mesh axes that any of
its operands is split over. Where both factors of a product are split over an axis, each device has a part of the sums: the
result is written, summed over the axis, and then the same on its devices.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, Literal, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from optima_tpu.pipeline.plan.topology import Machine
from optima_tpu.pipeline.programs import Call
from optima_tpu.runtime.loops import stated_turns


class Work(NamedTuple):
    """The work of one device in one call of a program.

    Attributes:
      narrow: FLOPs of products in the model's dtype.
      wide: FLOPs of float32 products at full precision.
      factor: FLOPs of factorisations.
      traffic: bytes of device memory that are read and written.
      rough: FLOPs of float32 products that only choose.
    """

    narrow: float = 0.0
    wide: float = 0.0
    factor: float = 0.0
    traffic: float = 0.0
    rough: float = 0.0

    @property
    def flops(self) -> float:
        return self.narrow + self.wide + self.rough + self.factor

    def times(self, factor: float) -> "Work":
        """The work of so many calls."""
        return Work().plus(self, factor)

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        """This and ``times`` the other."""
        return Work(*(a + times * b for a, b in zip(self, other)))

    def seconds(self, machine: Machine) -> float:
        """Seconds of products, traffic and factorisations, without overlap.

        Products and traffic run at ``utilisation`` of the chip's rates, factorisations at the full rate.
        """
        chip = machine.chip
        products = (self.narrow / chip.narrow + self.wide / chip.wide + self.rough / chip.rough) / machine.utilisation
        return products + self.factor / chip.factor + self.traffic / (chip.bandwidth * machine.utilisation)


class Counted(NamedTuple):
    """The work of a program.

    Attributes:
      unknown: the files and lines of loops that do not say how often they run; each counts once.
    """

    work: Work
    unknown: frozenset[str] = frozenset()


def counted(call: Call, machine: Machine) -> Counted:
    """The work of a program on one device, without its dead equations."""
    reader, jaxpr = _Reader(dict(machine.mesh.shape), machine.platform), call.function.trace(*call.arguments).jaxpr.jaxpr
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(call.arguments) if hasattr(leaf, "dtype")]
    needed, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    split = [reader.axes(sharding.spec) if sharding else _WHOLE for sharding, use in zip(shardings, used, strict=True) if use]
    return Counted(reader.body(needed, split).work, frozenset(reader.unknown))


def counted_all(calls: Iterable[Call], machine: Machine) -> Counted:
    """The work of several programs that run one after another."""
    each = [counted(call, machine) for call in calls]
    work = Work(*map(sum, zip(*(one.work for one in each))))
    return Counted(work, frozenset[str]().union(*(one.unknown for one in each)))


def carried(call: Call, *leaving: Any) -> int:
    """Bytes of text between hosts and devices in a pass through a block.

    The hidden states and the known inputs of layers enter.

    Args:
      leaving: what leaves the devices, as structs.
    """
    _, _, hidden, _, known = call.arguments
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves((hidden, known, leaving)))


Axes = frozenset[str]
_WHOLE: Axes = frozenset()


class _Value:
    """An array of a program.

    Attributes:
      size: bytes on a device.
      itemsize: bytes of one item; of the narrower dtype if the array was converted from that.
      level: number of products and reductions that lead to the array, which is the level of the pass that computes it.
      axes: the mesh axes that it is split over.
      stored: whether it is in memory anyway. Otherwise it is written if an equation needs it in memory.
      free: whether it follows from no array, as the indices of a diagonal do: each pass that reads it computes it again.
      needed: whether an equation needs it in memory.
      passes: the levels of the passes that read it.
      loads: how often a product or the like reads it.
    """

    def __init__(self, size: float, itemsize: int, level: int, axes: Axes, stored: bool = False, free: bool = False):
        self.itemsize = itemsize
        self.size, self.level, self.axes, self.stored, self.free = size, level, axes, stored, free
        self.needed, self.passes, self.loads = False, set[int](), 0

    def read(self, level: int) -> None:
        if not self.free and (self.stored or level > self.level):
            self.passes.add(level)

    def load(self) -> None:
        self.loads += 1

    @property
    def traffic(self) -> float:
        reads = len(self.passes) + self.loads
        return self.size * (reads + (not self.stored and (self.needed or reads > 0)))


class _Body(NamedTuple):
    """What one run of a jaxpr does.

    Attributes:
      out: the axes of each output.
      same: for each output the index of the input that it is; None if it is not an input.
    """

    work: Work
    out: tuple[Axes, ...]
    same: tuple[int | None, ...]


_VIEWS = {"reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "copy"}
_PARTS = {"slice", "dynamic_slice", "gather"}
_INTO = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2, "scatter_mul": 2}  # which operand is the part
_COLLECTIVES = {"psum", "pmax", "pmin", "psum_invariant", "all_gather", "all_to_all", "ppermute", "reduce_scatter"}
_ALONE = {"sort", "top_k", "fft", *_COLLECTIVES}
_REDUCTIONS = ("reduce", "cum", "arg")


def _named(equation: Any) -> tuple[str, ...]:
    """The mesh axes of a collective."""
    axes = equation.params.get("axes", equation.params.get("axis_name"))
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _dot(equation: Any) -> float:
    """FLOPs of a product."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _summable(equation: Any) -> bool:
    """Whether a mesh axis of both factors can only split the summed axis.

    A product of a batch of matrices may split the batch.
    """
    return equation.primitive.name == "dot_general" and not equation.params["dimension_numbers"][1][0]


def _convolution(equation: Any) -> float:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]


def _matrix(share: float) -> Callable[[Any], float]:
    """FLOPs of a factorisation, ``share * n^3`` for a matrix [..., n, n]."""
    return lambda equation: share * math.prod(equation.invars[0].aval.shape) * equation.invars[0].aval.shape[-1]


def _triangular_solve(equation: Any) -> float:
    return float(math.prod(equation.invars[1].aval.shape) * equation.invars[0].aval.shape[-1])


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}
_FACTORS = {"cholesky": _matrix(1 / 3), "lu": _matrix(2 / 3), "eigh": _matrix(9.0), "triangular_solve": _triangular_solve}


def _itemsize(aval: Any) -> int:
    return getattr(aval.dtype, "itemsize", 8)  # a random key has none


def _kind(equation: Any, narrow: bool, platform: str) -> str:
    """The field of :class:`Work` to which the FLOPs of a product belong.

    Args:
      narrow: whether all factors have a narrow dtype.
    """
    precision = equation.params["precision"]
    pair = set(precision if isinstance(precision, tuple) else (precision,))
    if narrow:
        return "narrow"
    if jax.lax.Precision.HIGH in pair:
        return "rough"
    # By default a TPU rounds the factors to bfloat16, and a GPU to TF32.
    rounded = {"tpu": "narrow", "gpu": "rough"}.get(platform, "wide")
    return rounded if pair & {None, jax.lax.Precision.DEFAULT} else "wide"


@dataclasses.dataclass
class _Reader:
    """Reads the jaxprs of one program.

    Attributes:
      sizes: of the mesh axes.
      platform: where programs differ by platform, the one of this platform counts.
      unknown: see :class:`Counted`.
    """

    sizes: Mapping[str, int]
    platform: str
    unknown: set[str] = dataclasses.field(default_factory=set)

    def axes(self, spec: Iterable[Any]) -> Axes:
        """The mesh axes of a ``PartitionSpec`` that have several devices."""
        named = (axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part))
        return frozenset(axis for axis in named if self.sizes[axis] > 1)

    def bytes(self, aval: Any, axes: Axes) -> float:
        """The size of an array on a device."""
        return math.prod(aval.shape) * _itemsize(aval) / self.parts(axes)

    def parts(self, axes: Axes) -> int:
        """The number of devices that share what is split over some axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    def body(self, jaxpr: Jaxpr, split: Sequence[Axes], scopes: str = "") -> _Body:
        """One run of a jaxpr whose inputs and outputs are in memory.

        Args:
          split: the axes of each input.
          scopes: the names around it.
        """
        run = _Run(self)
        inputs = [run.new(var.aval, 0, axes, stored=True) for var, axes in zip(jaxpr.invars, split, strict=True)]
        out = run.through(jaxpr, inputs, scopes)
        for value in out:
            value.needed = True
        positions = {id(value): index for index, value in enumerate(inputs)}
        return _Body(run.done, tuple(value.axes for value in out), tuple(positions.get(id(value)) for value in out))

    def turn(self, jaxpr: Jaxpr, split: Sequence[Axes], constant: int, carried: int) -> _Body:
        """One turn of a loop, with the carry split alike before and after it.

        Args:
          constant: number of inputs before the carry.
          carried: number of arrays in the carry, which are the first outputs.
        """
        while True:
            once, before = self.body(jaxpr, split), split[constant : constant + carried]
            joined = [old | new for old, new in zip(before, once.out)]
            if joined == list(before):
                return once
            split = [*split[:constant], *joined, *split[constant + carried :]]


@dataclasses.dataclass
class _Run:
    """One run of the equations of a jaxpr, and of the jaxprs that it calls.

    Attributes:
      work: of products, factorisations and loops, and the bytes that do not belong to one of the values.
      values: all of them.
      results: results by what computes them, for the compiler computes equal things once.
    """

    reader: _Reader
    work: Work = Work()
    values: list[_Value] = dataclasses.field(default_factory=list)
    results: dict[Any, list[_Value]] = dataclasses.field(default_factory=dict)

    @property
    def done(self) -> Work:
        """All work, once the run is over."""
        return self.work.plus(Work(traffic=sum(value.traffic for value in self.values)))

    def new(self, aval: Any, level: int, axes: Axes, stored: bool = False, free: bool = False) -> _Value:
        axes = axes if math.prod(aval.shape) > 1 else _WHOLE  # what is summed over everything is on all devices
        self.values.append(_Value(self.reader.bytes(aval, axes), _itemsize(aval), level, axes, stored, free))
        return self.values[-1]

    def through(self, jaxpr: Jaxpr, inputs: Sequence[_Value], scopes: str) -> list[_Value]:
        """The outputs of a jaxpr inside of scopes."""
        values: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        values |= {var: self.new(var.aval, 0, _WHOLE, stored=True) for var in jaxpr.constvars}

        def value(var: Any) -> _Value:
            if isinstance(var, Literal):
                return self._once(("literal", str(var.val), str(var.aval)), lambda: [_Value(0.0, 8, 0, _WHOLE, free=True)])[0]
            return values[var]

        for equation in jaxpr.eqns:
            operands = [value(var) for var in equation.invars]
            values.update(zip(equation.outvars, self._equation(equation, operands, scopes), strict=True))
        return [value(var) for var in jaxpr.outvars]

    def _once(self, key: Any, make: Callable[[], list[_Value]]) -> list[_Value]:
        try:
            hash(key)
        except TypeError:  # a parameter of an equation that has no hash
            return make()
        if key not in self.results:
            self.results[key] = make()
        return self.results[key]

    def _in_memory(self, equation: Any, operands: Sequence[_Value], axes: Iterable[Axes] | None = None) -> list[_Value]:
        """The results of an equation that reads and writes arrays in memory.

        Args:
          axes: of each result; None for the axes of all operands.
        """
        level = 1 + max((value.level for value in operands), default=0)
        every = itertools.repeat(_WHOLE.union(*(value.axes for value in operands)))
        for value in operands:
            value.needed = True
        return [self.new(var.aval, level, each, stored=True) for var, each in zip(equation.outvars, axes or every)]

    def _alone(self, equation: Any, operands: Sequence[_Value], work: Work) -> list[_Value]:
        """As :meth:`_in_memory`; adds ``work`` and a pass over each array."""
        for value in operands:
            value.load()
        results = self._in_memory(equation, operands)
        self.work = self.work.plus(work).plus(Work(traffic=sum(value.size for value in results)))
        return results

    def _equation(self, equation: Any, operands: list[_Value], scopes: str) -> list[_Value]:
        name, avals = equation.primitive.name, [var.aval for var in equation.outvars]
        inside = [] if name.startswith(("reduce", "scatter")) else list(jaxprs_in_params(equation.params))
        if inside:  # a statement about loops holds inside of calls and branches too
            scopes = f"{scopes}/{equation.source_info.name_stack}"
            loops = {"scan": self._scan, "while": self._while, "cond": self._cond}
            if special := (loops | {"shard_map": self._shard_map, "pallas_call": self._kernel}).get(name):
                return special(equation, operands, scopes)
            if len(inside) == 1 and len(inside[0].invars) == len(operands):
                return self.through(inside[0], operands, scopes)
        if name == "sharding_constraint":
            return self._constrained(equation, operands)
        key = name, tuple(sorted(equation.params.items())), tuple(map(id, operands)), tuple(map(str, avals))
        return self._once(key, lambda: self._simple(equation, name, operands, avals))

    def _simple(self, equation: Any, name: str, operands: list[_Value], avals: list[Any]) -> list[_Value]:
        """The results of an equation without equations inside."""
        level = max((value.level for value in operands), default=0)
        axes = _WHOLE.union(*(value.axes for value in operands))
        if name in _VIEWS or (name == "convert_element_type" and _itemsize(equation.invars[0].aval) < _itemsize(avals[0])):
            return operands[:1]
        if name in _COLLECTIVES and math.prod(self.reader.sizes[axis] for axis in _named(equation)) == 1:
            return operands
        if name in _PARTS:
            operands[0].needed = True
            for value in operands[1:]:
                value.read(level)
            return [self.new(avals[0], level + (not operands[0].stored), operands[0].axes, stored=True)]
        if name in _INTO:
            part, position = operands[_INTO[name]], _INTO[name]
            operands[0].needed = True
            for value in operands[1:]:
                value.read(level)
            adds = 1 + (name not in ("dynamic_update_slice", "scatter"))
            self.work = self.work.plus(Work(traffic=adds * self.reader.bytes(equation.invars[position].aval, part.axes)))
            return [self.new(avals[0], level, axes, stored=True)]
        if name in _PRODUCTS:
            flops = _PRODUCTS[name](equation) / self.reader.parts(axes)
            narrow = all(value.itemsize < 4 for value in operands)
            self.work = self.work.plus(Work(**{_kind(equation, narrow, self.reader.platform): flops}))
            for value in operands:
                value.load()
            summed = operands[0].axes & operands[1].axes if _summable(equation) else _WHOLE
            products = [self.new(aval, level + 1, axes - summed, stored=bool(summed)) for aval in avals]
            self.work = self.work.plus(Work(traffic=3.0 * sum(value.size for value in products) * bool(summed)))
            return products
        if name in _FACTORS or name in _ALONE:
            flops = _FACTORS[name](equation) / self.reader.parts(axes) if name in _FACTORS else 0.0
            return self._alone(equation, operands, Work(factor=flops))
        for value in operands:
            value.read(level)
        behind = level + (name.startswith(_REDUCTIONS) and name != "reduce_precision")
        return [self.new(aval, behind, axes, free=all(value.free for value in operands)) for aval in avals]

    def _constrained(self, equation: Any, operands: list[_Value]) -> list[_Value]:
        (value,), axes = operands, self.reader.axes(equation.params["sharding"].spec)
        if axes == value.axes:
            return operands
        value.read(value.level)
        return self._once(("sharded", id(value), axes), lambda: [self.new(equation.outvars[0].aval, value.level, axes)])

    def _shard_map(self, equation: Any, operands: list[_Value], scopes: str) -> list[_Value]:
        """The results of a ``shard_map``, whose shapes are of one device."""
        jaxpr, inputs, outputs = equation.params["jaxpr"], list[_Value](), list[_Value]()
        for value, var, spec in zip(operands, jaxpr.invars, equation.params["in_specs"], strict=True):
            value.needed = True
            inputs += self._once(("inside", id(value), str(spec)), functools.partial(self._stored, var.aval, 0, _WHOLE))
        came = {id(inside): [outside] for inside, outside in zip(inputs, operands)}
        out = self.through(jaxpr, inputs, scopes)
        for value, var, spec in zip(out, equation.outvars, equation.params["out_specs"], strict=True):
            value.needed = True
            make = functools.partial(self._stored, var.aval, value.level + 1, self.reader.axes(spec))
            outputs += came.get(id(value)) or self._once(("outside", id(value), str(spec)), make)
        return outputs

    def _stored(self, aval: Any, level: int, axes: Axes) -> list[_Value]:
        return [self.new(aval, level, axes, stored=True)]

    def _scan(self, equation: Any, operands: list[_Value], scopes: str) -> list[_Value]:
        params = equation.params
        constant, carried = params["num_consts"], params["num_carry"]
        turn = self.reader.turn(params["jaxpr"].jaxpr, [value.axes for value in operands], constant, carried)
        self.work = self.work.plus(turn.work, params["length"])
        return self._behind(equation, operands, turn, constant)

    def _while(self, equation: Any, operands: list[_Value], scopes: str) -> list[_Value]:
        params, split = equation.params, [value.axes for value in operands]
        tested, constant = params["cond_nconsts"], params["body_nconsts"]
        carried = len(split) - tested - constant
        times = stated_turns(scopes)
        if times is None:
            self.reader.unknown.add(source_info_util.summarize(equation.source_info))
        turn = self.reader.turn(params["body_jaxpr"].jaxpr, split[tested:], constant, carried)
        test = self.reader.body(params["cond_jaxpr"].jaxpr, [*split[:tested], *turn.out])
        self.work = self.work.plus(turn.work.plus(test.work), 1.0 if times is None else times)
        return self._behind(equation, operands[tested:], turn, constant)

    def _kernel(self, equation: Any, operands: list[_Value], scopes: str) -> list[_Value]:
        """The results of a kernel. What it computes inside moves no memory."""
        jaxpr, steps = equation.params["jaxpr"], math.prod(equation.params["grid_mapping"].grid)
        step = self.reader.body(jaxpr, [_WHOLE] * len(jaxpr.invars), scopes).work._replace(traffic=0.0)
        return self._alone(equation, operands, step.times(steps * (stated_turns(scopes) or 1.0)))

    def _behind(self, equation: Any, operands: list[_Value], turn: _Body, constant: int) -> list[_Value]:
        """The results of a loop."""
        results = self._in_memory(equation, operands, turn.out)
        unchanged = [came == constant + index for index, came in enumerate(turn.same)]
        return [operands[constant + index] if same else results[index] for index, same in enumerate(unchanged)]

    def _cond(self, equation: Any, operands: list[_Value], scopes: str) -> list[_Value]:
        """The results of a branch.

        If the branches differ by platform, the branch of the platform counts. Otherwise the largest work of any branch does.
        """
        _, *operands = operands
        branches, platforms = equation.params["branches"], equation.params.get("branches_platforms")
        if platforms:
            chosen = next(index for index, names in enumerate(platforms) if names is None or self.reader.platform in names)
            return self.through(branches[chosen].jaxpr, operands, scopes)
        bodies = [self.reader.body(branch.jaxpr, [value.axes for value in operands], scopes) for branch in branches]
        self.work = self.work.plus(Work(*map(max, zip(*(each.work for each in bodies)))))
        return self._in_memory(equation, operands, [_WHOLE.union(*each) for each in zip(*(each.out for each in bodies))])
