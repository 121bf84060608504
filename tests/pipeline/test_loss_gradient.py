"""The gradient of the dense model's loss, and tokens that are weighed by it."""

import functools

import jax
import numpy as np
import pytest
import torch

from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.method.targets import DenseTarget, SelfTarget
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline import loss_gradient
from optima_tpu.pipeline.calibrate import Capture, Stream, accumulate, groups_of_blocks, linear_groups, loss_factors
from optima_tpu.pipeline.loss_gradient import Text, mean_squares
from optima_tpu.pipeline.repair import verified
from optima_tpu.recover import main as recover
from optima_tpu.report.runs import read_report
from optima_tpu.runtime.signals import INTERRUPTED
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.pruning import compiled_forward
from tests.support.references import REFERENCES, small, tiny
from tests.support.runs import SMALL, assert_same_weights, stop_after_the_first_block
from tests.support.tiny_models import tiny_folder, tiny_llama


def text_of(decoder, count=5, length=12, seed=3):
    tokens = np.random.default_rng(0).integers(0, decoder.config.vocab, (count, length)).astype(np.int32)
    return Text(decoder, groups_of_blocks(decoder), tokens, seed)


def labels(text, logits):
    """The labels that the docstring of ``mean_squares`` promises: by the number of the position behind them."""
    count, length = text.tokens.shape
    key = jax.random.key(text.seed)

    def draw(window, position):
        return jax.random.categorical(jax.random.fold_in(key, window * length + position + 1), logits[window, position])

    return np.array([[draw(window, position) for position in range(length - 1)] for window in range(count)])


_FEW = ("Qwen2For", "OPTFor", "Qwen2MoeFor")
"""Families with biases, with layers of another name, and with experts."""


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param(reference, id=reference.model, marks=[] if reference.model.startswith(_FEW) else [pytest.mark.slow])
        for reference in REFERENCES
    ],
)
def test_mean_squares_are_those_of_torchs_gradients(reference):
    config, model, tensors = tiny(reference, {})
    decoder = Decoder.open(config, tensors, mesh(1, 1), batch=2)
    text = text_of(decoder)
    found = mean_squares(text, range(5))
    drawn, outputs = torch.tensor(labels(text, logits_of(decoder, text.tokens)), dtype=torch.long), {}

    def keep(name, module, inputs, output):
        outputs[name] = output[0] if isinstance(output, tuple) else output
        outputs[name].retain_grad()

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(functools.partial(keep, name))
    logits = model(torch.tensor(text.tokens, dtype=torch.long)).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").backward()
    for index, block in enumerate(found):
        assert set(block) == {names[0] for names in text.weighed(index)}
        for names in text.weighed(index):
            grads = [outputs[decoder.prefix(index) + name].grad.reshape(5, 12, -1) for name in names]
            expected = torch.cat(grads, dim=-1).square().mean(-1).numpy()
            np.testing.assert_allclose(block[names[0]], expected, rtol=2e-3, atol=1e-5 * expected.max(), err_msg=names[0])


@pytest.mark.parametrize("target", [SelfTarget(0.5), DenseTarget(gamma=0.5, weigh_tokens=True, weigh_by_loss=0.5)], ids=repr)
def test_statistics_are_means_over_the_tokens_by_their_weights(target):
    """In float64 from the very inputs: ``r^(1 - p) s^p``. 7 windows divide no mesh."""
    decoder, rng = Decoder.open(*small("Llama"), mesh(4, 2), batch=1), np.random.default_rng(0)
    hidden = rng.standard_normal((7, 11, decoder.config.d_model)).astype(np.float32)
    dense = hidden + 0.3 * rng.standard_normal(hidden.shape).astype(np.float32)
    whole, groups = next(decoder.blocks([1])), linear_groups(decoder)
    squares = {names[0]: rng.lognormal(size=(7, 11)).astype(np.float32) for names in groups}
    streams = [Stream(whole, Activations.of(decoder.mesh, states.copy())) for states in (hidden, dense)][: target.streams]
    found = accumulate(decoder, 1, Capture(groups, target), streams, squares)
    inputs, theirs = (
        compiled_forward(decoder.graph, decoder.state(whole), states, decoder.positions(1, 11))[1] for states in (hidden, dense)
    )
    after = {"self_attn.o_proj": "after_attention", "mlp.down_proj": "after_mlp"} if target.weigh_tokens else {}
    for names, statistics in zip(groups, found, strict=True):
        x, other = (np.asarray(states[names[0]], np.float64).reshape(77, -1) for states in (inputs, theirs))
        weight = squares[names[0]].reshape(77, 1).astype(np.float64) ** 0.5
        if names[0] in after:
            stream = np.asarray(theirs[after[names[0]]], np.float64).reshape(77, -1)
            weight *= np.mean(stream**2, axis=1, keepdims=True) ** -0.5
        weight /= weight.sum()
        expected = x.T @ (weight * x)
        assert np.abs(statistics.hessian - expected).max() < 1e-5 * np.abs(expected).max()
        if target.dense_stream and statistics.drift.cross is not None:
            expected = (other - x).T @ (weight * x)
            assert np.abs(statistics.drift.cross - expected).max() < 1e-5 * np.abs(expected).max()


