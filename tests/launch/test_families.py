"""Whole runs of every family, and of models without one."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from optima_tpu.config.run_config import Calibration, Evaluation, RunConfig
from optima_tpu.errors import UserError
from optima_tpu.export import sizes
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.patterns import NM, Neurons, Unstructured
from optima_tpu.method.solvers import CG
from optima_tpu.method.targets import DenseTarget
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import export, read_masks
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.models.checkpoints.packed import Packed
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.inputs import read_texts
from optima_tpu.pipeline.run import run
from optima_tpu.unpack import unpack
from tests.support.fake_run import assert_same, begun, block_report, on_host, write_checkpoint
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.references import (
    BESIDE_IMAGES,
    GENERAL,
    LLAMA_IMAGES,
    MIXED,
    MULTIMODAL,
    QWEN_IMAGES,
    REFERENCES,
    SIZES,
    far_from,
    save,
)
from tests.support.runs import folder_tensors, opened, stop_after_the_first_block

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FEW_EXPERTS = dict(moe_intermediate_size=48, num_experts=3)
HALF = dict(dtype="float32", pattern=NM(2, 4), solver=CG(tolerance=1e-6))
BEST = HALF | dict(recapture=True, target=DenseTarget())
BY_TORCH = {reference.model: reference for reference in [*GENERAL, MIXED]}
REFERENCE = {reference.model: reference for reference in [*REFERENCES, *BESIDE_IMAGES]}
FAMILIES = [name for name, reference in REFERENCE.items() if not reference.relative]
RELATIVES = [name for name, reference in REFERENCE.items() if reference.relative]


def slow_where(names: list[str], slow: set[str]) -> list:
    without = [pytest.mark.skipif(find_spec("torchax") is None, reason="torchax is not installed")]
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow) + without * (name in BY_TORCH)) for name in names]


def save_first(family: str, folder: Path) -> Path:
    """Saves a model's first variant in bfloat16, as several files."""
    reference = (REFERENCE | BY_TORCH)[family]
    sizes = {
        **{name: dict(vocab_size=258) for name in BY_TORCH},
        "OPTForCausalLM": dict(vocab_size=258, ffn_dim=48),
        **{reference.model: {} for reference in BESIDE_IMAGES},
        "Qwen3MoeForCausalLM": SIZES | FEW_EXPERTS,
        "Qwen3NextForCausalLM": SIZES | FEW_EXPERTS,
        "Gemma4ForCausalLM": SIZES | FEW_EXPERTS,
        "MixtralForCausalLM": SIZES | dict(num_local_experts=3),
        "OlmoeForCausalLM": SIZES | dict(num_experts=3),
        "GptOssForCausalLM": SIZES | dict(num_local_experts=3),
        "Glm4MoeForCausalLM": SIZES
        | dict(moe_intermediate_size=48, n_routed_experts=3, n_group=1, topk_group=1, n_shared_experts=1),
    }.get(family, SIZES)
    # The Qwen is published with all experts of a block in one tensor, as transformers holds them.
    options = dict(max_shard_size="60KB", save_original_format=family != QWEN_IMAGES.model)
    save(folder, reference, reference.first | sizes, torch.bfloat16, **options)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def pruned(model: Path, directory: Path, shape: tuple[int, int], **settings) -> Path:
    """Runs the whole program on a mesh. Returns the run directory."""
    config = configured(model, directory, **settings)
    run(config, Console(file=io.StringIO()), opened(config, shape))
    return directory


def configured(model: Path, directory: Path, **settings) -> RunConfig:
    """A run on a few short windows of pydoc, evaluated on random tokens."""
    return RunConfig(
        model=str(model),
        output=str(directory),
        calibration=Calibration("pydoc", windows=6, length=40, held_out=2),
        evaluation=Evaluation("random", windows=4),  # a run continues no prompts with it, which test_generate.py compares
    ).changed(**settings)


# Of each layout of a checkpoint one, and of those whose run is slow below.
LAYOUTS = ["LlamaForCausalLM", "OPTForCausalLM", "Qwen3MoeForCausalLM", "Phi3ForCausalLM", MULTIMODAL.model]
WITHOUT_RUN = ["Gemma2ForCausalLM", "Olmo2ForCausalLM", "CohereForCausalLM"]  # which test_fewer_blocks.py exports to transformers


# A test below writes every weight of each layout without a run, and the test of what transformers loads compares all that a run
# does not prune.
@pytest.mark.parametrize("family", slow_where([*FAMILIES, *BY_TORCH], {*FAMILIES, *BY_TORCH}))
def test_a_model_of_which_nothing_is_pruned_comes_back_bit_for_bit(saved, tmp_path, family):
    source = saved(family)
    folder = pruned(source, tmp_path, (1, 1), pattern=Unstructured(0), solver=None) / "hf"
    before, after = folder_tensors(source), folder_tensors(folder)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        assert np.array_equal(after[name].view(np.uint8), array.view(np.uint8)), name
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()


