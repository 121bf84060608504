"""Files appear complete, through unguessable names, and touch no others."""

import os
import stat
from pathlib import Path

import pytest

from optima_tpu.errors import UserError
from optima_tpu.runtime import files
from optima_tpu.runtime.files import making, remove_if, remove_unfinished, write_bytes


def write_folder(path: Path) -> None:
    with making(path) as folder:
        (folder / "file").write_bytes(b"new")


WRITES = {"file": lambda path: write_bytes(path, b"new"), "folder": write_folder}


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("planted", ["a link to a file", "a link to a folder", "a folder"])
def test_what_is_called_as_a_temporary_might_be_stays_as_it_is(what, planted, tmp_path):
    victim = tmp_path / "victim"
    if planted == "a link to a file":
        victim.write_text("years of work")
        (tmp_path / "out.partial").symlink_to(victim)
    else:
        victim.mkdir()
        (victim / "thesis.tex").write_text("years of work")
        if planted == "a folder":
            victim.rename(victim := tmp_path / "out.partial")
        else:
            (tmp_path / "out.partial").symlink_to(victim)
    WRITES[what](tmp_path / "out")
    assert (victim if victim.is_file() else victim / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "out.partial").is_symlink() == (planted != "a folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"out", "out.partial", victim.name})


@pytest.mark.parametrize("what", WRITES)
def test_what_is_written_has_the_mode_of_an_ordinary_file(what, tmp_path, umask):
    WRITES[what](tmp_path / "out")
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert all(mode == (0o750 if path.is_dir() else 0o640) for path, mode in modes.items())


def test_while_it_is_written_no_other_user_reaches_it(tmp_path):
    with making(tmp_path / "out") as folder:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("what", WRITES)
def test_a_write_that_fails_leaves_nothing(what, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError):
        WRITES[what](tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["folder", "file"])
def test_the_first_of_two_programs_wins_a_folder_and_the_other_leaves_nothing(what, tmp_path):
    first = {"folder": write_folder, "file": lambda path: path.write_bytes(b"new")}[what]
    with pytest.raises(UserError, match="another program has written .*out meanwhile"), making(tmp_path / "out") as folder:
        (folder / "other").write_bytes(b"old")
        first(tmp_path / "out")
    assert {path.name for path in tmp_path.rglob("*")} <= {"out", "file"}
    assert next(path for path in (tmp_path / "out" / "file", tmp_path / "out") if path.exists()).read_bytes() == b"new"


def test_leftovers_in_a_run_are_removed_and_neither_links_nor_other_names(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside.abcdefgh.partial"
    write_folder(outside)
    left = [files.begin(run / "run.json"), files.begin(run / "journal" / "block_0001")]
    for path in left:
        path.write_bytes(b"half")
    kept = [run / "mine.partial", run / "notes.12345678", run / "journal" / "block_0000"]
    for path in kept:
        write_folder(path)
    (run / "link.abcdefgh.partial").symlink_to(outside)
    (run / "linked").symlink_to(tmp_path)
    remove_unfinished(run)
    assert not any(path.parent.exists() for path in left)
    assert all((path / "file").exists() for path in (*kept, outside)) and (run / "link.abcdefgh.partial").is_symlink()


def test_what_killed_programs_left_in_and_beside_a_folder_is_named_and_stays(tmp_path):
    out = tmp_path / "out"
    write_folder(out / "journal")
    left = [files.begin(out).parent, files.begin(out / "report.html").parent, files.begin(out / "journal" / "block_0001").parent]
    files.begin(tmp_path / "out.json"), files.begin(tmp_path / "another")
    message = files.left_over(out)
    assert message.startswith(f"left over: {', '.join(map(str, sorted(left)))}: a stopped program")
    assert all(path.is_dir() for path in left)
    assert files.left_over(tmp_path / "new") == files.left_over(tmp_path / "no" / "folder") == ""


def test_a_folder_that_another_program_replaced_since_the_check_is_not_removed(tmp_path):
    write_folder(tmp_path / "out")
    answers = iter([True, False])
    remove_if(tmp_path / "out", lambda folder: next(answers))
    assert (tmp_path / "out" / "file").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
    remove_if(tmp_path / "out", lambda folder: True)
    assert not list(tmp_path.iterdir())


def test_removing_a_link_keeps_what_it_leads_to(tmp_path):
    write_folder(tmp_path / "folder")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    files.remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and (tmp_path / "folder" / "file").exists()
