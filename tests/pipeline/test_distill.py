"""Distillation: exact gradients and masks, equal on meshes and after stops."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from msgspec import structs
from rich.console import Console

from optima_tpu.config.parse import parse
from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.method.distillation import KL, rate_of_descent
from optima_tpu.models.checkpoints.orbax import CheckpointTensors, OrbaxTensors, load_group, read_metadata
from optima_tpu.models.decoder import Decoder, forward, head_logits
from optima_tpu.pipeline.distill import states
from optima_tpu.pipeline.distill.blocks import Trainer, head_gradient
from optima_tpu.pipeline.distill.model import TrainedBlocks
from optima_tpu.pipeline.distill.outcome import keep_outcome, read_outcome, trained_block
from optima_tpu.pipeline.distill.train import TRAINING_STEP, Training, distill, refuse_large, training_steps
from optima_tpu.pipeline.distill.windows import Inputs, TrainingStream
from optima_tpu.pipeline.journal import Journal
from optima_tpu.report.contents import Outcome
from optima_tpu.report.numbers import trained_on
from optima_tpu.report.progress import Progress
from optima_tpu.runtime.mesh import bytes_on_device
from optima_tpu.runtime.records import json_values
from optima_tpu.runtime.signals import Stopped
from tests.support.fake_run import begun, block_report, on_host
from tests.support.meshes import mesh
from tests.support.references import BY_MODEL
from tests.support.runs import SMALL, opened
from tests.support.tiny_models import MemoryTensors, tiny_folder

METHOD = KL(windows=16, passes=2, batch=4, learning_rate=1e-3, norm_factor=20.0, checks=2)
ROOM = 2.0**40


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pruned(request, tmp_path_factory):
    """Arguments and directory of a run whose blocks are pruned at random."""
    root, arrays, random = tmp_path_factory.mktemp("pruned"), {}, np.random.default_rng(0)
    model, journal = tiny_folder(root / "model", dtype=request.param, change=arrays.update), begun(root / "run")
    for block in range(3):
        own = {name: array for name, array in arrays.items() if name.startswith(f"model.layers.{block}.")}
        masks = {
            name: random.permuted(np.indices(array.shape)[1] % 5 < 2, axis=1) for name, array in own.items() if "proj" in name
        }
        pruned = {name: np.where(keep, own[name], np.zeros_like(own[name])) for name, keep in masks.items()}
        journal.save(block, own | pruned, masks, block_report(block, {}), on_host(np.zeros((1, 1, 1), np.float32)))
    return ["--model", str(model), "--output", str(root / "run"), "--pattern", "0.6/row", *SMALL], root / "run"


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, 60, (count, 32)).astype(np.int32) for count in (16, 8))


class Trained(NamedTuple):
    """Result of an unstopped distillation on the 2x2 mesh.

    ``before`` holds the pruned weights, ``weights`` the trained ones.
    """

    outcome: Outcome
    weights: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    before: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def trained(pruned, windows) -> Trained:
    outcome, journal = run(pruned, windows)
    assert outcome == read_outcome(journal.directory) and not (journal.directory / "distillation").exists()
    weights, source = result(journal), journal.tensors()
    masks = {name: keep for index in journal.finished for name, keep in journal.masks(index).items()}
    return Trained(outcome, weights, masks, {name: source.read(name) for name in weights})


# What a test compares does not depend on the dtype, and in float32 nothing hides in rounding.
in_float32 = pytest.mark.parametrize("pruned", ["float32"], indirect=True)


class Counted(Progress):
    """A silent progress whose steps a test counts, and may stop at."""

    def __init__(self, advance=lambda: None):
        super().__init__(Console(quiet=True))
        self._counts = advance

    def advance(self):
        super().advance()
        self._counts()


def inputs_of(dense, journal, windows, method=METHOD) -> Inputs:
    trainer = Trainer(dataclasses.replace(dense, tensors=journal.tensors()), method, ROOM)
    return Inputs(dense, trainer, journal, *windows)


def run(pruned, windows, shape=(2, 2), method=METHOD, advance=lambda: None) -> tuple[Outcome, Journal]:
    """A distillation over the journal of a run, in the run's directory."""
    arguments, directory = pruned
    journal = Journal(directory)
    inputs = inputs_of(opened(parse(arguments), shape).decoder, journal, windows, method)
    outcome = distill(inputs, Counted(advance))
    keep_outcome(directory, outcome)
    return outcome, journal


