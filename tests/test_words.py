"""Names and first lines of the code, as the style page asks for them."""

import ast
import collections
import functools
import re
from pathlib import Path

import pytest

from optima_tpu.errors import plural

_HOUSE = Path(__file__).parents[1]
_FOLDERS = "optima_tpu", "launch", "benchmarks", "examples", "docs", "tests"
"""Where the house has code."""
_WIDTH = 80
"""A docstring's first line ends before this column: editors show it whole."""
_SAY_NOTHING = frozenset({"found", "there", "mine", "told", "place", "happened"})
"""Words that are no names of values or functions: they do not say what is in them."""
_ACTIONS = frozenset({"place"})
"""Of these words, the ones that say what a function does."""


@functools.cache
def _trees():
    """Every file of the house with its syntax tree."""
    paths = (path for folder in _FOLDERS for path in sorted((_HOUSE / folder).rglob("*.py")))
    return {path: ast.parse(path.read_text()) for path in paths}


@functools.cache
def _lines(path):
    return path.read_text().splitlines()


def _nodes(root):
    """Every node of the files below a folder, with its file."""
    return ((path, node) for path, tree in _trees().items() if path.is_relative_to(root) for node in ast.walk(tree))


def test_a_public_class_has_a_name_of_its_own():
    """So that a name means one thing wherever it stands."""
    places = collections.defaultdict(list)
    for path, node in _nodes(_HOUSE / "optima_tpu"):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            places[node.name].append(str(path.relative_to(_HOUSE)))
    assert {name: each for name, each in places.items() if len(each) > 1} == {}


def test_a_docstring_begins_with_a_line_that_ends_before_column_80():
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    long = [
        f"{path.relative_to(_HOUSE)}:{node.body[0].lineno}"
        for path, node in _nodes(_HOUSE)
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        if len(_lines(path)[node.body[0].lineno - 1]) >= _WIDTH
    ]
    assert long == []


def _value(node):
    """The name that a node gives to a value, if it gives one."""
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else getattr(node, "arg", None)


def _says_nothing(node):
    if isinstance(node, ast.FunctionDef):
        return node.name.strip("_") in _SAY_NOTHING - _ACTIONS
    return _value(node) in _SAY_NOTHING


def test_a_value_or_a_function_is_named_by_what_it_holds_or_does():
    vague = [
        f"{path.relative_to(_HOUSE)}:{node.lineno}: {_value(node) or node.name}"
        for path, node in _nodes(_HOUSE)
        if _says_nothing(node)
    ]
    assert vague == []


_COUNTED = r"(?:window|block|file|cell|document|matrice|layer|tensor|device|processe|step|round|passe|row)s"
_BETWEEN = r"(?:consecutive|held-out|calibration|pruned|finished|other|more)"


def test_every_count_that_may_be_one_goes_through_plural():
    """As "1 windows of"; :func:`optima_tpu.errors.plural` writes both."""
    typed = re.compile(rf"^ (?:{_BETWEEN} )?{_COUNTED}\b(?![/=])")
    typed_counts = [
        f"{path.relative_to(_HOUSE)}:{value.lineno}: {{{ast.unparse(value.value)}}}{text.value[:24]}"
        for path, node in _nodes(_HOUSE / "optima_tpu")
        if isinstance(node, ast.JoinedStr)
        for value, text in zip(node.values, node.values[1:])
        if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and typed.match(text.value)
    ]
    assert typed_counts == []


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [(1, "window", "1 window"), (0, "window", "0 windows"), (1234, "matrix", "1,234 matrices"), (2, "pass", "2 passes")],
)
def test_plural_writes_one_and_many(count, noun, said):
    assert plural(count, noun) == said
