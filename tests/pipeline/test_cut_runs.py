"""Runs that cut whole structures before the walk, of every kind."""

import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.launch import main
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.pipeline import cutting
from optima_tpu.pipeline.cutting import read_left_out
from optima_tpu.pipeline.experts import done_blocks
from optima_tpu.pipeline.journal import Journal
from optima_tpu.pipeline.recover.config import RecoverConfig
from optima_tpu.pipeline.recover.start import open_start
from optima_tpu.pipeline.repair import verified
from optima_tpu.recover import main as recover
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.references import BY_MODEL, SIZES, far_from, save
from tests.support.runs import SMALL, folder_tensors, only_error, stop_after_the_first_block
from tests.support.tiny_models import tiny_folder

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

MIXTURE = "Qwen3MoeForCausalLM"
GROUPS = dict(n_routed_experts=8, n_group=2, topk_group=1, moe_intermediate_size=48)
MIXTURES = {
    MIXTURE: dict(moe_intermediate_size=48, num_experts=6),
    "MixtralForCausalLM": dict(num_local_experts=6),
    "GptOssForCausalLM": dict(num_local_experts=6),
    "DeepseekV3ForCausalLM": GROUPS,
    "Glm4MoeForCausalLM": GROUPS,
}
TOKENS = np.random.default_rng(0).integers(0, 250, (8, 32)).astype(np.int32)
"""As the windows of the runs, so with their programs."""


def mixture_folder(path, model=MIXTURE, **settings):
    """A tiny mixture as ``transformers`` saves it."""
    save(path, BY_MODEL[model], SIZES | MIXTURES[model] | settings)
    return path


class Cut(NamedTuple):
    """A kind of structure.

    Attributes:
      model: saves a model at a path.
      words: of the command, beside the model.
      cuts: of report.json.
      choice: the name in :mod:`cutting` of what chooses one structure after the other.
      once: the same, stopped behind the first.
      chosen: how many choices left_out.json has.
    """

    model: Callable
    words: str
    cuts: dict
    choice: str
    once: Callable
    chosen: Callable[[dict], int]


def one_block(choices, *arguments):
    yield next(choices(*arguments))
    raise KeyboardInterrupt


def one_mixture(keep_block, directory, index, *rest):
    if index == 1:
        raise KeyboardInterrupt
    return keep_block(directory, index, *rest)


CUTS = {
    "blocks": Cut(
        functools.partial(tiny_folder, num_hidden_layers=4),
        "--preset fast --cut.blocks 2 --target dense --pattern 2:4 --distill kl --distill.windows 4 --distill.batch 2",
        {"blocks": {"left": [2], "total": 4}},
        "choices",
        one_block,
        lambda left: len(left["blocks"]),
    ),
    # Behind the removal come masks for a dense target, and the training of the routers. The score compiles less than the default.
    "experts": Cut(
        mixture_folder,
        "--preset fast --cut.experts 2 --cut.refit 2 --cut.score reap --target dense --layers self_attn.*=dense "
        "--distill kl --distill.train routers --distill.windows 8 --distill.learning_rate 1e-2",
        {"experts": {"left": [4], "total": 6}},
        "keep_block",
        one_mixture,
        lambda left: len(left["experts"]["blocks"]),
    ),
}


@pytest.fixture(scope="module", params=CUTS)
def cut(request):
    return CUTS[request.param]


@pytest.fixture(scope="module")
def whole_run(cut, one_device, tmp_path_factory):
    """An unstopped run: its command without --output, and its directory."""
    root = tmp_path_factory.mktemp("cut")
    words = ["--model", str(cut.model(root / "model")), *cut.words.split(), *SMALL]
    assert main([*words, "--output", str(root / "run")]) == 0
    return words, root / "run"


def read(run, name="report.json"):
    return json.loads((run / name).read_text())


