"""Recovery of runs, exports and plain checkpoints: resumable, zeros held."""

import json
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy

import optima_tpu
from optima_tpu.errors import UserError
from optima_tpu.launch import main as prune
from optima_tpu.method.distillation import KL, CrossEntropy
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.pipeline.distill.model import TrainedBlocks
from optima_tpu.pipeline.distill.outcome import read_outcome
from optima_tpu.pipeline.distill.windows import Feed
from optima_tpu.pipeline.recover import run as recovering
from optima_tpu.pipeline.recover.config import RecoverConfig, parse
from optima_tpu.recover import main
from optima_tpu.report import progress
from optima_tpu.report.run_record import recorded_words
from optima_tpu.runtime import signals
from optima_tpu.runtime.records import json_values
from tests.support.meshes import mesh
from tests.support.runs import SMALL, assert_close_weights, assert_same_weights, folder_tensors, only_error
from tests.support.tiny_models import tiny_folder

TEXT = ["--source", "random", "--windows", "8", "--distill.batch", "4"]
TEXT += ["--distill.learning_rate", "1e-3", "--distill.checks", "2"]
TOKENS = ["--tokens", "0.512k"]  # 16 windows of 32, four steps
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def pruned(one_device, tmp_path_factory):
    """A pruned run, and the recovery from it with the command's defaults."""
    root = tmp_path_factory.mktemp("pruned")
    model = tiny_folder(root / "model", num_hidden_layers=2)
    magnitude = ["--selector", "magnitude", "--solver", "null", "--pattern", "0.6/row"]
    assert prune(["--model", str(model), "--output", str(root / "run"), *magnitude, *SMALL]) == 0
    assert main([str(root / "run"), *TOKENS, *TEXT, "--join_timeout", "299", "--output", str(root / "recovered")]) == 0
    return root


def report(directory) -> dict:
    return json.loads((directory / "report.json").read_text())


def test_zeros_stay_the_loss_falls_and_the_result_says_that_it_was_trained(pruned):
    recovered = report(pruned / "recovered")
    outcome = read_outcome(pruned / "recovered")
    assert recovered["distillation"] == json_values(outcome)
    assert outcome.kept and outcome.after < outcome.before and outcome.seconds > 0
    assert outcome.tokens == 512 and all(check.perplexity > 1 for check in outcome.checks)
    assert outcome.perplexity_before == pytest.approx(report(pruned / "run")["perplexity"]["pruned"], rel=1e-6)
    names = [
        [layer["name"] for block in record["blocks"] for layer in block["layers"]]
        for record in (report(pruned / "run"), recovered)
    ]
    assert names[0] == names[1]
    before, after = (folder_tensors(pruned / name / "hf") for name in ("run", "recovered"))
    masks = read_masks(pruned / "recovered/hf")
    assert masks.keys() == read_masks(pruned / "run/hf").keys()
    for name, keep in masks.items():
        assert (keep == read_masks(pruned / "run/hf")[name]).all() and (after[name][~keep] == 0).all()
        assert after[name].dtype == before[name].dtype and (after[name] != before[name]).any()
    assert (after["model.embed_tokens.weight"] == before["model.embed_tokens.weight"]).all()
    card, page = ((pruned / "recovered" / name).read_text() for name in ("hf/README.md", "report.html"))
    trained = "trained by OPTIMA-TPU, 4 steps on 512 tokens at a learning rate of 0.001, with its zeros held"
    assert trained in card and "in one shot" not in card
    assert "Trained on" in card and "| pruned, before the training |" in card and "as they were before the training" in card
    assert "optima_tpu.recover" in page and "not one-shot pruning" in page


