"""Python's own documentation, which every Python brings along."""

import dataclasses
import re
from collections.abc import Iterator

from optima_tpu.data.source import Split
from optima_tpu.errors import UserError


@dataclasses.dataclass(frozen=True)
class PyDoc:
    """The prose of the Python language reference, from ``pydoc_data.topics``.

    Topics are taken by name. Some quote others in part or whole ("compound" holds "for"), so a paragraph is kept only
    in the first topic that has it: no paragraph stands twice. Of the topics left every fourth is held out for
    evaluation, the others are for calibration. The text differs a little between versions of Python.
    """

    def __str__(self) -> str:
        return "pydoc"

    def documents(self, split: Split) -> Iterator[str]:
        """One topic a document. Raises UserError where this Python comes without its documentation."""
        try:
            from pydoc_data.topics import topics
        except ModuleNotFoundError as error:
            raise UserError(
                "this Python comes without pydoc_data, its documentation: choose another text source, such as file:PATH"
            ) from error
        for index, text in enumerate(_distinct([topics[name] for name in sorted(topics)])):
            if (index % 4 == 3) == (split == "evaluation"):
                yield text


def _distinct(texts: list[str]) -> list[str]:
    """The texts without the paragraphs of earlier ones; a text of which nothing is left is dropped."""
    seen: set[str] = set()
    kept = []
    for text in texts:
        fresh = [paragraph for paragraph in text.split("\n\n") if words(paragraph) and words(paragraph) not in seen]
        seen.update(words(paragraph) for paragraph in fresh)
        if fresh:
            kept.append("\n\n".join(fresh))
    return kept


def words(paragraph: str) -> str:
    """What makes two paragraphs the same: indentation, line breaks and the underlining of headings do not count."""
    return " ".join(re.findall(r"\w+", paragraph))