def test_the_report_has_what_left(cut, whole_run):
    _, run = whole_run
    report, kept = read(run), read(run, "left_out.json")
    assert report["cuts"] == cut.cuts and report["left_out"] == kept
    weights, left = (sum(each.size for each in folder_tensors(path).values()) for path in (run.parent / "model", run / "hf"))
    assert report["removed"] == weights - left > 0 and report["model"]["weights"] == weights
    assert report["distillation"]["checks"] and not verified(run).damaged


def test_a_run_that_is_stopped_twice_goes_on_to_the_same_bits(cut, whole_run, tmp_path, monkeypatch):
    """Stops after the first choice and after the first pruned block."""
    (words, expected), run = whole_run, tmp_path / "run"
    once = functools.partial(cut.once, getattr(cutting, cut.choice))
    for chosen, stop in ((1, lambda patch: patch.setattr(cutting, cut.choice, once)), (2, stop_after_the_first_block)):
        with monkeypatch.context() as patch:
            stop(patch)
            assert main([*words, "--output", str(run)]) != 0
        assert cut.chosen(read(run, "left_out.json")) == chosen
    assert main([*words, "--output", str(run)]) == 0
    assert (run / "left_out.json").read_bytes() == (expected / "left_out.json").read_bytes()
    ours, theirs = CheckpointTensors(run), CheckpointTensors(expected)
    assert ours.names() == theirs.names() and ours.pruned() == theirs.pruned()
    for name, array in theirs.load(theirs.names()).items():
        assert ours.read(name).tobytes() == array.tobytes(), name


def test_the_exported_model_computes_what_the_run_measured(whole_run):
    _, run = whole_run
    measured, exported = (logits_of(open_evaluated(str(each), mesh(1, 1)).model.decoder, TOKENS) for each in (run, run / "hf"))
    assert np.array_equal(measured, exported)


def test_training_goes_on_from_the_smaller_model(cut, whole_run, tmp_path):
    """The training aims at the whole dense model and holds the zeros."""
    _, run = whole_run
    out = tmp_path / "out"
    words = ["--tokens", "256", "--source", "random", "--evaluation", "random", "--windows", "4", "--length", "32"]
    assert recover([str(run), *words, "--held_out", "2", "--distill.learning_rate", "1e-3", "--output", str(out)]) == 0
    before, after = read(run), read(out)
    assert after["cuts"] == before["cuts"] == cut.cuts and after["left_out"]["blocks"] == before["left_out"]["blocks"]
    if before["left_out"]["experts"]:
        both = [[block["stay"] for block in each["left_out"]["experts"]["blocks"]] for each in (before, after)]
        assert both[0] == both[1]
    masks, old, new = read_masks(out / "hf"), folder_tensors(run / "hf"), folder_tensors(out / "hf")
    assert {name: each.shape for name, each in old.items()} == {name: each.shape for name, each in new.items()}
    assert masks and all(not new[name][~keep].any() and (new[name] != old[name]).any() for name, keep in masks.items())


def test_training_begins_from_the_exported_folder_too(whole_run):
    """The folder's record names what was cut; its masks equal the run's."""
    _, run = whole_run
    configs = [RecoverConfig(str(each), tokens="256") for each in (run, run / "hf")]
    both = [open_start(config, mesh(4, 2), lambda spec: None).record for config in configs]
    assert both[0].left_out == both[1].left_out and both[0].dense == both[1].dense
    assert both[0].layers.keys() == both[1].layers.keys() and len(both[1].layers) == len(read_masks(run / "hf"))


REFUSED = {
    "blocks": [
        ("--cut.blocks 4", "expected cut.blocks below 4, the blocks of LlamaForCausalLM, got 4"),
        ("--cut.blocks -1", "expected cut.blocks of at least 0, got -1"),
        ("--cut.blocks many", "expected cut.blocks to be a whole number, got many; as in --cut.blocks 0"),
        ("--cut.blocks 1 --calibration.held_out 0", "expected calibration.held_out of at least 1 where cut.blocks is 1"),
        ("--pattern dense", "expected a layer to prune, but the pattern dense leaves all of them dense"),
    ],
    "experts": [
        ("--cut.experts 1.5", "expected cut.experts to be a share below 1 or a whole number, got 1.5"),
        ("--cut.experts 5", f"the 6 experts of {MIXTURE}, got 5: a token is sent to 2; take --cut.experts 4"),
        ("--cut.experts 0.5 --cut.score reep", "expected cut.score to be one of price, reap, frequency, man, msan"),
        ("--cut.experts 0.5 --cut.blocks 1", "expected cut.blocks or cut.experts, got 1 and 0.5"),
    ],
}


