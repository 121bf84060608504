"""Runs that remove experts are exported as ordinary smaller models."""

import json
import shutil
from pathlib import Path

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
from tests.support.references import BY_MODEL, SIZES, save
from tests.support.runs import SMALL, folder_tensors, only_error, stop_after_the_first_block

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GROUPS = dict(n_routed_experts=8, n_group=2, topk_group=1, moe_intermediate_size=48)
MODELS = {
    "Qwen3MoeForCausalLM": dict(moe_intermediate_size=48, num_experts=6),
    "MixtralForCausalLM": dict(num_local_experts=6),
    "GptOssForCausalLM": dict(num_local_experts=6),
    "DeepseekV3ForCausalLM": GROUPS,
    "Glm4MoeForCausalLM": GROUPS,
}
ALONE = ["--pattern", "dense"]
REAP = ["--cut.score", "reap"]  # compiles less than the default, of which tests/pipeline/test_experts.py holds the numbers


def folder(model: str, path: Path, **settings: int) -> Path:
    """A tiny model as ``transformers`` saves it."""
    save(path, BY_MODEL[model], SIZES | MODELS[model] | settings)
    return path


# Of every family tests/pipeline/test_experts.py holds the same without a run.
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_transformers_loads_the_model_and_computes_what_the_run_measured(model, tmp_path, one_device):
    source, run = folder(model, tmp_path / "model"), tmp_path / "run"
    words = ["--model", str(source), "--output", str(run), "--cut.experts", "0.5", *REAP, *ALONE, *SMALL]
    assert main(words) == 0
    total = max(value for name, value in MODELS[model].items() if name.endswith("experts"))
    assert_is_told_and_loads(model, source, run, total // 2, total)


def assert_is_told_and_loads(model: str, source: Path, run: Path, some: int, total: int) -> None:
    """A run that left ``some`` of ``total`` experts says so everywhere, and transformers computes what it measured."""
    small, info = getattr(transformers, model).from_pretrained(
        run / "hf", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(info.values()), info
    report, kept = (json.loads((run / name).read_text()) for name in ("report.json", "left_out.json"))
    assert report["cuts"] == {"experts": {"left": [some], "total": total}} and report["left_out"] == kept
    weights, left = (sum(each.size for each in folder_tensors(path).values()) for path in (source, run / "hf"))
    assert report["removed"] == weights - left > 0
    card = " ".join((run / "hf" / "README.md").read_text().split())
    assert f"{some} of {total} experts in every block" in card and "a token passes through as many experts as before" in card
    assert "those that stay were solved toward the output of the whole mixture" in card and "changed to compensate" not in card
    assert "Experts solved" in (run / "report.html").read_text()
    errors = [(block["error_before"], block["error_after"]) for block in kept["experts"]["blocks"] if block["stay"]]
    assert errors and all(after < before for before, after in errors)
    assert not verified(run).damaged

    tokens = np.random.default_rng(0).integers(0, 250, (8, 32)).astype(np.int32)  # as the run's windows, so with its programs
    found, exported = (logits_of(open_evaluated(str(each), mesh(1, 1)).model.decoder, tokens) for each in (run, run / "hf"))
    assert np.array_equal(found, exported)
    with torch.no_grad():
        expected = small.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def whole_run(one_device, tmp_path_factory):
    """(words of the command without its output, directory) of a run that nothing stopped: behind the removal come masks for a dense target,
    and the training of the routers.
    """
    root = tmp_path_factory.mktemp("experts")
    model = folder("Qwen3MoeForCausalLM", root / "model")
    words = ["--model", str(model), "--preset", "fast", "--target", "dense", *SMALL, *REAP]
    words += ["--layers", "self_attn.*=dense", "--cut.experts", "2", "--cut.refit", "2"]
    words += ["--distill", "kl", "--distill.train", "routers", "--distill.windows", "8", "--distill.learning_rate", "1e-2"]
    assert main([*words, "--output", str(root / "run")]) == 0
    return words, root / "run"


def test_transformers_loads_a_run_that_pruned_and_trained_too(whole_run):
    words, run = whole_run
    assert_is_told_and_loads("Qwen3MoeForCausalLM", Path(words[1]), run, 4, 6)


def test_a_run_that_is_stopped_twice_goes_on_to_the_same_bits(whole_run, tmp_path, monkeypatch):
    """Behind the first block that lost experts, and behind the first one that was pruned."""
    words, expected = whole_run
    run, keep = tmp_path / "run", cutting.keep_block

    def once(directory, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return keep(directory, index, *rest)

    for done, stop in ((1, lambda patch: patch.setattr(cutting, "keep_block", once)), (2, stop_after_the_first_block)):
        with monkeypatch.context() as patch:
            stop(patch)
            assert main([*words, "--output", str(run)]) != 0
        assert len(json.loads((run / "left_out.json").read_text())["experts"]["blocks"]) == done
    assert main([*words, "--output", str(run)]) == 0
    assert (run / "left_out.json").read_bytes() == (expected / "left_out.json").read_bytes()
    ours, theirs = CheckpointTensors(run), CheckpointTensors(expected)
    assert ours.names() == theirs.names() and ours.pruned() == theirs.pruned()
    for name, array in theirs.load(theirs.names()).items():
        assert ours.read(name).tobytes() == array.tobytes(), name


def test_training_routers_moves_nothing_else_and_lowers_the_divergence(whole_run):
    _, run = whole_run
    journal, training = Journal(run), json.loads((run / "report.json").read_text())["distillation"]
    before, after = journal.tensors(), CheckpointTensors(run)
    moved = {name for name in before.names() if before.read(name).tobytes() != after.read(name).tobytes()}
    assert moved == {f"model.layers.{index}.mlp.gate.weight" for index in range(2)}
    assert training["kept"] and min(check["held_out"] for check in training["checks"][1:]) < training["checks"][0]["held_out"]


def test_blocks_whose_solved_weights_are_damaged_do_not_count(whole_run, tmp_path):
    _, run = whole_run
    shutil.copytree(run / "experts", tmp_path / "experts")
    left = read_left_out(run).experts
    assert done_blocks(tmp_path, left) == left.blocks
    largest = max((path for path in (tmp_path / "experts" / "block_0001").rglob("*") if path.is_file()), key=size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    assert done_blocks(tmp_path, left) == left.blocks[:1]


def test_training_goes_on_from_a_model_of_fewer_experts(whole_run, tmp_path):
    """Toward the dense mixture of all experts, with the zeros held."""
    _, run = whole_run
    out = tmp_path / "out"
    words = ["--tokens", "256", "--source", "random", "--evaluation", "random", "--windows", "4", "--length", "32"]
    assert recover([str(run), *words, "--held_out", "2", "--distill.learning_rate", "1e-3", "--output", str(out)]) == 0
    reports = [json.loads((each / "report.json").read_text()) for each in (run, out)]
    stay = [[block["stay"] for block in each["left_out"]["experts"]["blocks"]] for each in reports]
    assert stay[0] == stay[1] and reports[0]["cuts"] == reports[1]["cuts"]
    masks, before, after = read_masks(out / "hf"), folder_tensors(run / "hf"), folder_tensors(out / "hf")
    assert {name: each.shape for name, each in before.items()} == {name: each.shape for name, each in after.items()}
    assert masks and all(not after[name][~keep].any() and (after[name] != before[name]).any() for name, keep in masks.items())


def test_training_begins_from_the_exported_folder_too(whole_run):
    _, run = whole_run
    both = [
        open_start(RecoverConfig(str(each), tokens="256"), mesh(1, 1), lambda spec: None).record for each in (run, run / "hf")
    ]
    assert both[0].left_out == both[1].left_out and both[0].layers.keys() == both[1].layers.keys()


def size(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cut.experts", "1.5"], "expected cut.experts to be a share below 1 or a whole number, got 1.5"),
        (["--cut.experts", "5"], "the 6 experts of Qwen3MoeForCausalLM, got 5: a token is sent to 2; take --cut.experts 4"),
        (["--cut.experts", "0.5", "--cut.score", "reep"], "expected cut.score to be one of price, reap, frequency, man, msan"),
        (["--cut.experts", "0.5", "--cut.blocks", "1"], "expected cut.blocks or cut.experts, got 1 and 0.5"),
    ],
)
def test_what_cannot_be_removed_is_one_line(words, said, tmp_path, capsys):
    model = folder("Qwen3MoeForCausalLM", tmp_path / "model")
    (model / "model.safetensors").unlink()  # config.json alone decides
    capsys.readouterr()  # transformers prints while it saves
    assert main(["--model", str(model), "--output", str(tmp_path / "run"), *SMALL, *words]) == 2
    assert said in only_error(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
