"""Several texts, mixed by shares of the windows."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from optima_tpu.data.sampling import Draw
from optima_tpu.data.source import Part, Source, Split, TextSource, Tokens, common_part
from optima_tpu.errors import UserError

_SHARED = re.compile(r"(.+):(\d*\.?\d+)")


@dataclasses.dataclass(frozen=True)
class Mix(TextSource):
    """Texts of which each gives its share of the windows.

    Windows of different texts alternate, so the first windows of a mix are a mix too.

    Attributes:
      texts: two or more, all different.
      shares: of the windows, above 0 and 1 in sum.
    """

    texts: tuple[Source, ...]
    shares: tuple[float, ...]

    @staticmethod
    def parse(text: str, parse: Callable[[str], Source]) -> "Mix | None":
        """Reads "SOURCE:SHARE,SOURCE:SHARE,..."; None for another form.

        Raises:
          UserError: a source is none, writes itself or comes twice; or the shares are not a whole.
        """
        matches = [_SHARED.fullmatch(each.strip()) for each in text.split(",")]
        if len(matches) < 2 or not all(matches):
            return None
        texts = tuple(parse(each[1]) for each in matches if each)
        shares = tuple(float(each[2]) for each in matches if each)
        if min(shares) <= 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise UserError(
                f"expected shares above 0 whose sum is 1, as in c4:0.5,pydoc:0.5, got {text!r}, in sum {sum(shares):g}"
            )
        if any(each.by_model for each in texts):
            raise UserError(
                f"expected a mix of stored texts, got {text!r}: for text that the model writes beside them give "
                "--calibration.written and its number of windows, or name what it wrote for another run as "
                "npy:RUN/calibration.npy"
            )
        if len(set(texts)) < len(texts):
            raise UserError(f"expected different texts in a mix, got {text!r}: add up the shares of each")
        return Mix(texts, shares)

    def __str__(self) -> str:
        return ",".join(f"{text}:{np.format_float_positional(share, trim='-')}" for text, share in zip(self.texts, self.shares))

    def each_text(self) -> tuple[Source, ...]:
        return self.texts

    def documents(self, split: Split) -> Iterator[str]:
        """Always raises UserError: a mix is nothing to measure on."""
        raise UserError(
            f"expected one text to measure on, got the mix {self}: name one for the evaluation, such as wikitext2, pydoc or "
            "file:PATH"
        )

    def parts(self, split: Split) -> Iterable[Part]:
        """The parts that are read of all texts that can say it."""
        return [part for text in self.texts for part in text.parts(split)]

    def fingerprint(self, split: Split) -> str | None:
        """The fingerprints of all texts; None if one can't tell."""
        fingerprints = [text.fingerprint(split) for text in self.texts]
        present = [each for each in fingerprints if each is not None]
        return " ".join(present) if len(present) == len(fingerprints) else None

    def windows(self, draw: Draw, what: str, drawn: Callable[[Source, Draw], Tokens]) -> Tokens:
        """Returns mixed windows, then mixed held-out windows.

        Windows of a stream end where one of the texts does.

        Args:
          draw: how many of all texts together.
          what: what the windows are called.
          drawn: the windows of one text, the held-out ones last.

        Raises:
          UserError: a text would get no window, or two texts may share documents: held-out windows would hold what was calibrated
            on.
        """
        for first, second in itertools.combinations(self.texts, 2):
            if part := common_part(first.parts("calibration"), second.parts("calibration")):
                raise UserError(
                    f"expected different texts in a mix, got {first} and {second}, which both read {part.text}: add up their "
                    "shares"
                )
        order, later = self._order(draw.windows), self._order(draw.held_out)
        for k, text in enumerate(self.texts):
            if k not in order:
                raise UserError(
                    f"expected at least one of the {what} from each text in {self}, got {len(order)} and none of {text}: take "
                    "more"
                )
        shares = [(int(np.sum(order == k)), int(np.sum(later == k))) for k in range(len(self.texts))]
        parts = [
            drawn(text, dataclasses.replace(draw, windows=own, held_out=held_out))
            for text, (own, held_out) in zip(self.texts, shares, strict=True)
        ]
        # The first window that a text should give and has not got.
        missing = [np.flatnonzero(order == k)[len(part.ids) - shares[k][1] :] for k, part in enumerate(parts)]
        end = min((int(places[0]) for places in missing if places.size), default=len(order))
        return _mixed(np.concatenate([order[:end], later]), parts)

    def _order(self, windows: int) -> np.ndarray:
        """Each window's text, [windows] int: the farthest behind its share."""
        shares, counts, order = np.array(self.shares), np.zeros(len(self.texts)), np.empty(windows, int)
        for index in range(windows):
            order[index] = np.argmax(shares * (index + 1) - counts)
            counts[order[index]] += 1
        return order


def _mixed(order: np.ndarray, parts: list[Tokens]) -> Tokens:
    """Merges windows of several texts; ``order`` is each window's text."""
    ids = np.empty((len(order), parts[0].ids.shape[1]), np.int32)
    for k, part in enumerate(parts):
        ids[order == k] = part.ids[: np.sum(order == k)]
    return Tokens(ids, "mixed: " + "; ".join(part.how for part in parts), sum(part.available for part in parts))
