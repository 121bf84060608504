"""What a run prints at its end: what got worse, sizes, files, their use."""

import ast
import dataclasses
import io
import json
import shlex
from pathlib import Path

import pytest
from msgspec import structs
from rich.console import Console

from optima_tpu.config.run_config import EMBEDDED, to_dict
from optima_tpu.evaluate.config import parse as parse_evaluate
from optima_tpu.method.quantization import Int4
from optima_tpu.models.checkpoints.orbax import CheckpointTensors, read_metadata
from optima_tpu.report import summary
from optima_tpu.report.contents import Check, CutCount, FileSizes, Outcome, Perplexities, Report
from optima_tpu.report.distillation import distillation
from optima_tpu.report.facts import size
from optima_tpu.report.file import size_on_disk
from optima_tpu.report.findings import FINDINGS, TRADED, finding_lines, unusual
from optima_tpu.report.page import render, write_page
from optima_tpu.report.records import BlockReport
from optima_tpu.report.run_directory import FILES
from optima_tpu.report.runs import FinishedRun, read_report, read_runs
from optima_tpu.report.view import NONE
from optima_tpu.runtime.records import encoded
from tests.report.test_html_report import Page, drawn, unplotted  # noqa: F401  (a fixture)
from tests.support.fake_reports import ENTRIES, TEXT, layer, layers, report_of, write_run
from tests.support.records import put

DOWN = {"name": "mlp.down_proj"}


def test_every_matrix_that_got_worse_on_held_out_text_is_named_the_worst_first():
    layers = [
        layer(held_out_before=0.136, held_out_after=0.151),
        layer(**DOWN, held_out_before=0.1, held_out_after=0.2),
        layer(name="a", held_out_before=0.1, held_out_after=0.101),  # not above 1%
        layer(name="b", held_out_before=0.1, held_out_after=0.1011),
        layer(name="c", held_out_before=0.2, held_out_after=0.1),
        layer(name="d"),
        layer(name="e", held_out_before=0.0, held_out_after=0.1),
    ]
    assert list(unusual(layers)["worse_on_held_out"].items()) == [
        ("block 0 e", (0.0, 0.1)),
        ("block 0 mlp.down_proj", (0.1, 0.2)),
        ("block 0 self_attn.q_proj", (0.136, 0.151)),
        ("block 0 b", (0.1, 0.1011)),
    ]
    (line,) = finding_lines(FINDINGS, layers)
    for words in ("the error on held-out text", "block 0 self_attn.q_proj (from 13.6% to 15.1%)", "--calibration.windows"):
        assert words in line
    assert finding_lines([TRADED], layers) == []


def test_with_a_dense_target_worse_means_further_from_the_dense_model():
    aiming = layer(held_out_before=0.136, held_out_after=0.151, dense_before=0.3, dense_after=0.2)
    away = structs.replace(aiming, name="mlp.down_proj", dense_after=0.4)
    assert finding_lines(FINDINGS, [aiming]) == finding_lines([TRADED], [away]) == []
    assert unusual([away])["worse_on_held_out"] == {"block 0 mlp.down_proj": (0.3, 0.4)}
    (line,) = finding_lines(FINDINGS, [aiming, away])
    assert "the distance to the dense model's output on held-out text: block 0 mlp.down_proj (from 30.0% to 40.0%)" in line
    (line,) = finding_lines([TRADED], [aiming, away])
    assert line.endswith(": block 0 self_attn.q_proj (from 13.6% to 15.1%; against dense from 30.0% to 20.0%)")


def test_a_refit_is_not_worse_because_it_begins_without_an_error_of_its_own():
    """A refit moves unpruned weights toward the dense model's output."""
    refitted = dict(pruned=0, sparsity=0.0, error_before=0.0, error_after=0.003, held_out_before=0.0, held_out_after=0.004)
    refit = layer(**refitted, dense_before=0.2, dense_after=0.1)
    assert finding_lines([*FINDINGS, TRADED], [refit]) == []
    text = printed(report_of([BlockReport(0, 1.0, (refit,))]))
    assert text.index("to dense    before 20.0%, after the update 10.0%, better") < text.index("error       before 0%, after")
    assert "worse" not in text.partition("error       ")[2].partition("\n")[0]


def test_rows_that_did_not_converge_come_with_a_remedy():
    (line,) = finding_lines(FINDINGS, [layer(rows=8, rows_converged=5)])
    assert line.startswith("rows not converged: block 0 self_attn.q_proj (3 rows); ") and "--solver.max_steps" in line


