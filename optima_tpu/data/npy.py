"""Token ids prepared by another program."""

import dataclasses
from pathlib import Path

import numpy as np

from optima_tpu.data.source import Part, Split, Tokens, TokenSource
from optima_tpu.errors import UserError, plural, refusing


@dataclasses.dataclass(frozen=True)
class Npy(TokenSource):
    """An integer array [windows, length] of token ids, used unchanged.

    Calibration and evaluation both take its first rows.

    Attributes:
      path: a file written by ``numpy.save``.
    """

    path: Path
    here = True

    @staticmethod
    def parse(text: str) -> "Npy":
        """Reads PATH."""
        return Npy(Path(text).expanduser())

    def __str__(self) -> str:
        return f"npy:{self.path}"

    def parts(self, split: Split) -> list[Part]:
        """The whole file, named by its resolved path."""
        return [Part(str(self.path.resolve()))]

    def tokens(self, split: Split, *, vocabulary: int, windows: int | None, length: int, seed: int) -> Tokens:
        """The first ``windows`` rows; ``seed`` has no effect.

        Evaluation takes fewer rows if the file has fewer.

        Raises:
          UserError: no such file, not an integer matrix, rows of another length, too few rows, or an id outside the
            vocabulary.
        """
        array = self._load()
        if array.shape[1] != length:
            raise UserError(
                f"expected windows of {length} tokens in {self.path}, got an array of shape {array.shape}: "
                f"set the length to {array.shape[1]} or write the file again"
            )
        required = windows if split == "calibration" and windows is not None else 1
        if len(array) < required:
            raise UserError(
                f"{self.path} holds {plural(len(array), 'window')} of {length} tokens, {required} are needed: "
                "ask for fewer (windows and held_out count together) or give more"
            )
        ids = np.asarray(array[:windows])
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise UserError(
                f"expected token ids in [0, {vocabulary}), {self.path} holds {low if low < 0 else high}: "
                "make it with this model's tokenizer"
            )
        how = f"the first {plural(len(ids), 'window')} of {length} tokens of {self}"
        return Tokens(ids.astype(np.int32), how, int(array.size))

    def check(self) -> None:
        """Raises UserError if the file does not exist."""
        if not self.path.is_file():
            raise UserError(f"expected an .npy file of token ids, but {self.path} does not exist: check the path")

    def _load(self) -> np.ndarray:
        self.check()
        # Exception, because numpy reads the header as Python, and a damaged one raises anything.
        with refusing(Exception, f"{self.path} can't be read as an .npy file", "write it with numpy.save"):
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            came = f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
            raise UserError(f"expected an integer array [windows, length] in {self.path}, got {came}")
        return array
