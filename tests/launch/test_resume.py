"""A stopped run resumes to the same bits, with its own command alone."""

import itertools
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from optima_tpu.config.parse import parse
from optima_tpu.launch import main
from optima_tpu.pipeline import inputs, walk
from optima_tpu.pipeline.journal import Journal, finished_blocks
from optima_tpu.runtime import kept
from optima_tpu.runtime.files import remove
from optima_tpu.runtime.program import program
from tests.support.meshes import mesh
from tests.support.runs import assert_close_weights, assert_same_weights, only_error, snapshot, stop_after_the_first_block


@pytest.fixture(scope="module")
def killed(finished, tmp_path_factory) -> Path:
    """Folder of copies of a run, each named by the moment of its kill.

    Each is copied while a run goes on: of a process that ends at once exactly these files stay.
    tests/pipeline/test_interrupted.py kills processes. A block takes four calls of ``prune_group``. ``commit`` is called for
    the hidden states and then for the journal entry of every block.
    """
    root = tmp_path_factory.mktemp("killed")

    def copying(patch: pytest.MonkeyPatch, moment: str, owner, name: str, call: int, before: bool = False) -> None:
        original, count = getattr(owner, name), itertools.count(1)

        def copied(*arguments):
            here = next(count) == call
            if here and before:
                shutil.copytree(root / "run", root / moment)
            result = original(*arguments)
            if here and not before:
                shutil.copytree(root / "run", root / moment)
            return result

        patch.setattr(owner, name, copied)

    def run(*more: str) -> None:
        assert main([*finished.arguments, *more, "--output", str(root / "run")]) == 0
        shutil.rmtree(root / "run")

    with pytest.MonkeyPatch.context() as patch:
        copying(patch, "inside a block", walk, "prune_group", 6)  # the second of the second block's four solves was started
        copying(patch, "between blocks", Journal, "save", 2)  # the second block's entry is durable
        run()
    with pytest.MonkeyPatch.context() as patch:
        # Orbax has written the second block's entry, which does not have its name yet.
        copying(patch, "while saving", kept, "commit", 4, before=True)
        run("--recompute", "0")  # else the second block's hidden states would not be saved
    return root


@pytest.mark.parametrize(("moment", "blocks"), [("inside a block", 1), ("while saving", 1), ("between blocks", 2)])
def test_a_killed_run_goes_on_to_the_same_bits(finished, killed, capsys, moment, blocks):
    run = killed / moment
    assert finished_blocks(run) == list(range(blocks))
    left = [path for path in (run / "journal").iterdir() if "partial" in path.name]
    assert bool(left) == (moment == "while saving")
    for index, path in enumerate(run.rglob("*")):  # nothing is decided by times, which a clock that jumps makes wrong
        os.utime(path, (index % 2 * 2**32,) * 2)  # 1970 or 2106
    assert main([*finished.arguments, "--output", str(run)]) == 0
    assert f"resuming     {blocks} of 3 blocks done" in capsys.readouterr().out
    assert_same_weights(run, finished.directory)
    assert not [path for path in run.rglob("*") if "partial" in path.name]
    stages, whole = (json.loads((each / "report.json").read_text())["seconds"] for each in (run, finished.directory))
    assert stages.keys() == whole.keys()  # those of the first start too


def test_a_finished_run_is_not_done_again(finished, monkeypatch, capsys):
    """Only perplexity is measured again: the evaluation text may differ."""

    def files():
        return {
            name: state
            for name, state in snapshot(finished.directory).items()
            if Path(name) not in (finished.directory, finished.directory / "report.json")
        }

    monkeypatch.setattr(Journal, "save", None)
    before = files()
    assert main([*finished.arguments, "--output", str(finished.directory)]) == 0
    assert files() == before
    printed = capsys.readouterr().out
    assert "finished     nothing is left to do" in printed and "resuming" not in printed


