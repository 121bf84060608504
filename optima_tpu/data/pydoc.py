"""Python's own documentation, part of most installations of Python."""

import dataclasses
import re
from collections.abc import Iterator

from optima_tpu.data.source import Split, TextSource
from optima_tpu.errors import refusing


@dataclasses.dataclass(frozen=True)
class PyDoc(TextSource):
    """The prose of the Python language reference, from ``pydoc_data.topics``.

    Topics are taken in the order of their names. Some quote others in part or whole ("compound" holds "for"), so a paragraph is
    kept only in the first topic that has it. Every fourth of the remaining topics is held out for evaluation, the others are for
    calibration. The text differs a little between versions of Python.
    """

    here = True

    def __str__(self) -> str:
        return "pydoc"

    def documents(self, split: Split) -> Iterator[str]:
        """Yields each topic. Raises UserError if Python comes without them."""
        without = "this Python comes without pydoc_data, its documentation: choose another text source, such as file:PATH"
        with refusing(ModuleNotFoundError, without):
            from pydoc_data.topics import topics
        for index, text in enumerate(_distinct([topics[name] for name in sorted(topics)])):
            if (index % 4 == 3) == (split == "evaluation"):
                yield text


def _distinct(texts: list[str]) -> list[str]:
    """The texts without paragraphs of earlier texts, and no empty texts."""
    seen: set[str] = set()
    kept = []
    for text in texts:
        fresh = [paragraph for paragraph in text.split("\n\n") if words(paragraph) and words(paragraph) not in seen]
        seen.update(words(paragraph) for paragraph in fresh)
        if fresh:
            kept.append("\n\n".join(fresh))
    return kept


def words(paragraph: str) -> str:
    """The key of equal paragraphs: their words, joined by spaces."""
    return " ".join(re.findall(r"\w+", paragraph))