def test_an_exported_folder_gives_the_same_bits(pruned, tmp_path, capsys):
    folder = shutil.copytree(pruned / "run/hf", tmp_path / "folder")
    command = [str(folder), *TOKENS, *TEXT, "--output", str(tmp_path / "out"), "--against", str(pruned / "model")]
    command += ["--length", "32"]  # beside a folder that was copied no run says how long its windows were
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"\nfrom        {folder}: its own report has the layers" in printed and "not con-" not in printed
    for spec in (folder, pruned / "model"):
        assert printed.index(f"opening      {spec}: ") < printed.index("reading      ") < printed.index("\ndense model")
    assert " less); 4 steps on 512 tokens at a learning rate of 0.001; it took " in printed
    assert ": 4 steps on 512 tokens, 4 windows of 32 in a step, each read once\n" in printed and "not one-shot pruning" in printed
    assert "  training\n" in printed and "step 1 of 4: " in printed
    # The time left of a training is tested with a clock that is fed; here it is too short to be said.
    assert "  stages: dense perplexity, taking the pruned blocks, training, perplexity without the training, " in printed
    assert_same_weights(tmp_path / "out", pruned / "recovered")
    assert main(command) == 0  # finished: nothing is done again
    assert "finished     nothing is left to do" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "calibration.seed is 0 there, 1 here" in error and f"optima_tpu.recover {folder} --" in error


def folder_of(path, family, change):
    """Saves a tiny bfloat16 model: a Llama without torch, others with it."""
    if family == "Llama":
        return tiny_folder(path, dtype="bfloat16", change=change, num_hidden_layers=2)
    from tests.support.references import BY_MODEL, save, torch

    reference = BY_MODEL[family + "ForCausalLM"]
    save(path, reference, reference.first | dict(vocab_size=258), torch.bfloat16)
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    return path


OTHERS = ["DeepseekV3", "Gemma4", "Glm4Moe", "GptOss", "Llama4", "Qwen3Next", "Qwen3_5"]


