"""Decoders without a family of their own against transformers (torch)."""

import importlib.util

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.general_models import tiny_config, tiny_model
from optima_tpu.errors import UserError
from optima_tpu.models import family_of
from optima_tpu.models.check import check_checkpoint
from optima_tpu.models.checkpoints import Pretrained
from optima_tpu.models.checkpoints.stacks import Stacked, stacks_among, stacks_of, unstacked
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.general import block
from optima_tpu.models.layers import project
from optima_tpu.models.model import Model, without_blocks
from tests.models.test_models import compared
from tests.support.meshes import mesh
from tests.support.oracles import input_of, logits_of
from tests.support.pruning import compiled_forward
from tests.support.references import BY_MODEL, GENERAL, MIXED, Reference, far_from, revert_weight_conversion, tiny
from tests.support.tiny_models import MemoryTensors

torch = pytest.importorskip("torch")
pytest.importorskip("torchax")
transformers = pytest.importorskip("transformers")
logits = pytest.importorskip("optima_tpu.models.general.against_torch").logits
Shell = pytest.importorskip("optima_tpu.models.general.shell").Shell

# The code of torch is traced, whatever its settings: the first variant of a model stands for the others.
CASES = [
    pytest.param(reference, settings, id=f"{reference.model}-{name}", marks=[pytest.mark.slow] * (index > 0))
    for reference in GENERAL
    for index, (name, settings) in enumerate(reference.variants.items())
]


BERT = dict(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80)


def some(first: int):
    """Parametrizes over all models; all but every third one are marked slow.

    :func:`test_logits_agree_with_transformers` compares the logits of every model on one device.
    """
    marks = [[pytest.mark.slow] * (index % 3 != first) for index in range(len(GENERAL))]
    return pytest.mark.parametrize(
        "reference", [pytest.param(each, id=each.model, marks=mark) for each, mark in zip(GENERAL, marks)]
    )


@pytest.mark.parametrize(("reference", "settings"), CASES)
def test_logits_agree_with_transformers(reference, settings):
    assert (compared(reference, settings) < 1e-5).all()


def test_logits_agree_where_layers_stand_between_the_last_block_and_the_head():
    """A layer, a gelu, a norm, and a head bias that has two names."""
    reference = Reference("BertLMHeadModel", "BertConfig", BERT | dict(is_decoder=True), {})
    assert (compared(reference, {}) < 1e-5).all()


@some(0)
def test_logits_do_not_depend_on_the_mesh(reference):
    assert (compared(reference, reference.first, shape=(4, 2)) < 1e-5).all()


@some(1)
def test_bfloat16_logits_agree_within_its_rounding(reference):
    """Measured: 0.007 to 0.022."""
    assert (compared(reference, reference.first, dtype=torch.bfloat16) < 16 * 2**-9).all()


@pytest.mark.parametrize(("reference", "settings"), CASES)
def test_inputs_of_layers_are_those_of_torch(reference, settings):
    config, model, tensors = tiny(reference, settings)
    decoder = Decoder.open(config, tensors, mesh(1, 1), batch=2)
    tokens = np.random.default_rng(0).integers(1, 64, (2, 40)).astype(np.int32)
    expected = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: expected.update({name: args[0]}) if args else None)
    with torch.no_grad():
        model(torch.tensor(tokens, dtype=torch.long))
    hidden = decoder.embed(tokens)
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        (batch,) = hidden.batches(2)
        positions, alike = decoder.positions(index, 40), decoder.at(index)
        inputs = compiled_forward(alike.graph, alike.state(parameters), batch.hidden, positions)[1]
        assert set(inputs) == set(alike.linears)
        for name, ours in inputs.items():
            theirs = expected[decoder.prefix(index) + name].numpy().reshape(ours.shape)
            assert np.abs(np.asarray(ours) - theirs).max() < 1e-5 * np.abs(theirs).max(), name
        decoder.apply(index, parameters, hidden)


@pytest.mark.parametrize(("reference", "settings"), CASES)
def test_every_tensor_of_the_checkpoint_is_read_and_no_other(reference, settings):
    config, _, tensors = tiny(reference, settings)
    decoder = Decoder.open(config, tensors, mesh(1, 1))
    assert sorted(decoder.tensor_names()) == sorted(tensors.names())
    check_checkpoint(decoder)
    for index in decoder.config.kinds:
        alike = decoder.at(index)
        assert {name + ".weight" for name in alike.linears} == {n for n, shape in alike.block_shapes.items() if len(shape) == 2}
        assert all(alike.sharding(name + ".weight") != P() for name in alike.linears)