def stopped_in_step_6(before: int = 3):
    """An ``advance`` that raises SIGTERM's exception at step 6.

    Step 6 is the second step after the check behind step 4.

    Args:
      before: calls before the first check, one for each block of the dense model.
    """
    calls = itertools.count(1)

    def advance():
        if next(calls) == before + 1 + 4 + 1 + 2:  # first check, steps, check, steps
            raise Stopped(signal.SIGTERM)

    return advance


def result(journal: Journal) -> dict[str, np.ndarray]:
    entries = [trained_block(journal.directory, index) for index in sorted(journal.finished)]
    tensors = OrbaxTensors(entries)
    return tensors.load(tensors.names())


@in_float32
@pytest.mark.parametrize("budget", [ROOM, 0.0], ids=["kept", "done again"])
def test_the_gradient_is_that_of_the_whole_model(pruned, windows, budget):
    """Blockwise gradients on a mesh equal one ``jax.grad`` on one device."""
    arguments, directory = pruned
    journal, tokens, rate = Journal(directory), windows[0][:8], jnp.float32(1e-3)
    dense = dataclasses.replace(opened(parse(arguments), (4, 2)).decoder, batch=1)
    trainer = Trainer(dataclasses.replace(dense, tensors=journal.tensors()), METHOD, budget)
    blocks, others = ([trainer.open(parameters, {}) for parameters in trainer.decoder.blocks(range(3))] for _ in range(2))
    head, final = dense.head(), dense.embed(tokens)
    for index, parameters in enumerate(dense.blocks(range(3))):
        dense.apply(index, parameters, final)
    positions = [dense.positions(index, 32) for index in range(3)]
    gradients = [trainer.zeros() for _ in blocks]
    for pruned_batch, dense_batch in zip(dense.embed(tokens).batches(1), final.batches(1)):
        hidden, pulls = pruned_batch.hidden, []
        for block, block_positions in zip(blocks, positions):
            counted = trainer.bytes_kept(block, hidden, block_positions)
            hidden, pull = trainer.ahead(block, hidden, block_positions, keep=budget > 0)
            pulls.append(pull)
            if budget:
                assert counted / 8 <= bytes_on_device(*jax.tree.leaves(pull)) <= counted
        targets, valid = pruned_batch.place(tokens), pruned_batch.valid
        _, cotangent = head_gradient(METHOD.loss, head, dense_batch.hidden, hidden, targets, valid)
        for index in (2, 1, 0):
            gradients[index], cotangent = trainer.backward(pulls.pop(), cotangent, gradients[index])

    def loss(masters):
        hidden = jnp.asarray(dense.embed(tokens).values)
        for own, block, block_positions in zip(masters, blocks, positions):
            hidden = forward(dense.graph, dense.state(block.fixed | own), hidden, block_positions)[0]
        logits = [head_logits(head, states)[:, :-1] for states in (jnp.asarray(final.values), hidden)]
        return jnp.mean(METHOD.loss(*logits, jnp.asarray(tokens[:, 1:])))

    expected = jax.jit(jax.grad(loss))([block.masters for block in blocks])
    share = jnp.float32(1 / (8 * 31))
    for own, theirs in zip(gradients, expected):
        for name, gradient in own.items():
            assert np.abs(share * gradient - theirs[name]).max() < 1e-4 * np.abs(theirs[name]).max(), name
    # A step updates each block behind its own backward pass, and the blocks before it read none of it.
    model = TrainedBlocks(trainer, journal, head, positions, others)
    model.step(TrainingStream(tokens, dense.embed(tokens), final), float(rate))
    for moved, block, gradient in zip(model.blocks, blocks, gradients):
        for name, expected in trainer.update(block, gradient, share, rate).masters.items():
            assert (moved.masters[name] == expected).all(), name


def test_masks_are_held_and_the_held_out_divergence_falls(trained):
    outcome = trained.outcome
    assert [check.step for check in outcome.checks] == [0, 4, 8] and outcome.kept > 0
    assert outcome.after < outcome.before and outcome.tokens == 2 * 16 * 32
    assert len(trained.masks) == 3 * 7
    for name, keep in trained.masks.items():
        weight, before = trained.weights[name], trained.before[name]
        assert (weight[~keep] == 0).all() and (weight != before).any() and weight.dtype == before.dtype, name


