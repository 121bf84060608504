"""All patterns, and :func:`parse_pattern`, which reads a pattern's text."""

import re
from collections.abc import Callable

from optima_tpu.errors import UserError, did_you_mean, refusing
from optima_tpu.method.patterns.base import Pattern
from optima_tpu.method.patterns.masks import DENSE, NM, Dense, Unstructured
from optima_tpu.method.patterns.named import NamedPattern, import_pattern
from optima_tpu.method.patterns.parts import Heads, Neurons, Place, WholeInputs, WholeParts
from optima_tpu.runtime.bounds import whole
from optima_tpu.runtime.own_classes import is_import_path

__all__ = [
    "DENSE",
    "NM",
    "Dense",
    "Heads",
    "NamedPattern",
    "Neurons",
    "Pattern",
    "Place",
    "Unstructured",
    "WholeInputs",
    "WholeParts",
    "import_pattern",
    "parse_pattern",
]


def parse_pattern(text: str | float, group: str = "row", own: Callable[[str], Pattern] = NamedPattern) -> Pattern:
    """Reads a pattern from its text.

    The forms are "0.5/row" (half of every row), "0.5/layer" (half of every matrix), "0.5", "0.25/input" (a quarter of the
    inputs), "0.25/neuron", "0.25/neuron@64", "0.5/head", "2:4", "2:4@128", "dense" and "my_lab.patterns:Banded?width=4".

    Args:
      group: the comparison group of a plain "0.5", as in the published selector.
      own: makes the pattern of an import path. :func:`import_pattern` for a text that the person typed; by default nothing is
        imported.

    Raises:
      UserError: the text is none of these.
    """
    text = str(text).strip()
    if is_import_path(text):
        return own(text)
    forms = "expected a pattern such as 0.5, 0.5/layer, 0.25/neuron, 2:4 or 2:4@128, got"
    if (meant := _respelled(text)) != text:
        raise UserError(f"{forms} {text!r}{did_you_mean(text, [meant], cutoff=0.0)}")
    with refusing(ValueError, f"{forms} {text!r}"):
        if text == DENSE:
            return Dense()
        if ":" in text:
            n, m = text.split(":")
            m, apart, stride = m.partition("@")
            return NM(whole(n), whole(m), whole(stride) if apart else 1)
        sparsity, _, given = text.partition("/")
        unit, apart, multiple = given.partition("@")
        for cls in (WholeInputs, Neurons, Heads):
            if unit == cls.word:
                return cls(float(sparsity), whole(multiple) if apart else cls.multiple)
        return Unstructured(float(sparsity), given or group)


def _respelled(text: str) -> str:
    """ "2:4" for 2/4, and "0.2/row" for 20%/row; any other text as it is."""
    share = re.sub(r"^(\d+(?:\.\d+)?)%", lambda percent: f"{float(percent[1]) / 100:g}", text)
    return re.sub(r"^(\d+)/(\d+)$", r"\1:\2", share)