def linears_of(decoder: Decoder) -> list[str]:
    return [decoder.prefix(i) + name + ".weight" for i in range(decoder.config.blocks) for name in decoder.at(i).linears]


# A Llama's is in test_launch.py. test_models.py compares every family's forward pass on several meshes, and test_calibrate.py the
# Hessians of an OPT, whose biases make something of windows that are not there, and those of experts.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["OPTForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_pruned_model_is_the_same_on_any_mesh(saved, halved, tmp_path, family):
    one, others = (folder_tensors(folder) for folder in (halved(family), pruned(saved(family), tmp_path, (4, 2), **HALF) / "hf"))
    dense = open_model(str(saved(family)), "float32")
    for name in linears_of(Decoder.open(dense.config, dense.tensors, mesh(1, 1))):
        # Scores of bfloat16 weights are often nearly equal, and rounding then decides.
        same = ((one[name] != 0) == (others[name] != 0)).all(axis=1)
        assert same.mean() > 0.9, name
        # Two experts of one token in five have few tokens, and their weights are known less well.
        assert np.abs(one[name] - others[name])[same].max() < 3e-3 * np.abs(one[name]).max(), name


# The first two have problems of many shapes; what is new in their checkpoints has a relative, too, or a model that reads images.
# The half model of the third is loaded below.
@pytest.mark.parametrize(
    "family",
    slow_where(
        [*FAMILIES, *BY_TORCH],
        {"Qwen3NextForCausalLM", "Gemma4ForCausalLM", "Phi3ForCausalLM", *WITHOUT_RUN, *BY_TORCH} - {"GPT2LMHeadModel"},
    ),
)
def test_a_pruned_model_loads_in_transformers(saved, halved, family):
    dense = open_model(str(saved(family)), "float32")
    linears = linears_of(Decoder.open(dense.config, dense.tensors, mesh(1, 1)))
    masks, pruned_model = read_masks(halved(family)), open_model(str(halved(family)))
    shapes = ({name: array.shape for name, array in folder_tensors(folder(family)).items()} for folder in (saved, halved))
    assert next(shapes) == next(shapes)
    for name in pruned_model.tensors.names():
        array = pruned_model.tensors.read(name)
        if name in linears:
            # By the mask: a weight that stays may happen to be solved to 0.
            assert (masks[name].reshape(-1, 4).sum(axis=1) == 2).all() and (array[~masks[name]] == 0).all(), name
            assert family in BY_TORCH or np.count_nonzero(array) >= array.size // 2 - 1, name
        else:
            assert np.array_equal(array, dense.tensors.read(name)), name

    assert_loads(halved(family), family, (1, 1))


CUT = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Gemma4", "OPT", "Phi3", "Granite", "Mixtral", "Qwen3Next"]


# test_cuts.py compares every family's export with its zeros, without a run.
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("family", [f"{name}ForCausalLM" for name in CUT])
def test_a_run_that_cuts_goes_on_to_the_same_bits_and_exports_what_its_zeros_compute(saved, family, shape, tmp_path, monkeypatch):
    cuts = dict(pattern=Neurons(0.25, 4), layers=parse_layers("" if family.startswith("OPT") else "*=0.5/head"), dtype="float32")
    whole = pruned(saved(family), tmp_path / "whole", shape, **cuts)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_the_first_block(patch)
        pruned(saved(family), tmp_path / "stopped", shape, **cuts)
    again = pruned(saved(family), tmp_path / "stopped", shape, **cuts)
    expected, resumed = (folder_tensors(each / "hf") for each in (whole, again))
    assert expected.keys() == resumed.keys() and all(resumed[name].tobytes() == expected[name].tobytes() for name in resumed)
    zeros, small = CheckpointTensors(whole), open_model(str(whole / "hf"), "float32")
    dense = open_model(str(saved(family)), "float32").config
    tokens = np.random.default_rng(0).integers(1, 256, (3, 40)).astype(np.int32)
    both = ((dense, zeros), (small.config, small.tensors))
    logits = [logits_of(Decoder.open(config, tensors, mesh(*shape), batch=1), tokens) for config, tensors in both]
    # A sum over fewer terms is rounded otherwise: by at most 7.7e-7 where this was measured, but by 4.9e-6 in Qwen3-Next.
    bound = 5e-6 if family == "Qwen3NextForCausalLM" else 1e-6
    assert np.abs(logits[0] - logits[1]).max() <= bound * np.abs(logits[0]).max()
    assert sum(each.size for each in resumed.values()) < sum(each.size for each in folder_tensors(saved(family)).values())
    assert_loads(whole / "hf", family, shape)


