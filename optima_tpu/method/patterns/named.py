"""Patterns of the user's own: imported, or only named by a record."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from optima_tpu.method.patterns.base import Mask, Pattern, Scores
from optima_tpu.runtime.own_classes import import_class, only_named, read_options


@dataclasses.dataclass(frozen=True)
class NamedPattern(Pattern):
    """A user's own pattern by its recorded text; nothing is imported.

    It allows whatever the recorded run did. It chooses no mask.

    Attributes:
      words: the import path and the options.
    """

    free: ClassVar[bool] = True

    words: str

    def at(self, sparsity: float) -> "NamedPattern":
        return self

    def pruned_count(self, shape: tuple[int, int]) -> int:
        raise only_named(self.words)

    def keep_mask(self, scores: Scores) -> Mask:
        raise only_named(self.words)

    def exchange(self, *_: Any, **__: Any) -> Any:
        raise only_named(self.words)

    def holds(self, zero: np.ndarray) -> bool:
        return True

    def text(self, group: str | None = None) -> str:
        return self.words


def import_pattern(text: str) -> Pattern:
    """Imports a user's own pattern, such as "my_lab.patterns:Comb?every=3"."""
    path, _, options = text.partition("?")
    return read_options(import_class(path, Pattern), options)  # type: ignore[type-abstract]  # never instantiates Pattern itself
