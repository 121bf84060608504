"""Every file of a run directory: what it is, what needs it, how it is mended.

The report's page and the documentation list these files, ``optima verify`` compares those that a resume reads, and a resume makes
damaged ones again. So a step that keeps a result adds one row.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple


class RunFile(NamedTuple):
    """A file or a folder of a run directory.

    Attributes:
      words: what it is.
      needed: what needs it after the run; "no" for a file that nothing reads again.
      kept: "whole" for a file that a resume reads back and makes again if its checksum differs; "by block" for a folder of
        folders, each written whole with its own checksums; empty for what has another owner.
      after: the names of what it was made from, or together with: if one of them is lost, a resume makes this again too.
    """

    words: str
    needed: str = "no"
    kept: Literal["", "whole", "by block"] = ""
    after: tuple[str, ...] = ()


FILES: Mapping[str, RunFile] = {
    "report.html": RunFile("the page of the run, to look at: one file, no network", "for people"),
    "report.json": RunFile(
        "everything that the page shows, and the record of every matrix, as JSON for programs", "for programs", "whole"
    ),
    "hf": RunFile(
        "the pruned model for transformers: weights as safetensors, the source’s config.json, generation_config.json, tokenizer "
        "and chat template, which weights were kept (pruning_masks.npz, one bit each; not where parts were cut and nothing else "
        "is pruned), the recipe and every layer’s errors (optima_tpu.json), a model card (README.md), checksums "
        "(sha256-all.json)",
        "to use the model",
    ),
    "checkpoint": RunFile(
        "the pruned model for optima evaluate, optima export and JAX programs: an Orbax checkpoint of the tensors of no "
        "block, which names those of the blocks, in journal/ or distilled/",
        "to evaluate and to export",
        after=("distillation.json",),  # a training that is done again begins with the blocks as they were pruned
    ),
    "evaluation.json": RunFile("the results of optima evaluate; the page shows them"),
    "lm_eval.json": RunFile("the results of the tasks, as the evaluation harness writes them"),
    "evaluation-parts.json": RunFile(
        "what a stopped evaluation had measured; the same command goes on behind it, and removes it at its end", "to go on"
    ),
    "run.json": RunFile(
        "the settings, and digests of model, text and code; a command compares them before it resumes the run",
        "to go on, and to evaluate",
        "whole",
    ),
    "assets": RunFile("the source’s config.json, tokenizer, licence and model card, byte for byte", "to export"),
    "dense.json": RunFile(
        "the dense model’s perplexity; a resumed run does not measure it again", kept="whole", after=("dense_losses.npy",)
    ),
    "dense_losses.npy": RunFile(
        "the dense model’s loss on every token of the evaluation text, to find the tokens that got worse",
        kept="whole",
        after=("dense.json",),
    ),
    "pruned.json": RunFile(
        "the pruned model’s perplexity; a run that repairs its files does not measure it again",
        kept="whole",
        after=("pruned_losses.npy", "checkpoint"),
    ),
    "pruned_losses.npy": RunFile(
        "the pruned model’s loss on every token of the evaluation text, likewise",
        kept="whole",
        after=("pruned.json", "checkpoint"),
    ),
    "continuations.json": RunFile("the texts that both models write after a few prompts", kept="whole"),
    "speed.json": RunFile("how fast the dense and the cut model computed on this machine", kept="whole"),
    "seconds.json": RunFile("the seconds of every finished stage, of all starts of the run", kept="whole"),
    "calibration.npy": RunFile("the calibration windows that the dense model wrote, as token ids", "to go on", "whole"),
    "allocation.json": RunFile("the sparsity of every block, chosen by the allocation", "to go on", "whole"),
    "left_out.json": RunFile(
        "the blocks that the model is without, and what each choice did to its predictions; the experts that stay",
        "to go on",
        "whole",
    ),
    "experts": RunFile(
        "the solved weights of the experts that stay, one Orbax checkpoint for each block",
        "to go on, and to evaluate",
        "by block",
    ),
    "distilled": RunFile(
        "every block after the training, with checksums; checkpoint/ refers to it", "to go on, and by checkpoint/", "by block"
    ),
    "distillation.json": RunFile(
        "the held-out loss at every check of the training, and which steps were kept", "to go on", "whole"
    ),
    "distillation": RunFile(
        "masters, moments and best weights of a training that has not ended; the training removes it at its end",
        "to go on",
        "by block",
    ),
    "journal": RunFile(
        "every finished block with checksums, one Orbax checkpoint each; checkpoint/ refers to it",
        "to go on, and by checkpoint/",
        "by block",
        after=("allocation.json", "left_out.json"),
    ),
    "activations": RunFile(
        "the hidden states after the last finished block, to resume a stopped run; the walk removes it at its end",
        "to go on",
        "by block",
    ),
    "sha256-all.json": RunFile(
        "the checksums of the files here that are in no folder, and of assets; optima verify compares them",
        "to check these files",
    ),
    "tensorboard": RunFile("the records of every block for TensorBoard"),
    "wandb": RunFile("the records of every block for Weights & Biases"),
    "run.lock": RunFile("an empty lock file that keeps a second program from writing to the directory at the same time"),
}
"""Name in a run directory -> its file, the most important first. Names without a dot, such as hf, are folders."""


def shown(name: str) -> str:
    """The name of a file or a folder as people see it: "hf/"."""
    return name if "." in name else f"{name}/"


def names_kept(how: Literal["whole", "by block"]) -> tuple[str, ...]:
    """The names of the files, or of the folders, that are kept in a way."""
    return tuple(name for name, file in FILES.items() if file.kept == how)


def lost_with(names: Iterable[str]) -> set[str]:
    """The names of lost files, and of all that is made again with them."""
    lost = set(names)
    while more := {name for name, file in FILES.items() if name not in lost and not lost.isdisjoint(file.after)}:
        lost |= more
    return lost
