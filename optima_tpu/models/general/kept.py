"""How a checkpoint holds the parameters of a module of torch.

``transformers`` renames and joins tensors when it loads them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, PrefixChange, SplitModulelist, WeightRenaming, WeightTransform

from optima_tpu.models.checkpoints.stacks import stacks_of
from optima_tpu.models.family import Shape, Stack


class Joined(NamedTuple):
    """What a checkpoint holds for a parameter of a module.

    Attributes:
      stack: how the parameter consists of tensors of the checkpoint; their names, ``*`` for the number of an expert.
      shape: the parameter's.
    """

    stack: Stack
    shape: Shape

    @property
    def experts(self) -> int | None:
        """How many experts have tensors of their own; None without experts."""
        return self.shape[0] if self.stack.axes else None

    def members(self) -> list[str]:
        """The names of the tensors, expert after expert."""
        return [name for number in range(self.experts or 1) for name in self.stack.of(number)]

    def shapes(self) -> dict[str, Shape]:
        """The shape of each; a matrix is [d_out, d_in]."""
        first, *rest = self.stack.turn(self.shape[self.stack.axes :]) or (1,)
        each = (first // len(self.stack.parts), *rest) if self.shape else ()
        return dict.fromkeys(self.members(), each)

    def split(self, array: Any) -> dict[str, Any]:
        """The tensors of a numpy array."""
        return {self.stack.parts[0]: array} if not self.shape else dict(zip(self.members(), self.stack.split(array), strict=True))

    def joined(self, arrays: Mapping[str, Array]) -> Array:
        """The parameter."""
        parameter: Array = self.stack.joined(jnp.stack([arrays[name] for name in self.members()])).reshape(self.shape)
        return parameter


class Names:
    """The names that a checkpoint has for the parameters of a model.

    Args:
      model: a model of ``transformers``.
    """

    def __init__(self, model: Any):
        changes = [each for each in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(each, PrefixChange)]
        back = [change.reverse_transform() for change in reversed(changes)]
        self._renamings = [change for change in back if isinstance(change, WeightRenaming)]
        self._converters: list[Any] = [change for change in back if not isinstance(change, WeightRenaming)]
        self._stacks = stacks_of([type(model).__name__])

    def of(self, name: str) -> Stack:
        """What a parameter is made of.

        Raises:
          ValueError: it is a part of a tensor, or has other numbers than its tensors.
        """
        parts = self._renamed(self._parts(name))
        for tensor, stack in self._stacks.items():
            if parts[0].endswith(f".{tensor}"):
                return stack.behind(parts[0].removesuffix(tensor))
        return Stack(parts, turned=False)

    def _parts(self, name: str) -> tuple[str, ...]:
        for converter in self._converters:
            renamed, matched = converter.rename_source_key(name)
            if matched is not None:
                operations = [(type(each), each.dim) for each in converter.operations if hasattr(each, "dim")]
                if len(operations) < len(converter.operations) or operations not in _UNDONE:
                    raise ValueError
                first, *others = converter.target_patterns
                before, _, after = renamed.partition(first)
                return tuple(before + part + after for part in (first, *others))
        return (name,)

    def _renamed(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        renaming: WeightTransform
        for renaming in self._renamings:
            parts = tuple(renaming.rename_source_key(part)[0] for part in parts)
        return parts


_UNDONE: list[list[tuple[type, int]]] = [[(SplitModulelist, 0)], [(Chunk, 1), (SplitModulelist, 0)], [(Chunk, 0)]]
"""What makes a parameter's tensors of it: of every expert; of every expert, several along the outputs; several along the
outputs."""
