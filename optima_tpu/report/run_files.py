"""Page section on a run's files, and on how to load the pruned model."""

import json
from pathlib import PurePath

from optima_tpu.report.facts import running, size, sizes
from optima_tpu.report.run_directory import FILES, shown
from optima_tpu.report.runs import FinishedRun
from optima_tpu.report.view import NONE, Section, Table, command, commands
from optima_tpu.runtime.buckets import in_bucket
from optima_tpu.runtime.files import entries_on_disk

_ALWAYS = ("report.json", "report.html")
"""Files that are written after the sizes are recorded."""

_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))"""


def run_files(run: FinishedRun) -> Section:
    """Section on the files in the directory of one run."""
    report, directory, remote = run.report, run.directory, in_bucket(run.directory)
    recorded = report.sizes.left
    names = {*recorded, *_ALWAYS, *(path.name for path in entries_on_disk(directory))}
    rows = [
        [shown(name), file.words, size(recorded[name]) if recorded.get(name) else NONE]
        for name, file in FILES.items()
        if name in names
    ]
    rows += [[name, "not a file of this run: something else put it here", NONE] for name in sorted(names - FILES.keys())]
    text: list = [f"Sizes: {sizes(report)}."]
    exported = "hf" in {PurePath(path).name for path in report.files.values()}
    if not exported:
        again = command("export", str(directory), str(directory / "hf"))
        text.append(commands(f"The run did not write a folder for transformers. `{again}` writes one from checkpoint/."))
    elif remote:
        text.append(f"Copy {directory / 'hf'} to this machine first: transformers does not read buckets.")
    text.append(f"transformers loads the pruned model like any other model. {running(report)}")
    folder = json.dumps("hf" if remote else str(directory / "hf"), ensure_ascii=False)
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
