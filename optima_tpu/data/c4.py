"""C4, the web text that most pruners calibrate on (arXiv:1910.10683)."""

import dataclasses
import itertools
from collections.abc import Iterator

from optima_tpu.data import hub
from optima_tpu.data.file import File
from optima_tpu.data.source import Part, Split, TextSource

REPOSITORY = "allenai/c4"
FILES = {"calibration": "en/c4-train.00000-of-01024.json.gz", "evaluation": "en/c4-validation.00000-of-00008.json.gz"}
EVALUATION_DOCUMENTS = 1100


@dataclasses.dataclass(frozen=True)
class C4(TextSource):
    """The first shard of C4's training set, or of its validation set.

    Calibration reads the training shard, of 356,317 documents. Evaluation takes the first 1100 documents of the validation
    shard joined by a space, as SparseGPT does, and all of their windows; SparseGPT takes at most 256, which matters for windows
    much shorter than its 2048 tokens.
    """

    def __str__(self) -> str:
        return "c4"

    def documents(self, split: Split) -> Iterator[str]:
        """Yields each web page; for evaluation one text of many pages.

        Raises UserError where the hub can't be reached.
        """
        pages = self._file(split).documents(split)
        if split == "calibration":
            yield from pages
        else:
            yield " ".join(itertools.islice(pages, EVALUATION_DOCUMENTS))

    def parts(self, split: Split) -> list[Part]:
        """The same parts as those of ``hub:allenai/c4/en``."""
        return [hub.part(REPOSITORY, "en", "train" if split == "calibration" else "validation")]

    def fingerprint(self, split: Split) -> str:
        """The fingerprint of the shard's file."""
        return self._file(split).fingerprint(split)

    def _file(self, split: Split) -> File:
        return File(hub.download(REPOSITORY, FILES[split]))