def printed(report) -> str:
    out = Console(file=io.StringIO(), width=80)
    summary.print_summary(out, report, Path("runs/x"))
    return out.file.getvalue()


def worse_run(directory, **changes) -> Path:
    reports = [structs.replace(each, held_out_after=0.9) if each.block == 1 else each for each in layers(0)]
    return write_run(directory, EMBEDDED.changed(**changes), reports)


def test_what_got_worse_is_on_the_console_the_page_and_in_the_record(tmp_path, unplotted):  # noqa: F811
    run = worse_run(tmp_path / "run")
    report = read_report(str(run))
    assert [after for _, after in report.unusual["worse_on_held_out"].values()] == [0.9] * 7
    text = printed(report)
    assert "unusual     the update raised the error on held-out text: block 1 " in text and "3 more in the report" in text
    assert "unusual     nothing" not in text
    page = drawn(run, to=tmp_path / "x.html")
    assert "The update raised the error on held-out text" in page.sections["unusual"]
    assert len(page.tables["Full list, by layer"]) == 1 + 7 and "Unusual7 layers" in page.words
    fine = drawn(write_run(tmp_path / "fine"), to=tmp_path / "y.html")
    assert "no matrix got worse on held-out text" in fine.sections["unusual"] and "Unusualnothing" in fine.words


def test_the_page_says_what_became_of_a_training():
    outcome = Outcome((Check(0, 0.5, None, 20.0), Check(4, 0.4, 0.45, 18.0)), 4, 512, 21.0)
    settings = to_dict(EMBEDDED) | {"distill": {"name": "kl", "train": "all"}}
    report = report_of((), distillation=outcome, perplexity=Perplexities(12.0, 19.0), configuration=settings)
    (section,) = distillation([FinishedRun("", "run", report, None)])
    assert "the whole model was trained with fixed masks, to lower the divergence from the dense model" in section.text[0]
    (checks,) = section.tables
    assert checks.rows == [["0", NONE, "0.5000", "20.00", ""], ["4", "0.4500", "0.4000", "18.00", "kept"]]


def test_a_recovery_tells_what_it_did_and_names_the_model_that_it_began_from(tmp_path):
    """Findings on layers are left out: a recovery cannot mend the layers."""
    checks = (Check(0, 0.5), Check(4, 0.4))
    report = structs.replace(
        read_report(str(worse_run(tmp_path / "run"))),
        distillation=Outcome(checks, 4, 512, 3.5, 7.0),
        configuration=to_dict(EMBEDDED) | {"recover": {"model": "runs/pruned"}},
    )
    text = printed(report)
    assert text.startswith("from        runs/pruned: its own report has the layers") and "unusual     nothing" in text
    assert "perplexity  dense 2.000, pruned 3.500, trained 3.000, " in text
    assert "(20.0% less); 4 steps on 512 tokens; it took 7 s\n" in text
    assert not any(words in text for words in ("q_proj", "\nerror ", "--accept", "Held out"))


@pytest.mark.parametrize("calibration, evaluation", [(2.0, 3.0), (2.0, 300.0), (900.0, 300.0)])
def test_the_label_of_what_is_unusual_stands_once(tmp_path, calibration, evaluation):
    texts = {"calibration": calibration, "evaluation": evaluation}
    changes = {name: structs.replace(TEXT, unigram_perplexity=value) for name, value in texts.items()}
    lines = printed(structs.replace(read_report(str(worse_run(tmp_path / "run"))), **changes)).splitlines()
    assert sum(line.startswith("unusual ") for line in lines) == 1
    assert sum("hardly more than one token" in line for line in lines) == (calibration < 4) + (evaluation < 4)


def test_the_result_is_at_the_top_of_the_page_and_the_end_of_the_console(tmp_path, unplotted):  # noqa: F811
    run = write_run(tmp_path / "run")
    settings = to_dict(EMBEDDED) | {"evaluation": {"source": "c4"}}
    report = structs.replace(read_report(str(run)), configuration=settings, perplexity=Perplexities(2.0, 5.0))
    put(run / "report.json", encoded(report).decode())
    change = "Perplexity 2.000 {} 5.000: 2.50 times the dense model{}s, worse"
    assert change.format("->", "'") in printed(report).splitlines()[-1] and "`" not in printed(report)
    write_page([run], tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert text.index(change.format("→", "’")) < text.index("<dl") and "OPT-125M" in drawn(run, to=tmp_path / "y.html").words


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (538_060_032, "538 MB"), (16_060_000_000, "16.1 GB")],
)
def test_a_size_has_three_digits_and_a_unit(count, text):
    assert size(count) == text


