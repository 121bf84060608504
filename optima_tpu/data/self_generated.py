"""Text that the model to be pruned writes itself, for people without data."""

import dataclasses
import math
from collections.abc import Iterator

from optima_tpu.data.source import Split
from optima_tpu.errors import UserError


@dataclasses.dataclass(frozen=True)
class SelfGenerated:
    """Windows sampled from the dense model, as in self-calibration (Williams, Chrysostomou, Aletras, arXiv:2410.17170).

    They are not made here, which takes the model: see ``optima_tpu.pipeline.self_calibration``. Every token of a window is drawn at one
    temperature; the paper also studies other ones for the first few tokens, which is not done here.

    Attributes:
      temperature: 1 samples what the model learnt; lower ones prefer likely tokens.
    """

    temperature: float = 1.0

    @staticmethod
    def parse(text: str) -> "SelfGenerated":
        """Reads "self" or "self?temperature=NUMBER". Raises UserError for anything else."""
        _, question, option = text.partition("?")
        name, _, value = option.partition("=")
        try:
            source = SelfGenerated(float(value)) if question else SelfGenerated()
            if name not in ("", "temperature") or not 0 < source.temperature < math.inf:
                raise ValueError
        except ValueError:
            raise UserError(f"expected self or self?temperature=NUMBER with a number above 0, got {text!r}") from None
        return source

    def __str__(self) -> str:
        return "self" + (f"?temperature={self.temperature:g}" if self.temperature != 1 else "")

    def documents(self, split: Split) -> Iterator[str]:
        """Always a UserError: only a run, which has the model, makes this text, and no model is scored on what it says itself."""
        raise UserError(
            f"{self} is text for calibration in a run, no text to measure a model on or to read without one: give "
            "--evaluation.source of a run, or --perplexity of optima_tpu.evaluate, another one, such as wikitext2, "
            "pydoc or file:PATH"
        )
