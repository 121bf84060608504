"""WikiText-2, raw: the text that perplexity is reported on (arXiv:1609.07843)."""

import dataclasses
from collections.abc import Iterator

from optima_tpu.data import hub
from optima_tpu.data.file import File
from optima_tpu.data.source import Split

REPOSITORY = "Salesforce/wikitext"
FILES = {"calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
         "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet"}


@dataclasses.dataclass(frozen=True)
class WikiText2:
    """The training rows joined by a space for calibration, the test rows joined by a blank line for evaluation.

    Both as SparseGPT and Wanda do, empty rows included.
    """

    def __str__(self) -> str:
        return "wikitext2"

    def documents(self, split: Split) -> Iterator[str]:
        """One document. Raises UserError where the hub can't be reached."""
        rows = File(hub.download(REPOSITORY, FILES[split])).documents(split)
        yield (" " if split == "calibration" else "\n\n").join(rows)
