"""The export for MaxText against its layout, which is written down here.

The layout is names, axes, factors and settings, and needs no MaxText. ``tests/test_ecosystem.py`` loads the same exports with
MaxText, where it is installed.
"""

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from orbax.checkpoint import v1 as ocp
from ruamel.yaml import YAML

from optima_tpu.errors import UserError
from optima_tpu.export import main
from optima_tpu.models.checkpoints.export import export, read_masks
from optima_tpu.models.checkpoints.forms import Options
from optima_tpu.models.checkpoints.maxtext import Convert, layout_of
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.runtime import signals
from optima_tpu.verify import main as verify
from tests.support.ecosystem import BASE, MODELS, configured
from tests.support.fake_run import pruned_run
from tests.support.runs import only_error
from tests.support.tiny_models import MemoryTensors, random_tensors

Back = Callable[[np.ndarray], np.ndarray]
"""From a slice of MaxText's array to the tensor of Hugging Face."""
HEADS, KV_HEADS, SIZE, WIDTH, INNER, VOCAB, EXPERTS = 6, 3, 16, 48, 80, 64, 5
"""Sizes of MODELS."""


def matrix(outputs: int, factor: float = 1.0) -> Back:
    """From [d_in, ...] or [..., d_out] to [d_out, d_in]."""
    return lambda array: array.reshape(-1, outputs).T / factor


def separated(back: Back) -> Back:
    """Even dimensions of every head first, then odd ones."""
    return lambda array: back(np.concatenate([array[..., 0::2], array[..., 1::2]], axis=-1))


def shifted(array: np.ndarray) -> np.ndarray:
    return array - 1


def same(array: np.ndarray) -> np.ndarray:
    return array


