"""Losses of single tokens and continuations, in runs of a tiny model."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from optima_tpu.evaluate.perplexity import perplexity, token_losses
from optima_tpu.launch import main
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline import continuations as writing
from optima_tpu.pipeline import perplexities
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.processes import several
from tests.support.records import put
from tests.support.runs import stop_after_the_first_block
from tests.support.tiny_models import tiny_folder, tiny_llama

pytestmark = pytest.mark.usefixtures("one_device")

WORDS = [
    *("--calibration.windows", "4", "--calibration.length", "32", "--calibration.held_out", "2"),
    *("--evaluation.windows", "4", "--preset", "fast"),
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Command without --output, and directory, of a run on a text of words."""
    root = tmp_path_factory.mktemp("words")
    random = np.random.default_rng(0)
    for name in ("a.txt", "b.txt"):
        (root / name).write_text(" ".join(random.choice(["stone", "river", "<b>bread</b>", "walks", "é"], 2000)))
    model = tiny_folder(root / "model", num_hidden_layers=2)
    texts = ["--calibration.source", f"file:{root / 'a.txt'}", "--evaluation.source", f"file:{root / 'b.txt'}"]
    command = ["--model", str(model), *texts, *WORDS]
    assert main([*command, "--output", str(root / "run")]) == 0
    return command, root / "run"


def record(run) -> dict:
    return json.loads((run / "report.json").read_text())


@pytest.mark.parametrize("length", [2, 129, 150])
@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_losses_of_tokens_are_those_of_the_logits(length, shape):
    config, tensors = tiny_llama(max_position_embeddings=256)
    tokens = np.random.default_rng(0).integers(0, 64, (5, length)).astype(np.int32)
    decoder = Decoder.open(config, tensors, mesh(*shape))
    logits = logits_of(Decoder.open(config, tensors, mesh(1, 1)), tokens)[:, :-1].astype(np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(axis=-1)) + peak[..., 0]
    expected = total - np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    losses = token_losses(decoder, tokens)
    assert losses.shape == (5, length - 1) and losses.dtype == np.float32
    assert np.abs(losses - expected).max() < 1e-5 * expected.max()
    assert perplexity(decoder, tokens) == pytest.approx(np.exp(expected.mean()), rel=1e-6)


def test_a_run_says_which_tokens_got_worse(words):
    report, run = record(words[1]), words[1]
    losses = np.load(run / "dense_losses.npy")
    assert losses.shape == (4, 31) and losses.dtype == np.float32
    assert np.exp(losses.mean(dtype=np.float64)) == pytest.approx(report["perplexity"]["dense"], rel=1e-6)
    tokens = report["tokens"]
    rise = np.log(report["perplexity"]["pruned"] / report["perplexity"]["dense"])
    assert tokens["tokens"] == 124 and tokens["mean"] == pytest.approx(rise, abs=1e-6)
    assert sum(tokens["shares"]) == pytest.approx(1)
    assert all(len(each["token"]) == 1 for each in tokens["worst"])  # a token is a byte
    page = (run / "report.html").read_text()
    assert "Which tokens got worse" in page and "<b>" not in page


@pytest.mark.parametrize("lost", ["", "damaged"])
def test_a_run_that_goes_on_has_the_dense_losses_of_its_first_part(words, tmp_path, monkeypatch, lost):
    command = [*words[0], "--export", "false", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        stop_after_the_first_block(patch)
        assert main(command) == 130
    path = tmp_path / "run" / "dense_losses.npy"
    if lost == "damaged":
        path.write_bytes(path.read_bytes()[:-4])
    measured = []
    monkeypatch.setattr(perplexities, "token_losses", lambda *args: measured.append(1) or token_losses(*args))
    assert main(command) == 0
    assert len(measured) == (2 if lost == "damaged" else 1), "the pruned model alone"
    assert record(tmp_path / "run")["tokens"] == record(words[1])["tokens"]


def test_both_models_continue_the_prompts(words):
    run, continuations = words[1], record(words[1])["continuations"]
    assert json.loads((run / "continuations.json").read_text()) == continuations
    assert [each["prompt"] for each in continuations["texts"]] == [prompt.replace("\n", "⏎") for prompt in writing.PROMPTS]
    for each in continuations["texts"]:
        dense, pruned = each["dense"], each["pruned"]
        assert dense[0] == pruned[0] and (dense[1] != pruned[1] or not dense[1])
    assert "What the models write" in (run / "report.html").read_text()
    assert "continuing prompts with both models" in record(run)["seconds"] and record(run)["memory"]["host_peak"]


def test_they_are_not_written_twice(words, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(words[1], run)
    (run / "report.json").unlink()
    put(run / "continuations.json", '{"reason": "kept"}')
    monkeypatch.setattr(writing, "generate", None)
    assert main([*words[0], "--output", str(run)]) == 0
    assert record(run)["continuations"] == {"texts": [], "reason": "kept"}


def test_where_nobody_would_read_them_none_are_written(words, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "generate", None)
    assert main([*words[0], "--export", "false", "--output", str(tmp_path / "run")]) == 0
    for run in (tmp_path / "run", finished.directory):  # whose text is random tokens
        assert record(run)["continuations"] is None and not (run / "continuations.json").exists()


def test_a_model_that_does_not_fit_is_not_asked(words, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_SHARE", 1e-9)
    assert main([*words[0], "--output", str(tmp_path / "run")]) == 0
    reason = record(tmp_path / "run")["continuations"]["reason"]
    assert reason.startswith("The models were not asked to continue prompts: the whole model and its cache take ")


@pytest.mark.parametrize("generates", [True, False])
def test_a_model_that_cannot_write_has_no_step_of_writing(generates, tmp_path):
    model = SimpleNamespace(decoder=SimpleNamespace(config=SimpleNamespace(generates=generates)))
    assert bool(writing.CONTINUING.steps(SimpleNamespace(model=model, directory=tmp_path))) == generates


@pytest.mark.slow
def test_two_processes_write_what_one_does(words, tmp_path):
    for status, _, error in several([*words[0], "--output", str(tmp_path / "run")]):
        assert status == 0, error
    one, two = record(words[1]), record(tmp_path / "run")
    assert two["continuations"]["texts"] == one["continuations"]["texts"]
    assert two["tokens"]["shares"] == one["tokens"]["shares"]
    assert [each["token"] for each in two["tokens"]["worst"]] == [each["token"] for each in one["tokens"]["worst"]]
