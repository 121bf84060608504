"""Page section on a run's files, and on how to load the pruned model."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath

from optima_tpu.report.facts import running, size, sizes
from optima_tpu.report.runs import FinishedRun
from optima_tpu.report.view import NONE, Section, Table, command, commands
from optima_tpu.runtime.buckets import in_bucket

_ALWAYS = ("report.json", "report.html")
"""Files that are written after the sizes are recorded."""

FILES: Mapping[str, str] = {
    "report.html": "this page",
    "report.json": "everything that this page shows, and the record of every matrix, as JSON for programs",
    "hf": "the pruned model for transformers: weights as safetensors, the source’s config.json, generation_config.json, tokenizer "
    "and chat template, which weights were kept (pruning_masks.npz, one bit each; not where parts were cut and nothing else is pruned), "
    "the recipe and every layer’s errors "
    "(optima_tpu.json), a model card (README.md), checksums (sha256-all.json)",
    "checkpoint": "the pruned model for optima evaluate, optima export and JAX programs: an Orbax checkpoint of the tensors of no "
    "block, which names those of the blocks, in journal/ or distilled/",
    "evaluation.json": "the results of optima evaluate; this page shows them",
    "lm_eval.json": "the results of the tasks, as the evaluation harness writes them",
    "evaluation-parts.json": "what a stopped evaluation had measured; the same command goes on behind it",
    "run.json": "the settings, and digests of model, text and code; a command compares them before it resumes this run",
    "assets": "the source’s config.json, tokenizer, licence and model card; optima export reads them",
    "dense.json": "the dense model’s perplexity; a resumed run does not measure it again",
    "dense_losses.npy": "the dense model’s loss on every token of the evaluation text, to find the tokens that got worse",
    "pruned.json": "the pruned model’s perplexity; a run that repairs its files does not measure it again",
    "pruned_losses.npy": "the pruned model’s loss on every token of the evaluation text, likewise",
    "continuations.json": "the texts that both models write after a few prompts",
    "speed.json": "how fast the dense and the cut model computed on this machine",
    "calibration.npy": "the calibration windows that the dense model wrote, as token ids",
    "allocation.json": "the sparsity of every block, chosen by the allocation",
    "left_out.json": "the blocks that the model is without, and what each choice did to its predictions; the experts that stay",
    "experts": "the solved weights of the experts that stay, one Orbax checkpoint for each block",
    "distilled": "every block after the training, with checksums; checkpoint/ refers to it",
    "distillation.json": "the held-out loss at every check of the training, and which steps were kept",
    "distillation": "the state of a training that has not ended; the training removes it at its end",
    "journal": "every finished block with checksums, one Orbax checkpoint each; checkpoint/ refers to it",
    "activations": "the hidden states after the last finished block, to resume a stopped run. The walk removes it at its end",
    "sha256-all.json": "the checksums of the files here that are in no folder, and of assets; optima verify compares them",
    "tensorboard": "the records of every block for TensorBoard",
    "wandb": "the records of every block for Weights & Biases",
    "run.lock": "an empty lock file that keeps a second program from writing to the directory at the same time",
}
"""Name in a run directory -> its purpose, the most important files first. Names without a dot, such as hf, are folders."""

_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))"""


def run_files(run: FinishedRun) -> Section:
    """Section on the files in the directory of one run."""
    report, directory = run.report, run.directory
    recorded = report.sizes.left
    names = {*recorded, *_ALWAYS, *_names_in(directory)}
    rows = [
        [name if "." in name else f"{name}/", words, size(recorded[name]) if recorded.get(name) else NONE]
        for name, words in FILES.items()
        if name in names
    ]
    rows += [[name, "not a file of this run: something else put it here", NONE] for name in sorted(names - FILES.keys())]
    text: list = [f"Sizes: {sizes(report)}."]
    exported = "hf" in {PurePath(path).name for path in report.files.values()}
    if not exported:
        again = command("export", str(directory), str(directory / "hf"))
        text.append(commands(f"The run did not write a folder for transformers. `{again}` writes one from checkpoint/."))
    elif in_bucket(directory):
        text.append(f"Copy {directory / 'hf'} to this machine first: transformers does not read buckets.")
    text.append(f"transformers loads the pruned model like any other model. {running(report)}")
    folder = json.dumps("hf" if in_bucket(directory) else str(directory / "hf"), ensure_ascii=False)
    return Section(
        "left",
        "What the run left, and how to use it",
        text,
        tables=[
            Table(
                f"In {directory}",
                ["file", "what it is", "size"],
                rows,
                words=True,
                note="Sizes were recorded at the end of the run." if recorded else "",
            )
        ],
        code=[
            ("Load the pruned model, in Python, from the directory in which the run was started", _SNIPPET.format(folder=folder))
        ],
    )


def _names_in(directory: Path) -> set[str]:
    """The names in a run's directory; empty if it is missing or a bucket."""
    return set() if in_bucket(directory) or not directory.is_dir() else {path.name for path in directory.iterdir()}
