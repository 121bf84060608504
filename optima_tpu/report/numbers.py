"""Formats numbers for people."""

import math
from collections.abc import Callable, Sequence

from optima_tpu.errors import plural


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits: "0.0123", "2.00e-9".

    None is a number that is not finite, as in records. The text has an exponent from 1e15 on and below 1e-5.
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    # The perplexity of a ruined model may be e^709, with 308 digits; the divergence of two equal models 2e-9.
    if not 1e-5 <= abs(value) < 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    # Rounding may add a digit before the point: 9.996 becomes 10.0, not 10.00.
    decimals = max(digits - 1 - math.floor(math.log10(abs(round(value, decimals)))), 0)
    return f"{value:.{decimals}f}"


def named_blocks(indices: Sequence[int]) -> str:
    """ "block 2", "blocks 17, 14": names blocks in the given order."""
    return f"{'block' if len(indices) == 1 else 'blocks'} {', '.join(map(str, indices))}"


def percent(share: float | None) -> str:
    """A share in percent with three significant digits: 0.1234 is "12.3%"."""
    if share is None:
        return number(None)
    if 0 < share < 1e-7:
        return "< 0.00001%"
    return number(100 * share) + ("%" if math.isfinite(share) else "")


def direction(before: float, after: float) -> str:
    """ "worse", "better" or "unchanged", where less is better."""
    return "worse" if after > before else "better" if after < before else "unchanged"


def became(before: float | None, after: float | None, show: Callable[[float], str]) -> str:
    """As :func:`direction`, but "unchanged" where both are shown alike.

    Empty if one of both is None or not finite.
    """
    if before is None or after is None or not math.isfinite(before + after):
        return ""
    return "unchanged" if show(before) == show(after) else direction(before, after)


def unsure(ratio: float, error: float | None) -> bool:
    """Whether 1 is within two standard errors of a ratio."""
    ends = interval(ratio, error)
    return ends is not None and ends[0] <= 1 <= ends[1]


def interval(ratio: float, error: float | None) -> tuple[float, float] | None:
    """The ends of a ratio's interval of two standard errors on both sides.

    The error is that of the ratio's logarithm. None if the error was not measured.
    """
    if error is None:
        return None
    spread = math.exp(min(2 * error, 100.0))  # a damaged report may hold any number
    return ratio / spread, ratio * spread


def times(ratio: float, error: float | None) -> str:
    """ "2.80× (2.61 to 3.00)": a ratio, and its :func:`interval` if known."""
    ends = interval(ratio, error)
    return f"{number(ratio)}×" + (f" ({' to '.join(map(number, ends))})" if ends else "")


def trained_on(steps: int, tokens: int) -> str:
    """ "3 steps on 3,072 tokens": how much a training reads."""
    return f"{plural(steps, 'step')} on {plural(tokens, 'token')}"


def duration(seconds: float) -> str:
    """A duration with its unit: "7 s", "12:05 min", "1:02:03 h"."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{hms(whole)} {'min' if whole < 3600 else 'h'}"


def hms(seconds: float) -> str:
    """Hours, minutes and seconds: "0:07", "12:05", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
