"""WikiText-2 raw, on which perplexity is reported (arXiv:1609.07843)."""

import dataclasses
from collections.abc import Iterator

from optima_tpu.data import hub
from optima_tpu.data.file import File
from optima_tpu.data.source import Part, Split, TextSource

REPOSITORY, CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
SPLITS = {"calibration": "train", "evaluation": "test"}


@dataclasses.dataclass(frozen=True)
class WikiText2(TextSource):
    """The training rows for calibration, the test rows for evaluation.

    A space joins the training rows, a blank line the test rows. Both as SparseGPT and Wanda do, empty rows included.
    """

    def __str__(self) -> str:
        return "wikitext2"

    def documents(self, split: Split) -> Iterator[str]:
        """One document. Raises UserError where the hub can't be reached."""
        rows = self._file(split).documents(split)
        yield (" " if split == "calibration" else "\n\n").join(rows)

    def parts(self, split: Split) -> list[Part]:
        """The parts of ``hub:Salesforce/wikitext/wikitext-2-raw-v1``."""
        return [hub.part(REPOSITORY, CONFIG, SPLITS[split])]

    def fingerprint(self, split: Split) -> str:
        """The fingerprint of the Parquet file."""
        return self._file(split).fingerprint(split)

    def _file(self, split: Split) -> File:
        return File(hub.download(REPOSITORY, f"{CONFIG}/{SPLITS[split]}-00000-of-00001.parquet"))
