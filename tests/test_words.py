"""Names and first lines of the package, as the style page asks for them."""

import ast
import collections
import re
from pathlib import Path

import pytest

import optima_tpu
from optima_tpu.errors import plural

_ROOT = Path(optima_tpu.__file__).parent

_LONG = 0.5
"""The share of docstrings whose first line has 80 characters or more. It may only fall."""


def _nodes():
    for path in sorted(_ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text())
        yield path, tree
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef))


def test_a_public_class_has_a_name_of_its_own():
    """So that a name means one thing wherever it stands."""
    places = collections.defaultdict(list)
    for path, node in _nodes():
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            places[node.name].append(str(path.relative_to(_ROOT)))
    assert {name: each for name, each in places.items() if len(each) > 1} == {}


def test_no_larger_share_of_docstrings_begins_with_a_long_line():
    texts = [text for _, node in _nodes() if (text := ast.get_docstring(node)) is not None]
    assert sum(len(text.partition("\n")[0]) >= 80 for text in texts) <= _LONG * len(texts)


_COUNTED = r"(?:window|block|file|cell|document|matrice|layer|tensor|device|processe|step|round|passe|row)s"
_BETWEEN = r"(?:consecutive|held-out|calibration|pruned|finished|other|more)"


def test_every_count_that_may_be_one_goes_through_plural():
    """ "1 windows of": a count stands in front of a noun in the plural only where :func:`optima_tpu.errors.plural` wrote both."""
    typed = re.compile(rf"^ (?:{_BETWEEN} )?{_COUNTED}\b(?![/=])")
    found = [
        f"{path.relative_to(_ROOT)}:{value.lineno}: {{{ast.unparse(value.value)}}}{text.value[:24]}"
        for path, tree in ((path, node) for path, node in _nodes() if isinstance(node, ast.Module))
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for value, text in zip(node.values, node.values[1:])
        if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and typed.match(text.value)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [(1, "window", "1 window"), (0, "window", "0 windows"), (1234, "matrix", "1,234 matrices"), (2, "pass", "2 passes")],
)
def test_plural(count, noun, said):
    assert plural(count, noun) == said
