"""Whole runs of models without a family; test_families.py has the rest."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import general_models
from benchmarks.general_models import tiny_config, tiny_model
from benchmarks.records import recorded
from optima_tpu.config.run_config import RunConfig
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.pipeline.inputs import read_texts
from optima_tpu.pipeline.run import run
from optima_tpu.report.contents import Report
from optima_tpu.report.file import REPORT
from optima_tpu.runtime.records import read_record
from tests.launch.test_families import BEST, BY_TORCH, HALF, configured, pruned, slow_where
from tests.support.references import BY_MODEL, SIZES, save
from tests.support.runs import folder_tensors, opened, stop_after_the_first_block
from tests.support.tiny_models import byte_tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("torchax")
transformers = pytest.importorskip("transformers")
against_torch = pytest.importorskip("optima_tpu.models.general.against_torch")

# Turned matrices and learned positions; a fused matrix and arguments that depend on the number of windows.
LAYOUTS = {"GPT2LMHeadModel", "BloomForCausalLM"}


def assert_perplexity_of_torch(directory: Path, name: str, config: RunConfig) -> None:
    """transformers computes the run's perplexity from the exported model."""
    ids = read_texts(config, opened(config, (1, 1))).evaluation.ids
    model = getattr(transformers, name).from_pretrained(directory / "hf", dtype="float32", attn_implementation="eager")
    with torch.no_grad():
        tokens = torch.tensor(ids, dtype=torch.long)
        losses = torch.nn.functional.cross_entropy(model(tokens, use_cache=False).logits[:, :-1].transpose(1, 2), tokens[:, 1:])
    assert read_record(directory / REPORT, Report).perplexity.pruned == pytest.approx(float(losses.exp()), rel=1e-5)


@pytest.mark.parametrize("name", slow_where(list(BY_TORCH), BY_TORCH.keys() - LAYOUTS))
def test_the_perplexity_is_that_of_transformers(saved, halved, name):
    directory = halved(name).parent
    assert_perplexity_of_torch(directory, name, configured(saved(name), directory, **BEST))


KINDS = {
    "classic": ("GPT2LMHeadModel", "BloomForCausalLM", "PhiForCausalLM", "RobertaForCausalLM", "CTRLLMHeadModel"),
    "gated": ("HeliumForCausalLM", "MiniCPM3ForCausalLM", "HunYuanDenseV1ForCausalLM"),
    "mixture": ("GraniteMoeForCausalLM", "MiniMaxM2ForCausalLM", "PhimoeForCausalLM", "AriaTextForCausalLM"),
    "state space": ("MambaForCausalLM", "Mamba2ForCausalLM", "xLSTMForCausalLM"),
    "hybrid": ("JambaForCausalLM", "FalconH1ForCausalLM", "NemotronHForCausalLM", "Lfm2ForCausalLM"),
    "sparse attention": ("DeepseekV32ForCausalLM", "AXK2ForCausalLM"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, id=f"{kind}-{name}") for kind, names in KINDS.items() for name in names])
def test_every_kind_of_model_goes_from_file_to_file(tmp_path, name):
    """The model's logits are torch's, and transformers loads its exports.

    The runs are on one device and on meshes. A stopped run ends with the same bits.
    """
    source = tmp_path / "model"
    tiny_model(tiny_config(name, vocab_size=258)).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    assert against_torch.compared(str(source), 40).agrees
    perplexities = []
    # Nearly all of the time goes to compiling: one run with and one without the dense stream on each side, not both on every
    # mesh.
    for shape, settings in (((1, 1), BEST), ((2, 4), BEST), ((4, 2), HALF)):
        directory = pruned(source, tmp_path / f"{shape}", shape, **settings)
        assert_perplexity_of_torch(directory, name, configured(source, directory, **settings))
        perplexities.append(read_record(directory / REPORT, Report).perplexity)
    one, other, _ = perplexities
    assert np.allclose([each.dense for each in perplexities], one.dense, rtol=1e-5)
    assert other.pruned == pytest.approx(one.pruned, rel=0.01)
    stopped = configured(source, tmp_path / "stopped", **BEST)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after_the_first_block(patched)
        run(stopped, model=opened(stopped, (1, 1)))
    run(stopped, model=opened(stopped, (1, 1)))
    whole, again = (folder_tensors(tmp_path / each / "hf") for each in ("(1, 1)", "stopped"))
    assert all(np.array_equal(again[tensor].view(np.uint8), array.view(np.uint8)) for tensor, array in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GraniteMoeForCausalLM", "NemotronHForCausalLM", "JetMoeForCausalLM", "BertLMHeadModel"])
def test_the_table_of_decoders_is_true(name):
    """Each of these models is an unusual kind of decoder.

    In order: experts in one tensor, blocks of several kinds, a loop that depends on values, layers behind the last block.
    """
    record = recorded(Path(__file__).parents[2] / "docs/results/records/decoders.json")
    assert general_models.row(name, general_models.outcome(name)) == record[f"`{name}`"]


@pytest.mark.slow
def test_the_table_has_every_class_and_no_error():
    record = recorded(Path(__file__).parents[2] / "docs/results/records/decoders.json")
    assert record.keys() == {f"`{name}`" for name in general_models.classes()}
    assert {way for _, way, _ in record.values()} == {"declared", "general", "refused"}


def test_a_stopped_run_goes_on_to_the_same_bits(saved, halved, tmp_path):
    config = configured(saved("GPT2LMHeadModel"), tmp_path, **BEST)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after_the_first_block(patched)
        run(config, model=opened(config, (1, 1)))
    run(config, model=opened(config, (1, 1)))
    whole, again = (folder_tensors(each) for each in (halved("GPT2LMHeadModel"), tmp_path / "hf"))
    assert all(np.array_equal(again[name].view(np.uint8), array.view(np.uint8)) for name, array in whole.items())


# A Gemma 3 has all that a Llama has, windows in some blocks, norms of queries and keys, and a scaled embedding.
BOTH = "LlamaForCausalLM", "Gemma3ForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"


@pytest.mark.parametrize("name", slow_where(BOTH, set(BOTH) - {"Gemma3ForCausalLM"}))
def test_both_ways_give_the_same_masks_and_the_same_perplexity(tmp_path, name):
    reference = BY_MODEL[name]
    save(tmp_path / "model", reference, reference.first | SIZES)
    runs = [pruned(tmp_path / "model", tmp_path / way, (1, 1), family=way, **HALF) for way in ("declared", "general")]
    reports = [read_record(run / REPORT, Report) for run in runs]
    masks = [read_masks(run / "hf") for run in runs]
    assert [report.manifest.get("family") for report in reports] == [None, "general"]
    assert masks[0].keys() == masks[1].keys()
    assert np.mean([(masks[0][each] == masks[1][each]).mean() for each in masks[0]]) > 0.999
    first, second = (report.perplexity for report in reports)
    assert second.dense == pytest.approx(first.dense, rel=1e-5) and second.pruned == pytest.approx(first.pruned, rel=1e-4)
