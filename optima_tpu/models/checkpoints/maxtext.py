"""A pruned model in MaxText's layout: arrays, names, axes and settings.

    OUT/0/items      the parameters, an Orbax tree params/params/..., for MaxText's load_parameters_path
    OUT/maxtext.yml  the settings of the model, over MaxText's base.yml
    OUT/models/      the same settings as a model's own, where MaxText's decoder insists on the name of a model that it knows

MaxText differs from Hugging Face:

- A matrix is [d_in, d_out], and heads are an axis of their own: [d_model, heads, head_dim], [heads, head_dim, d_model].
- With ``scan_layers`` the blocks are stacked along axis 1 of one array. Gemma 2 stacks pairs of blocks, Gemma 3 six blocks and
  six.
- Most of its decoders do not scale the products of queries and keys: the factor is in the weights of the queries.
- Gemma's norms hold ``1 + w``, and its embedding ``sqrt(d_model)`` times the table.
- With ``rope_type: llama3.1`` the dimensions of a head that rotate together are neighbours.
- One array has a matrix of all experts, [experts, d_in, d_out]. The softmax over a token's experts gives their shares.

None of this turns a zero into another number.

Source: AI-Hypercomputer/maxtext 0.2.5, checkpoint_conversion/utils/param_mapping.py, layers/attentions.py, layers/embeddings.py,
layers/nnx_decoders.py, layers/moe.py and models/.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from transformers import PretrainedConfig

from optima_tpu.errors import UserError
from optima_tpu.models import experts, family_of, llama, mixtures
from optima_tpu.models.checkpoints.source import TensorSource, check_names
from optima_tpu.models.rope import Llama3Scaling, Rope, RopeByBlock

FILE = "maxtext.yml"
STEP = "0"
"""The folder of the step, in which Orbax stores ``items``."""
SCAN_AXIS = 1
_EPS = 1e-6
"""The ``eps`` of the norms inside Gemma's blocks, which no setting of MaxText changes."""
_LLAMA31 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
"""The numbers of ``rope_type: llama3.1``, which no setting of MaxText changes."""
_CYCLE = 6
"""The last of six blocks of a Gemma 3 has no window."""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turns a Hugging Face tensor into a slice of MaxText's array.

    The slice is ``factor (tensor + shift)`` in float32, rounded once.

    Attributes:
      shape: of the transposed tensor; None leaves it as it is.
      halves: whether the two halves of the last axis are interleaved.
    """

    shape: tuple[int, ...] | None = None
    factor: float = 1.0
    shift: float = 0.0
    halves: bool = False

    def __call__(self, tensor: np.ndarray) -> np.ndarray:
        # bfloat16 would round 1 + w, and float16 lose what a small factor makes smaller: these become float32.
        dtype = np.float32 if self.shift or tensor.dtype == np.float16 else tensor.dtype
        if self.shape is not None:
            tensor = tensor.T.reshape(self.shape)
        if self.halves:
            tensor = np.stack(np.split(tensor, 2, axis=-1), axis=-1).reshape(tensor.shape)
        if self.factor != 1 or self.shift:
            tensor = np.float32(self.factor) * (tensor.astype(np.float32) + np.float32(self.shift))
        return tensor.astype(dtype, copy=False)


class Leaf(NamedTuple):
    """One array of MaxText.

    Attributes:
      path: its names below ``params/params``.
      convert: makes a slice of it from a tensor.
      experts: the number of experts, whose tensors make the slice of a block, stacked along axis 0; 0 where one tensor makes it.
      names: the tensors that it is made of, in order.
      stacked: whether the slices of the blocks are stacked along axis 1; otherwise it belongs to one block, or to none.
    """

    path: tuple[str, ...]
    convert: Convert
    experts: int = 0
    names: tuple[str, ...] = ()
    stacked: bool = False

    def array(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The array, from the tensors by name."""
        slices = [self.convert(tensors[name]) for name in self.names]
        if self.experts:
            each = iter(slices)
            slices = [np.stack(list(itertools.islice(each, self.experts))) for _ in range(len(slices) // self.experts)]
        return np.stack(slices, axis=SCAN_AXIS) if self.stacked else slices[0]


class MaxTextArrays(NamedTuple):
    """The arrays of a model, and the settings of MaxText that describe it."""

    leaves: tuple[Leaf, ...]
    settings: dict[str, Any]

    def files(self) -> dict[str, str]:
        """The files of settings, by their path in the folder."""
        name = self.settings["model_name"]
        # MaxText reads the sizes of a model that it knows over those of a file, and looks for them in models/ beside the file
        # first.
        return {FILE: self._yml()} | ({} if name == "default" else {f"models/{name}.yml": self._yml()})

    def _yml(self) -> str:
        lines = [
            "# The settings of this model, over MaxText's base.yml, for the arguments of MaxText's trainer, with absolute paths:",
            f"#   OUT/{FILE} load_parameters_path=OUT/{STEP}/items tokenizer_path=OUT ...",
            "# That trainer itself moves every weight, the zeros too. The page docs/guides/jax-programs.md of OPTIMA-TPU has a",
            "# train_pruned.py of ten lines that holds them.",
            "base_config: base.yml",
            *(f"{name}: {json.dumps(value)}" for name, value in self.settings.items()),
        ]
        return "\n".join(lines) + "\n"


class _Place(NamedTuple):
    """Where MaxText keeps a block: the names above it, its parts' suffix."""

    prefix: tuple[str, ...]
    suffix: str = ""
    stacked: bool = False


def _one_by_one(blocks: int, scan: bool) -> Iterator[_Place]:
    for index in range(blocks):
        yield _Place(("layers",), stacked=True) if scan else _Place((f"layers_{index}",))


def _in_pairs(blocks: int, scan: bool) -> Iterator[_Place]:
    for index in range(blocks):
        suffix = ("_local", "_global")[index % 2]
        yield _Place(("layers",), suffix, stacked=True) if scan else _Place((f"layers_{index // 2}",), suffix)


def _in_sixes(blocks: int, scan: bool) -> Iterator[_Place]:
    if not scan:
        yield from _one_by_one(blocks, scan)
        return
    cycled = blocks - blocks % _CYCLE
    for index in range(cycled):
        yield _Place(("layers", f"layers_{index % _CYCLE}"), stacked=True)
    for index in range(blocks - cycled):
        yield _Place(("layers_remainder", f"layers_{index}"))


_LLAMA_NORMS = {"input_layernorm": "pre_self_attention_layer_norm", "post_attention_layernorm": "post_self_attention_layer_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "pre_self_attention_norm",
    "post_attention_layernorm": "post_self_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A ``decoder_block`` of MaxText.

    Attributes:
      norms: the names of its norms, by ours.
      places: (blocks, scan) -> where every block is kept.
      scales: whether it multiplies queries by ``head_dim ** -0.5`` itself.
      gemma: whether its norms and its embedding are Gemma's.
      windows: (blocks, width) -> the windows that it has with ``sliding_window_size`` width; None if it has none.
      mixture: for a mixture of experts, its name and how our checkpoint names its parts.
    """

    name: str
    norms: Mapping[str, str]
    places: Callable[[int, bool], Iterator[_Place]] = _one_by_one
    scales: bool = False
    gemma: bool = False
    windows: Callable[[int, int], tuple[int | None, ...]] | None = None
    mixture: tuple[str, experts.MixtureNames] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FOUR_NORMS = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
_GEMMA3 = _Kind(
    "gemma3",
    _GEMMA_NORMS,
    _in_sixes,
    scales=True,
    gemma=True,
    windows=lambda blocks, width: tuple(None if index % _CYCLE == _CYCLE - 1 else width for index in range(blocks)),
    # Its decoder scales queries by the model's name, and refuses other names.
    settings={"model_name": "gemma3-4b", "use_multimodal": False, **_FOUR_NORMS},
)
_KINDS: Mapping[str, _Kind] = {
    "LlamaForCausalLM": _Kind("llama2", _LLAMA_NORMS),
    "MistralForCausalLM": _Kind("mistral", _LLAMA_NORMS),
    "MixtralForCausalLM": _Kind("mixtral", _LLAMA_NORMS, mixture=("MoeBlock_0", mixtures.MIXTRAL_NAMES)),
    "Qwen2ForCausalLM": _Kind("qwen2", _LLAMA_NORMS, scales=True, settings={"attention_bias": True}),
    "Qwen3ForCausalLM": _Kind("qwen3", _LLAMA_NORMS, scales=True, settings={"use_qk_norm": True}),
    "Qwen3MoeForCausalLM": _Kind(
        "qwen3_moe", _LLAMA_NORMS, scales=True, mixture=("moe_block", experts.MixtureNames()), settings={"use_qk_norm": True}
    ),
    "GemmaForCausalLM": _Kind(
        "gemma", {"input_layernorm": "pre_self_attention_norm", "post_attention_layernorm": "pre_ffw_norm"}, gemma=True
    ),
    "Gemma2ForCausalLM": _Kind(
        "gemma2",
        _GEMMA_NORMS,
        _in_pairs,
        gemma=True,
        windows=lambda blocks, width: tuple(None if index % 2 else width for index in range(blocks)),
        settings=_FOUR_NORMS,
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
}
"""The decoder of MaxText for the architecture that config.json names."""
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}


def layout_of(hf_config: PretrainedConfig, source: TensorSource, scan: bool = True) -> MaxTextArrays:
    """The layout of a model in MaxText.

    Args:
      source: the source of its tensors, of which only names and dtypes are read.

    Raises:
      UserError: MaxText has no decoder for the model, or none with one of its settings, which the message names.
    """
    family = family_of(hf_config)
    kind = _KINDS.get(next(iter(hf_config.architectures or ()), ""))
    if kind is None:
        raise UserError(
            f"expected a model of {', '.join(_KINDS)} for MaxText, got {', '.join(hf_config.architectures or ())}: take --format "
            "plain"
        )
    config = family.read_config(hf_config)
    assert isinstance(config, llama.LlamaConfig), "all of these families have this configuration"
    settings = _settings(config, kind) | {"scan_layers": scan, "param_scan_axis": SCAN_AXIS}
    root = family.root(source.names())
    dtype = source.dtype(root + family.embedding)
    # As our forward pass does, and as the model was trained: the factor is rounded to the embedding's dtype.
    factor = float(np.asarray(config.d_model**0.5).astype(dtype)) if kind.gemma else 1.0
    shift = 1.0 if kind.gemma else 0.0
    leaves = [
        Leaf(("token_embedder", "embedding"), Convert(factor=factor), names=(root + family.embedding,)),
        Leaf(("decoder", "decoder_norm", "scale"), Convert(shift=shift), names=(f"{root}norm.weight",)),
    ]
    if not config.tied:
        head = Convert((config.d_model, config.vocab))
        leaves.append(Leaf(("decoder", "logits_dense", "kernel"), head, names=(family.head,)))
    parts = _parts(config, kind, shift)
    names: dict[tuple[str, ...], list[str]] = {}
    arrays: dict[tuple[str, ...], Leaf] = {}
    for index, position in enumerate(kind.places(config.blocks, scan)):
        for inner, part in parts.items():
            first, *rest = part.path
            path = ("decoder", *position.prefix, first + position.suffix, *rest)
            names.setdefault(path, []).append(root + family.layers.format(index) + inner)
            arrays[path] = part._replace(path=path, stacked=position.stacked)
    leaves += (leaf._replace(names=tuple(names[path])) for path, leaf in arrays.items())
    check_names((name for leaf in leaves for name in leaf.names), source, family.ignored)
    return MaxTextArrays(tuple(leaves), settings)


_WI_WO = ("wi_0", "wi_1", "wo")
"""MaxText's names of gate, up and down."""


def _parts(config: llama.LlamaConfig, kind: _Kind, shift: float) -> dict[str, Leaf]:
    """The arrays of a block's tensors, by tensor name; paths begin in it."""
    width, heads, kv_heads, size = config.d_model, config.heads, config.kv_heads, config.head_dim
    wanted = size**-0.5 if config.scale is None else config.scale
    factor = wanted / (size**-0.5 if kind.scales else 1.0)
    # A norm of the queries undoes a factor before it.
    query, normed = (1.0, factor) if config.qk_norm else (factor, 1.0)
    halves = _neighbours(config)
    attention = {
        "q": ("query", Convert((width, heads, size), query, halves=halves), Convert((heads, size), query, halves=halves)),
        "k": ("key", Convert((width, kv_heads, size), halves=halves), Convert((kv_heads, size), halves=halves)),
        "v": ("value", Convert((width, kv_heads, size)), Convert((kv_heads, size))),
    }
    parts: dict[str, Leaf] = {}
    for letter, (name, kernel, bias) in attention.items():
        parts[f"self_attn.{letter}_proj.weight"] = Leaf(("self_attention", name, "kernel"), kernel)
        if config.qkv_bias:
            parts[f"self_attn.{letter}_proj.bias"] = Leaf(("self_attention", name, "bias"), bias)
    parts["self_attn.o_proj.weight"] = Leaf(("self_attention", "out", "kernel"), Convert((heads, size, width)))
    if config.qk_norm:
        parts["self_attn.q_norm.weight"] = Leaf(("self_attention", "query_norm", "scale"), Convert(factor=normed, shift=shift))
        parts["self_attn.k_norm.weight"] = Leaf(("self_attention", "key_norm", "scale"), Convert(shift=shift))
    parts |= _mlp(config) if kind.mixture is None else _mixture(config, *kind.mixture)
    for ours, name in kind.norms.items():
        parts[f"{ours}.weight"] = Leaf((name, "scale"), Convert(shift=shift))
    return parts


def _mlp(config: llama.LlamaConfig) -> dict[str, Leaf]:
    sizes = {"gate": (config.d_model, config.d_ff), "up": (config.d_model, config.d_ff), "down": (config.d_ff, config.d_model)}
    return {f"mlp.{ours}_proj.weight": Leaf(("mlp", name, "kernel"), Convert(sizes[ours])) for ours, name in zip(sizes, _WI_WO)}


def _mixture(config: llama.LlamaConfig, name: str, layout: experts.MixtureNames) -> dict[str, Leaf]:
    assert isinstance(config, experts.MixtureConfig), "a family with a mixture has this configuration"
    router = Leaf((name, "gate", "kernel"), Convert((config.d_model, config.experts)))
    return {f"{layout.mlp}.{layout.router}.weight": router} | {
        f"{layout.mlp}.experts.{number}.{ours}.weight": Leaf((name, theirs), Convert(size), config.experts)
        for (ours, size), theirs in zip(layout.sizes(config).items(), _WI_WO)
        for number in range(config.experts)
    }


def _neighbours(config: llama.LlamaConfig) -> bool:
    return isinstance(config.rope, Rope) and config.rope.scaling == _LLAMA31


def _settings(config: llama.LlamaConfig, kind: _Kind) -> dict[str, Any]:
    """The settings of MaxText for a model.

    Raises:
      UserError: MaxText has no setting for something in the model, which the message names.
    """
    mixture = config if isinstance(config, experts.MixtureConfig) else None
    for what, needed in {
        "biases of q, k and v": config.qkv_bias != kind.settings.get("attention_bias", False),
        "a bias of o": config.o_bias,
        "biases in the MLP": config.mlp_bias,
        "a cap on attention scores": config.score_cap and kind.name != "gemma2",
        "a cap on logits and a head of its own": config.logit_cap and not config.tied,
        f"the activation {config.activation}": config.activation not in _ACTIVATIONS,
        f"norms with eps {config.eps:g}, where MaxText has {_EPS:g}": kind.gemma and config.eps != _EPS,
        "an odd number of blocks": kind.places is _in_pairs and config.blocks % 2,
        "blocks without a mixture": mixture and not all(mixture.mixed),
        "shares of experts that do not sum to one": mixture and not mixture.normalise,
    }.items():
        if needed:
            raise _refusal(what)
    return {
        "model_name": "default",
        "decoder_block": kind.name,
        "base_num_decoder_layers": config.blocks // 2 if kind.places is _in_pairs else config.blocks,
        "base_emb_dim": config.d_model,
        "base_num_query_heads": config.heads,
        "base_num_kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "base_mlp_dim": config.d_ff,
        "mlp_activations": [_ACTIVATIONS[config.activation], "linear"],
        "vocab_size": config.vocab,
        "normalization_layer_epsilon": config.eps,
        "logits_via_embedding": config.tied,
        "normalize_embedding_logits": kind.gemma,
        "final_logits_soft_cap": config.logit_cap,
        "attn_logits_soft_cap": config.score_cap,
        "tokenizer_type": "huggingface",
        **_rotary(config, kind),
        **_windows(config, kind),
        **({} if mixture is None else _sizes(mixture)),
        **kind.settings,
    }


def _sizes(mixture: experts.MixtureConfig) -> dict[str, Any]:
    return {"num_experts": mixture.experts, "num_experts_per_tok": mixture.experts_per_token, "base_moe_mlp_dim": mixture.d_ff}


def _windows(config: llama.LlamaConfig, kind: _Kind) -> dict[str, Any]:
    widths = {width for width in config.windows if width}
    if kind.windows is None and not widths:
        return {}
    if len(widths) == 1:
        (width,) = widths
        if kind.windows is not None and config.windows == kind.windows(config.blocks, width):
            return {"sliding_window_size": width}
        if kind.name in ("mistral", "mixtral") and config.windows == (width,) * config.blocks:
            return {"max_target_length": width}  # its decoder has no window, and no such text is longer than one
    raise _refusal("windows in other blocks than MaxText")


def _rotary(config: llama.LlamaConfig, kind: _Kind) -> dict[str, Any]:
    ropes = config.rope.ropes if isinstance(config.rope, RopeByBlock) else (config.rope,) * config.blocks
    full = next((rope for rope, window in zip(ropes, config.windows or (None,) * len(ropes)) if not window), ropes[0])
    local = next((rope for rope, window in zip(ropes, config.windows) if window), full)
    if full.scaling is not None and not _neighbours(config):
        raise _refusal("stretched positions that MaxText cannot compute (it has Llama 3.1's alone, with factor 8)")
    settings: dict[str, Any] = {
        "rope_type": "llama3.1" if _neighbours(config) else "default",
        "rope_max_timescale": _whole_number(full.theta),
        "rope_linear_scaling_factor": full.factor,
    }
    if local != full:
        if kind is not _GEMMA3 or local.factor != 1 or local.scaling is not None:
            raise _refusal("stretched positions in blocks with a window")
        settings["local_rope_max_timescale"] = _whole_number(local.theta)
    return settings


def _whole_number(theta: float) -> int:
    if theta != int(theta):
        raise _refusal(f"the rotary base {theta}, which is no whole number")
    return int(theta)


def _refusal(what: str) -> UserError:
    return UserError(f"expected a model that MaxText has a decoder for, got {what}: take --format plain")