@pytest.mark.parametrize(
    ("pruned", "shape"),
    [("float32", (1, 1)), *(pytest.param(*each, marks=pytest.mark.slow) for each in [("bfloat16", (1, 1)), ("float32", (2, 4))])],
    indirect=["pruned"],
)
def test_the_mesh_changes_nothing_but_rounding(pruned, trained, windows, shape):
    rounded = trained.weights["model.layers.0.mlp.up_proj.weight"].dtype.itemsize == 2
    outcome, journal = run(pruned, windows, shape)
    assert outcome.after == pytest.approx(trained.outcome.after, rel=2e-2 if rounded else 1e-5)
    for name, weight in result(journal).items():
        expected = trained.weights[name].astype(np.float32)
        difference = np.abs(weight.astype(np.float32) - expected).max()
        assert difference < (3e-2 if rounded else 1e-5) * np.abs(expected).max(), name


@pytest.mark.parametrize("pruned", ["bfloat16"], indirect=True)  # the masters, float32, go on and not the rounded weights
def test_what_was_stopped_ends_with_the_same_bits_and_is_not_gone_on_from_where_its_state_is_damaged(pruned, trained, windows):
    state, steps = pruned[1] / "distillation" / "step_0000006", {False: 0, True: 0}
    for damaged in (False, True):
        with pytest.raises(Stopped):
            run(pruned, windows, advance=stopped_in_step_6())
        assert list(state.parent.iterdir()) == [state]
        if damaged:
            victim = max(state.rglob("*"), key=lambda path: path.stat().st_size)
            data = bytearray(victim.read_bytes())
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)

        def advance(damaged=damaged):
            steps[damaged] += 1

        again, journal = run(pruned, windows, advance=advance)
        assert structs.replace(again, seconds=0.0) == structs.replace(trained.outcome, seconds=0.0)
        for name, weight in result(journal).items():
            assert (weight == trained.weights[name]).all(), name
    assert steps[True] > steps[False] + 3  # from the first step on


@in_float32
def test_the_best_check_is_kept_though_the_run_was_stopped_behind_it(pruned, windows, monkeypatch):
    """The middle check is the best; the later state holds its weights too."""
    losses, seen = {0: 3.0, 4: 1.0, 8: 2.0}, {}

    def measure(model, stream):
        step = int(model.blocks[0].moments.count)
        for index, block in enumerate(model.blocks):
            seen[index, step] = {name: np.array(array) for name, array in block.masters.items()}
        return losses[step], 1.0

    monkeypatch.setattr(TrainedBlocks, "measure", measure)
    with pytest.raises(Stopped):
        run(pruned, windows, advance=stopped_in_step_6())
    outcome, journal = run(pruned, windows)
    assert outcome.kept == 4 and [check.held_out for check in outcome.checks] == [3, 1, 2]
    weights = result(journal)
    for index in range(3):
        for name, expected in seen[index, 4].items():
            assert (weights[f"model.layers.{index}.{name}"] == expected).all() and (expected != seen[index, 8][name]).any(), name


@in_float32
def test_what_does_not_help_is_refused_and_nothing_is_written(pruned, windows, monkeypatch):
    """Trains on one repeated token, and holds out other tokens.

    No state is saved either: the training is much shorter than a save.
    """
    monkeypatch.setattr(states, "_save", lambda path, *rest: pytest.fail(f"wrote {path}"))
    one = np.full_like(windows[0], 7), windows[1]
    outcome, _ = run(pruned, one, method=dataclasses.replace(METHOD, learning_rate=0.05))
    assert outcome.kept == 0 and outcome.after == outcome.before == outcome.checks[0].held_out
    assert min(check.held_out for check in outcome.checks[1:]) > outcome.before


@in_float32
@pytest.mark.parametrize("train, moved", [("norms", "layernorm"), pytest.param("weights", "proj", marks=pytest.mark.slow)])
def test_only_what_is_asked_for_moves(pruned, windows, train, moved):
    _, journal = run(pruned, windows, method=dataclasses.replace(METHOD, train=train, learning_rate=1e-3))
    before = journal.tensors()
    for name, weight in result(journal).items():
        assert moved in name or (weight == before.read(name)).all(), name
    assert any((weight != before.read(name)).any() for name, weight in result(journal).items())
    for index in journal.finished:
        entry, masks = trained_block(journal.directory, index), journal.masks(index)
        saved = load_group(entry, "masks", read_metadata(entry).metadata["masks"])
        assert saved.keys() == masks.keys() and all((saved[name] == keep).all() for name, keep in masks.items())


@pytest.mark.parametrize(
    ("model", "routers"),
    [
        ("Qwen3MoeForCausalLM", [{"mlp.gate.weight"}] * 2),
        ("GptOssForCausalLM", [{"mlp.router.weight", "mlp.router.bias"}] * 2),
        ("DeepseekV3ForCausalLM", [set(), {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}]),
        ("LlamaForCausalLM", None),
    ],
)
def test_a_training_of_routers_moves_the_parameters_that_have_a_row_for_each_expert(model, routers):
    reference = BY_MODEL[model]
    trainer = Trainer(Decoder.open(reference.configuration({}), MemoryTensors({}), mesh(1, 1)), KL(train="routers"), ROOM)
    if routers:
        assert [set(trainer.at(index).factors) for index in range(2)] == routers
    else:
        with pytest.raises(UserError, match="expected a model with routers where distill.train is routers, got one without"):
            refuse_large(trainer)