def test_a_model_that_stores_its_experts_in_one_tensor_is_packed_but_not_as_integers(halved, tmp_path):
    plain, small, back = halved("GptOssForCausalLM"), tmp_path / "small", tmp_path / "back"
    export(plain.parent, small, form="packed")
    unpack(small, back)
    for name in ("model.safetensors", "pruning_masks.npz", "config.json"):
        assert (back / name).read_bytes() == (plain / name).read_bytes()
    size, whole = (
        (folder / name).stat().st_size for folder, name in ((small, "packed-model.safetensors"), (plain, "model.safetensors"))
    )
    assert size < 0.8 * whole and "pruned matrices" not in sizes(Packed(small))
    packed, read = (open_model(str(folder)).tensors for folder in (small, plain))
    assert packed.names() == read.names() and all(np.array_equal(packed.read(name), read.read(name)) for name in read.names())
    for form in ("compressed-tensors", "compressed-tensors-w8a8", "gguf", "maxtext"):
        with pytest.raises(
            UserError, match=f"^expected --format plain or packed for a .* experts in one tensor, .* got {form}: [^\n]*$"
        ):
            export(plain.parent, tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


def assert_loads(folder: Path, family: str, shape: tuple[int, int]) -> None:
    """transformers loads all tensors and no other, and computes our logits."""
    loaded, information = getattr(transformers, family).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype="float32"
    )
    assert not any(information.values()), information
    ours = open_model(str(folder), "float32")
    tokens = np.random.default_rng(0).integers(1, 256, (3, 40)).astype(np.int32)
    # transformers 5.24 fails to name what a Llama 4 that reads images returns.
    text = loaded.language_model if family == LLAMA_IMAGES.model else loaded
    logits = logits_of(Decoder.open(ours.config, ours.tensors, mesh(*shape), batch=1), tokens)
    assert (far_from(text, logits, tokens) < 1e-4).all()


# Of the relatives those with experts, which a checkpoint has apart or in one tensor, and those that read images. test_cuts.py and
# test_fewer_blocks.py export others to transformers, and test_models.py compares what each computes.
OWN = {"MixtralForCausalLM", "DeepseekV3ForCausalLM", LLAMA_IMAGES.model, QWEN_IMAGES.model}
HALVED = [*LAYOUTS, *WITHOUT_RUN, *RELATIVES]


@pytest.mark.parametrize("family", slow_where(HALVED, set(HALVED) - OWN - set(LAYOUTS)))
def test_a_model_with_half_of_its_weights_comes_back_and_loads_in_transformers(saved, tmp_path, family):
    """Every second weight of a layer is zero, the others keep their bits.

    The test makes no run, since a run's solver knows no family.
    """
    dense = open_model(str(saved(family)))
    decoder = Decoder.open(dense.config, dense.tensors, mesh(1, 1))
    journal = begun(tmp_path / "run", assets=dense.assets)
    expected = {name: dense.tensors.read(name) for name in dense.tensors.names()}
    for index in range(decoder.config.blocks):
        linears = decoder.at(index).linears
        names = [decoder.prefix(index) + name + ".weight" for name in linears]
        masks = {name: np.indices(expected[name].shape).sum(axis=0) % 2 == 0 for name in names}
        expected |= {name: np.where(keep, expected[name], np.zeros_like(expected[name])) for name, keep in masks.items()}
        report = block_report(index, dict(zip(linears, masks.values())))
        journal.save(index, {name: expected[name] for name in names}, masks, report, on_host(np.zeros((1, 1, 1))))
    write_checkpoint(journal, dense.tensors, mesh(1, 1))
    export(tmp_path / "run", tmp_path / "out")
    before, after = (folder_tensors(folder) for folder in (saved(family), tmp_path / "out"))
    assert {name: (array.shape, array.dtype) for name, array in before.items()} == {
        name: (array.shape, array.dtype) for name, array in after.items()
    }
    exported = open_model(str(tmp_path / "out")).tensors
    for name, array in expected.items():
        assert_same(exported.read(name), array)
    assert (tmp_path / "out/config.json").read_bytes() == (saved(family) / "config.json").read_bytes()
    if family not in LAYOUTS or family == "Phi3ForCausalLM":  # else transformers loads the model of a run
        assert_loads(tmp_path / "out", family, (1, 1))


@pytest.mark.parametrize("family", [family for family in REFERENCE if "Gemma" in family or "Llama" in family])
@pytest.mark.parametrize("source", ["pydoc", "random"])
def test_windows_begin_with_bos_where_the_family_needs_it(saved, family, source):
    config = RunConfig(
        model=str(saved(family)),
        calibration=Calibration(source, windows=4, length=12, held_out=2),
        evaluation=Evaluation(windows=4),
    )
    model = opened(config, (1, 1))
    for tokens in read_texts(config, model)[:2]:
        assert tokens.ids.shape[1] == 12
        assert (tokens.ids[:, 0] == 256).all() == ("Gemma" in family)
        assert (tokens.ids[:, 1:] != 256).any()
        assert ("BOS" in tokens.how) == ("Gemma" in family)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save(tmp_path, REFERENCES[0], {})
    config = RunConfig(model=str(tmp_path), calibration=Calibration("pydoc", windows=4, length=12))
    with pytest.raises(UserError, match="below 64"):
        read_texts(config, opened(config, (1, 1)))