def test_sizes_are_counted_on_the_disk(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"123")
    (tmp_path / "a" / "d").write_bytes(b"12")
    assert [size_on_disk(tmp_path / name) for name in ("a", "a/d", "missing")] == [5, 2, 0]


SIZES = FileSizes(None, 538_060_032, 538_090_000, {"hf": 555_000_000, "journal": 7_000, "run.lock": 0})


def with_sizes(run: Path, **changes) -> Report:
    changes = {"sizes": SIZES, "files": {"transformers": "elsewhere/hf"}} | changes
    report = structs.replace(read_report(str(run)), **changes)
    put(run / "report.json", encoded(report).decode())
    return report


def test_sizes_and_the_sparsity_of_the_whole_model_are_said(tmp_path, unplotted):  # noqa: F811
    report = with_sizes(write_run(tmp_path / "run"), model=structs.replace(ENTRIES["model"], weights=2100), model_sparsity=0.2)
    text = printed(report)
    assert "sparsity    50.0% of the 840 weights in 21 matrices, 20.0% of all 2,100 weights of the model\n" in text
    why = "not smaller because zeros are stored like other numbers; optima export --packed writes a smaller one and prints its size, a smaller share of bfloat16 (--dtype) than of float32"
    sizes = f"dense weights 538 MB, pruned in hf/ 538 MB, {why}"
    assert f"size        {sizes}\n" in text
    page = drawn(tmp_path / "run", to=tmp_path / "x.html")
    assert sizes in page.sections["outcome"] and "File538 MB → 538 MB" in page.words and "20.0% of all 2,100" in page.words


def test_a_source_of_fewer_bytes_than_its_weights_is_said(tmp_path, unplotted):  # noqa: F811
    """A float32 model may take more bytes than its quantised source."""
    report = with_sizes(write_run(tmp_path / "run"))
    for source, phrase in ((95_000_000, "95.0 MB in the source's files; "), (538_070_000, ""), (None, "")):
        changed = structs.replace(report, sizes=structs.replace(SIZES, source=source))
        assert f"dense weights 538 MB, pruned in hf/ 538 MB, {phrase}not smaller" in printed(changed)


def test_a_quantised_run_names_the_export_that_stores_its_integers(tmp_path, unplotted):  # noqa: F811
    settings = to_dict(EMBEDDED.changed(quantize=Int4()))
    text = printed(with_sizes(write_run(tmp_path / "run"), configuration=settings))
    assert "optima export --format compressed-tensors stores the integers" in text and "--packed" not in text


def test_a_cut_run_with_integers_is_smaller_and_says_which_share_counts_what_left(tmp_path, unplotted):  # noqa: F811
    cut, settings = {"neurons": CutCount((1152,), 1536)}, to_dict(EMBEDDED.changed(quantize=Int4()))
    sizes, weights = structs.replace(SIZES, transformers=458_000_000), structs.replace(ENTRIES["model"], weights=2100)
    changes = {"sizes": sizes, "configuration": settings, "cuts": cut, "removed": 210, "model": weights, "model_sparsity": 0.3}
    text = printed(with_sizes(write_run(tmp_path / "run"), **changes))
    reason = "smaller by what was cut, not by the integers, because it holds integers times scales"
    assert f"size        dense weights 538 MB, pruned in hf/ 458 MB, {reason}" in text and "not smaller" not in text
    shares = (
        "50.0% of the 840 weights in 21 matrices; with the 210 other weights that leave with what was cut, 30.0% of all 2,100"
    )
    assert f"sparsity    {shares} weights of the model\n" in text


def test_the_memory_of_a_resumed_run_is_that_since_the_resume(tmp_path, unplotted):  # noqa: F811
    whole, resumed = (read_report(str(write_run(tmp_path / str(pruning), pruning=pruning))) for pruning in (70.0, 1.0))
    assert " at the peak\n" in printed(whole)
    assert " at the peak since the last resume; earlier peaks were not recorded\n" in printed(resumed)