@in_float32
def test_a_model_that_the_devices_do_not_hold_is_refused(pruned):
    trainer = Trainer(opened(parse(pruned[0]), (4, 2)).decoder, METHOD)
    needed = trainer.bytes_on_device()
    refuse_large(dataclasses.replace(trainer, budget=needed))
    with pytest.raises(UserError, match="take more devices, --distill.train norms or --distill null"):
        refuse_large(dataclasses.replace(trainer, budget=needed - 1), "--distill null")
    # A batch of 1 on each of 4 slices holds the step's 4 windows. Where a step takes two batches, gradients of all blocks add up.
    shares = [Trainer(dataclasses.replace(trainer.decoder, batch=1), KL(batch=batch)) for batch in (4, 8)]
    gradient = 4 * sum(np.prod(array.sharding.shard_shape(array.shape)) for array in trainer.struct().masters.values())
    assert [share.bytes_on_device() - needed for share in shares] == [0, 2 * gradient]  # of two more of the three blocks
    # On one device. On a mesh, what does not move is on every slice of the data axis, and masters are spread over all devices.
    alone = opened(parse(pruned[0]), (1, 1)).decoder
    sizes = [Trainer(alone, KL(train=train)).bytes_on_device() for train in ("norms", "weights")]
    held = 13 + 4 / 3  # bytes a weight: master, moments and mask, and the gradient of one of three blocks
    assert 4 / held < sizes[0] / sizes[1] < 1.1 * 4 / held


@in_float32
def test_a_step_with_fewer_windows_than_slices_says_what_to_type(pruned):
    decoder = opened(parse(pruned[0]), (4, 2)).decoder
    messages = [Trainer(decoder, KL(batch=batch)).idle for batch in (2, 1, 4)]
    assert messages[0].startswith(
        "2 of 4 slices of the data axis compute padding, for a step trains on 2 windows: take --distill.batch 4"
    )
    assert "on 1 window: take --distill.batch 4, or" in messages[1] and not messages[2]