def test_a_finished_run_may_be_moved_and_a_lost_checkpoint_is_written_again(finished, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(finished.directory, moved)
    command = [*finished.arguments, "--output", str(moved)]
    for lost in (False, True):
        if lost:
            shutil.rmtree(moved / "checkpoint")
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert str(finished.directory) not in printed
        assert all(str(moved / file) in printed for file in ("report.json", "checkpoint", "hf"))
        page = (moved / "report.html").read_text()
        assert str(moved / "checkpoint") in page and str(finished.directory / "checkpoint") not in page
        assert_same_weights(moved, finished.directory)


@pytest.mark.parametrize(
    "lost", [["hf/model.safetensors"], ["hf/README.md", "hf/pruning_masks.npz"], ["hf", "report.json"]], ids=" ".join
)
def test_what_a_finished_run_lost_is_made_again_and_nothing_else(finished, tmp_path, monkeypatch, lost):
    run = tmp_path / "run"
    shutil.copytree(finished.directory, run)
    for name in lost:
        remove(run / name)
    monkeypatch.setattr(Journal, "save", None)  # no block is pruned again
    assert main([*finished.arguments, "--output", str(run)]) == 0
    assert_same_weights(run, finished.directory)
    names = [path.relative_to(finished.directory / "hf") for path in (finished.directory / "hf").rglob("*")]
    assert all((run / "hf" / name).exists() for name in names)
    assert len(json.loads((run / "report.json").read_text())["blocks"]) == 3


@pytest.mark.parametrize("record", ["report.json", "dense.json", "hf/optima_tpu.json"])
def test_a_damaged_record_is_no_traceback(finished, tmp_path, capsys, record):
    run = tmp_path / "run"
    shutil.copytree(finished.directory, run)
    (run / record).write_text('{"manifest')
    if record == "dense.json":  # which only a run without a report looks for
        (run / "report.json").unlink()
    assert main([*finished.arguments, "--output", str(run)]) == 0
    assert_same_weights(run, finished.directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--pattern", "0.6"], "pattern is 0.5/row there, 0.6/row here"),
        (["--solver.damping", "0.5"], "solver.damping is 0.01 there, 0.5 here"),
        (["--solver", "exact"], "solver is cg there, exact here"),
        (["--solver", "null"], "solver is cg there, null here"),
        (["--selector", "magnitude"], "pattern is 0.5/row there, 0.5/layer here; selector is wanda there, magnitude here"),
        (["--dtype", "bfloat16"], "dtype is null there, bfloat16 here"),
        (["--calibration.seed", "1"], "calibration.seed is 0 there, 1 here"),
        (["--calibration.windows", "9"], "calibration.windows is 8 there, 9 here"),
    ],
)
def test_another_run_is_refused_with_the_settings_that_differ_and_its_command(finished, capfd, change, said):
    arguments = finished.arguments
    if "--solver" in change:  # whose options the other solver does not have
        arguments = [argument for argument in arguments if argument not in ("--solver.tolerance", "1e-6")]
    before = snapshot(finished.directory)
    assert main([*arguments, *change, "--output", str(finished.directory)]) == 2
    message = only_error(capfd.readouterr().err)
    begun, _, rest = message.partition(". To resume it, type ")
    assert begun == f"error: {finished.directory} holds another run: {said}"
    again, _, beside = rest.partition(". To leave it as it is, add another --output, such as --output ")
    assert beside == f"{finished.directory}-2\n"
    assert parse(shlex.split(again.removeprefix(program("prune")))) == parse(
        [*finished.arguments, "--output", str(finished.directory)]
    )
    assert snapshot(finished.directory) == before


@pytest.mark.parametrize("shape", ["1x1", pytest.param("8x1", marks=pytest.mark.slow)])
def test_another_mesh_goes_on_with_a_stopped_run(finished, tmp_path, monkeypatch, capsys, shape):
    command = [*finished.arguments, "--output", str(tmp_path / "run")]
    stop_after_the_first_block(monkeypatch)
    assert main(command) == 130
    assert "goes on" in capsys.readouterr().err
    monkeypatch.undo()
    command[command.index("4x2")] = shape
    monkeypatch.setattr(inputs, "make_mesh", lambda text: mesh(*map(int, text.split("x"))))  # of the first ones of eight devices
    assert main(command) == 0
    assert_close_weights(tmp_path / "run", finished.directory)


def test_a_journal_removed_under_a_run_ends_it_with_one_line_and_the_command_prunes_again(
    finished, tmp_path, monkeypatch, capsys
):
    run, save = tmp_path / "run", Journal.save

    def removed(journal, index, *rest):
        save(journal, index, *rest)
        shutil.rmtree(run / "journal")

    command = [*finished.arguments, "--output", str(run)]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", removed)
        assert main(command) == 2
    assert "journal was removed" in only_error(capsys.readouterr().err)
    assert main(command) == 0
    assert_same_weights(run, finished.directory)
