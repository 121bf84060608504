"""An export without blocks equals the model with identities instead."""

import itertools
import json

import numpy as np
import pytest

from optima_tpu.config.run_config import CutStructures, RunConfig
from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import export, read_masks
from optima_tpu.models.checkpoints.fewer_blocks import refuse_uncuttable, renumbered, settings_without, why_unreadable
from optima_tpu.models.checkpoints.source import Pretrained
from optima_tpu.models.decoder import Decoder, head_logits
from optima_tpu.pipeline.inputs import on_model
from optima_tpu.runtime.processes import fetch
from optima_tpu.unpack import unpack
from tests.support.fake_run import pruned_run
from tests.support.meshes import mesh
from tests.support.references import BESIDE_IMAGES, BY_MODEL, LLAMA_IMAGES, REFERENCES, tiny
from tests.support.refusals import refusal
from tests.support.runs import folder_tensors
from tests.support.tiny_models import MemoryTensors, tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.arange(40)[None] * 7 % 60


def all_cases():
    """Every family's first variant, without its first and its last block."""
    for reference in (*REFERENCES, *(each for each in BESIDE_IMAGES if each is not LLAMA_IMAGES)):
        name, settings = next(iter(reference.variants.items()))
        config = reference.configuration(settings)
        for left_out in [(0,), (config.get_text_config().num_hidden_layers - 1,)]:
            yield reference, name, settings, left_out, why_unreadable(config, left_out)


# Without its first block, from which all others get new numbers; one family without its last, and one whose first cannot go. What
# of a relative belongs to one block is in the test of settings below, and test_cuts.py exports every relative to transformers.
CASES = [
    pytest.param(
        reference,
        settings,
        left_out,
        id=f"{reference.model}-{name}-{left_out[0]}",
        marks=[pytest.mark.slow]
        * (reference.model not in ("LlamaForCausalLM", "Qwen2MoeForCausalLM") and (left_out != (0,) or reference.relative)),
    )
    for reference, name, settings, left_out, why in all_cases()
    if not why
]


def test_only_blocks_that_others_depend_on_are_refused():
    """transformers always gives a Gemma 4's last block full attention."""
    refused = {(reference.model, left_out): why for reference, _, _, left_out, why in all_cases() if why}
    gemmas = {(f"Gemma4{kind}", (1,)) for kind in ("ForCausalLM", "ForConditionalGeneration", "UnifiedForConditionalGeneration")}
    assert refused.keys() == {*gemmas, ("Qwen2MoeForCausalLM", (0,))}


def without(model, left_out):
    """Puts the identity in the place of some blocks; returns the model."""
    blocks = model.config.get_text_config().num_hidden_layers
    (layers,) = (
        part
        for name, part in model.named_modules()
        if name.endswith("layers") and "vision" not in name and isinstance(part, torch.nn.ModuleList) and len(part) == blocks
    )
    for index in left_out:
        layers[index].forward = lambda hidden_states, *args, **named: hidden_states
    return model


@pytest.mark.parametrize(("reference", "settings", "left_out"), CASES)
def test_the_exported_model_computes_what_the_identity_in_their_place_does(reference, settings, left_out, tmp_path):
    config, model, source = tiny(reference, settings)
    run = pruned_run(tmp_path / "run", config, source, "dense", left_out=left_out)
    export(run, tmp_path / "out")
    small, info = type(model).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(info.values()), info
    blocks = config.get_text_config().num_hidden_layers
    assert small.config.get_text_config().num_hidden_layers == blocks - 1
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        expected, actual = (each(tokens, use_cache=False).logits for each in (without(model, left_out), small.eval()))
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    sidecar = json.loads((tmp_path / "out" / "optima_tpu.json").read_text())
    assert sidecar["cuts"] == {"blocks": {"left": [blocks - 1], "total": blocks}} and sidecar["layers"] == []
    assert sidecar["left_out"]["blocks"] == list(left_out)
    assert not (tmp_path / "out" / "pruning_masks.npz").exists()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("LlamaForCausalLM", (4, 2)),
        ("Gemma3ForCausalLM", (1, 1)),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in [
                ("LlamaForCausalLM", (1, 1)),
                ("Gemma3ForCausalLM", (4, 2)),
                *itertools.product(["OPTForCausalLM", "Qwen2ForCausalLM"], [(1, 1), (4, 2)]),
            ]
        ),
    ],
)
def test_our_own_pass_through_the_export_skips_these_blocks(model, shape, tmp_path):
    """To the same bits on the same mesh, since the same programs run."""
    reference = BY_MODEL[model]
    config, _, source = tiny(reference, reference.first)
    run = pruned_run(tmp_path / "run", config, source, "dense", left_out=(0,))
    export(run, tmp_path / "out")
    small = open_model(str(tmp_path / "out"))
    dense, cut = (
        Decoder.open(each.config, each.tensors, mesh(*shape)) for each in (Pretrained(config, source, {}, "", ""), small)
    )
    assert cut.config.blocks == dense.config.blocks - 1
    expected, actual = (
        logits(each, blocks) for each, blocks in ((dense, range(1, dense.config.blocks)), (cut, range(cut.config.blocks)))
    )
    np.testing.assert_array_equal(actual, expected)


def logits(decoder, blocks):
    hidden = decoder.embed(np.tile(TOKENS, (4, 1)))
    for index, parameters in zip(blocks, decoder.blocks(blocks)):
        decoder.apply(index, parameters, hidden)
    return np.concatenate([fetch(head_logits(decoder.head(), batch.hidden)) for batch in hidden.batches(1)])


