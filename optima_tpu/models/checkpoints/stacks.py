"""Checkpoints that store the parameters of all experts as one tensor.

They are read expert by expert, and written back as they were. The rest of the program sees the parameters of each expert under
names of their own, with matrices [d_out, d_in]. See ``Family.stacks``.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from optima_tpu.models import family_named, general
from optima_tpu.models.checkpoints.source import ComputedTensors, LazyTensor, TensorSource
from optima_tpu.models.family import Stack


def stacks_of(architectures: Iterable[str] | None) -> Mapping[str, Stack]:
    """``Family.stacks`` of a model by ``architectures`` of its config.json."""
    family, name = family_named(architectures), next(iter(architectures or ()), None)
    return family.stacks if family else general.stacks(name) if name else {}


def stacks_among(names: Iterable[str], stacks: Mapping[str, Stack]) -> dict[str, Stack]:
    """The stacks among a checkpoint's tensors, by their whole names.

    Args:
      stacks: ``Family.stacks``. A checkpoint of the same family may hold each expert by itself, as ``transformers`` writes it.
    """
    matches = ((name, stack) for name in names for stack in stacks if name.endswith("." + stack))
    return {name: stacks[stack].behind(name.removesuffix(stack)) for name, stack in matches}


def unstacked(stacked: TensorSource, stacks: Mapping[str, Stack]) -> ComputedTensors:
    """The tensors of a checkpoint, with each expert's parameters apart.

    Args:
      stacks: ``Family.stacks``.
    """
    by_name = stacks_among(stacked.names(), stacks)
    computed: dict[str, LazyTensor] = {}
    for name, stack in by_name.items():
        stored_shape, dtype = stacked.shape(name), stacked.dtype(name)
        experts, (first, *rest) = stored_shape[: stack.axes], stack.turn(stored_shape[stack.axes :])
        shape = (first // len(stack.parts), *rest)
        for expert in range(*experts or (1,)):
            for number, part in enumerate(stack.of(expert)):
                read = functools.partial(_read, stacked, name, stack, expert, number * shape[0])
                computed[part] = LazyTensor(shape, dtype, read)
    return ComputedTensors(stacked, computed, by_name.keys() - computed.keys(), by_name)


def _read(stacked: TensorSource, name: str, stack: Stack, expert: int, before: int, index: tuple[slice, ...]) -> np.ndarray:
    """An expert's parameter, which begins at output ``before`` of a stack."""
    first, *rest = index
    inner = (slice(before + first.start, before + first.stop, first.step), *rest)
    read = stacked.read(name, ((slice(expert, expert + 1),) * stack.axes + stack.turn(inner)))
    read = read.reshape(read.shape[stack.axes :])
    return read.T if stack.turned else read


class Stacked:
    """Turns the tensors of :func:`unstacked` into the checkpoint's again.

    Args:
      parts: the tensors, by the names of :func:`unstacked`; only names, shapes and dtypes are read.
      stacks: :func:`stacks_among` the checkpoint's names.
    """

    def __init__(self, parts: TensorSource, stacks: Mapping[str, Stack]):
        self._parts, self._stacks, present = parts, stacks, set(parts.names())
        self._members: dict[str, tuple[str, ...]] = {}
        for name, stack in stacks.items():
            numbers = itertools.count() if stack.axes else range(1)
            experts = itertools.takewhile(present.issuperset, map(stack.of, numbers))
            self._members[name] = tuple(itertools.chain.from_iterable(experts))
        self._members |= {name: (name,) for name in present.difference(*self._members.values())}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._members))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._stacks:
            return self._parts.shape(name)
        stack, members = self._stacks[name], self._members[name]
        first, *rest = self._parts.shape(members[0])
        return (len(members) // len(stack.parts),) * stack.axes + stack.turn((first * len(stack.parts), *rest))

    def dtype(self, name: str) -> np.dtype:
        return self._parts.dtype(self._members[name][0])

    def members(self, name: str) -> tuple[str, ...]:
        """The names of a stack's parts by expert; else a tensor's own name."""
        return self._members[name]

    def joined(self, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tensor, from its members."""
        members = [arrays[member] for member in self._members[name]]
        if name not in self._stacks:
            return members[0]
        array: np.ndarray = self._stacks[name].joined(np.stack(members))
        return array

    def split(self, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
        """The members of a tensor."""
        if name not in self._stacks:
            return {name: array}
        return dict(zip(self._members[name], self._stacks[name].split(array), strict=True))
