"""A tokenizer whose files ask for too much is refused in one line."""

import json

import pytest

from optima_tpu.data import Draw, calibration_tokens, evaluation_tokens, parse_source
from optima_tpu.errors import UserError, panics_refused
from optima_tpu.models.checkpoints import load_tokenizer, open_model
from optima_tpu.runtime.command import guarded
from tests.support.runs import only_error
from tests.support.tiny_models import tiny_folder


def changed(folder, file, change):
    settings = json.loads((folder / file).read_text())
    change(settings)
    (folder / file).write_text(json.dumps(settings))


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def blows_up(folder):
    """A model with a tokenizer rule of exponential cost on long words."""
    rule = {"type": "Split", "pattern": {"Regex": r"(\w+\s?)+$!"}, "behavior": "Isolated", "invert": False}
    changed(folder, "tokenizer.json", lambda settings: settings.update(pre_tokenizer=rule))
    return open_model(str(folder))


def test_a_rule_that_blows_up_is_refused_by_the_name_of_its_file(blows_up, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 60 + " !")
    source, tokenizer = parse_source(f"file:{tmp_path / 'a.txt'}"), load_tokenizer(blows_up)
    for read in (
        lambda: calibration_tokens(source, tokenizer, Draw(windows=1, length=8, seed=0, held_out=0)),
        lambda: evaluation_tokens(source, tokenizer, length=8, windows=1),
    ):
        with pytest.raises(
            UserError, match=f"the tokenizer.json of {tmp_path / 'model'} has a rule that fails on some text"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_any_other_panic_of_a_library_is_one_line(capsys):
    class PanicException(BaseException):
        __module__ = "pyo3_runtime"

    def command():
        raise PanicException("called `Option::unwrap()`\non a `None` value")

    assert guarded(command, "again") == 2
    assert "a library in Rust ended the command" in only_error(capsys.readouterr().err)
    with pytest.raises(KeyboardInterrupt), panics_refused("never"):
        raise KeyboardInterrupt


def test_a_token_number_beyond_int32_is_refused(folder, tmp_path):
    changed(folder, "tokenizer.json", lambda settings: settings["model"]["vocab"].update(a=4294967295))
    (tmp_path / "a.txt").write_text("a" * 60)
    tokenizer = load_tokenizer(open_model(str(folder)))
    with pytest.raises(UserError, match="has a token with the number 4294967295"):
        evaluation_tokens(parse_source(f"file:{tmp_path / 'a.txt'}"), tokenizer, length=8, windows=1)


def test_the_code_of_a_tokenizer_is_never_run_and_never_advised(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    settings = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="asks for code of the model's own .auto_map., which is never run") as refused:
        load_tokenizer(open_model(str(folder)))
    assert "trust_remote_code" not in str(refused.value) and "tokenizer.json" in str(refused.value)
