"""What a released version wrote opens in this one.

``python -m tests.support.release tests/released`` adds a version.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from optima_tpu.cli import main
from tests.support import ROOT
from tests.support.release import PRUNE
from tests.support.runs import folder_tensors, only_error

RELEASED = ROOT / "tests" / "released"


@pytest.fixture(params=sorted(path.name for path in RELEASED.iterdir()))
def released(request, tmp_path, monkeypatch) -> Path:
    """A copy of a version's model, run and packed folder.

    The copy is the working directory, as the original was for the run.
    """
    folder = Path(shutil.copytree(RELEASED / request.param, tmp_path / "released"))
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_its_report_is_read_and_its_page_is_written(released, capsys):
    assert main(["report", "run"]) == 0
    record, printed = json.loads((released / "run" / "report.json").read_text()), capsys.readouterr().out
    shown = f"{record['perplexity']['dense']:.4g} -> {record['perplexity']['pruned']:.4g}"
    assert shown in printed and f"{record['perplexity']['pruned']:.4g}" in (released / "run" / "report.html").read_text()


@pytest.mark.parametrize("folder", ["run", "run/hf", "packed"])
def test_its_files_are_verified(released, folder, capsys):
    assert main(["verify", folder]) == 0
    assert "all match" in capsys.readouterr().out


def test_its_packed_folder_unpacks_to_its_export(released):
    assert main(["unpack", "packed", "plain"]) == 0
    assert contents(released / "plain") == contents(released / "run" / "hf")


def test_its_run_is_exported_again_from_its_blocks(released):
    assert main(["export", "run", "again"]) == 0
    written, before = folder_tensors(released / "again"), folder_tensors(released / "run" / "hf")
    assert written.keys() == before.keys()
    assert all(np.array_equal(written[name], before[name]) for name in before)


def test_its_command_ends_as_finished_or_is_refused_with_what_to_do(released, capsys):
    before = contents(released / "run")
    code = main(PRUNE)
    printed = capsys.readouterr()
    if code == 0:
        assert "finished" in printed.out
    else:
        refusal = only_error(printed.err)
        assert "run holds another run: code: " in refusal and "add another --output, such as --output " in refusal
        assert contents(released / "run") == before