def bias(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


class Part(NamedTuple):
    """A tensor of a block, by our name and as MaxText stores it."""

    ours: str
    path: str
    shape: tuple[int, ...]
    back: Back
    expert: int | None = None


MLP = [
    Part("mlp.gate_proj.weight", "mlp/wi_0/kernel", (WIDTH, INNER), matrix(INNER)),
    Part("mlp.up_proj.weight", "mlp/wi_1/kernel", (WIDTH, INNER), matrix(INNER)),
    Part("mlp.down_proj.weight", "mlp/wo/kernel", (INNER, WIDTH), matrix(WIDTH)),
]


def mixture(ours: str, theirs: str, gate: str, up: str, down: str) -> list[Part]:
    """The parts of a mixture; one array has the matrices of all experts."""
    wide, narrow = ((EXPERTS, WIDTH, INNER), matrix(INNER)), ((EXPERTS, INNER, WIDTH), matrix(WIDTH))
    return [
        Part(f"{ours}.gate.weight", f"{theirs}/gate/kernel", (WIDTH, EXPERTS), matrix(EXPERTS)),
        *(Part(f"{ours}.experts.{e}.{gate}.weight", f"{theirs}/wi_0", *wide, e) for e in range(EXPERTS)),
        *(Part(f"{ours}.experts.{e}.{up}.weight", f"{theirs}/wi_1", *wide, e) for e in range(EXPERTS)),
        *(Part(f"{ours}.experts.{e}.{down}.weight", f"{theirs}/wo", *narrow, e) for e in range(EXPERTS)),
    ]


def block(norms: dict[str, str], norm: Back = same, query: float = 1.0, mlp: list[Part] = MLP) -> list[Part]:
    """The parts that all families have."""
    return [
        Part("self_attn.q_proj.weight", "self_attention/query/kernel", (WIDTH, HEADS, SIZE), matrix(HEADS * SIZE, query)),
        Part("self_attn.k_proj.weight", "self_attention/key/kernel", (WIDTH, KV_HEADS, SIZE), matrix(KV_HEADS * SIZE)),
        Part("self_attn.v_proj.weight", "self_attention/value/kernel", (WIDTH, KV_HEADS, SIZE), matrix(KV_HEADS * SIZE)),
        Part("self_attn.o_proj.weight", "self_attention/out/kernel", (HEADS, SIZE, WIDTH), matrix(WIDTH)),
        *mlp,
        *(Part(f"{ours}.weight", f"{name}/scale", (WIDTH,), norm) for ours, name in norms.items()),
    ]


TWO = {"input_layernorm": "pre_self_attention_layer_norm", "post_attention_layernorm": "post_self_attention_layer_norm"}
FOUR = {
    "input_layernorm": "pre_self_attention_norm",
    "post_attention_layernorm": "post_self_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
BIASES = [
    Part("self_attn.q_proj.bias", "self_attention/query/bias", (HEADS, SIZE), bias),
    Part("self_attn.k_proj.bias", "self_attention/key/bias", (KV_HEADS, SIZE), bias),
    Part("self_attn.v_proj.bias", "self_attention/value/bias", (KV_HEADS, SIZE), bias),
]
NORMS = [
    Part("self_attn.q_norm.weight", "self_attention/query_norm/scale", (SIZE,), same),
    Part("self_attn.k_norm.weight", "self_attention/key_norm/scale", (SIZE,), same),
]
# Gemma 3 scales by the name of its model, 1/4 for heads of 16; these models want 1/sqrt(20), which is in the norm of the queries.
SHIFTED_NORMS = [NORMS[0]._replace(back=lambda array: array / (20**-0.5 / 0.25) - 1), NORMS[1]._replace(back=shifted)]
SCALED = block(TWO, query=0.25)  # 16 ** -0.5
BLOCKS = {
    "llama": SCALED,
    "llama-tied": SCALED,
    "llama-3.1": [
        part._replace(back=separated(part.back)) if "/query/" in part.path or "/key/" in part.path else part for part in SCALED
    ],
    "mistral": SCALED,
    "mixtral": block(TWO, query=0.25, mlp=mixture("block_sparse_moe", "MoeBlock_0", "w1", "w3", "w2")),
    "qwen2": block(TWO) + BIASES,
    "qwen3": block(TWO) + NORMS,
    "qwen3-moe": block(TWO, mlp=mixture("mlp", "moe_block", "gate_proj", "up_proj", "down_proj")) + NORMS,
    "gemma": block({"input_layernorm": "pre_self_attention_norm", "post_attention_layernorm": "pre_ffw_norm"}, shifted, 0.25),
    "gemma2": block(FOUR, shifted, 20**-0.5),
    "gemma3": block(FOUR, shifted) + SHIFTED_NORMS,
}
TIED = {"llama-tied", "qwen2", "gemma", "gemma2", "gemma3"}


EXPECTED = {
    "llama": dict(decoder_block="llama2", logits_via_embedding=False, rope_type="default", rope_max_timescale=10000),
    "llama-tied": dict(logits_via_embedding=True, normalize_embedding_logits=False, rope_linear_scaling_factor=2.0),
    "llama-3.1": dict(decoder_block="llama2", rope_type="llama3.1", rope_max_timescale=500000),
    "mistral": dict(decoder_block="mistral", max_target_length=40),
    "mixtral": dict(decoder_block="mixtral", num_experts=EXPERTS, num_experts_per_tok=2, base_moe_mlp_dim=INNER),
    "qwen2": dict(decoder_block="qwen2", attention_bias=True),
    "qwen3": dict(decoder_block="qwen3", use_qk_norm=True),
    "qwen3-moe": dict(decoder_block="qwen3_moe", use_qk_norm=True, num_experts=EXPERTS, base_moe_mlp_dim=INNER),
    "gemma": dict(decoder_block="gemma", mlp_activations=["gelu", "linear"], normalize_embedding_logits=True),
    "gemma2": dict(
        decoder_block="gemma2", base_num_decoder_layers=2, sliding_window_size=7, attn_logits_soft_cap=1.5, final_logits_soft_cap=2.5
    ),
    "gemma3": dict(
        decoder_block="gemma3", model_name="gemma3-4b", sliding_window_size=7, rope_max_timescale=1000000,
        local_rope_max_timescale=10000, rope_linear_scaling_factor=8.0, use_post_attn_norm=True,
    ),
}  # fmt: skip


def placed(family: str, index: int, blocks: int, scan: bool) -> tuple[str, str, int | None]:
    """Returns MaxText's prefix, first suffix and stack index of a block."""
    if family == "gemma2":
        suffix = "_global" if index % 2 else "_local"
        return ("layers", suffix, index // 2) if scan else (f"layers_{index // 2}", suffix, None)
    if family == "gemma3" and scan:
        stacked = blocks // 6 * 6
        return (
            (f"layers/layers_{index % 6}", "", index // 6)
            if index < stacked
            else (f"layers_remainder/layers_{index - stacked}", "", None)
        )
    return ("layers", "", index) if scan else (f"layers_{index}", "", None)


def items(folder: Path) -> dict[str, np.ndarray]:
    """Reads an export's arrays by path below params/params, on the host."""
    tree = ocp.metadata(folder / "0", checkpointable_name="items").metadata
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)
    arrays = ocp.load(folder / "0", target, checkpointable_name="items")["params"]["params"]
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def settings(folder: Path) -> dict:
    return YAML(typ="safe").load(folder / "maxtext.yml")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Callable[[str], Path]:
    """Gives a run over a model of a family."""

    @functools.cache
    def run(family: str) -> Path:
        config = configured(family)
        return pruned_run(tmp_path_factory.mktemp(family) / "run", config, random_tensors(config))

    return run


# Unscanned, Gemma 2 and 3 alone have places of their own; what is in an array is the same.
@pytest.mark.parametrize(
    "family, scan",
    [
        *(pytest.param(name, True, marks=[pytest.mark.slow] * (name == "llama")) for name in MODELS),  # llama-tied has the same
        *((name, False) for name in ("llama", "gemma2", "mixtral")),
        pytest.param("gemma3", False, marks=pytest.mark.slow),  # as gemma2, with a longer cycle
    ],
)
def test_every_array_is_where_maxtext_has_it_and_the_settings_describe_it(pruned, tmp_path, family, scan):
    checkpoint = CheckpointTensors(pruned(family))
    stored = checkpoint.load(checkpoint.names())
    export(pruned(family), tmp_path / "out", options=Options(scan_layers=scan), form="maxtext")
    arrays, masks, blocks = items(tmp_path / "out"), read_masks(tmp_path / "out"), configured(family).num_hidden_layers
    places = [placed(family, index, blocks, scan)[:2] for index in range(blocks)]
    shapes, seen = {}, {}
    for index in range(blocks):
        prefix, suffix, position = placed(family, index, blocks, scan)
        for part in BLOCKS[family]:
            first, rest = part.path.split("/", 1)
            path, name = f"decoder/{prefix}/{first}{suffix}/{rest}", f"model.layers.{index}.{part.ours}"
            stack = 0 if position is None else places.count((prefix, suffix))
            shapes[path] = (part.shape[0], stack, *part.shape[1:]) if stack else part.shape
            own = np.take(arrays[path], position, axis=1) if stack else arrays[path]
            seen[name] = part.back(own if part.expert is None else own[part.expert])
    factor = WIDTH**0.5 if family.startswith("gemma") else 1.0
    shapes |= {"token_embedder/embedding": (VOCAB, WIDTH), "decoder/decoder_norm/scale": (WIDTH,)}
    seen["model.embed_tokens.weight"] = arrays["token_embedder/embedding"] / np.float32(factor)
    seen["model.norm.weight"] = arrays["decoder/decoder_norm/scale"] - (1 if family.startswith("gemma") else 0)
    if family not in TIED:
        shapes["decoder/logits_dense/kernel"] = (WIDTH, VOCAB)
        seen["lm_head.weight"] = arrays["decoder/logits_dense/kernel"].T
    assert {path: array.shape for path, array in arrays.items()} == shapes
    assert seen.keys() == stored.keys()
    for name, tensor in seen.items():
        np.testing.assert_allclose(tensor, stored[name], rtol=1e-6, atol=3e-7, err_msg=name)
    for name, keep in masks.items():
        np.testing.assert_array_equal(seen[name] != 0, keep, err_msg=name)
    written = settings(tmp_path / "out")
    sizes = dict(base_emb_dim=WIDTH, base_num_query_heads=HEADS, base_num_kv_heads=KV_HEADS, head_dim=SIZE, base_mlp_dim=INNER)
    expected = sizes | dict(base_config="base.yml", vocab_size=VOCAB, scan_layers=scan) | EXPECTED[family]
    assert {name: written[name] for name in expected} == expected
    # Where MaxText insists on a name that it knows, it reads this model's sizes under the name.
    named = list((tmp_path / "out").glob("models/*.yml"))
    assert [path.stem for path in named] == [written["model_name"]] * (family == "gemma3")
    assert all(path.read_bytes() == (tmp_path / "out" / "maxtext.yml").read_bytes() for path in named)


@pytest.mark.parametrize(
    ("family", "changed", "said"),
    [
        ("llama", dict(attention_bias=True), "got biases of q, k and v"),
        ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.5)), "got the rotary base 10000.5"),
        ("llama-3.1", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=64)),
         "got stretched positions that MaxText cannot compute"),
        ("qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1), "got windows in other blocks"),
        ("qwen3-moe", dict(mlp_only_layers=[0]), "got blocks without a mixture"),
        ("qwen3-moe", dict(norm_topk_prob=False), "got shares of experts that do not sum to one"),
        ("gemma", dict(rms_norm_eps=1e-5), "got norms with eps 1e-05, where MaxText has 1e-06"),
        ("gemma2", dict(num_hidden_layers=3), "got an odd number of blocks"),
        ("gemma2", dict(hidden_activation="gelu"), "got the activation gelu"),
        ("gemma3", dict(layer_types=["full_attention"] * 7), "got windows in other blocks"),
    ],
)  # fmt: skip
def test_what_maxtext_has_no_setting_for_is_refused_by_name(family, changed, said):
    with pytest.raises(UserError, match=said):
        layout_of(configured(family, **changed), MemoryTensors({"model.embed_tokens.weight": np.zeros((1, 1))}))


