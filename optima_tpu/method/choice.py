"""The base class of all methods that a recipe, or a run, holds a choice of."""

import dataclasses
import re
from typing import TYPE_CHECKING, Any, ClassVar

from optima_tpu.runtime.bounds import Bounded

if TYPE_CHECKING:
    from optima_tpu.method.recipe import Recipe


class Method(Bounded):
    """A method that a setting chooses: a frozen dataclass of its options.

    Attributes:
      setting: the setting that chooses the method.
      by_held_out: whether it chooses by held-out tokens.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    by_held_out: ClassVar[bool] = False

    @property
    def in_words(self) -> str:
        """The choice in words for a message: "allocation is measured"."""
        return f"{self.setting} is {re.sub('(?<=[a-z])(?=[A-Z])', '_', type(self).__name__).lower()}"

    def needs(self, recipe: "Recipe") -> None:  # most methods go with all others
        """Raises UserError if another method of the recipe does not fit."""