@pytest.mark.parametrize(
    "model, settings, left_out, expected",
    [
        ("Gemma3ForCausalLM", {}, (1,), {"layer_types": ["sliding_attention", "full_attention"]}),
        (
            "Gemma4ForCausalLM",
            {},
            (0,),
            {"layer_types": ["full_attention"], "per_layer_config": {"0": {"head_dim": 16, "num_key_value_heads": 5}}},
        ),
        ("SmolLM3ForCausalLM", {}, (0,), {"no_rope_layers": [0]}),
        ("Llama4ForCausalLM", {}, (0,), {"moe_layers": [0], "no_rope_layers": [0]}),
        ("DeepseekV3ForCausalLM", {}, (0,), {"first_k_dense_replace": 0}),
        ("DeepseekV3ForCausalLM", {}, (1,), {"first_k_dense_replace": 1}),
        ("Qwen3NextForCausalLM", {}, (0,), {"layer_types": ["linear_attention"]}),
        ("Qwen2ForCausalLM", dict(num_hidden_layers=4, max_window_layers=2), (0, 3), {"max_window_layers": 1}),
    ],
)
def test_settings_of_each_block_follow_the_blocks(model, settings, left_out, expected):
    reference = BY_MODEL[model]
    config = reference.configuration(reference.first | settings)
    changed = settings_without(config, left_out)
    assert changed["num_hidden_layers"] == config.num_hidden_layers - len(left_out)
    assert {name: changed[name] for name in expected} == expected


def test_tensors_behind_the_last_block_stay_behind_it():
    names = (
        "model.embed_tokens.weight",
        *(f"model.layers.{index}.norm.weight" for index in range(5)),
        "vision.layers.1.norm.weight",
    )
    tensors = MemoryTensors({name: np.full(1, value, np.float32) for value, name in enumerate(names)})
    actual = renumbered(tensors, "model.layers.{}.", (1, 3))
    assert {name: int(actual.read(name)[0]) for name in actual.names()} == {
        "model.embed_tokens.weight": 0,
        **{f"model.layers.{new}.norm.weight": 1 + old for new, old in enumerate((0, 2, 4))},
        "vision.layers.1.norm.weight": 6,
    }


@pytest.mark.parametrize(
    "model, blocks, said",
    [
        ("LlamaForCausalLM", 2, "expected cut.blocks below 2, the blocks of LlamaForCausalLM, got 2"),
        ("LlamaForCausalLM", 99, "expected cut.blocks below 2, the blocks of LlamaForCausalLM, got 99"),
        (
            "Qwen2MoeForCausalLM",
            2,
            "expected a model without whose blocks config.json describes the others where cut.blocks is 2, got "
            "Qwen2MoeForCausalLM: without block 0 block 1 would be read as a block of another kind; leave out cut.blocks, and "
            "cut neurons by --pattern 0.25/neuron",
        ),
    ],
)
def test_blocks_that_cannot_be_left_out_are_refused_before_anything_is_computed(model, blocks, said):
    reference = BY_MODEL[model]
    settings = dict(decoder_sparse_step=2, num_hidden_layers=4) if "Moe" in model else {}
    config = reference.configuration(reference.first | settings)
    run = RunConfig(model="here", cut=CutStructures(blocks))
    assert refusal(on_model, run, config) == said
    on_model(RunConfig(model="here"), config)


def test_a_model_that_runs_by_its_own_code_is_refused_by_name():
    config = transformers.GPT2Config(architectures=["GPT2LMHeadModel"])
    with pytest.raises(
        UserError, match="^expected a model of a family of this program where cut.blocks is 1, got GPT2LMHeadModel, "
    ):
        refuse_uncuttable(CutStructures(1), config)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, source = tiny_llama(intermediate_size=64, num_hidden_layers=4)
    return pruned_run(tmp_path_factory.mktemp("fewer") / "run", config, source, "2:4", "*=0.25/neuron@8", left_out=(2, 1))


def test_every_form_has_the_renumbered_blocks_and_nothing_of_the_others(run, tmp_path):
    """With neurons cut from the blocks that stay, and masks on the rest."""
    lines = []
    export(run, tmp_path / "out", say=lines.append)
    assert "2 of 4 blocks, 48 of 64 neurons in every block are left, and the others are not written" in lines
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 48)
    tensors, masks = folder_tensors(tmp_path / "out"), read_masks(tmp_path / "out")
    assert {name.split(".")[2] for name in tensors if ".layers." in name} == {"0", "1"} == {name.split(".")[2] for name in masks}
    assert len(masks) == 2 * 6
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "it is without the blocks 1, 2 of the source, so that later blocks have lower numbers; 48 of 64 neurons in every block"
        in card
    )
    assert ", cut to 2 of 4 blocks, 48 of 64 neurons in every block and pruned 2:4\n" in card
    export(run, tmp_path / "packed", form="packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    export(run, tmp_path / "maxtext", form="maxtext")
    assert "base_num_decoder_layers: 2\n" in (tmp_path / "maxtext" / "maxtext.yml").read_text()


def test_what_is_left_is_the_source_bit_for_bit(tmp_path):
    config, source = tiny_llama(num_hidden_layers=4)
    run = pruned_run(tmp_path / "run", config, source, "dense", left_out=(2, 0))
    export(run, tmp_path / "out")
    for name, tensor in folder_tensors(tmp_path / "out").items():
        old = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.1.")
        assert tensor.tobytes() == source.read(old).tobytes(), name
