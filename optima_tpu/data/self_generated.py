"""Text that the model to be pruned writes itself, for people without data."""

import dataclasses
from collections.abc import Iterator

from optima_tpu.data.source import Split, TextSource
from optima_tpu.errors import UserError, refusing


@dataclasses.dataclass(frozen=True)
class SelfGenerated(TextSource):
    """Windows sampled from the dense model, as in self-calibration.

    Williams, Chrysostomou, Aletras, arXiv:2410.17170.

    ``optima_tpu.pipeline.self_calibration`` makes them, since it has the model. Every token of a window is drawn at the same
    temperature. The paper also studies another temperature for the first few tokens; this is not implemented.

    Attributes:
      temperature: 1 samples the model's own distribution; lower values prefer likely tokens.
    """

    temperature: float = 1.0
    by_model = True

    @staticmethod
    def parse(text: str) -> "SelfGenerated":
        """Reads "self" or "self?temperature=NUMBER"; else UserError."""
        _, question, option = text.partition("?")
        name, _, value = option.partition("=")
        with refusing(ValueError, f"expected self or self?temperature=NUMBER with a number from 0.001 to 1000, got {text!r}"):
            source = SelfGenerated(float(value)) if question else SelfGenerated()
            if name not in ("", "temperature") or not 1e-3 <= source.temperature <= 1e3:
                raise ValueError
        return source

    def __str__(self) -> str:
        return "self" + (f"?temperature={self.temperature:g}" if self.temperature != 1 else "")

    def documents(self, split: Split) -> Iterator[str]:
        """Always raises UserError: only a run has the model that writes."""
        raise UserError(
            f"{self} is text that the model writes for calibration in a run, got a request to read or to score it: give "
            "--evaluation.source of a run, or --perplexity of optima_tpu.evaluate, another text, such as wikitext2, "
            "pydoc or file:PATH"
        )
