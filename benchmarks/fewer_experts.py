"""Measures what trained mixtures lose without half of their experts.

    python -m benchmarks.mixture c4.jsonl mixture0
    python -m benchmarks.mixture c4.jsonl mixture1 --seed 1
    python -m benchmarks.fewer_experts mixture0 mixture1 --runs runs --other wiki.test.raw.txt

Rows differ in the score that chooses experts, in the refit, and in a training of the routers behind it. Each mixture is one
draw, whose number is the seed of its calibration text. Prints, and writes as a record, the loss above that of the dense
mixture: on the first windows of its held-out documents, by which settings are chosen, on the windows behind these, and on the
second half of a text of another kind. Where experts are chosen by the other text, its first half calibrates. Runs that are in
the folder are not done again.
"""

import argparse
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.mixture import LENGTH, joined
from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.evaluate.perplexity import perplexity
from optima_tpu.launch import main as prune
from optima_tpu.models.checkpoints import load_tokenizer
from optima_tpu.runtime.mesh import make_mesh

WINDOWS = 256
"""Windows of LENGTH tokens to calibrate on, and of each text to measure on."""
TRAINING = (
    "--distill kl --distill.train routers --distill.windows 256 --distill.passes 2 --distill.batch 8 --distill.learning_rate 1e-3"
)
EXPERTS = "--pattern dense --cut.experts 0.5 --cut.score {}"
AS_THEY_ARE, SOLVED, ROUTERS = f"{EXPERTS} --cut.refit 0", EXPERTS, f"{EXPERTS} {TRAINING}"


class Case(NamedTuple):
    """A row of the table, and the settings of its runs.

    ``taken`` leaves the model. ``left`` says what is done with the rest. With ``other`` the text of another kind calibrates.
    """

    taken: str
    left: str
    settings: str
    other: bool = False

    @classmethod
    def scored(cls, score: str, left: str, settings: str, other: bool = False) -> "Case":
        return cls(f"experts, by `{score}`", left, settings.format(score), other)

    @property
    def row(self) -> list[str]:
        return [self.taken, self.left, "the other text" if self.other else "its own text"]

    def words(self, folder: Path, first_half: Path, draw: int) -> str:
        """The command, without its output."""
        text = first_half if self.other else folder / "calibration.jsonl"
        return (
            f"--model {folder}/model --preset fast {self.settings} --calibration.source file:{text} --calibration.windows "
            f"{WINDOWS} --calibration.length {LENGTH} --calibration.seed {draw} --evaluation.source file:{folder}/held_out.jsonl "
            "--evaluation.windows 16 --batch 64 --export false"
        )


CASES = (
    *(
        Case.scored(score, *left)
        for score in ("frequency", "reap", "msan", "price")
        for left in (("as they are", AS_THEY_ARE), ("solved", SOLVED))
    ),
    Case.scored("price", "solved, then routers trained", ROUTERS),
    *(Case.scored(score, "solved", SOLVED, other=True) for score in ("reap", "price")),
    Case("neurons of experts", "solved", "--pattern 0.5/neuron@32 --layers self_attn.*=dense"),
    Case("weights of experts, two of four", "solved", "--pattern 2:4 --layers self_attn.*=dense"),
    Case(
        "bits of experts, 4 of them left",
        "solved",
        "--pattern 0/row --layers self_attn.*=dense --quantize int4 --quantize.group 16",
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fewer_experts", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="what benchmarks.mixture wrote; each is one draw")
    parser.add_argument("--runs", type=Path, required=True, help="where the runs are written")
    parser.add_argument("--other", type=Path, required=True, help="a text of another kind, in one file")
    parser.add_argument("--record", type=Path, help="a record whose rows are written anew")
    arguments = parser.parse_args(argv)
    first, second = write_halves(arguments.other, arguments.runs)
    dense = [losses(folder / "model", folder, second) for folder in arguments.folders]
    rows = [["nothing: the loss itself", "-", "-", *cells(dense)]]
    for case in CASES:
        increases = []
        for draw, (folder, before) in enumerate(zip(arguments.folders, dense)):
            run = arguments.runs / "-".join(re.findall(r"[a-z0-9]+", f"{' '.join(case.row)} {draw}"))
            words = f"{case.words(folder, first, draw)} --output {run}"
            if not (run / "report.json").exists() and prune(shlex.split(words)):
                raise SystemExit(f"no result: {words}")
            increases.append(losses(run, folder, second) - before)
        rows.append([*case.row, *cells(increases)])
        print(" | ".join(rows[-1]), flush=True)
        if arguments.record:
            record = json.loads(arguments.record.read_text("utf-8"))
            arguments.record.write_text(json.dumps(record | {"rows": rows}, indent=2, ensure_ascii=False) + "\n", "utf-8")


def cells(values: Sequence[np.ndarray]) -> list[str]:
    """Returns a cell for each text, with the numbers of all draws."""
    return [", ".join(f"{each:.4f}" for each in draws) for draws in zip(*values)]


def write_halves(text: Path, folder: Path) -> tuple[Path, Path]:
    """The two halves of a text, as files of documents."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = text.read_text("utf-8").split("\n\n")
    paths = folder / "first_half.jsonl", folder / "second_half.jsonl"
    for path, part in zip(paths, (lines[: len(lines) // 2], lines[len(lines) // 2 :])):
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in part if each.strip()), "utf-8")
    return paths


def losses(model: Path, folder: Path, other: Path) -> np.ndarray:
    """Returns the losses of a model, [texts].

    The texts are: to choose by, of the same kind, of another kind.
    """
    opened = open_evaluated(str(model), make_mesh("1x1"), None, 64).model
    tokenizer = load_tokenizer(opened.pretrained)
    own, others = (
        joined(tokenizer, [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]).astype(np.int32)
        for path in (folder / "held_out.jsonl", other)
    )
    texts = own[:WINDOWS], own[WINDOWS : 2 * WINDOWS], others[:WINDOWS]
    return np.array([math.log(perplexity(opened.decoder, windows)) for windows in texts])


if __name__ == "__main__":
    main()
