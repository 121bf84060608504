"""One flipped bit in any file of a run or an export is repaired or named."""

import collections
import json
import random
import shutil
from pathlib import Path

import pytest

from optima_tpu import export, verify
from optima_tpu.evaluate.__main__ import main as evaluate
from optima_tpu.launch import main
from optima_tpu.pipeline import repair
from optima_tpu.pipeline.repair import verified
from optima_tpu.runtime.checksums import ALL
from tests.support.runs import SMALL, assert_same_weights, only_error, stop_after_the_first_block

DRAWN = ("report.html", "run.lock")
"""Files that nothing reads back."""


def files_of(folder: Path) -> list[Path]:
    """Every file whose bits matter."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size and path.name not in DRAWN)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory) -> Path:
    """The run, stopped after its first block."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after_the_first_block(patch)
        assert main([*finished.arguments, "--output", str(directory)]) == 130
    return directory


@pytest.mark.parametrize("which", ["finished", "stopped", "exported"])
def test_one_bit_in_any_file_is_named(which, finished, stopped, tmp_path, capsys):
    source = {"finished": finished.directory, "stopped": stopped, "exported": finished.directory / "hf"}[which]
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    assert verify.main([str(folder)]) == 0 and "all match" in capsys.readouterr().out
    random.seed(0)
    for path in files_of(folder):
        whole = path.read_bytes()
        flip(path, random.randrange(8 * len(whole)))
        damaged = verified(folder).damaged
        # A bit in a file of checksums may damage one of its entries instead.
        assert list(damaged) == [str(path.relative_to(folder))] or (path.name.startswith("sha256-") and damaged), path
        path.write_bytes(whole)
    path.unlink()
    assert verify.main([str(folder)]) == 1
    assert f"damaged: {path} is missing" in capsys.readouterr().out


@pytest.mark.parametrize("inside", [".", "hf"])
def test_files_that_were_added_to_an_export_are_named(inside, finished, tmp_path, capsys):
    folder = Path(shutil.copytree(finished.directory / ("hf" if inside == "." else "."), tmp_path / "copy"))
    added = [folder / inside / name for name in ("chat_template.jinja", "model-00002-of-00002.safetensors", "more/modeling.py")]
    for path in (*added, folder / inside / ".gitattributes", folder / inside / ".cache/huggingface/one.metadata"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"added")
    assert verify.main([str(folder)]) == 1
    printed = capsys.readouterr().out
    assert all(f"not listed: {path} was added" in printed for path in added) and "all match, 3 not listed" in printed
    assert ".gitattributes" not in printed and ".cache" not in printed


def test_after_damage_verify_says_what_to_type(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished.directory, tmp_path / "run"))
    alone = Path(shutil.copytree(run / "hf", tmp_path / "alone"))
    for folder in (run / "hf", alone):
        flip(folder / "model.safetensors", 999)
    for folder, remedy in (
        (run, "optima_tpu.launch --model "),
        (run / "hf", "optima_tpu.launch --model "),
        (alone, "or export its run to a new one: python -m optima_tpu.export RUN OUT"),
    ):
        assert verify.main([str(folder)]) == 1
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("to mend it: ") and remedy in last


def test_after_damage_to_a_run_of_other_code_verify_does_not_promise_a_mending(finished, tmp_path, monkeypatch, capsys):
    run = Path(shutil.copytree(finished.directory, tmp_path / "run"))
    flip(run / "hf" / "model.safetensors", 999)
    monkeypatch.setattr("optima_tpu.pipeline.repair.code_version", lambda: "another")
    assert "and this is another, which does not go on with it: with that version, " in repair._remedy(run)