def test_the_command_line_writes_it_whole_or_not_at_all(finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(finished.directory), str(out), "--format", "maxtext", "--unscanned"]) == 0
    assert settings(out)["scan_layers"] is False and "decoder/layers_2/mlp/wo/kernel" in items(out)
    assert (out / "tokenizer.json").is_file() and "library_name: maxtext" in (card := (out / "README.md").read_text())
    assert "moves the zeros too" in card and "model.safetensors" not in card
    assert verify([str(out)]) == 0
    next((out / "0" / "items").glob("d/*")).unlink()
    assert verify([str(out)]) == 1
    capsys.readouterr()
    assert main([str(finished.directory), str(out), "--format", "maxtext"]) == 0  # of the same run and damaged: made again
    assert settings(out)["scan_layers"] is True and "decoder/layers/mlp/wo/kernel" in items(out)
    assert main([str(finished.directory), str(out), "--format", "maxtext"]) == 0  # whole: nothing is left to do
    assert main([str(finished.directory), str(out), "--format", "maxtext", "--unscanned"]) == 2
    assert "expected a new or empty folder" in only_error(capsys.readouterr().err)


def test_a_family_without_a_decoder_is_refused(tmp_path):
    config = transformers.Phi3Config(**BASE, pad_token_id=0)
    config.architectures = ["Phi3ForCausalLM"]
    with pytest.raises(UserError, match="for MaxText, got Phi3ForCausalLM: take --format plain"):
        layout_of(config, MemoryTensors({}))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_factor_is_rounded_once_and_makes_no_zero(dtype):
    weight = np.array([[3.0, 0.0, 6e-8, -1.0]]).astype(dtype)
    converted = Convert((4, 1), factor=0.3)(weight)
    assert converted.dtype == (np.float32 if dtype == np.float16 else dtype)  # float16 would lose the third weight
    np.testing.assert_array_equal(converted[:, 0], (np.float32(0.3) * weight[0].astype(np.float32)).astype(converted.dtype))
    np.testing.assert_array_equal(converted[:, 0] == 0, weight[0] == 0)
    assert Convert(shift=1.0)(weight).dtype == np.float32  # 1 + w in bfloat16 would lose most of w


def test_a_signal_stops_an_export_between_two_arrays(pruned, tmp_path, monkeypatch):
    def stop() -> None:
        raise signals.Stopped(signal.SIGTERM)

    monkeypatch.setattr(signals, "check", stop)
    with pytest.raises(signals.Stopped):
        export(pruned("llama"), tmp_path / "out", form="maxtext")
    assert not list(tmp_path.iterdir())
