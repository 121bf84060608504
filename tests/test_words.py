"""Names and first lines of the package, as the style page asks for them."""

import ast
import collections
from pathlib import Path

import optima_tpu

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