@pytest.mark.parametrize(
    "left, said, exported",
    [
        ([1152], "1,152", "the exported model is without the others"),
        ([768, 1152], "768 to 1,152", "where blocks differ, the exported model has zeros"),
    ],
    ids=["alike", "different"],
)
def test_parts_that_were_cut_are_counted(tmp_path, left, said, exported, unplotted):  # noqa: F811
    said = f"{said} of 1,536 neurons, 2 of 3 key-value heads in every block ({exported}"
    cuts = {"neurons": CutCount(tuple(left), 1536), "key-value heads": CutCount((2,), 3)}
    text = printed(with_sizes(write_run(tmp_path / "run"), cuts=cuts))
    assert f"\nkept        {said}" in text and "pruned in hf/ 538 MB, what was cut is in no file" in text
    words = drawn(tmp_path / "run", to=tmp_path / "x.html").words
    assert said.replace("block (", "block(") in words and "what was cut is in no file" in words


def test_the_files_of_the_directory_are_explained(tmp_path, unplotted):  # noqa: F811
    run = write_run(tmp_path / "run")
    with_sizes(run)
    rows = {row[0]: row[1:] for row in drawn(run, to=tmp_path / "x.html").tables[f"In {run}"][1:]}
    assert list(rows) == ["report.html", "report.json", "hf/", "journal/", "sha256-all.json", "run.lock"]
    assert rows["hf/"][1] == "555 MB" and rows["run.lock"][1] == "–"


def test_every_name_in_the_directory_is_listed(tmp_path, unplotted):  # noqa: F811
    run = write_run(tmp_path / "run")
    (run / "distillation").mkdir()
    put(run / "<b>notes.txt", "")
    rows = {row[0]: row[1] for row in drawn(run, to=tmp_path / "x.html").tables[f"In {run}"][1:]}
    assert {name.rstrip("/") for name in rows} == {"report.html", *(path.name for path in run.iterdir())}
    assert "not a file of this run" in rows["<b>notes.txt"] and "training" in rows["distillation/"]


def test_a_real_run_leaves_nothing_that_its_page_does_not_explain(finished):
    page = Page((finished.directory / "report.html").read_text())
    listed = {row[0].rstrip("/") for row in page.tables[f"In {finished.directory}"][1:]}
    assert {path.name for path in finished.directory.iterdir()} == listed <= FILES.keys()
    report = json.loads((finished.directory / "report.json").read_text())
    hf = finished.directory / "hf"
    assert report["sizes"]["transformers"] == (hf / "model.safetensors").stat().st_size
    assert 0 <= report["sizes"]["transformers"] - report["sizes"]["dense"] < 20_000  # the header
    assert 0 <= report["sizes"]["source"] - report["sizes"]["dense"] < 20_000
    assert 0 < report["model_sparsity"] < report["sparsity"]
    # No tensor is in two of its Orbax checkpoints, and no hidden states are left.
    folders = [finished.directory / "checkpoint", *(finished.directory / "journal").iterdir()]
    stored = [name for folder in folders for name in read_metadata(folder).metadata["weights"]]
    assert sorted(stored) == list(CheckpointTensors(finished.directory).names()) and "activations" not in listed


@pytest.mark.parametrize("name", ["run", "a run's (folder)"])
def test_commands_and_the_snippet_have_the_paths_of_the_run(name, tmp_path, monkeypatch, unplotted):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    run = write_run(Path(name), dataclasses.replace(EMBEDDED, model="my models/x"))
    with_sizes(run)
    title, runs = read_runs([f"{name}/report.json"])
    page = Page(render(title, runs))
    command = next(line for line in page.sections["outcome"].splitlines() if " --against " in line)
    config = parse_evaluate(shlex.split(command.partition(".evaluate ")[2]))
    assert (config.model, config.against, config.perplexity) == (name, "my models/x", "pydoc")
    snippet = page.sections["left"][page.sections["left"].index("from transformers") :].strip()
    tree = ast.parse(snippet)
    folders = [
        node.value.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    ]
    assert folders == [f"{name}/hf"]
    assert "RUN" not in page.words and "MODEL" not in page.words


def test_without_an_exported_folder_the_command_that_makes_it_is_said(tmp_path, unplotted):  # noqa: F811
    page = drawn(write_run(tmp_path / "run"), to=tmp_path / "x.html")
    assert f"optima_tpu.export {tmp_path}/run {tmp_path}/run/hf" in page.sections["left"]
