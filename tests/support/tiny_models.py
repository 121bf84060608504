"""Tiny random models, in memory and as a folder; no torch needed."""

import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from optima_tpu.models.checkpoints.source import DTYPES
from optima_tpu.models.decoder import Decoder
from tests.support.meshes import mesh

NEW_READER = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2])) >= (5, 18)
"""Whether transformers' own tokenizer of a GGUF file can be compared with. Before 5.18 it added none of the file's special
tokens, and respelled Gemma's bytes."""


class MemoryTensors:
    """A TensorSource over a dictionary of numpy arrays."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    def names(self):
        return tuple(sorted(self.arrays))

    def shape(self, name):
        return self.arrays[name].shape

    def dtype(self, name):
        return self.arrays[name].dtype

    def read(self, name, index=(...,)):
        return self.arrays[name][index]


def tiny_llama(seed: int = 0, **settings):
    """Makes a random Llama whose sizes divide no mesh: (config, tensors)."""
    config = LlamaConfig(
        **(
            dict(
                vocab_size=64,
                hidden_size=36,
                intermediate_size=60,
                num_hidden_layers=3,
                num_attention_heads=9,
                num_key_value_heads=3,
                max_position_embeddings=128,
                tie_word_embeddings=True,
            )
            | settings
        )
    )
    config.architectures = ["LlamaForCausalLM"]
    return config, random_tensors(config, seed)


def random_tensors(config: PretrainedConfig, seed: int = 0) -> MemoryTensors:
    """Draws float32 tensors for a configuration of transformers."""
    rng = np.random.default_rng(seed)
    decoder = Decoder.open(config, MemoryTensors({}), mesh(1, 1))
    arrays = {}
    for name in decoder.tensor_names():
        inner = re.sub(rf"^{re.escape(decoder.root)}layers\.\d+\.", "", name)
        shape = decoder.end_shapes.get(name) or decoder.block_shapes[inner]
        noise = rng.standard_normal(shape).astype(np.float32)
        arrays[name] = (1 + 0.1 * noise if "norm" in name else noise / np.sqrt(shape[-1])).astype(np.float32)
    return MemoryTensors(arrays)


def byte_tokenizer():
    """A tokenizer of bytes, ``<s>`` (256, BOS) and ``</s>`` (257, EOS)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def tiny_folder(
    path: Path, *, dtype: str = "float32", change: Callable[[dict[str, np.ndarray]], None] = lambda arrays: None, **settings
) -> Path:
    """Writes a :func:`tiny_llama` as a Hugging Face folder.

    It has two shards, and a tokenizer of one token a byte.

    It has two shards, and a tokenizer of one token a byte.

    Args:
      change: edits the tensors, by name, before they are written.
    """
    # o_proj and down_proj of one shape: the solver is compiled once less.
    config, source = tiny_llama(**(dict(vocab_size=258, intermediate_size=36) | settings))
    arrays = {name: array.astype(DTYPES[dtype]) for name, array in sorted(source.arrays.items())}
    change(arrays)
    path.mkdir(parents=True)
    names, files = list(arrays), [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = dict.fromkeys(names[::2], files[0]) | dict.fromkeys(names[1::2], files[1])
    for file in files:
        safetensors.numpy.save_file({name: arrays[name] for name in names if weight_map[name] == file}, path / file)
    size = sum(array.nbytes for array in arrays.values())
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config.to_diff_dict() | {"dtype": dtype}, indent=1))
    byte_tokenizer().save_pretrained(path)
    return path


def with_bos(folder: Path) -> Path:
    """Makes a :func:`tiny_folder`'s tokenizer put BOS before every text."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save_pretrained(folder)
    return folder