def test_blocks_that_compute_the_same_are_one_kind():
    kinds = {
        reference.model: family_of(reference.configuration(reference.first)).read_config(None).kinds for reference in GENERAL
    }
    assert kinds.pop("GPTNeoForCausalLM") == (0, 1)
    assert set(kinds.values()) == {(0,)}
    scaled = BY_MODEL["GPT2LMHeadModel"].configuration(dict(scale_attn_by_inverse_layer_idx=True))
    assert family_of(scaled).read_config(None).kinds == (0, 1, 2)


@pytest.mark.parametrize("reference", GENERAL, ids=lambda reference: reference.model)
def test_the_output_of_attention_is_known_by_the_layer_that_reads_it(reference):
    """The first layer whose input at a token depends on an earlier token."""
    config, _, tensors = tiny(reference, reference.first)
    decoder = Decoder.open(config, tensors, mesh(1, 1))
    assert decoder.attended.rpartition(".")[2] in ("c_proj", "dense", "out_proj", "o_proj") and "mlp" not in decoder.attended


def test_experts_read_the_tokens_that_torch_sends_them():
    """On a mesh on which each slice sorts its own tokens."""
    config, model, tensors = tiny(MIXED, MIXED.first)
    decoder = Decoder.open(config, tensors, mesh(2, 2), batch=2)
    check_checkpoint(decoder)
    assert (decoder.config.reach("mlp.experts.3.up_proj"), decoder.config.reach("mlp.shared_experts.up_proj")) == (1 / 4, 1)
    tokens, sent = np.random.default_rng(0).integers(1, 64, (4, 24)).astype(np.int32), []
    for module in model.modules():
        if hasattr(module, "is_concatenated"):
            module.register_forward_pre_hook(lambda module, args: sent.append((module, *args)))
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True).hidden_states
    hidden = decoder.embed(tokens)
    for index, parameters in enumerate(decoder.blocks(range(2))):
        (batch,) = hidden.batches(2)
        positions, alike = decoder.positions(index, 24), decoder.at(index)
        inputs = compiled_forward(alike.graph, alike.state(parameters), batch.hidden, positions)[1]
        assert set(inputs) == set(alike.linears)
        decoder.apply(index, parameters, hidden)
    (batch,), (module, x, chosen, _) = hidden.batches(2), sent[0]
    assert np.abs(np.asarray(batch.hidden) - expected[2].numpy()[batch.rows]).max() < 1e-5 * float(expected[2].abs().max())
    for number in range(8):
        here = (chosen == number).any(dim=1, keepdim=True)
        gated = module._apply_gate(x @ module.gate_up_proj[number].T)
        for name, theirs in (("gate", x), ("up", x), ("down", gated)):
            ours = input_of(inputs, f"mlp.experts.{number}.{name}_proj")
            theirs = (theirs * here).detach().numpy().reshape(*tokens.shape, -1)[batch.rows]
            assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_without_torchax_the_refusal_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchax" else find(name))
    with pytest.raises(
        UserError,
        match=r"^a GPT2LMHeadModel without a family of its own .* torchax: pip install '.\[any\]' in the directory of the repo",
    ):
        family_of(BY_MODEL["GPT2LMHeadModel"].configuration({}))


def test_a_model_that_transformers_has_not_is_refused():
    config = BY_MODEL["GPT2LMHeadModel"].configuration({})
    config.architectures = ["NoSuchModel"]
    with pytest.raises(UserError, match="^expected an architecture of the installed transformers .*, got NoSuchModel: "):
        family_of(config)


def test_a_model_that_sees_later_tokens_is_refused():
    config = transformers.BertConfig(**BERT)
    config.architectures = ["BertLMHeadModel"]
    with pytest.raises(
        UserError, match="^the general way cannot run a BertLMHeadModel: .*; give a model of another architecture$"
    ):
        family_of(config)


def test_a_block_that_counts_the_tokens_of_its_experts_is_refused():
    with pytest.raises(UserError, match="its block 0 looks at values to choose what it computes, which no compiled program can"):
        Shell(tiny_config("JetMoeForCausalLM"))


