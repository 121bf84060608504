"""What removing experts from a trained mixture costs: by score, with the refit, and with the routers trained behind it.

    python -m benchmarks.mixture c4.jsonl mixture
    python -m benchmarks.fewer_experts mixture runs --other wiki.test.raw.txt
    python -m benchmarks.fewer_experts mixture runs --other wiki.test.raw.txt --calibrate-on-other

Prints the loss above that of the dense mixture on its held-out documents, and on the second half of a text of another kind, for every
draw of the calibration text. Calibrated on the other text, experts are chosen and solved on its first half. Runs that are in the
folder are not done again.
"""

import argparse
import itertools
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.mixture import LENGTH, joined
from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.evaluate.perplexity import perplexity
from optima_tpu.launch import main as prune
from optima_tpu.models.checkpoints import load_tokenizer
from optima_tpu.runtime.mesh import make_mesh

ROUTERS = (
    "--distill kl --distill.train routers --distill.windows 256 --distill.passes 2 --distill.batch 8 --distill.learning_rate 1e-3"
)
VARIANTS = {"neither": "--cut.refit 0", "refit": "", "routers": f"--cut.refit 0 {ROUTERS}", "refit and routers": ROUTERS}
"""What is done with the experts that stay, by name."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fewer_experts",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="what benchmarks.mixture wrote")
    parser.add_argument("runs", type=Path, help="where the runs are written")
    parser.add_argument("--other", type=Path, required=True, help="a text of another kind, in one file")
    parser.add_argument("--calibrate-on-other", action="store_true", help="choose and solve experts on the text of another kind")
    parser.add_argument("--scores", default="frequency,reap,msan", help="values of --cut.score")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="what is done with the experts that stay")
    parser.add_argument("--seeds", default="0,1", help="draws of the calibration text")
    parser.add_argument("--experts", default="0.5", help="value of --cut.experts")
    parser.add_argument("--settings", default="", help="further settings of every run")
    parser.add_argument("--windows", type=int, default=256, help=f"windows of {LENGTH} tokens, to calibrate on and to measure on")
    arguments = parser.parse_args(argv)
    folder, runs = arguments.folder, arguments.runs
    runs.mkdir(parents=True, exist_ok=True)
    halves = write_halves(arguments.other, runs)
    source = halves[0] if arguments.calibrate_on_other else folder / "calibration.jsonl"
    measured = [folder / "held_out.jsonl", halves[1]]
    dense = losses(folder / "model", measured, arguments.windows)
    print(f"losses of the dense mixture: {dense[0]:.4f} on its own text, {dense[1]:.4f} on the other\n")
    print("| score | experts that stay | own text | other text | error before | error after |\n|---|---|---|---|---|---|")
    text = f"--calibration.source file:{source} --calibration.windows {arguments.windows} --calibration.length {LENGTH}"
    text += f" --evaluation.source file:{measured[0]} --evaluation.windows 16"
    base = (
        f"--model {folder}/model --preset fast --pattern dense --batch 64 --export false --cut.experts {arguments.experts} {text}"
    )
    for score, variant in itertools.product(arguments.scores.split(","), arguments.variants.split(",")):
        rows = []
        for seed in arguments.seeds.split(","):
            run = runs / "-".join(["other" if arguments.calibrate_on_other else "own", score, variant.replace(" ", "-"), seed])
            words = (
                f"{base} {VARIANTS[variant]} --cut.score {score} --calibration.seed {seed} {arguments.settings} --output {run}"
            )
            if not (run / "report.json").exists() and prune(shlex.split(words)):
                raise SystemExit(f"no result: {words}")
            found = losses(run, measured, arguments.windows)
            blocks = json.loads((run / "left_out.json").read_text())["experts"]["blocks"]
            errors = [np.mean([block[name] or math.nan for block in blocks]) for name in ("error_before", "error_after")]
            rows.append(
                [*(f"{after - before:+.4f}" for after, before in zip(found, dense)), *(f"{error:.1%}" for error in errors)]
            )
        print(f"| {score} | {variant} | {' | '.join(', '.join(cells) for cells in zip(*rows))} |", flush=True)


def write_halves(text: Path, folder: Path) -> tuple[Path, Path]:
    """The two halves of a text, as files of documents."""
    lines = text.read_text("utf-8").split("\n\n")
    paths = folder / "first_half.jsonl", folder / "second_half.jsonl"
    for path, part in zip(paths, (lines[: len(lines) // 2], lines[len(lines) // 2 :])):
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in part if each.strip()), "utf-8")
    return paths


def losses(model: Path, texts: Sequence[Path], windows: int) -> list[float]:
    """The loss of a model on the first windows of each text."""
    opened = open_evaluated(str(model), make_mesh("1x1"), None, 64).model
    tokenizer, found = load_tokenizer(opened.pretrained), []
    for path in texts:
        documents = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
        found.append(math.log(perplexity(opened.decoder, joined(tokenizer, documents)[:windows].astype(np.int32))))
    return found


if __name__ == "__main__":
    main()
