"""Calibration text that the model writes itself.

The cache gives the logits of one pass, tokens follow the logits, and a run keeps its text.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu import data
from optima_tpu.config.run_config import Calibration, Evaluation, RunConfig
from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.method.distillation import KL
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.generate import Prompt, Sampling, choose, generate, plan_generation
from optima_tpu.models.whole_model import empty_cache, load, step
from optima_tpu.pipeline import self_calibration
from optima_tpu.pipeline.inputs import Texts, open_model_on_mesh, read_texts
from optima_tpu.pipeline.opening_lines import short_text
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.processes import several
from tests.support.references import apart, tiny
from tests.support.runs import SMALL, folder_tensors, snapshot, stop_after_the_first_block
from tests.support.tiny_models import byte_tokenizer, tiny_folder, tiny_llama, with_bos

pytestmark = pytest.mark.usefixtures("one_device")
torch = pytest.importorskip("torch")

# Of the families whose first variant does not have what a cache could get wrong: caps, places in the embedding, windows.
VARIANTS = {
    "Gemma2ForCausalLM": "caps",
    "OPTForCausalLM": "350m",
    "Phi3ForCausalLM": "long text",
    "Qwen2ForCausalLM": "window above",
    "Qwen3ForCausalLM": "window above",
    "SmolLM3ForCausalLM": "window where still",
    "StableLmForCausalLM": "side by side",
}
START, END = 3, 5


def logits_by_cache(decoder: Decoder, tokens: np.ndarray, read: int) -> np.ndarray:
    """Logits [windows, length - read, vocab] after tokens ``read`` to last.

    Reads ``read`` tokens of every window at once, then one token a step.
    """
    windows, length = tokens.shape

    @jax.jit
    def run(model, caches, tokens):
        def one(caches, at):
            logits, caches = step(decoder, model, caches, tokens[:, at][:, None], at)
            return caches, logits

        # The last two of the first tokens do not count yet: they are read again, one by one.
        _, caches = step(decoder, model, caches, tokens[:, : read + 2], jnp.int32(0), jnp.int32(read))
        return jax.lax.scan(one, caches, jnp.arange(read, length))[1]

    return np.asarray(run(load(decoder, length), empty_cache(decoder, windows, length), tokens)).swapaxes(0, 1)


# The named ones keep of earlier tokens what the families whose layers they have do not: windows in some blocks, latent keys.
CACHES = ("MinistralForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM", "DeepseekV3ForCausalLM", "Llama4ForCausalLM")


@pytest.mark.parametrize("reference", apart(*CACHES, "SmolLM3ForCausalLM"))
def test_logits_with_a_cache_are_those_of_one_pass(reference):
    """Compares with transformers on 40 tokens, more than any sliding window.

    Other tests compare the pass without a cache with transformers.
    """
    settings = reference.variants[VARIANTS.get(reference.model, next(iter(reference.variants)))]
    config, model, tensors = tiny(reference, settings)
    tokens = np.random.default_rng(0).integers(1, 64, (3, 40)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    logits = logits_by_cache(Decoder.open(config, tensors, mesh(1, 1)), tokens, 12)
    assert np.abs(logits - expected[:, 12:]).max() < 1e-5 * np.abs(expected).max()


def test_tokens_are_drawn_in_proportion_to_their_probabilities():
    """Chi-square, 5 degrees of freedom: above 25.7 once in 10,000 seeds."""
    logits, temperature, count = np.array([2.0, 1.0, 0.0, -1.0, 0.5, 0.2, 9.0, 9.0], np.float32), 0.7, 20_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = np.asarray(jax.jit(choose)(jnp.tile(logits, (count, 1)), Sampling(6, temperature), keys))
    shares = np.exp(logits[:6].astype(np.float64) / temperature)
    expected = count * shares / shares.sum()
    assert drawn.max() < 6  # the last two rows of the embedding belong to no token
    assert np.sum((np.bincount(drawn, minlength=6) - expected) ** 2 / expected) < 25.7


@pytest.fixture(scope="module")
def written():
    """Five windows of a tiny model that are written at once on one device."""
    return tiny_llama(), write(tiny_llama(), (1, 1), 5, 5)


def write(model, shape: tuple[int, int], windows: int, at_once: int, **options) -> np.ndarray:
    decoder, sampling = Decoder.open(*model, mesh(*shape)), Sampling(vocabulary=60, temperature=1.5, seed=7, follow=(END, START))
    plan = plan_generation(
        decoder, [Prompt((START,), 23)] * windows, sampling, advice=self_calibration.ADVICE, room=24, **options
    )
    assert plan.batches[0].rows == at_once
    return np.array([[START, *tokens] for tokens in generate(decoder, plan)])


def test_every_token_follows_the_logits_of_those_before_it(written):
    """One pass over the finished windows and the noise give the tokens."""
    model, windows = written
    logits = logits_of(Decoder.open(*model, mesh(1, 1)), windows)[:, :-1, :60].astype(np.float64)
    keys = [jax.random.fold_in(jax.random.key(7), window) for window in range(5)]
    noise = np.array([[jax.random.gumbel(jax.random.fold_in(key, at), (64,)) for at in range(1, 24)] for key in keys])[..., :60]
    expected = np.where(windows[:, :-1] == END, START, np.argmax(logits / 1.5 + noise, axis=-1))
    assert (windows[:, 0] == START).all() and (windows[:, 1:] == expected).all()
    assert (windows == END).any()


def test_a_window_depends_neither_on_the_others_nor_on_the_mesh(written):
    model, windows = written
    assert (write(model, (1, 1), 2, 2) == windows[:2]).all()
    # A budget for one window on each of four slices: two batches, the second one filled up.
    assert (write(model, (4, 2), 5, 4, budget=100_000) == windows).all()


def test_a_model_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(UserError, match="GiB of each.*--mesh.*--calibration.source"):
        write(tiny_llama(), (1, 1), 2, 2, budget=2**14)


def test_logits_that_are_not_finite_are_told():
    config, tensors = tiny_llama()
    tensors.arrays["model.norm.weight"] = np.full_like(tensors.arrays["model.norm.weight"], 3e38)
    with pytest.raises(UserError, match="overflows even in float32"):
        write((config, tensors), (1, 1), 5, 5)


@pytest.mark.parametrize(
    "text", ["self?", "self?temperature=0", "self?temperature=hot", "self?temperature=nan", "self?top=3", "self?field=0.5"]
)
def test_another_spelling_is_refused(text):
    with pytest.raises(UserError, match="self.temperature=NUMBER"):
        data.parse_source(text)


@pytest.mark.parametrize("evaluation", [[], ["--evaluation.source", "self"]])
def test_no_model_is_scored_on_what_it_says_itself(tmp_path, capsys, monkeypatch, evaluation):
    monkeypatch.setattr(self_calibration, "generate", None)
    folder = tiny_folder(tmp_path / "model")
    words = ["--model", str(folder), "--calibration.source", "self", "--calibration.length", "16", *evaluation]
    words += ["--output", str(tmp_path / "run")]
    assert main(words) == 2
    assert "give --evaluation.source" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_without_a_token_to_begin_with_nothing_is_written(tmp_path, capsys):
    folder, tokenizer = tiny_folder(tmp_path / "model"), byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert main([*arguments(folder), "--output", str(tmp_path / "run")]) == 2
    assert "BOS or an EOS" in capsys.readouterr().err


def arguments(folder) -> list[str]:
    settings = [*SMALL]
    settings[settings.index("random")] = "self"
    return ["--model", str(folder), "--solver", "null", *settings]


@pytest.mark.parametrize("bos", [True, False], ids=["with BOS", "without BOS"])
def test_a_document_begins_as_the_tokenizer_begins_a_text(tmp_path, bos):
    """After an EOS comes a BOS if texts begin with one, else a drawn token."""
    folder = tiny_folder(tmp_path / "model")
    text = Calibration("self?temperature=9", windows=16, length=64)
    config = RunConfig(model=str(with_bos(folder) if bos else folder), output=str(tmp_path / "run"), calibration=text)
    model = open_model_on_mesh(config)
    ids = self_calibration.self_calibration(config, model.pretrained, model.decoder).ids
    first = ids[:, 1:][ids[:, :-1] == 257]
    assert (ids[:, 0] == 256).all() and len(first) > 1 and (first == 256).all() == bos


def test_text_is_kept_before_the_dense_model_is_measured(tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    command = [*arguments(tiny_folder(tmp_path / "model")), "--output", str(tmp_path / "run")]
    monkeypatch.setattr("optima_tpu.pipeline.perplexities.token_losses", stopped)
    assert main(command) == 130
    monkeypatch.undo()
    monkeypatch.setattr(self_calibration, "generate", None)
    assert main(command) == 0


def test_a_run_keeps_its_text_and_goes_on_with_it(tmp_path, monkeypatch, capsys):
    folder, run = tiny_folder(tmp_path / "model"), tmp_path / "run"
    command = [*arguments(folder), "--output", str(run)]
    stop_after_the_first_block(monkeypatch)
    assert main(command) == 130
    monkeypatch.undo()
    assert "writing 16 windows of 32 tokens with the dense model" in capsys.readouterr().out
    kept = np.load(run / "calibration.npy")
    assert kept.shape == (16, 32) and (kept[:, 0] == 256).all()

    # Other settings are refused before anything is written anew.
    monkeypatch.setattr(self_calibration, "generate", None)
    before = snapshot(run)
    assert main([*command, "--calibration.seed", "1"]) == 2
    assert "calibration.seed is 0 there, 1 here" in capsys.readouterr().err
    assert main([*command, "--calibration.source", "self?temperature=0.5"]) == 2
    assert "calibration.source is self there, self?temperature=0.5 here" in capsys.readouterr().err
    assert snapshot(run) == before

    assert main(command) == 0
    assert "from <s> at temperature 1 (8 to fit to, 8 held out)" in capsys.readouterr().out
    assert (np.load(run / "calibration.npy") == kept).all()
    weights = folder_tensors(run / "hf")["model.layers.0.mlp.up_proj.weight"]
    assert ((weights == 0).sum(axis=1) == weights.shape[1] // 2).all()

    # A damaged file is written again: to the same tokens, or the run would be refused.
    monkeypatch.undo()
    (run / "calibration.npy").write_bytes(b"nothing")
    assert main(command) == 0
    assert "writing 16 windows" in capsys.readouterr().out


def test_what_the_model_writes_beside_a_text_stands_between_the_drawn_and_the_held_out_windows(tmp_path):
    """Drawn and written windows equal those of runs with one kind alone."""
    folder = tiny_folder(tmp_path / "model")

    def texts(distill: KL | None = None, **text) -> Texts:
        chosen = {"source": "random", "windows": 4, "length": 16, "held_out": 2} | text
        config = RunConfig(
            str(folder), calibration=Calibration(**chosen), evaluation=Evaluation("random", windows=2), distill=distill
        )
        return read_texts(config, open_model_on_mesh(config))

    alone, self_written = texts(), texts(source="self", windows=3, held_out=0)
    beside = texts(written=3)
    expected = np.concatenate([alone.calibration.ids[:4], self_written.calibration.ids, alone.calibration.ids[4:]])
    assert (beside.calibration.ids == expected).all() and (beside.written == self_written.written).all()
    assert "3 windows of 16 tokens that the model wrote itself" in beside.calibration.how

    training = KL(windows=5)
    without, trained = texts(training), texts(training, written=3)
    assert (trained.distillation == without.distillation).all() and len(trained.distillation) == 5
    assert (trained.calibration.ids[4:7] == beside.written).all()
    assert (np.delete(trained.calibration.ids, np.s_[4:7], axis=0) == without.calibration.ids).all()

    both = texts(dataclasses.replace(training, written=2), written=3)
    assert (both.calibration.ids == trained.calibration.ids).all() and both.calibration.how == trained.calibration.how
    assert (both.written[:3] == trained.written).all() and len(both.written) == 5
    expected = np.concatenate([without.distillation, both.written[3:]])
    assert sorted(map(tuple, both.distillation)) == sorted(map(tuple, expected)) and (both.distillation != expected).any()
    alone = texts(dataclasses.replace(training, written=2))
    assert (alone.calibration.ids == without.calibration.ids).all() and alone.calibration.how == without.calibration.how

    no_text, one_more = texts(training, source="self"), texts(dataclasses.replace(training, written=1), source="self")
    assert (no_text.calibration.ids == no_text.written[:6]).all() and (no_text.distillation == no_text.written[6:]).all()
    assert len(no_text.distillation) == 5 and (one_more.written[:11] == no_text.written).all() and len(one_more.distillation) == 6


def test_a_training_reads_what_the_model_wrote_for_it_and_a_stopped_run_keeps_it(tmp_path, monkeypatch, capsys):
    folder, run = tiny_folder(tmp_path / "model"), tmp_path / "run"
    command = ["--model", str(folder), *SMALL, "--preset", "fast", "--distill.windows", "4", "--distill.written", "4"]
    command += ["--distill", "kl", "--distill.learning_rate", "1e-4", "--output", str(run)]
    stop_after_the_first_block(monkeypatch)
    assert main(command) == 130
    monkeypatch.undo()
    kept = np.load(run / "calibration.npy")
    assert kept.shape == (4, 32) and (kept[:, 0] == 256).all()
    monkeypatch.setattr(self_calibration, "generate", None)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "4 of the 8 windows written by the dense model" in printed and "that the model wrote itself" not in printed
    assert "4 steps on 256 tokens" in printed


def test_a_run_goes_on_with_what_the_model_wrote_beside_its_text(tmp_path, monkeypatch, capsys):
    folder, run = tiny_folder(tmp_path / "model"), tmp_path / "run"
    command = ["--model", str(folder), *SMALL, "--calibration.written", "3", "--solver", "null"]
    command += ["--output", str(run)]
    stop_after_the_first_block(monkeypatch)
    assert main(command) == 130
    monkeypatch.undo()
    kept = np.load(run / "calibration.npy")
    assert kept.shape == (3, 32) and (kept[:, 0] == 256).all()
    monkeypatch.setattr(self_calibration, "generate", None)
    for other in ("4", "0"):
        assert main([*command, "--calibration.written", other]) == 2
        assert f"calibration.written is 3 there, {other} here" in capsys.readouterr().err
    assert main(command) == 0
    assert "3 windows of 32 tokens that the model wrote itself, from <s> at temperature 1; and " in capsys.readouterr().out


def test_a_text_that_is_short_for_wide_layers_is_told_with_what_to_do():
    text = Calibration("file:a.txt", windows=16, length=512)
    assert short_text(text, 1536, writes=True) == (
        "8,192 tokens are few for layers of 1,536 inputs: take --calibration.windows 48, or let the model write more by "
        "--calibration.written 32"
    )
    assert short_text(dataclasses.replace(text, written=4), 1536, writes=True).endswith("--calibration.written 32")
    assert short_text(dataclasses.replace(text, source="self"), 1536, writes=True).endswith("take --calibration.windows 48")
    assert short_text(text, 1536, writes=False).endswith("take --calibration.windows 48")
    enough = [dataclasses.replace(text, written=32), dataclasses.replace(text, windows=48), Calibration()]
    assert not any(short_text(each, 1536, writes=True) for each in enough)


def test_a_text_that_the_model_writes_as_a_whole_has_nothing_written_beside_it():
    with pytest.raises(UserError, match="give 12 windows of it and no calibration.written"):
        Calibration("self?temperature=0.9", windows=8, written=4)


@pytest.mark.slow
def test_several_processes_write_the_same_text(tmp_path):
    words = [*arguments(tiny_folder(tmp_path / "model")), "--mesh", "4x2"]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    for status, _, error in several([*words, "--output", str(tmp_path / "two")]):
        assert status == 0, error
    one, two = (np.load(tmp_path / run / "calibration.npy") for run in ("one", "two"))
    assert (one == two).all()
