"""Folders with an unusual config.json against transformers' Auto classes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optima_tpu.errors import UserError
from optima_tpu.models.check import check_checkpoint
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.decoder import Decoder
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.references import BY_MODEL, LLAMA3, LONG, far_from, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BARE = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}


def saved(folder: Path, model: str, settings: dict, change: Callable[[dict], None]) -> Path:
    """A random model as transformers saves it, its config.json changed."""
    tiny(BY_MODEL[model], settings)[1].save_pretrained(folder)
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def opened(folder: Path) -> Decoder:
    pretrained = open_model(str(folder))
    decoder = Decoder.open(pretrained.config, pretrained.tensors, mesh(1, 1), batch=2)
    check_checkpoint(decoder)
    return decoder


def store(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Stores the embedding, changed, under another name as well."""
    tensors = load_file(folder / "model.safetensors")
    embedding = next(array for stored, array in tensors.items() if stored.endswith("embed_tokens.weight"))
    save_file(tensors | {name: change(embedding)}, folder / "model.safetensors", {"format": "pt"})


def reverse(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[::-1])


@pytest.mark.parametrize(
    ("model", "settings", "change"),
    [
        pytest.param(
            "MistralForCausalLM",
            dict(sliding_window=7),
            lambda record: record.update(layer_types=["full_attention", "sliding_attention"]),
            id="Mistral with the windows of a Ministral",
        ),
        pytest.param(
            "LlamaForCausalLM",
            dict(rope_parameters=LLAMA3),
            lambda record: record.update(
                rope_parameters=BARE | dict(original_max_position_embeddings=64), original_max_position_embeddings=16
            ),
            id="original length beside the rope's settings, and in them",
        ),
        pytest.param(
            "LlamaForCausalLM",
            dict(rope_parameters=LLAMA3),
            lambda record: record.update(rope_parameters=BARE, original_max_position_embeddings=16),
            id="original length beside the rope's settings alone",
        ),
        pytest.param(
            "Phi3ForCausalLM",
            dict(rope_parameters=LONG, original_max_position_embeddings=16),
            lambda record: record["rope_parameters"].update(factor=None),
            id="factor null",
        ),
        pytest.param(
            "Gemma4ForCausalLM",
            dict(enable_moe_block=False),
            lambda record: record.update(
                dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size")),
                global_head_dim=record.pop("per_layer_config")["1"]["head_dim"],
                num_global_key_value_heads=5,
            ),
            id="a Gemma 4 whose config.json is as it is published",
        ),
        pytest.param(
            "Gemma3ForConditionalGeneration",
            {},
            lambda record: record["text_config"].update(final_logit_softcapping=2.5),
            id="a cap that the multimodal Gemma 3 does not apply",
        ),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, model, settings, change):
    folder = saved(tmp_path, model, settings, change)
    tokens = np.random.default_rng(0).integers(1, 60, (2, 40)).astype(np.int32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32")
    assert (far_from(reference, logits_of(opened(folder), tokens), tokens) < 1e-4).all()


def test_whether_a_multimodal_head_is_tied_stands_beside_the_text_config(tmp_path):
    folder = saved(tmp_path, "Gemma3ForConditionalGeneration", {}, lambda record: record.update(tie_word_embeddings=False))
    store(folder, "lm_head.weight", reverse)
    assert "lm_head.weight" in opened(folder).tensor_names()


def test_a_config_without_rotary_embedding_is_read_without_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    opened(saved(tmp_path, "OPTForCausalLM", {}, lambda record: None))
    assert not [record for record in caplog.records if "rope" in record.getMessage().lower()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda record: record.update(model_type="mistral"),
            "expected the model_type llama of a LlamaForCausalLM, got 'mistral'",
        ),
        (lambda record: record.update(is_causal=False), "expected is_causal true, got false"),
    ],
    ids=["model_type", "is_causal"],
)
def test_a_config_that_transformers_reads_as_another_model_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        opened(saved(tmp_path, "LlamaForCausalLM", {}, change))


def test_a_tied_head_may_be_stored_as_a_copy_and_as_nothing_else(tmp_path):
    folder = saved(tmp_path, "LlamaForCausalLM", dict(tie_word_embeddings=True), lambda record: None)
    store(folder, "lm_head.weight", np.copy)
    assert "lm_head.weight" not in opened(folder).tensor_names()
    store(folder, "lm_head.weight", lambda embedding: np.append(embedding[:-1], embedding[:1], axis=0))
    with pytest.raises(UserError, match=r"ties lm_head.weight to model.embed_tokens.weight.* tie_word_embeddings to false"):
        opened(folder)
    saved(folder, "LlamaForCausalLM", dict(tie_word_embeddings=True), lambda record: record.update(tie_word_embeddings=False))
    store(folder, "lm_head.weight", reverse)
    assert "lm_head.weight" in opened(folder).tensor_names()
