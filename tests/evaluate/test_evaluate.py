"""The command line of an evaluation: models, tasks, record, refusals."""

import contextlib
import errno
import functools
import io
import json
import math
import re
import shutil
import signal
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest

import optima_tpu
from optima_tpu.errors import UserError
from optima_tpu.evaluate import run as evaluation
from optima_tpu.evaluate import tasks as evaluate_tasks
from optima_tpu.evaluate.__main__ import main
from optima_tpu.evaluate.config import EvaluateConfig, parse
from optima_tpu.evaluate.perplexity import perplexity_of
from optima_tpu.evaluate.table import task_table
from optima_tpu.evaluate.task_settings import Asking
from optima_tpu.evaluate.tasks import PAPER, load_tasks, paper_average, run_tasks
from optima_tpu.report.evaluation import TaskResult
from optima_tpu.report.run_record import default_folder
from optima_tpu.runtime import checksums, signals
from tests.support.processes import at_once, free_port, python, without_gloo
from tests.support.records import put_json
from tests.support.runs import only_error, snapshot
from tests.support.tiny_models import tiny_folder

pytestmark = pytest.mark.usefixtures("one_device", "own_tasks_only")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/choice.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
- {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
WRITING = CHOICE.replace("multiple_choice", "generate_until").replace("doc_to_choice", "description")
SAMPLE = "{question: a, choices: [b], answer: 0}"
OTHERS = {
    "tiny_group": "group: tiny_group\ntask: [tiny_choice]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
    "tiny_gone": "group: tiny_gone\ntask: [tiny_missing]\n",
    "tiny_writing": WRITING.replace("tiny_choice", "tiny_writing") + "generation_kwargs: {do_sample: true, temperature: 0.7}\n",
    "tiny_empty": ROLLING.replace("tiny_rolling", "tiny_empty").replace("rolling.jsonl", "empty.jsonl"),
    "tiny_missing": ROLLING.replace("tiny_rolling", "tiny_missing").replace("rolling.jsonl", "missing.jsonl"),
    "tiny_fields": ROLLING.replace("tiny_rolling", "tiny_fields").replace("{{text}}", "{{txet.upper()}}"),
    "tiny_unasked": CHOICE.replace("tiny_choice", "tiny_unasked").replace("choice.jsonl", "unasked.jsonl"),
    "tiny_nothing": CHOICE.replace("tiny_choice", "tiny_nothing").replace("choice.jsonl", "nothing.jsonl"),
    "tiny_late": CHOICE.replace("tiny_choice", "tiny_late") + "process_results: !function late.results\n",
    "tiny_nltk": WRITING.replace("tiny_choice", "tiny_nltk")
    + "generation_kwargs: {max_gen_toks: 8}\nprocess_results: !function late.sentences\n",
    "tiny_hub": ROLLING.replace("tiny_rolling", "tiny_hub").replace("path: json", "path: no-such-owner/no-such-set"),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)

    def word():
        return "".join(rng.choice(list("abcdefgh"), rng.integers(1, 9)))

    def write(name, records):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def question():
        return {"question": f"{word()} {word()}?", "choices": [word() for _ in range(3)], "answer": int(rng.integers(0, 3))}

    write("choice.jsonl", [question() for _ in range(30)])
    write("rolling.jsonl", [{"text": " ".join(word() for _ in range(size))} for size in (3, 60)])
    write("empty.jsonl", [{"text": "a"}, {"text": ""}])
    document = {"question": "a?", "choices": ["b", "c"], "answer": "b"}
    for name, choices in (("unasked", None), ("nothing", [])):
        write(f"{name}.jsonl", [document, document | {"choices": choices}])
    (folder / "late.py").write_text(
        "def results(document, likelihoods):\n    return {'acc': document['level']}\n"
        "def sentences(document, answers):\n    raise LookupError(\"not found: >>> nltk.download('punkt_tab')\")\n"
    )
    for name, text in {"tiny_choice": CHOICE, "tiny_rolling": ROLLING, **OTHERS}.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return path


@pytest.fixture(scope="module")
def evaluated(finished, tasks, text, tmp_path_factory):
    """(record, harness's own results, printed text, directory).

    The command line evaluates the finished run against its dense model.
    """
    out, printed = tmp_path_factory.mktemp("evaluated"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        words = [str(finished.directory), "--against", str(finished.model), "--perplexity", f"file:{text}"]
        words += ["--length", "64", "--tasks", "tiny_group,tiny_rolling", "--include_path", str(tasks), "--output", str(out)]
        assert main(words) == 0
    record, harness = (json.loads((out / name).read_text()) for name in ("evaluation.json", "lm_eval.json"))
    return record, harness, printed.getvalue(), out


def test_the_record_has_the_harness_results_the_perplexities_and_the_distance(evaluated, finished, text):
    record, harness, printed, _ = evaluated
    assert record["model"] == str(finished.directory) and record["against"] == str(finished.model)
    described = {"model", "against", "evaluated", "configuration", "environment"}
    assert record.keys() == described | {"perplexity", "distance", "tasks", "average"}
    report = json.loads((finished.directory / "report.json").read_text())
    of, against = record["evaluated"]["model"], record["evaluated"]["against"]
    assert of["manifest"] == report["manifest"] and against == {"fingerprint": report["model"]["fingerprint"], "manifest": None}
    measured = record["perplexity"][f"file:{text}"]
    assert measured["tokens"] == 14 * 64 and measured["perplexity"] > 1 and measured["against"] > 1
    assert "14 consecutive windows of 64 tokens" in measured["how"]
    apart = record["distance"][f"file:{text}"]
    assert apart["tokens"] == 14 * 63 and 0 < apart["kl_stderr"] < apart["kl"] and 0 < apart["agreement"] < 1
    assert len(apart["hidden_errors"]) == 3 and apart["kls"] is None
    assert record["tasks"].keys() == {"tiny_group", "tiny_rolling"} and record["average"] is None
    group, own = record["tasks"]["tiny_group"], harness["results"]["tiny_group"]
    assert group["metrics"] == {"acc": own["acc,none"], "acc_stderr": own["acc_stderr,none"]} and group["documents"] == 30
    assert group["against"].keys() == {"acc", "acc_stderr"}
    rolling = record["tasks"]["tiny_rolling"]["metrics"]
    assert rolling["byte_perplexity"] == harness["results"]["tiny_rolling"]["byte_perplexity,none"]
    assert rolling["byte_perplexity_stderr"] is None
    assert harness["n-samples"]["tiny_choice"] == {"original": 30, "effective": 30}
    for words in ("both models on file:", "KL divergence", "model: 90 continuations in 90 texts", "±", str(finished.model)):
        assert words in printed, printed


def test_the_tasks_agree_with_the_harness_on_transformers(evaluated, finished, tasks):
    pytest.importorskip("torch")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    chosen = TaskManager(include_path=str(tasks), include_defaults=False).load(["tiny_group", "tiny_rolling"])
    theirs = evaluate(HFLM(str(finished.directory / "hf"), device="cpu", dtype="float32", batch_size=16), chosen)["results"]
    ours = evaluated[1]["results"]
    assert ours["tiny_choice"] == theirs["tiny_choice"] and ours["tiny_group"] == theirs["tiny_group"]
    assert ours["tiny_rolling"]["byte_perplexity,none"] == pytest.approx(theirs["tiny_rolling"]["byte_perplexity,none"], rel=1e-5)


def test_every_form_of_a_run_is_the_same_model_on_every_mesh(evaluated, finished, tasks, text, tmp_path):
    expected = evaluated[0]
    optima_tpu.load(finished.directory).export(tmp_path / "packed", form="packed")
    forms = [(finished.directory / "checkpoint", ["--mesh", "2x4"]), (finished.directory / "hf", []), (tmp_path / "packed", [])]
    measured = []
    for number, (model, mesh) in enumerate(forms):
        out = tmp_path / str(number)
        words = [str(model), *mesh, "--perplexity", f"file:{text}", "--length", "64", "--tasks", "tiny_choice"]
        words += ["--include_path", str(tasks), "--output", str(out)]
        assert main(words) == 0
        record = json.loads((out / "evaluation.json").read_text())
        assert record["tasks"]["tiny_choice"]["metrics"]["acc"] == expected["tasks"]["tiny_group"]["metrics"]["acc"]
        measured.append(record["perplexity"][f"file:{text}"]["perplexity"])
    assert measured == pytest.approx([expected["perplexity"][f"file:{text}"]["perplexity"]] * 3, rel=1e-5)
    assert measured[1] == measured[2]  # the same weights on the same mesh


def test_the_tasks_of_the_other_model_are_taken_from_an_earlier_evaluation(evaluated, finished, tasks, tmp_path, capsys):
    def again(*arguments):
        words = [str(finished.directory / "hf"), "--against", str(finished.model), "--tasks", "tiny_group,tiny_rolling"]
        words += ["--include_path", str(tasks), "--output", str(tmp_path / "out"), *arguments]
        return main(words)

    earlier = evaluated[3]
    assert again("--against_results", str(earlier)) == 0
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "out" / "evaluation.json").read_text())
    now, before = ({task: numbers["against"] for task, numbers in each["tasks"].items()} for each in (record, evaluated[0]))
    assert now == before
    assert f"{finished.model} from {earlier}" in printed and "against: " not in printed
    own, kept = (json.loads((folder / "lm_eval_against.json").read_text()) for folder in (tmp_path / "out", earlier))
    assert own == kept
    # And not where they would be others.
    (tmp_path / "pruned").mkdir()
    shutil.copy(earlier / "lm_eval.json", tmp_path / "pruned")
    for name, text in (("damaged", "{}"), ("another", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lm_eval.json").write_text(text)
    changes = {
        "no group": lambda saved: saved["results"].pop("tiny_group"),
        "old": lambda saved: saved.update(lm_eval_version="0"),
        "longer": lambda saved: saved["n-samples"]["tiny_choice"].update(original=31),
    }
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        change(saved := json.loads((earlier / "lm_eval_against.json").read_text()))
        (tmp_path / name / "lm_eval_against.json").write_text(json.dumps(saved))
    for arguments, expected in (
        (["--against_results", str(tmp_path)], "which has no lm_eval.json"),
        (["--against_results", str(tmp_path / "no group")], "results of tiny_group, got none of them"),
        (["--against_results", str(tmp_path / "old")], "got another lm-eval: 0 in that evaluation"),
        (["--against_results", str(tmp_path / "longer")], "documents of task tiny_choice: 31 in that evaluation, 30 here"),
        (["--against_results", str(tmp_path / "damaged")], "lm_eval.json: expected a value for config, got none"),
        (["--against_results", str(tmp_path / "another")], "lm_eval.json: expected object, got array"),
        (["--against_results", str(tmp_path / "pruned")], f"with results of {finished.directory} (other weights"),
        (["--against_results", str(earlier), "--limit", "5"], "number of documents: None in that evaluation, 5 here"),
        (["--against_results", str(earlier), "--context", "64"], "got another context: 128 in that evaluation, 64 here"),
        (["--against_results", str(earlier), "--fewshot", "1"], "got other settings of task tiny_choice"),
        (["--against_results", str(earlier), "--system_instruction", "Hi."], "system instruction: None in that evaluation, Hi."),
        (["--against_results", str(earlier), "--tasks", "tiny_choice,tiny_empty"], "results of tiny_empty, got none of them"),
    ):
        assert again(*arguments) == 2
        assert expected in (captured := capsys.readouterr()).err + captured.out


def test_an_evaluation_replaces_the_results_of_an_earlier_one_and_another_s_only_by_force(finished, text, tmp_path, capsys):
    words = [str(finished.directory), "--perplexity", f"file:{text}", "--length", "64", "--windows", "1"]
    words += ["--output", str(tmp_path)]
    for name in ("lm_eval.json", "lm_eval_against.json"):
        (tmp_path / name).write_text("{}")
    before = snapshot(tmp_path)
    assert main(words) == 2 and snapshot(tmp_path) == before
    assert "which holds another lm_eval.json: choose another, or add --force true" in only_error(capsys.readouterr().err)
    assert main([*words, "--force", "true"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "sha256-all.json"]
    (tmp_path / "lm_eval.json").write_text("{}")  # as of an evaluation with tasks
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "sha256-all.json"]


def test_what_was_stopped_goes_on_behind_what_it_had_measured(evaluated, finished, tasks, text, tmp_path, monkeypatch, capsys):
    """The evaluation stops between the tasks of the two models.

    Other text, tasks or settings are measured from the first part on.
    """
    (tmp_path / "tasks").mkdir()
    for path in tasks.iterdir():
        (tmp_path / "tasks" / path.name).write_text(path.read_text())
    (tmp_path / "text.txt").write_text(text.read_text())
    words = [str(finished.directory), "--against", str(finished.model), "--perplexity"]
    words += [f"file:{tmp_path / 'text.txt'}", "--length", "64", "--tasks", "tiny_group,tiny_rolling"]
    words += ["--include_path", str(tmp_path / "tasks"), "--output", str(tmp_path / "out")]
    original = evaluation.run_tasks

    def stop_at_second(*given):
        if calls:
            raise signals.Stopped(signal.SIGTERM)
        calls.append(1)
        return original(*given)

    def stopped(*more):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "run_tasks", stop_at_second)
            assert main([*words, *more]) == signals.RESUME
        printed = capsys.readouterr()
        assert "the same command goes on" in printed.err
        return printed.out.count("measured before this evaluation was stopped")

    calls: list[int] = []
    assert stopped() == 0 and (tmp_path / "out/evaluation-parts.json").exists()
    assert stopped("--batch", "2") == 0  # another order of sums
    (tmp_path / "text.txt").write_text("another text. " * 60)
    assert stopped("--batch", "2") == 0
    (tmp_path / "text.txt").write_text(text.read_text())
    assert stopped() == 0
    choice = tmp_path / "tasks/tiny_choice.yaml"
    choice.write_text(choice.read_text().replace("{{question}}", "Q: {{question}}"))
    assert stopped() == 1  # the text alone
    choice.write_text((tasks / "tiny_choice.yaml").read_text())
    assert main(words) == 0
    output = capsys.readouterr().out
    assert f"file:{tmp_path / 'text.txt'}: measured before" in output and "tasks of model: measured before" in output
    results = {"evaluation.json", "lm_eval.json", "lm_eval_against.json", "sha256-all.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == results
    assert checksums.damage(tmp_path / "out") == ""
    record, expected = json.loads((tmp_path / "out/evaluation.json").read_text()), evaluated[0]
    assert record["tasks"] == expected["tasks"]
    for kind in ("perplexity", "distance"):
        (own,), (theirs,) = record[kind].values(), expected[kind].values()
        assert {**own, "how": ""} == {**theirs, "how": ""}


@pytest.mark.parametrize(
    "words", [[], pytest.param(["--against"], marks=pytest.mark.slow), ["--against", "--per-block"]], ids=" ".join
)
def test_the_progress_counts_every_step_that_is_taken(words, finished, text, tmp_path, monkeypatch):
    class Counts(evaluation.Progress):
        def end_stage(self):
            counts.append((self._done, self._total))
            super().end_stage()

    counts: list[tuple[int, int]] = []
    monkeypatch.setattr(evaluation, "Progress", Counts)
    values = {"--against": str(finished.model), "--per-block": "true"}
    given = [each for word in words for each in (word, values[word])]
    sizes = ["--length", "64", "--batch", "1", "--mesh", "4x2", "--output", str(tmp_path)]
    assert main([str(finished.directory), *given, "--perplexity", f"file:{text}", *sizes]) == 0
    # 3 blocks; the head reads 14 windows, 4 at a time, after the last block or after every block.
    taken = 3 + 4 * (3 if "--per-block" in words else 1)
    assert set(counts) == {(0, 0), (taken, taken)}


def test_a_text_or_a_model_behind_which_no_number_means_anything_is_named(tmp_path, capsys):
    """Norms of 0 make all tokens equally likely; one text is one letter."""
    norms = lambda arrays: [array.fill(0) for name, array in arrays.items() if "norm" in name]  # noqa: E731
    model = tiny_folder(tmp_path / "model", change=norms, num_hidden_layers=1)
    (tmp_path / "a.txt").write_text("a" * 4000)
    words = ["--perplexity", f"file:{tmp_path / 'a.txt'},random", "--windows", "4", "--length", "64"]
    for against, named in (([], "model"), (["--against", str(model)], "model of --against")):
        assert main([str(model), *words, *against, "--output", str(tmp_path / "out")]) == 0
        greeting, _, rest = capsys.readouterr().out.partition(" on file:")
        poor = f"the file:{tmp_path / 'a.txt'} text is hardly more than one token again and again"
        assert f"unusual      {poor}" in greeting and f"unusual     {poor}" in rest and "another text by --perplexity" in rest
        assert rest.count(f"the {named} does not predict the evaluation text (perplexity 258") == 1  # no stage is behind it
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["perplexity"][f"file:{tmp_path / 'a.txt'}"]["unigram_perplexity"] == 1.0


def test_the_page_of_a_run_shows_what_was_evaluated_of_it(finished, text, tmp_path, capsys):
    run, page = tmp_path / "run", tmp_path / "run" / "report.html"
    shutil.copytree(finished.directory, run)
    shutil.copytree(run / "hf", tmp_path / "elsewhere")
    dense, export = f"{finished.model.parent}/./{finished.model.name}", str(tmp_path / "elsewhere")
    for models, shown, other in (
        ([dense], False, None),
        ([export], True, None),
        ([run, "--against", dense], True, "dense"),
        ([run, "--against", export], True, export),
    ):
        words = ["--perplexity", f"file:{text}", "--length", "64", "--windows", "2", "--output", str(run)]
        assert main([*map(str, models), *words]) == 0
        printed, drawn = capsys.readouterr().out, page.read_text()
        assert ("file:text.txt" in drawn) == shown
        assert (f"report.html does not show this evaluation: {models[0]} was not made by" in printed) == (not shown)
        assert [name for name in ("dense", export) if f"Divergence from {name}<" in drawn] == ([other] if other else [])


def test_the_exports_of_two_runs_are_recorded_apart(tmp_path):
    folders = [tmp_path / name / "hf" for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder.parent / "run.json").write_text("{}")
    for models in (
        folders,
        [folder / "model.gguf" for folder in folders],
        [tmp_path / name / "model.gguf" for name in ("one", "two")],
    ):
        assert [str(default_folder("evaluate", str(model))) for model in models] == ["runs/evaluate-one", "runs/evaluate-two"]
    assert str(default_folder("evaluate", "org/name@main")) == "runs/evaluate-name"


def test_files_stand_in_for_the_data_set_of_a_task(finished, tasks, tmp_path):
    """The task's data set is on the hub; one of its three splits is a file."""
    yaml = tmp_path / "tasks" / "far.yaml"
    yaml.parent.mkdir()
    yaml.write_text(
        CHOICE.replace("tiny_choice", "far").replace(
            "path: json", "path: no-such-owner/no-such-set\ndataset_name: none\ntraining_split: train\ntest_split: test"
        )
    )
    (tmp_path / "data").mkdir()
    shutil.copy(tasks / "choice.jsonl", tmp_path / "data" / "validation.jsonl")
    words = [str(finished.directory), "--tasks", "far", "--include_path", str(yaml.parent), "--data", f"far={tmp_path / 'data'}"]
    words += ["--limit", "7", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["tasks"]["far"]["documents"] == 7


@pytest.mark.parametrize(
    "named, files, message",
    [
        ("training_split: train\ntest_split: test", "validation", "expected train.jsonl in {}"),
        ("training_split: train\ntest_split: test", "validation,test", "drawn from validation; add the file"),
        ("training_split: train\ntest_split: test", "train,validation", None),
        ("training_split: train\nfewshot_split: dev", "validation", "expected dev.jsonl or train.jsonl in {}"),
        ("training_split: train\nfewshot_split: dev", "validation,train", None),
        ("training_split: train\nfewshot_split: dev", "validation,dev", None),
        ("test_split: test", "validation", "expected test.jsonl in {}"),
        ("test_split: test", "test", "expected validation.jsonl in {}"),
        ("fewshot_split: validation\ntest_split: test", "test,validation", None),
        (f"fewshot_config: {{samples: [{SAMPLE}, {SAMPLE}]}}", "validation", None),
        ("", "validation", None),
    ],
)  # as the task's file has it
def test_files_of_a_data_set_hold_the_examples_before_a_question(named, files, message, tasks, tmp_path):
    """Without them the harness draws examples from the scored documents."""
    (tmp_path / "far.yaml").write_text(CHOICE.replace("tiny_choice", "far").replace("path: json", f"path: no/such\n{named}"))
    folder = tmp_path / "data"
    folder.mkdir()
    for split in files.split(","):
        shutil.copy(tasks / "choice.jsonl", folder / f"{split}.jsonl")
    load_tasks(["far"], None, Asking(fewshot=0), str(tmp_path), {"far": folder})
    with contextlib.nullcontext() if message is None else pytest.raises(UserError) as refusal:
        load_tasks(["far"], None, Asking(fewshot=1), str(tmp_path), {"far": folder})
    if message is not None:
        assert message.format(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_every_model_sees_the_same_examples_before_a_question(tasks):
    class Asked:
        rank, world_size, max_length = 0, 1, 9

        def loglikelihood(self, requests):
            self.texts = [request.args for request in requests]
            return [(0.0, False)] * len(requests)

    loaded, models = load_tasks(["tiny_choice"], None, Asking(fewshot=3), str(tasks)), (Asked(), Asked())
    for model in models:
        run_tasks(model, loaded)
    assert models[0].texts == models[1].texts and models[0].texts[0][0].count("?") == 4


@pytest.fixture
def refused(capfd, tmp_path, tasks):
    """Runs the command line; returns the line that it is refused with."""

    def run(*arguments, output=tmp_path / "out"):
        own = ["--include_path", str(tasks)] if "--tasks" in arguments else []
        assert main([*map(str, arguments), *own, "--output", str(output)]) == 2
        message = only_error(capfd.readouterr().err)
        assert not list(output.glob("*"))
        return message

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks", "tiny_chioce"], "expected tasks of the harness, got 'tiny_chioce'; did you mean tiny_choice"),
        (["--tasks", "tiny_missing"], "the data set of task tiny_missing is not on this machine and can't be downloaded ("),
        (["--tasks", "tiny_missing"], "with a network, or give the data as files with --data tiny_missing=FOLDER"),
        (["--tasks", "tiny_gone"], "or give the data as files with --data: give --tasks the group's single"),
        (["--tasks", "tiny_fields"], "task tiny_fields can't be made from its data (UndefinedError: 'txet' is undefined)"),
        (["--tasks", "tiny_writing"], "tiny_writing: expected answers of the most likely tokens, got do_sample True"),
        (["--tasks", "tiny_writing", "--gen_kwargs", "do_sample=false,num_beams=2"], "do_sample, max_gen_toks, min_p, temp"),
        (["--tasks", "tiny_writing", "--gen_kwargs", "do_sample=false,max_gen_toks=0"], "max_gen_toks of at least 1, got 0"),
        (["--tasks", "tiny_writing", "--gen_kwargs", "do_sample=false,until=3"], "expected settings of written answers, got {"),
        (["--tasks", "tiny_writing", "--gen_kwargs", "do_sample=false"], "up to 256 tokens, expected fewer than the 128"),
        (["--tasks", "tiny_choice", "--gen_kwargs", "until=a"], "--gen_kwargs for tasks in which the model writes (none)"),
        (["--tasks", "tiny_nltk"], "task tiny_nltk needs NLTK's punkt_tab, which is not on this machine: on a machine with a"),
        (["--tasks", "tiny_choice", "--apply_chat_template", "true"], "with a tokenizer that has a chat template, got none in"),
        (["--tasks", "tiny_choice", "--fewshot_as_multiturn", "true"], "for a chat (none), got True: give --apply_chat_template"),
        (["--tasks", "tiny_empty"], "document 1 of task tiny_empty: expected a text to score, got an empty document"),
        (["--tasks", "tiny_unasked"], "task tiny_unasked can't be made from its data (TypeError: "),
        (["--tasks", "tiny_nothing"], "document 1 of task tiny_nothing: expected a text to score, got no choices; correct"),
        (["--tasks", "tiny_late"], "task tiny_late can't be scored on its data (KeyError: 'level')"),
        (["--tasks", "tiny_choice", "--fewshot", "30"], "drawn from 30 documents, got 30: give a smaller --fewshot"),
        (["--tasks", "tiny_choice", "--context", "129"], "expected --context of at most 128, the model's context, got 129"),
        (["--tasks", "tiny_choice", "--data", "tiny_choice=/no"], "tiny_choice=FOLDER with an existing folder, got /no"),
        (["--tasks", "tiny_group", "--data", "tiny_group=/"], "give --tasks the group's single tasks, each with a --data"),
        (["--data", "tiny_choice=/tmp"], "expected --data for tasks in --tasks (none), got it for tiny_choice"),
        (["--include_path", "/tmp"], "expected --include_path for tasks that are run (none), got /tmp: give --tasks too"),
        (["--limit", "5"], "expected --limit for tasks that are run (none), got 5"),
        (["--fewshot", "0"], "expected --fewshot for tasks that are run (none), got 0"),
        (["--context", "64"], "expected --context for tasks that are run (none), got 64"),
        (["--tasks", "tiny_choice", "--length", "64"], "--length for texts that perplexity is measured on (none), got 64"),
        (["--tasks", "tiny_choice", "--windows", "2"], "--windows for texts that perplexity is measured on (none), got 2"),
        (["--tasks", "tiny_choice", "--bos", "text"], "expected --bos for texts that perplexity is measured on (none), got text"),
        (["--tasks", "tiny_choice", "--against_results", "x"], "expected --against_results for tasks that are compared (none)"),
        (["--per-block", "true"], "expected --per_block for a distance that is measured (none), got True: give --against"),
        (["--tasks", "tiny_choice", "--against", "x", "--per-block", "true"], "--per_block for a distance that is measured"),
        (["--perplexity", "random", "--length", "129"], "expected --length of at most 128, the model's context, got 129"),
        (["--perplexity", "file:/nowhere.txt", "--length", "64"], "expected a text file, but /nowhere.txt does not exist"),
        (["--perplexity", "wikitext3"], "expected a text source (pydoc, c4, wikitext2, random, self, file:PATH"),
        (["--against", "wheel:no-such-model"], "the package 'no-such-model' is not installed"),
        (["--mesh", "2x2"], "mesh 2x2 needs 4 devices, there are 8 (cpu)"),
        (["--taks", "piqa"], "there is no setting --taks; did you mean --tasks"),
        (["--solver.damping", "0.1"], "there is no setting --solver.damping"),
        (["--limit", "few"], "expected limit to be a whole number or null, got few"),
        (["--limit", "0"], "expected limit of at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_one_line(finished, refused, arguments, expected):
    assert expected in refused(finished.model, *arguments)


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(finished, refused, text, tmp_path, monkeypatch):
    def full(dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(evaluation, "perplexity", None)
    message = refused(finished.directory, "--perplexity", f"file:{text}", "--length", 32, "--output", tmp_path / "out")
    assert f"could not write {tmp_path / 'out'}: Permission denied; choose another --output" in message


def test_a_perplexity_beyond_all_numbers_is_the_largest():
    assert perplexity_of(np.full(2, 1e6), np.zeros((2, 5))) == math.exp(709)


def test_a_text_that_a_model_was_calibrated_on_is_refused(finished, refused, text, tmp_path, monkeypatch):
    """The text is refused under whatever name it comes.

    A calibration text that is not on this machine is never the same text.
    """
    run, link = tmp_path / "run", tmp_path / "link.txt"
    shutil.copytree(finished.directory, run)
    link.symlink_to(text)
    record = json.loads((run / "run.json").read_text())

    def calibrated(source):
        record["configuration"]["calibration"]["source"] = source
        put_json(run / "run.json", record)

    for number, models in enumerate([[run], [run / "checkpoint"], [run / "hf"], [finished.model, "--against", run]]):
        calibrated(f"tfds:gone@/nowhere:0.5,file:{text}:0.5" if number == 1 else f"file:{text}")
        line = refused(*models, "--perplexity", f"random,file:{link}", "--length", "32", output=tmp_path / str(number))
        assert f"expected --perplexity with a text that {models[-1]} was not calibrated on, got file:{link} (calibrated " in line

    def measured(*given, **options):
        raise UserError("measured")

    monkeypatch.setattr(evaluation, "perplexity", measured)
    for source in ("tfds:gone@/nowhere", "file:/nowhere.txt", "self"):
        calibrated(source)
        assert "measured" in refused(run, "--perplexity", f"file:{link}", "--length", "32")


def test_a_model_that_is_none(finished, refused, tmp_path):
    assert f"no such path: '{tmp_path / 'nowhere'}'" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert f"folder (config.json), got {tmp_path / 'empty'}, which is none of them" in refused(tmp_path / "empty")
    assert "expected the model before everything else, got --tasks" in refused("--tasks", "piqa")
    run = tmp_path / "run"
    shutil.copytree(finished.directory, run)
    (run / "checkpoint" / "state" / "manifest.ocdbt").write_bytes(b"nothing")
    message = refused(run, "--perplexity", "random", "--length", "32")
    assert f"{run / 'checkpoint'} is damaged (state/manifest.ocdbt has 7 bytes" in message
    (run / "checkpoint" / "_CHECKPOINT_METADATA").write_text("{")
    assert f"{run / 'checkpoint'} is damaged" in refused(run)
    shutil.copytree(finished.directory / "checkpoint", tmp_path / "alone")
    assert "expected an Orbax checkpoint named checkpoint in its run directory" in refused(tmp_path / "alone")
    shutil.rmtree(run / "checkpoint")
    assert f"expected a run with its pruned model, got {run}, which holds the report alone" in refused(run)
    (run / "report.json").unlink()
    message = f"expected a finished run, got {run}, which has no checkpoint yet; to finish it, repeat "
    assert re.search(re.escape(message) + r"\S.* --model \S+", refused(run))
    (run / "run.json").write_text("{")
    assert f"{run / 'run.json'} has 1 bytes where" in refused(run)


def test_a_hub_that_is_not_reached(finished, tasks, tmp_path):
    """In a process without torch: the hub's client reads its setting once."""
    code = (
        "import functools, sys\n"
        "from optima_tpu.evaluate import __main__ as command\n"
        "import optima_tpu.evaluate.tasks as module\n"
        "module.TaskManager = functools.partial(module.TaskManager, include_defaults=False)\n"
        "for task in ('tiny_rolling', 'tiny_hub'):\n"
        "    status = command.main([*sys.argv[1:], '--tasks', task])\n"
        "sys.exit(status)"
    )
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "TQDM_DISABLE": "1"}
    result = python("-c", code, finished.model, "--include_path", tasks, "--output", tmp_path / "out", **hub)
    assert result.returncode == 2, result.stderr
    assert "the data set of task tiny_hub is not on this machine" in only_error(result.stderr)
    assert "byte_perplexity" in result.stdout


@pytest.mark.slow
def test_two_processes_measure_what_one_does(evaluated, finished, tasks, text, tmp_path):
    """Process 0 reads and prints; an error ends both and is printed once."""

    def run(tested):
        command = ["-m", "optima_tpu.evaluate", str(finished.directory), "--perplexity", f"file:{text}", "--length", "64"]
        command += ["--tasks", tested, "--include_path", str(tasks), "--output", str(tmp_path / "out"), "--cpu-devices", "4"]
        command += ["--mesh", "4x2", "--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
        return at_once([*command, number] for number in range(2))

    (first, printed, _), (second, other, _) = run("tiny_group,tiny_rolling")
    assert (first, second) == (0, 0) and "byte_perplexity" in printed
    assert without_gloo(other) == []
    record, expected = json.loads((tmp_path / "out" / "evaluation.json").read_text()), evaluated[0]
    assert record["tasks"]["tiny_group"]["metrics"]["acc"] == expected["tasks"]["tiny_group"]["metrics"]["acc"]
    for path in (("tasks", "tiny_rolling", "metrics", "byte_perplexity"), ("perplexity", f"file:{text}", "perplexity")):
        actual, wanted = (functools.reduce(lambda part, key: part[key], path, results) for results in (record, expected))
        assert actual == pytest.approx(wanted, rel=1e-5)
    for task, message in (("tiny_empty", "document 1 of task tiny_empty"), ("tiny_late", "task tiny_late can't be scored")):
        (first, _, error), (second, _, other) = run(task)
        assert (first, second, other) == (2, 2, "") and message in error


def test_the_settings_are_one_dataclass():
    config = parse(["runs/a", "--tasks=piqa, arc_easy", "--cpu-devices", "8", "--data", "piqa=data/piqa"])
    assert config == EvaluateConfig("runs/a", tasks="piqa, arc_easy", cpu_devices=8, data="piqa=data/piqa")
    assert config.task_names == ("piqa", "arc_easy") and config.texts == ()
    assert str(config.folders["piqa"]) == "data/piqa"
    assert EvaluateConfig("runs/a", length=64, bos="text", against="x", per_block=True).texts == ("wikitext2",)
    assert EvaluateConfig("runs/a", tasks="piqa", perplexity="c4", limit=2, fewshot=0, windows=1).texts == ("c4",)


def test_a_metric_that_the_other_model_has_no_number_for_has_no_change():
    scores = TaskResult(4, {"acc": 0.7, "f1": 0.5}, {"acc": 0.6, "f1": None}).scores("piqa")
    *_, against, change = (list(column.cells) for column in task_table(list(scores), compared=True).columns)
    assert against == ["0.6000", "-"] and change == ["+0.100", "-"]


def test_a_metric_that_is_not_finite_is_none_and_one_beyond_all_numbers_is_told(monkeypatch):
    task = SimpleNamespace(task_name="t", set_fewshot_seed=lambda seed: None)
    entry = {"perplexity,none": math.inf, "acc,none": 0.5, "acc_stderr,none": math.nan, "sample_len": 3}
    loaded = {"groups": {}, "tasks": {"t": task}}
    expected = TaskResult(3, {"perplexity": None, "acc": 0.5, "acc_stderr": None}, {})
    assert evaluate_tasks.task_results(loaded, {"results": {"t": entry}}) == {"t": expected}
    monkeypatch.setattr(evaluate_tasks, "evaluate", lambda *args, **options: math.exp(1000))
    with pytest.raises(UserError, match="a perplexity among the tasks is larger than any number of 64 bits"):
        evaluate_tasks.run_tasks(None, loaded)


def test_the_paper_average_is_over_its_six_tasks():
    results = {name: TaskResult(1, {"acc": number / 10}, {}) for number, name in enumerate(PAPER)}
    assert paper_average(results) == pytest.approx(0.25)
    del results["mmlu"]
    assert paper_average(results) is None
