"""Compares the speed of generation with transformers in torch.

    python -m benchmarks.generation

On the same cores in float32, both continue the same prompts of different lengths with the most likely tokens, all at once and
with a key-value cache: torch by ``generate`` with padding on the left. Prompts are pieces of the source of Python's
``argparse``. The first call of each, in which programs are compiled, does not count. Runs alternate, so that other load on the
machine affects both. Seconds are medians; the ratio is the median over pairs. Our call reads the weights first; that time is
measured alone too, and not in the ratio. Needs the extra ``test``.
"""

import argparse
import inspect
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness_parity import write_folder
from optima_tpu.config.run_config import EMBEDDED
from optima_tpu.models.checkpoints import load_tokenizer, open_model
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.generate import Prompt, Sampling, generate, plan_generation
from optima_tpu.models.whole_model import load
from optima_tpu.runtime.mesh import make_mesh


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=EMBEDDED.model, help="as in optima_tpu.launch")
    parser.add_argument("--prompts", type=int, default=8, help="number of prompts")
    parser.add_argument("--length", type=int, default=160, help="tokens of the shortest prompt; each next one has 4 more")
    parser.add_argument("--new", type=int, default=48, help="tokens to write after each prompt")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--cpu", action="store_true", help="count the CPU seconds of the process, not the time that passes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    clock = time.process_time if arguments.cpu else time.monotonic

    with tempfile.TemporaryDirectory() as directory:
        folder = write_folder(arguments.model, Path(directory))
        pretrained = open_model(str(folder), None)
        tokenizer = load_tokenizer(pretrained)
        ids = tokenizer(inspect.getsource(argparse), verbose=False)["input_ids"]
        sizes = [arguments.length + 4 * number for number in range(arguments.prompts)]
        starts = np.cumsum([0, *sizes])
        prompts = [Prompt(tuple(ids[start : start + size]), arguments.new) for start, size in zip(starts, sizes)]

        decoder = Decoder.open(pretrained.config, pretrained.tensors, make_mesh(None))
        plan = plan_generation(decoder, prompts, Sampling(len(tokenizer)), advice="take a smaller model")
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        padded = torch.zeros((len(prompts), max(sizes)), dtype=torch.long)
        for row, prompt in zip(padded, prompts):
            row[-len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask = (torch.arange(max(sizes)) >= max(sizes) - torch.tensor(sizes)[:, None]).long()

        def theirs() -> list[list[int]]:
            with torch.no_grad():
                written = peer.generate(
                    padded, attention_mask=mask, do_sample=False, max_new_tokens=arguments.new, eos_token_id=-1, pad_token_id=0
                )
            return written[:, max(sizes) :].tolist()

        def ours() -> list[list[int]]:
            return generate(decoder, plan)

        def read() -> None:
            jax.block_until_ready(load(decoder, plan.batches[0].room))

        answers, seconds = zip(*(_timed([ours, read, theirs], clock) for _ in range(arguments.repeats + 1)))
    own, _, other = answers[-1]
    same = sum(first == second for first, second in zip(own, other))
    our_time, reading, torch_time = np.array(seconds[1:]).T
    ratio = statistics.median(torch_time / (our_time - reading))
    count = arguments.new * arguments.prompts
    print(
        f"{count} tokens after {len(prompts)} prompts of {min(sizes)} to {max(sizes)} tokens: {statistics.median(our_time):.2f} "
        f"s here, {statistics.median(reading):.2f} s of them to read the weights; {statistics.median(torch_time):.2f} s in "
        f"torch. {ratio:.2f} times the speed of torch. {same} of {len(own)} answers are the same"
    )


def _timed(works: Sequence[Callable[[], Any]], clock: Callable[[], float]) -> tuple[list[Any], list[float]]:
    """Calls each function. Returns the results and the seconds."""
    results, seconds = [], []
    for work in works:
        start = clock()
        results.append(work())
        seconds.append(clock() - start)
    return results, seconds


if __name__ == "__main__":
    main()
