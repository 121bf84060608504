"""Exported GGUF files match llama.cpp's and are read as the same model."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from optima_tpu.errors import UserError
from optima_tpu.method.quantization import Int8
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import export
from optima_tpu.models.checkpoints.gguf_export import GGUFModel, Stored
from optima_tpu.report.licence import CARD, Licence, licence_of
from tests.models import test_gguf_families, test_weights
from tests.support.fake_run import begun, block_report, on_host, write_checkpoint
from tests.support.meshes import mesh
from tests.support.references import LINEAR, LLAMA3, YARN
from tests.support.tiny_models import MemoryTensors, byte_tokenizer, tiny_folder


def write(path, opened) -> GGUFModel:
    model = GGUFModel.of(opened)
    model.write(path, (Stored(name, opened.tensors.read(name)) for name in model.kinds))
    model.reopened(path)
    return model


def test_a_file_keeps_the_licence_of_the_source(tmp_path):
    test_weights.write_gguf(tmp_path / "first.gguf", test_weights.llama_tensors())
    opened, licence = open_model(str(tmp_path / "first.gguf")), Licence("other", "mine", "https://example.org/terms")
    assert licence_of(opened.assets) == Licence()
    write(tmp_path / "second.gguf", dataclasses.replace(opened, assets={**opened.assets, CARD: licence.card()}))
    assert licence_of(open_model(str(tmp_path / "second.gguf")).assets) == licence


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_a_file_that_is_written_again_says_the_same(tmp_path, arch):
    """The first one is written as llama.cpp's converter writes it."""
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    if arch == "llama":
        test_weights.write_gguf(first, test_weights.llama_tensors())
    else:
        test_gguf_families.write(first, arch)
    opened = open_model(str(first))
    write(second, opened)
    again = open_model(str(second))
    assert again.assets.keys() == opened.assets.keys()
    for name in opened.assets.keys() - {"tokenizer.json"}:
        assert json.loads(again.assets[name]) == json.loads(opened.assets[name]), name
    vocabularies = [json.loads(each.assets["tokenizer.json"])["model"]["vocab"] for each in (opened, again)]
    assert vocabularies[0] == vocabularies[1]
    # Tokens of spaces too: llama.cpp finds the user-defined ones in the text before it merges anything.
    fields = [gguf.GGUFReader(path).fields for path in (first, second)]
    for name in ("tokens", "token_type"):
        values = [each[f"tokenizer.ggml.{name}"].contents() for each in fields]
        assert values[0] == values[1], name
    states = [
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32").state_dict()
        for path in (first, second)
    ]
    for name in opened.tensors.names():
        # Gemma's norms plus 1, minus 1.
        np.testing.assert_allclose(again.tensors.read(name), opened.tensors.read(name), atol=2**-22 if "norm" in name else 0)
        assert torch.allclose(states[0][name], states[1][name], atol=2**-22), name


def test_large_norms_of_a_trained_gemma_are_exported(tmp_path):
    """Norms of up to 1656, as in Gemma 3 270M, come back.

    Adding 1 and subtracting it again rounds them in float32.
    """
    test_gguf_families.write(tmp_path / "m.gguf", "gemma3")
    opened = open_model(str(tmp_path / "m.gguf"))
    arrays, rng = {name: opened.tensors.read(name) for name in opened.tensors.names()}, np.random.default_rng(0)
    for name in arrays:
        if name.endswith("norm.weight"):
            arrays[name] = rng.uniform(-1, 1656, arrays[name].shape).astype(np.float32)
    journal, pruned = begun(tmp_path / "run", assets=opened.assets), "model.layers.0.mlp.up_proj.weight"
    keep = np.indices(arrays[pruned].shape)[1] % 2 == 0
    report = block_report(0, {"mlp.up_proj": keep})
    journal.save(0, {pruned: arrays[pruned] * keep}, {pruned: keep}, report, on_host(np.zeros((1, 1, 1))))
    write_checkpoint(journal, MemoryTensors(arrays), mesh(1, 1))
    export(tmp_path / "run", tmp_path / "out", form="gguf")
    exported = open_model(str(tmp_path / "out" / "model.gguf")).tensors
    for name in exported.names():
        expected = arrays[name] * keep if name == pruned else arrays[name]
        np.testing.assert_allclose(exported.read(name), expected, rtol=2**-23, atol=2**-23 if "norm" in name else 0)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("bfloat16", {}),
        ("float16", dict(head_dim=16, tie_word_embeddings=False)),
        ("bfloat16", dict(attention_bias=True, mlp_bias=True)),
        ("float32", dict(head_dim=16, rope_parameters=LLAMA3 | dict(rope_theta=5e5, original_max_position_embeddings=8192))),
    ],
    ids=["tied", "untied", "biases", "llama3"],
)
def test_a_pruned_llama_comes_back_bit_for_bit(tmp_path, dtype, settings):
    """This program reads every configuration from the file.

    transformers is compared where it reads them too: without biases and scaled rotations.
    """

    def half(arrays):
        for name, array in arrays.items():
            if "proj.weight" in name:
                array[:, ::2] = 0

    folder = tiny_folder(tmp_path / "model", dtype=dtype, change=half, num_hidden_layers=2, **settings)
    opened = open_model(str(folder))
    write(folder / "model.gguf", opened)
    again = open_model(str(folder / "model.gguf"), dtype).tensors
    assert again.names() == opened.tensors.names()
    for name in again.names():
        assert again.read(name).tobytes() == opened.tensors.read(name).tobytes(), name
    if "attention_bias" in settings or "rope_parameters" in settings:
        return
    with torch.no_grad():
        actual, expected = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)(torch.arange(48).reshape(2, 24)).logits
            for options in ({"gguf_file": "model.gguf"}, {})
        )
    assert torch.equal(actual, expected)


def change_tokenizer(folder):
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.pre_tokenizer = None
    tokenizer.save_pretrained(folder)


def change_config(**entries):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_tokenizer, "expected a tokenizer that GGUF can name"),
        (change_config(architectures=["MistralForCausalLM"], model_type="mistral"), "expected a model of architecture Llama"),
        (
            change_config(rope_parameters=LLAMA3),
            "describes, got rope .*original_length=16.* \\(rope_parameters or rope_scaling in config.json\\)",
        ),
        (change_config(rope_parameters=LINEAR), "describes, got one of which .* llama.rope.scaling"),
        (change_config(rope_parameters=YARN), "llama describes, got rope"),
    ],
)
def test_what_a_gguf_file_can_not_say_is_refused(tmp_path, change, message):
    folder = tiny_folder(tmp_path / "model", num_hidden_layers=1)
    change(folder)
    with pytest.raises(UserError, match=message):
        GGUFModel.of(open_model(str(folder))).refuse_unsaid()


def test_a_refusal_names_the_setting_of_config_json(tmp_path):
    test_gguf_families.write(tmp_path / "first.gguf", "gemma3")
    opened = open_model(str(tmp_path / "first.gguf"))
    opened.config.query_pre_attn_scalar = 64
    with pytest.raises(
        UserError, match=r"got scale 0.125 \(query_pre_attn_scalar in config.json\), which would be read as 0.25; "
    ):
        GGUFModel.of(opened).refuse_unsaid()


def test_integers_of_rows_that_are_no_whole_blocks_are_refused_before_the_file_is_begun(tmp_path):
    opened, name = open_model(str(tiny_folder(tmp_path / "model"))), "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UserError, match=f"a multiple of 32 inputs for a GGUF file, got one for 36 in {name}"):
        GGUFModel.of(opened, [name], Int8(group=None))