@pytest.mark.parametrize("family", ["Llama", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_zeros_of_any_checkpoint_are_its_masks(tmp_path, capsys, family):
    """In bfloat16, from a folder without a record."""

    def prune_it(arrays):
        for name, array in arrays.items():
            if "proj" in name and "bias" not in name:
                array[np.abs(array.astype(np.float32)) < 0.1] = 0

    dense = folder_of(tmp_path / "dense", family, lambda arrays: None)
    folder = folder_of(tmp_path / "folder", family, prune_it)
    assert main([str(folder), *TOKENS, *TEXT, "--output", str(tmp_path / "out"), "--against", str(dense)]) == 0
    printed = capsys.readouterr().out
    assert f"\nfrom        {folder}: nobody measured the errors" in printed and "held-out divergence" in printed
    assert report(tmp_path / "out")["distillation"]["kept"]
    tensors = [open_model(str(where)).tensors for where in (folder, tmp_path / "out/hf")]
    for name, keep in read_masks(tmp_path / "out/hf").items():
        before, after = (source.read(name) for source in tensors)
        assert (keep == (before != 0)).all() and (after[~keep] == 0).all(), name
        assert after.dtype == before.dtype and (after != before).any(), name
    stored = [
        {name: (array.shape, array.dtype) for name, array in folder_tensors(where).items()}
        for where in (folder, tmp_path / "out/hf")
    ]
    assert stored[0] == stored[1]


def test_a_directory_of_other_files_is_refused_before_a_model_is_opened(pruned, tmp_path, monkeypatch, capfd):
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.delattr(recovering, "open_start")
    assert main([str(pruned / "run"), *TOKENS, *TEXT, "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} holds files that are not a run of this program" in only_error(capfd.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_sigterm_stopped_ends_with_the_same_bits(pruned, tmp_path, monkeypatch, capsys):
    """Stops in step 3; only the next state keeps the check after step 2."""
    command = [str(pruned / "run"), *TOKENS, *TEXT, "--output", str(tmp_path / "out")]
    step, steps = TrainedBlocks.step, []

    def stop(model, *given):
        steps.append(step(model, *given))
        if len(steps) == 3:
            monkeypatch.setattr(progress, "check_signals", behind_it)
        return steps[-1]

    def behind_it():
        monkeypatch.undo()
        raise signals.Stopped(signal.SIGTERM)

    monkeypatch.setattr(TrainedBlocks, "step", stop)
    assert main(command) == signals.RESUME
    assert "saved  3 of 4 steps" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out/distillation").iterdir()] == ["step_0000003"]
    shown, begin = [], Feed.begin
    monkeypatch.setattr(Feed, "begin", lambda feed, step: shown.append(feed._progress._done) or begin(feed, step))
    assert main(command) == 0
    assert shown == [3]  # while the dense model reads the text, which takes longer than a step
    assert "resuming  3 of 4 steps done" in capsys.readouterr().out
    assert_same_weights(tmp_path / "out", pruned / "recovered")
    assert report(tmp_path / "out")["distillation"]["checks"] == report(pruned / "recovered")["distillation"]["checks"]


@pytest.mark.slow  # the distillation of a run shows the mesh with the same code
def test_mesh_and_parts_of_the_text_change_rounding_alone(pruned, tmp_path, monkeypatch):
    """On 2x2 devices, with as many windows at once as one step needs."""
    monkeypatch.setattr("optima_tpu.pipeline.distill.windows.AT_ONCE", 1)
    monkeypatch.setattr(recovering, "make_mesh", lambda spec: mesh(2, 2))
    assert main([str(pruned / "run"), *TOKENS, *TEXT, "--output", str(tmp_path / "out")]) == 0
    assert_close_weights(tmp_path / "out", pruned / "recovered")


def test_norms_alone_on_the_next_tokens(pruned, tmp_path, capsys):
    """Trains the norms of a recovered model on a text that is too short.

    The text is read once, and the command says so.
    """
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(0).integers(97, 105, 970))))
    settings = dict(source=f"file:{text}", evaluation="random", windows=4, length=32)
    training = {"name": "cross_entropy", "train": "norms", "batch": 4, "learning_rate": 1e-3, "checks": 2}
    result = optima_tpu.load(pruned / "recovered").recover("1M", **settings, distill=training, output=str(tmp_path / "out"))
    assert result.directory == tmp_path / "out"
    printed = capsys.readouterr().out
    assert "has no more: 1,000,000 tokens were asked for" in printed
    # 30 windows, of which eight are held out, and two would not fill a step.
    assert ": 5 steps on 640 tokens, 4 windows of 32 in a step, each read once\n" in printed
    assert "the dense model reads" not in printed
    before, after = (folder_tensors(path / "hf") for path in (pruned / "recovered", tmp_path / "out"))
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved and all(before[name].ndim == 1 for name in moved)
    masks = [read_masks(path / "hf") for path in (pruned / "recovered", tmp_path / "out")]
    assert masks[0].keys() == masks[1].keys() and all((masks[0][name] == masks[1][name]).all() for name in masks[0])
    distillation = report(tmp_path / "out")["distillation"]
    assert distillation["tokens"] == 20 * 32
    assert distillation["checks"][-1]["perplexity"] == pytest.approx(np.exp(distillation["checks"][-1]["held_out"]))


@pytest.mark.parametrize(
    "words, said",
    [
        (["{run}", "--tokens", "many"], "a number such as 200k, 50M or 1000000, got many"),
        (["{run}"], "got none"),
        (["{run}", "--tokens", "1,5M"], "such as 200k, 50M or 1000000, got 1,5M"),
        (
            ["{run}", "--tokens", "1k", "--window", "32"],
            "there is no setting --window; type --length, tokens in each window, or --windows",
        ),
        (
            ["{run}", "--tokens", "1k", "--source", "file:{root}/run/report.json"],
            "without --evaluation training and evaluation would both read ",
        ),
        (["{run}", "--tokens", "0"], "expected tokens from 1 to 268435456, got 0"),
        (["{run}", "--tokens", "1k", "--distill.batch", "0"], "distill.batch of at least 1, got 0"),
        (["{run}", "--tokens", "1k", "--distill", "null"], "expected distill to be one of kl, cross_entropy, got null"),
        (["{run}", "--tokens", "1k", "--distill.windows", "4"], "type --tokens"),
        (["{run}", "--tokens", "1k", "--step", "4"], "type --distill.batch"),
        (["{run}", "--tokens", "1k", "--solver.damping", "0.1"], "there is no setting --solver.damping"),
        (["{run}", "--tokens", "1k", "--distill.passes", "99999999999"], "distill.passes of at most"),
        (["{root}/nowhere", "--tokens", "1k"], "no such path"),
        (["runs/no-such-run", "--tokens", "1k"], "no such path: 'runs/no-such-run'; expected a folder"),
        (["{root}/rum", "--tokens", "1k"], "/run?"),
        (["{model}", "--tokens", "1k", "--against", "{model}"], "no matrix has a share of zeros of at least 0.1"),
        (["{model}", "--tokens", "1k"], "expected --against with the dense model and --source with a text to train on, got none"),
        (["{model}", "--tokens", "1k", *TEXT], "expected --against with the dense model, got none"),
        (["{run}", "--tokens", "1k", *TEXT, "--source", "npy:{root}/none.npy", "--evaluation", "random"], "does not exist"),
        (["{run}", "--tokens", "1k", "--length", "1000"], "at most 128, the model's context, got 1000"),
        (["{run}", "--tokens", "1k", "--against", "{root}/other"], "was pruned from, got another one in"),
        (["{run}", "--tokens", "1k", *TEXT, "--device_memory", "1e-6"], "take more devices or --distill.train norms"),
    ],
)
def test_what_cannot_be_is_one_line(pruned, words, said, capsys):
    if "{root}/other" in words and not (pruned / "other").exists():
        tiny_folder(pruned / "other", seed=1)
    places = {"root": pruned, "run": pruned / "run", "model": pruned / "model"}
    assert main([word.format(**places) for word in words]) == 2
    assert said in only_error(capsys.readouterr().err)


def test_tokens_are_read_as_they_are_printed():
    assert [parse(["m", "--tokens", text]).token_count for text in ("4,096", "1,000,000", "1.5M")] == [4096, 10**6, 1_500_000]


def test_a_text_that_only_the_record_names_says_what_replaces_it(pruned, monkeypatch, capsys):
    def gone(*arguments):
        raise UserError("expected a text file, but a.jsonl does not exist")

    monkeypatch.setattr(recovering, "_texts", gone)
    assert main([str(pruned / "run"), *TOKENS]) == 2
    assert "; --source and --evaluation would replace the text that the record of" in only_error(capsys.readouterr().err)


def test_the_command_of_a_recovery_says_how_it_trained(pruned):
    configuration = json.loads((pruned / "recovered/run.json").read_text())["configuration"]
    name, words = recorded_words(configuration)
    assert configuration["calibration"]["length"] == 32, "as in the run, of which the command said nothing"
    assert configuration["join_timeout"] == 299, "of the recovery, and not of the run"
    assert name == "recover" and parse(words).distill == KL(batch=4, learning_rate=1e-3, checks=2)


def test_tokens_are_counted_in_any_spelling():
    counts = {"200k": 200_000, "50M": 50_000_000, "1.5m": 1_500_000, "1_000": 1000, "77": 77}
    assert {text: RecoverConfig("model", text).token_count for text in counts} == counts
    assert parse(["model", "--tokens", "50M"]).distill == KL()
    assert parse(["model", "--tokens", "1k", "--distill", "cross_entropy"]).distill == CrossEntropy()
    with pytest.raises(UserError, match="from 1 to 268435456, got 9000000000"):
        RecoverConfig("model", "9b")