@pytest.mark.parametrize(
    ("name", "words", "said"), itertools.chain(*([(name, *each) for each in every] for name, every in REFUSED.items()))
)
def test_what_cannot_be_cut_is_one_line(name, words, said, tmp_path, capsys):
    model = CUTS[name].model(tmp_path / "model")
    (model / "model.safetensors").unlink(missing_ok=True)  # of the mixture, where config.json alone decides
    capsys.readouterr()  # transformers prints while it saves
    assert main(["--model", str(model), "--output", str(tmp_path / "run"), *SMALL, *words.split()]) == 2
    assert said in only_error(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


EXPERTS = pytest.mark.parametrize("cut", ["experts"], indirect=True)


@EXPERTS
def test_transformers_loads_a_run_that_pruned_and_trained_too(whole_run):
    _, run = whole_run
    assert_is_told_and_loads(MIXTURE, run, 4, 6)


@EXPERTS
def test_training_routers_moves_nothing_else_and_lowers_the_divergence(whole_run):
    _, run = whole_run
    journal, training = Journal(run), read(run)["distillation"]
    before, after = journal.tensors(), CheckpointTensors(run)
    moved = {name for name in before.names() if before.read(name).tobytes() != after.read(name).tobytes()}
    assert moved == {f"model.layers.{index}.mlp.gate.weight" for index in range(2)}
    assert training["kept"] and min(check["held_out"] for check in training["checks"][1:]) < training["checks"][0]["held_out"]


@EXPERTS
def test_blocks_whose_solved_weights_are_damaged_do_not_count(whole_run, tmp_path):
    _, run = whole_run
    shutil.copytree(run / "experts", tmp_path / "experts")
    left = read_left_out(run).experts
    assert done_blocks(tmp_path, left) == left.blocks
    files = [path for path in (tmp_path / "experts" / "block_0001").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    assert done_blocks(tmp_path, left) == left.blocks[:1]


# Of every family tests/pipeline/test_experts.py holds the same without a run.
@pytest.mark.slow
@pytest.mark.parametrize("model", MIXTURES)
def test_transformers_loads_the_model_and_computes_what_the_run_measured(model, tmp_path, one_device):
    source, run = mixture_folder(tmp_path / "model", model), tmp_path / "run"
    words = f"--model {source} --output {run} --cut.experts 0.5 --cut.score reap --pattern dense".split()
    assert main([*words, *SMALL]) == 0
    total = max(value for name, value in MIXTURES[model].items() if name.endswith("experts"))
    assert_is_told_and_loads(model, run, total // 2, total)


def assert_is_told_and_loads(model: str, run: Path, some: int, total: int) -> None:
    """Checks what a run with ``some`` of ``total`` experts says and exports.

    Its card and page name the experts that stay, and transformers computes the logits that the run measured.
    """
    small, info = getattr(transformers, model).from_pretrained(
        run / "hf", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(info.values()), info
    card = " ".join((run / "hf" / "README.md").read_text().split())
    assert f"{some} of {total} experts in every block" in card and "a token passes through as many experts as before" in card
    assert "those that stay were solved toward the output of the whole mixture" in card and "changed to compensate" not in card
    assert "Experts solved" in (run / "report.html").read_text()
    blocks = read(run, "left_out.json")["experts"]["blocks"]
    errors = [(block["error_before"], block["error_after"]) for block in blocks if block["stay"]]
    assert errors and all(after < before for before, after in errors)
    assert (far_from(small, logits_of(open_evaluated(str(run), mesh(1, 1)).model.decoder, TOKENS), TOKENS) <= 2e-5).all()
