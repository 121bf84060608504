"""Checkpoints that store one parameter of all experts as one tensor: read expert by expert, and written back as they were.

The rest of the program sees the parameters of each expert under names of their own, with matrices [d_out, d_in]. See
``Family.stacks``.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from optima_tpu.models import family_named
from optima_tpu.models.checkpoints.source import Index, TensorSource, whole_slices


def stacks_of(architectures: Iterable[str] | None) -> Mapping[str, str]:
    """``Family.stacks`` of the model with these ``architectures`` in config.json; empty for an unknown one."""
    family = family_named(architectures)
    return family.stacks if family else {}


class Unstacked:
    """The tensors of a checkpoint, with the parameters of each expert by themselves.

    Args:
      stacked: the checkpoint.
      stacks: ``Family.stacks``.
    """

    def __init__(self, stacked: TensorSource, stacks: Mapping[str, str]):
        self._stacked = stacked
        self._places: dict[str, tuple[str, int] | None] = {}
        for name in stacked.names():
            part = next((name.removesuffix(stack) + part for stack, part in stacks.items() if name.endswith("." + stack)), None)
            if part is None:
                self._places[name] = None
            else:
                self._places |= {part.replace("*", str(number)): (name, number) for number in range(stacked.shape(name)[0])}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._places))

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._places[name]
        return self._stacked.shape(name) if place is None else self._stacked.shape(place[0])[:0:-1]

    def dtype(self, name: str) -> np.dtype:
        place = self._places[name]
        return self._stacked.dtype(name if place is None else place[0])

    def read(self, name: str, index: Index = (...,)) -> np.ndarray:
        place = self._places[name]
        if place is None:
            return self._stacked.read(name, index)
        tensor, number = place
        inner = whole_slices(index, self.shape(name))[::-1]
        return self._stacked.read(tensor, (slice(number, number + 1), *inner))[0].T


class Stacked:
    """How the tensors of :class:`Unstacked` become those of the checkpoint again.

    Args:
      parts: the tensors, by the names of :class:`Unstacked`; only names, shapes and dtypes are read.
      stacks: ``Family.stacks``.
    """

    def __init__(self, parts: TensorSource, stacks: Mapping[str, str]):
        self._parts = parts
        self._members: dict[str, dict[int, str]] = {}
        rules = [(re.compile(r"(.*\.)" + re.escape(part).replace(r"\*", r"(\d+)")), stack) for stack, part in stacks.items()]
        for name in parts.names():
            found = next(((match, stack) for rule, stack in rules if (match := rule.fullmatch(name))), None)
            if found is None:
                self._members[name] = {}
            else:
                match, stack = found
                self._members.setdefault(match[1] + stack, {})[int(match[2])] = name

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._members))

    def shape(self, name: str) -> tuple[int, ...]:
        members = self._members[name]
        return (len(members), *self._parts.shape(members[0])[::-1]) if members else self._parts.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._parts.dtype(self.members(name)[0])

    def members(self, name: str) -> tuple[str, ...]:
        """The names of what a tensor is made of, in the order of the experts; its own name if it is no stack."""
        members = self._members[name]
        return tuple(members[number] for number in sorted(members)) or (name,)

    def joined(self, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tensor, from its members."""
        members = [arrays[member] for member in self.members(name)]
        return np.stack([array.T for array in members]) if self._members[name] else members[0]

    def split(self, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
        """The members of a tensor."""
        return dict(zip(self.members(name), (each.T for each in array))) if self._members.get(name) else {name: array}