def test_a_block_that_differs_from_torch_is_refused_by_the_name_of_its_layer(monkeypatch):
    config, _, tensors = tiny(BY_MODEL["GPTJForCausalLM"], dict(rotary_dim=2))
    decoder = Decoder.open(config, tensors, mesh(1, 1))
    decoder.positions(0, 40)
    monkeypatch.setattr(block, "project", lambda x, weight: project(x, weight) * 1.001)
    decoder.positions(1, 24)  # a block like it was compared at a longer window
    with pytest.raises(
        UserError,
        match="^the general way cannot run a GPTJForCausalLM: the input of attn.out_proj of its block 0 differs .* at 48 ",
    ):
        decoder.positions(1, 48)


def test_what_is_not_pruned_is_said():
    note = family_of(BY_MODEL["PhiForCausalLM"].configuration({})).note
    assert "PhiForCausalLM" in note and "self_attn.q_proj" in note and "It cannot write text" in note


def test_a_layer_whose_input_cannot_be_seen_stays_dense():
    """A state space model multiplies by the layer's weight itself."""
    config = transformers.FalconMambaConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2, state_size=8)
    config.architectures = ["FalconMambaForCausalLM"]
    family = family_of(config)
    assert family.linears == ("mixer.in_proj", "mixer.x_proj", "mixer.out_proj")
    assert "mixer.dt_proj.weight of the blocks stay as they are" in family.note


def test_a_model_that_changes_its_buffers_has_them_as_they_were():
    """A CTRL casts its position table, and the shell also tries bfloat16."""
    shell = Shell(tiny_config("CTRLLMHeadModel"))
    before = {name: buffer.clone() for name, buffer in shell.model.named_buffers()}
    assert shell.follows
    assert all(torch.equal(before[name], buffer) for name, buffer in shell.model.named_buffers())


def test_values_that_the_configuration_gives_to_a_stored_buffer_are_kept_in_the_check():
    """A MiniMax stores its table of decays, whose zeros hide later tokens."""
    family = family_of(tiny_config("MiniMaxForCausalLM"))
    assert "self_attn.output_gate" in family.linears


def test_experts_whose_gates_lie_between_their_other_outputs_are_pruned_as_the_family_prunes_them():
    reference = BY_MODEL["GptOssForCausalLM"]
    config, model, tensors = tiny(reference, reference.first)
    tokens = np.random.default_rng(0).integers(1, 64, (1, 24)).astype(np.int32)
    declared, general = (Decoder.open(config, tensors, mesh(1, 1), general=general) for general in (False, True))
    assert [sorted(declared.at(index).linears) for index in range(2)] == [sorted(general.at(index).linears) for index in range(2)]
    assert (far_from(model, logits(general, tokens), tokens, use_cache=False) < 1e-5).all()


def test_a_kimi_linear_is_read_and_written_by_the_names_that_it_is_published_with():
    """Only transformers gives its MLP and its mixture the same name."""
    name, tokens = "KimiLinearForCausalLM", np.arange(2, 26, dtype=np.int32)[None]
    config = tiny_config(name, layer_types=["full_attention"] * 2)
    model = tiny_model(config)
    saved = {each: value.contiguous().numpy() for each, value in revert_weight_conversion(model, model.state_dict()).items()}
    published = {each.replace(".0.block_sparse_moe.", ".0.mlp."): value for each, value in saved.items()}
    assert "model.layers.0.mlp.down_proj.weight" in published
    for files in (saved, published):
        tensors = unstacked(MemoryTensors(files), stacks_of([name]))
        decoder = Decoder.open(config, tensors, mesh(1, 1))
        check_checkpoint(decoder)
        assert (far_from(model, logits(decoder, tokens), tokens, use_cache=False) < 1e-5).all()
        assert Stacked(tensors, stacks_among(files, stacks_of([name]))).names() == tuple(sorted(files))


def test_blocks_leave_a_model_that_is_run_by_torch_though_it_has_a_family():
    config, _, tensors = tiny(BY_MODEL["LlamaForCausalLM"], {})
    pretrained = Pretrained(config, tensors, {"config.json": config.to_json_string(use_diff=False).encode()}, "", "")
    decoders = [Decoder.open(config, tensors, mesh(1, 1), general=general) for general in (False, True)]
    declared, general = (without_blocks(Model(pretrained, decoder), (0,)).decoder for decoder in decoders)
    assert (general.config.blocks, general.config.generates) == (declared.config.blocks, False) == (1, False)
    tokens = np.random.default_rng(0).integers(1, 64, (1, 24)).astype(np.int32)
    np.testing.assert_allclose(logits_of(general, tokens), logits_of(declared, tokens), rtol=1e-4, atol=1e-4)