@in_float32
def test_the_steps_that_a_training_names_are_those_that_it_takes_resumed_or_not(pruned, windows, tmp_path, monkeypatch):
    """Each long pass through a model is a step, so the time left ends at 0."""

    class Steps(Counted):
        def advance(self):
            super().advance()
            self.waiting.append(len(self._steps))
            if len(self.waiting) == self.stop:
                raise Stopped(signal.SIGTERM)

        def begin(self, kind, words):
            super().begin(kind, words)
            begun.append((kind, words))

    begun = []

    def train(stop):
        progress = Steps()
        progress.waiting, progress.stop = [], stop
        steps = training_steps(METHOD, 3)
        progress.stage("training", len(steps), steps, TRAINING_STEP)
        inputs = inputs_of(opened(parse(pruned[0]), (1, 1)).decoder, Journal(tmp_path), windows)
        distill(inputs, progress)
        return progress.waiting

    for name in ("run.json", "journal"):
        (shutil.copytree if name == "journal" else shutil.copy)(pruned[1] / name, tmp_path / name)
    ahead, save = [], Training._save_in_time

    def saving(training):  # takes long, so its step is counted before
        ahead.append((training.progress._done - training.step) % METHOD.steps)
        save(training)

    monkeypatch.setattr(Training, "_save_in_time", saving)
    left = train(None)
    assert len(ahead) >= METHOD.steps and not any(ahead)
    steps = [step.kind for step in training_steps(METHOD, 3)]
    descriptions = {"check": "measuring the held-out text", "dense model reads the text": "the dense model reads the text"}
    assert begun == [(kind, descriptions[kind]) for kind in steps if kind in descriptions]
    assert left == [*reversed(range(len(left)))]
    for folder in ("distilled", "distillation"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    with pytest.raises(Stopped):
        train(3 + 1 + 2)
    assert train(None)[-1] == 0


def test_the_rates_rise_and_fall():
    method = KL(windows=64, batch=4, warmup=3)
    rates = [method.rate(1e-4, step) for step in range(method.steps)]
    assert len(rates) == 16 and max(rates) == pytest.approx(1e-4) == rates[3]
    assert rates[:4] == sorted(rates[:4]) and rates[3:] == sorted(rates[3:], reverse=True) and min(rates) > 0
    assert method.check_steps() == (4, 8, 12, 16) and KL(windows=2).steps == 1 == KL(windows=2).check_steps()[0]
    assert KL(windows=2).rate(1e-4, 0) == pytest.approx(1e-4)


@pytest.mark.parametrize("best", [2e-5, 6.5e-5, 7e-4, 1e-3, 1.9e-3, 2.1e-3, 0.3])
def test_the_rate_is_the_minimum_of_a_parabola(best):
    tried = []

    def loss(rate):
        tried.append(rate)
        return 3.0 + (rate / best - 1) ** 2 - 1 if rate < 10 * best else float("inf")

    assert rate_of_descent(loss, 3.0) == pytest.approx(best, rel=1e-6)
    assert len(set(tried)) == len(tried) <= 3 + abs(round(math.log(best / 1e-4, 3)))


@pytest.mark.parametrize("falls, least", [(lambda rate: -(rate**2), 0.1), (lambda rate: rate, 0)])
def test_a_rate_is_one_that_was_tried_where_a_loss_is_no_parabola(falls, least):
    tried = []
    chosen = rate_of_descent(lambda rate: tried.append(rate) or 1 + falls(rate), 1.0)
    assert chosen in tried and chosen > least


@in_float32
def test_a_rate_that_was_found_trains_as_one_that_was_given(pruned, windows):
    """Also if the training stops between two trials and after the search."""
    method, calls = dataclasses.replace(METHOD, learning_rate=None), itertools.count(1)

    def stop():
        # Behind three dense blocks, a check and two trials; then behind the same, all trials and at least one step.
        if next(calls) in (6, 18):
            raise Stopped(signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(Stopped):
            run(pruned, windows, method=method, advance=stop)
    assert any((pruned[1] / "distillation").iterdir())
    outcome, journal = run(pruned, windows, method=method)
    weights = result(journal)
    assert 0 < outcome.after < outcome.before
    given, journal = run(pruned, windows, method=dataclasses.replace(METHOD, learning_rate=outcome.learning_rate))
    assert given.checks == outcome.checks and given.learning_rate == outcome.learning_rate
    for name, weight in result(journal).items():
        assert (weight == weights[name]).all(), name


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--distill.windows", "0"], "at least 1, got 0"),
        (["--distill.learning_rate", "0"], "above 0 and at most 1, got 0"),
        (["--calibration.held_out", "0"], "which chooses by held-out windows, got 0"),
        (["--distill.train", "heads"], "all, weights, norms"),
    ],
)
def test_wrong_settings_are_one_line(argv, said):
    with pytest.raises(UserError, match=said):
        parse(["--distill", "kl", *argv])


def test_a_run_says_that_it_trains_and_measures_both_models(one_device, tmp_path, capsys):
    """The run says that it trains, and measures both models.

    Another number of windows is another run.
    """
    model, output = tiny_folder(tmp_path / "model"), tmp_path / "run"
    command = ["--model", str(model), "--output", str(output), "--selector", "wanda", "--solver", "null", *SMALL]
    command += ["--distill", "kl", "--distill.windows", "16", "--distill.learning_rate", "1e-3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    outcome = read_outcome(output)
    assert report["distillation"] == json_values(outcome) and "distill" in report["recipe"]
    assert outcome.after < outcome.before and outcome.perplexity_before > 0
    assert "held-out divergence" in printed
    lines = ["starting ", f"opening      {model}", "reading      random", "model  "]  # not one of them after a long silence
    assert [printed.index(line) for line in lines] == sorted(map(printed.index, lines))
    # How much a training reads is printed once in each place, and alike.
    card, page = ((output / name).read_text() for name in ("hf/README.md", "report.html"))
    pattern = r"\d+ steps? on [\d,]+ tokens"
    assert {*re.findall(pattern, printed + card + page)} == {trained_on(outcome.checks[-1].step, outcome.tokens)}
    assert len(re.findall(pattern, printed)) == 2 and len(re.findall(pattern, card)) == len(re.findall(pattern, page)) == 1
    assert re.search(rf"training     divergence from the dense model, all: {pattern}, 2 windows of ", printed)
    journal = Journal(output)
    tensors = CheckpointTensors(output)
    for name, weight in result(journal).items():
        assert (tensors.read(name) == weight).all(), name
    assert main(command) == 0  # finished: nothing is done again
    assert main([*command, "--distill.windows", "12"]) == 2
    assert "distill.windows is 16 there, 12 here" in capsys.readouterr().err