def test_power_0_and_a_gradient_of_zero_weigh_all_tokens_alike():
    squares = np.random.default_rng(0).lognormal(size=(3, 4)).astype(np.float32)
    assert (loss_factors(squares, 0.0) == 1).all() and (loss_factors(np.zeros((3, 4), np.float32), 0.5) == 1).all()
    np.testing.assert_allclose(loss_factors(squares, 1.0) ** 2, squares / squares.mean(), rtol=1e-5)


@pytest.mark.parametrize("target", [SelfTarget, DenseTarget])
def test_a_power_is_a_share(target):
    for power in (-0.1, 1.1):
        with pytest.raises(UserError, match=rf"expected target.weigh_by_loss from 0 to 1, got {power}"):
            target(weigh_by_loss=power)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), *(pytest.param(each, marks=pytest.mark.slow) for each in [(1, 1), (4, 2)])])
def test_the_mesh_and_the_parts_do_not_change_the_squares(monkeypatch, shape):
    """Beyond rounding; the parts alone change no bit, since they are whole batches."""
    decoder = Decoder.open(*tiny_llama(), mesh(*shape), batch=1)
    text = text_of(decoder, count=19)
    (whole,), steps = text.parts, []
    squares = mean_squares(text, whole, lambda: steps.append(None))
    assert len(steps) == len(text.steps(whole))
    monkeypatch.setattr(loss_gradient, "ROOM", 1)
    assert len(text.parts) == -(-19 // shape[0])
    parts = [mean_squares(text, windows) for windows in text.parts]
    alone = mean_squares(text_of(Decoder.open(*tiny_llama(), mesh(1, 1), batch=1), count=19), range(19))
    for index, block in enumerate(squares):
        for name, found in block.items():
            assert (found[:, :-1] > 0).all() and (found[:, -1] == 0).all()  # no later position reads the last one
            assert np.array_equal(np.concatenate([part[index][name] for part in parts]), found)
            np.testing.assert_allclose(found, alone[index][name], rtol=1e-4, atol=1e-6 * found.max())


@pytest.fixture(scope="module")
def weighed(one_device, tmp_path_factory):
    """(arguments, directory) of a run that weighs its tokens by the loss."""
    root = tmp_path_factory.mktemp("weighed")
    # The target of the preset best, with a selector and without exchanges that compile in a moment.
    target = ["--target", "dense", "--target.alpha", "0.5", "--target.gamma", "0.5", "--target.weigh_tokens", "true"]
    arguments = ["--model", str(tiny_folder(root / "model")), *SMALL, "--preset", "fast", "--recapture", "true", *target]
    arguments += ["--batch", "8", "--target.weigh_by_loss", "0.5"]  # so that two parts have all windows
    assert main([*arguments, "--output", str(root / "run")]) == 0
    return arguments, root / "run"


def test_a_run_weighs_its_tokens(weighed, tmp_path, capsys):
    arguments, run = weighed
    assert not (run / loss_gradient.FOLDER).exists() and not verified(run).damaged
    report = read_report(run)
    assert "loss-weighted tokens 0.5" in report.recipe and "gradient of the loss" in report.seconds
    assert main([*arguments[:-1], "0", "--output", str(tmp_path / "alike")]) == 0
    assert "gradient of the loss" not in capsys.readouterr().out
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "alike", run)


def test_a_recovery_takes_the_blocks_without_a_gradient(weighed, tmp_path, capsys):
    """What choosing masks and weights needs is no stage of a recovery."""
    training = ["--tokens", "0.128k", "--source", "random", "--windows", "4", "--length", "32", "--distill.batch", "4"]
    assert recover([str(weighed[1]), *training, "--output", str(tmp_path / "recovered")]) == 0
    assert "gradient of the loss" not in capsys.readouterr().out
    report = read_report(tmp_path / "recovered")
    assert report.settings.target.weigh_by_loss == 0.5 and "gradient of the loss" not in report.seconds


def test_a_run_that_is_stopped_again_and_again_goes_on_to_the_same_bits(weighed, tmp_path, monkeypatch):
    """Behind its first part, behind the other one, and, with the first part damaged, behind the first block."""
    arguments, run = weighed
    arguments, measured, keep = [*arguments, "--output", str(tmp_path / "run")], [], loss_gradient.keep
    monkeypatch.setattr(loss_gradient, "ROOM", 1)
    monkeypatch.setattr(
        loss_gradient, "mean_squares", lambda text, part, advance: measured.append(part) or mean_squares(text, part, advance)
    )

    def stopped(*given):
        keep(*given)
        raise KeyboardInterrupt

    for there in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(loss_gradient, "keep", stopped)
            assert main(arguments) == INTERRUPTED
        parts = sorted((tmp_path / "run" / loss_gradient.FOLDER).iterdir())
        assert len(parts) == len(measured) == there
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"?")
    with monkeypatch.context() as patch:
        stop_after_the_first_block(patch)
        assert main(arguments) == INTERRUPTED
    assert len(measured) == 3
    assert main(arguments) == 0
    assert len(measured) == 3
    assert_same_weights(tmp_path / "run", run)