def test_a_run_that_mends_a_block_does_not_count_it_as_done(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished.directory, tmp_path / "run"))
    flip(next(path for path in files_of(run / "journal/block_0001") if path.name != ALL), 9)
    assert main([*finished.arguments, "--output", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "resuming     2 of 3 blocks done" in printed and "3 of 3 blocks" not in printed


def test_a_damaged_export_is_named_first_and_nothing_is_measured_again(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished.directory, tmp_path / "run"))
    before = json.loads((run / "report.json").read_text())["seconds"]
    flip(run / "hf/model.safetensors", 999_999)
    assert main([*finished.arguments, "--output", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.index("hf is damaged: ") < printed.index("stages: exporting for transformers, reporting")
    seconds = json.loads((run / "report.json").read_text())["seconds"]
    changed = {stage for stage in before if seconds[stage] != before[stage]}
    assert changed <= {"exporting for transformers", "reporting"} and {"dense perplexity", "pruning"} < seconds.keys()
    assert not verified(run).damaged


def test_a_folder_of_something_else_is_not_verified(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert verify.main([str(folder)]) == 2
        assert "expected a run directory or an exported folder" in capsys.readouterr().err


def test_whatever_is_damaged_at_once_is_made_again_and_said(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished.directory, tmp_path / "run"))
    names = ("run.json", "dense.json", "report.json", "assets/config.json", "hf/model.safetensors", "hf/optima_tpu.json")
    victims = [*(run / name for name in names), next(path for path in files_of(run / "checkpoint") if path.name != ALL)]
    for path in victims:
        # In run.json a letter of a setting: this command is not the one that wrote it, which a damaged manifest would ask for.
        middle = path.read_bytes().rindex(b"random") if path.name == "run.json" else path.stat().st_size // 2
        flip(path, 8 * middle)
    assert main([*finished.arguments, "--output", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in ("run.json", "dense.json", "report.json", "assets/config.json", "checkpoint"):
        assert f"{name} has changed since it was written; it is made again" in printed or f"{name} is damaged" in printed, name
    assert "hf is damaged: " in printed
    assert_same_weights(run, finished.directory)
    assert not verified(run).damaged
    for path in victims:
        if path.name not in ("report.json", "run.json") and "checkpoint" not in str(path):
            assert path.read_bytes() == (finished.directory / path.relative_to(run)).read_bytes(), path


def test_a_damaged_model_is_neither_exported_nor_evaluated_nor_pruned(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished.directory, tmp_path / "run"))
    flip(next(path for path in files_of(run / "checkpoint") if path.name != ALL), 9)
    flip(run / "hf/model.safetensors", 999_999)
    text = ["--perplexity", "random", "--length", "16", "--windows", "2"]
    commands = (
        (export.main, [run, tmp_path / "out"]),
        (evaluate, [run, *text]),
        (evaluate, [run / "checkpoint", *text]),
        (evaluate, [run / "hf", *text, "--output", tmp_path / "numbers"]),
        (main, ["--model", run / "hf", *SMALL, "--mesh", "4x2", "--output", tmp_path / "again"]),
    )
    for command, arguments in commands:
        assert command(list(map(str, arguments))) == 2
        assert "has changed since it was written" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not (tmp_path / "again").exists()


@pytest.mark.slow
def test_three_hundred_flipped_bits_are_noticed_or_do_no_harm(finished, stopped, tmp_path, capsys):
    """Flips 100 bits each in a finished run, a stopped run and an export.

    Prints what became of the bits.
    """
    draw, outcomes = random.Random(0), collections.Counter()
    folders = {"finished": finished.directory, "stopped": stopped, "exported": finished.directory / "hf"}
    for which, source in folders.items():
        files = files_of(source)
        for count in range(100):
            folder = Path(shutil.copytree(source, tmp_path / "copy"))
            path = folder / (files[count] if count < len(files) else draw.choice(files)).relative_to(source)
            flip(path, draw.randrange(8 * path.stat().st_size))
            if which == "exported":
                command = ["--model", str(folder), *SMALL, "--mesh", "4x2", "--preset", "fast", "--solver", "null"]
                status = main([*command, "--output", str(tmp_path / "again")])
            else:
                status = main([*finished.arguments, "--output", str(folder)])
            captured = capsys.readouterr()
            assert status in (0, 2) and "Traceback" not in captured.err, (path, captured.err)
            if status == 2:
                assert captured.err.count("\n") == 1 and (path.name in captured.err or ALL in captured.err), (path, captured.err)
                outcomes[which, "named"] += 1
            elif which == "exported":
                assert path.name == "README.md", path  # which nothing reads
                outcomes[which, "not read"] += 1
            else:
                assert_same_weights(folder, finished.directory)
                assert not verified(folder).damaged
                same = path.exists() and path.read_bytes() == (source / path.relative_to(folder)).read_bytes()
                outcomes[which, "as before" if same else "made anew"] += 1
            shutil.rmtree(folder)
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
    with capsys.disabled():
        print("\n" + "\n".join(f"{which}: {count} {what}" for (which, what), count in sorted(outcomes.items())))
    assert outcomes.total() == 300
