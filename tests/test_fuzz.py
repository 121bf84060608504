"""Any file or command line gives a result or one line, never a traceback."""

import json
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.options import alternatives, kinds
from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import RunConfig
from optima_tpu.config.written import flags
from optima_tpu.errors import UserError
from optima_tpu.evaluate.config import parse as parse_evaluate
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.plan.model import open_declared
from optima_tpu.report import plots
from tests.support.fuzz import KINDS, PAGES, REPLACEMENTS, Kind, bits_flipped, outcome, value_replaced
from tests.support.references import REFERENCES
from tests.support.tiny_models import tiny_folder

pytest.importorskip("transformers")

pytestmark = pytest.mark.fuzz
DRAWS = True  # its pages have their drawings, see conftest.py


def tried(check: Any, strategy: st.SearchStrategy, examples: int) -> None:
    """Runs ``check`` on a strategy's values, the same ones at every call."""
    few = settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    few(given(strategy)(check))()


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Content with flipped bits, or cut short, or JSON with another value.

    Up to three bits are flipped, half of the times near the beginning, where headers are.
    """
    byte = st.integers(0, 200) | st.integers(0, max(1, len(content)))
    flips = st.lists(st.tuples(byte, st.integers(0, 7)), min_size=1, max_size=3)
    ways = flips.map(lambda places: bits_flipped(content, places)) | st.integers(0, len(content)).map(lambda end: content[:end])
    try:
        json.loads(content)
    except ValueError:
        return ways
    return ways | st.builds(value_replaced, st.just(content), st.integers(0, 1 << 20), st.sampled_from(REPLACEMENTS))


def assert_refused_or_read(kind: Kind, folder: Path, examples: int) -> None:
    if kind.write is not tiny_folder:
        folder.mkdir()
    kind.write(folder)
    content = (folder / kind.file).read_bytes()
    assert outcome(kind, folder, content) == "read"

    def check(changed: bytes) -> None:
        result = outcome(kind, folder, changed)
        assert result == "refused" or not kind.checked or changed == content

    tried(check, damaged(content), examples)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_in_one_line_or_read(name, tmp_path):
    assert_refused_or_read(KINDS[name], tmp_path / "folder", 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS | PAGES)
def test_a_thousand_damages_of_each_file_are_refused_or_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "lines", lambda given, *_, **__: ["<svg></svg>" for _ in given])
    monkeypatch.setattr(plots, "cells", lambda *_, **__: "<svg></svg>")
    assert_refused_or_read((KINDS | PAGES)[name], tmp_path / "folder", 1000)


def read_declared(folder: Path) -> Decoder:
    """What is computed from a config.json before any weight is read."""
    decoder = open_declared(str(folder), None, 4).decoder
    for block in (0, decoder.config.blocks - 1):
        decoder.config.positions(block, 8)
    return decoder


@st.composite
def configurations(draw: st.DrawFn) -> bytes:
    """The config.json of some family with one or two other values."""
    variants = [(reference, variant) for reference in REFERENCES for variant in reference.variants.values()]
    reference, variant = draw(st.sampled_from(variants))
    content = json.dumps(reference.configuration(variant).to_dict()).encode()
    for index, value in draw(st.lists(st.tuples(st.integers(0, 1 << 20), st.sampled_from(REPLACEMENTS)), min_size=1, max_size=2)):
        content = value_replaced(content, index, value)
    return content


def assert_configurations(folder: Path, examples: int) -> None:
    folder.mkdir()
    kind = Kind("config.json", folder.mkdir, read_declared)

    def check(content: bytes) -> None:
        outcome(kind, folder, content)

    tried(check, configurations(), examples)


def test_a_configuration_with_another_value_is_refused_in_one_line_or_read(tmp_path):
    assert_configurations(tmp_path / "model", 75)


@pytest.mark.slow
def test_five_thousand_configurations_are_refused_or_read(tmp_path):
    assert_configurations(tmp_path / "model", 5000)


WORDS = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=8) | st.sampled_from(
    (
        *("", "null", "true", "-1", "0", "1e400", "nan", "2:4", "0.5/row", "{}", "[]", "[1]", "--", "9" * 30),
        *("a=b", "x:Y", "null.name"),
    )
)


def values_of(kind: Any) -> st.SearchStrategy[str]:
    """Words for a setting, half of them of its own type."""
    own: list[st.SearchStrategy[str]] = []
    for each in alternatives(kind):
        if typing.get_origin(each) is Literal:
            own.append(st.sampled_from([str(value) for value in typing.get_args(each)]))
        elif each is int:
            own += [st.integers(-3, 300).map(str), st.integers().map(str)]
        elif each is float:
            own += [st.floats(0, 1).map(repr), st.floats().map(repr)]
        elif each is bool:
            own.append(st.sampled_from(("true", "false")))
        elif each is type(None):
            own.append(st.just("null"))
    return st.one_of(WORDS, *own)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A run's settings by their names, with values of right or wrong types."""
    methods = {setting: draw(st.sampled_from(sorted(names))) for setting, names in CHOICES.items()}
    chosen = draw(st.lists(st.sampled_from(sorted(methods)), max_size=4, unique=True))
    argv = [word for setting in chosen for word in (f"--{setting}", methods[setting])]
    settings_of = {
        name: kind for name, kind in kinds(RunConfig, methods).items() if name not in ("config", "print_config", "help")
    }
    for name in draw(st.lists(st.sampled_from(sorted(settings_of)), max_size=4, unique=True)):
        argv += [f"--{name}", draw(values_of(settings_of[name]))]
    return argv + draw(st.lists(WORDS, max_size=1)) * draw(st.booleans())


def assert_parsed(argv: list[str]) -> None:
    """Asserts a refusal in one line, or settings that survive a round trip."""
    try:
        config = parse(argv)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert parse(flags(config)) == config


def assert_evaluation_parsed(argv: list[str]) -> None:
    try:
        parse_evaluate(argv)
    except UserError as error:
        assert str(error) and "\n" not in str(error)


EVALUATE = "model", "--against", "--perplexity", "--tasks", "--length", "--windows", "--mesh", "--dtype", "--batch", "--limit"
EVALUATE += ("--output",)
EVALUATIONS = st.lists(st.sampled_from(EVALUATE) | WORDS | st.integers().map(str), max_size=6)


def test_a_command_line_is_refused_in_one_line_or_means_what_it_says():
    tried(assert_parsed, command_lines(), 60)
    tried(assert_evaluation_parsed, EVALUATIONS, 60)


@pytest.mark.slow
def test_a_thousand_command_lines_are_refused_or_parsed():
    tried(assert_parsed, command_lines(), 1000)
    tried(assert_evaluation_parsed, EVALUATIONS, 1000)
