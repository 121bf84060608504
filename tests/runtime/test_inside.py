"""What a folder says is data: nothing that it names leads out of it, and nothing in it keeps a reader waiting."""

import contextlib
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optima_tpu import export, push, unpack, verify
from optima_tpu.config.parse import load_file
from optima_tpu.data.file import File
from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints import open_model, packed, refuse_damaged_model
from optima_tpu.models.checkpoints.export import export as export_run
from optima_tpu.models.checkpoints.folder import INDEX
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.models.masks import open_masks
from optima_tpu.pipeline.journal import open_journal
from optima_tpu.pipeline.repair import mend, verified
from optima_tpu.pipeline.sweep.grid import read_grid
from optima_tpu.report.run_record import read_assets, read_run
from optima_tpu.report.runs import read_report
from optima_tpu.runtime.checksums import ALL
from tests.support.fake_run import ASSETS, MANIFEST, finished_run, pruned_block, small_model
from tests.support.runs import only_error
from tests.support.tiny_models import tiny_folder

WATCHED = {"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
_touched: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _touched is not None and event in WATCHED:
        _touched.extend(os.path.realpath(os.fsdecode(each)) for each in arguments[:2] if isinstance(each, (str, bytes, os.PathLike)))


sys.addaudithook(_watch)  # stays, and does nothing outside of ``touched``


@contextlib.contextmanager
def touched() -> Iterator[list[str]]:
    """Every path that Python opens, lists, makes, renames or removes in the body, with its links resolved."""
    global _touched
    _touched = paths = []
    try:
        yield paths
    finally:
        _touched = None


def contents(folder: Path) -> dict[str, tuple]:
    """What a change, or a read on a file system that records reads, would change."""
    stats = ((path, path.stat()) for path in [folder, *sorted(folder.rglob("*"))])
    return {str(path): (at.st_mtime_ns, at.st_ino, path.read_bytes() if path.is_file() else None) for path, at in stats}


class Kind(NamedTuple):
    """A kind of file that names a path.

    Attributes:
      folder: which of the folders of ``whole`` has it.
      write: writes the name into it.
      readers: whoever reads that file.
    """

    folder: str
    write: Callable[[Path, str], object]
    readers: Sequence[Callable[[Path], object]]


def change(path: Path, add: Callable[[dict], object]) -> None:
    """Changes the record in a JSON file; the index of a packed folder is sealed again."""
    record = json.loads(path.read_text())
    add(record)
    sealed = record.pop("sha256", None)
    path.write_bytes(packed._sealed(record) if sealed else json.dumps(record).encode())


def names_a_part(run: Path, name: str) -> None:
    path = next(each for each in (run / "checkpoint").rglob("*") if each.is_file() and b'"parts"' in each.read_bytes())
    change(path, lambda record: record["custom_metadata"].update(parts=[name]))


def unpacked(folder: Path) -> None:
    unpack.unpack(folder, folder.parent / "unpacked")


DIGEST = "ab" * 32
CHECKED = (mend, verified, lambda run: open_journal(run, MANIFEST, ASSETS))
PACKED = (unpacked, lambda folder: open_model(str(folder)))
KINDS = {
    "checksums of a run": Kind("stopped", lambda run, name: change(run / ALL, lambda sums: sums.update({name: [1, DIGEST]})), CHECKED),
    "checksums of a block": Kind(
        "stopped",
        lambda run, name: change(run / "journal/block_0000" / ALL, lambda sums: sums.update({name: [1, DIGEST]})),
        CHECKED[1:],
    ),
    "parts of a checkpoint": Kind("run", names_a_part, [CheckpointTensors]),
    "index of weights": Kind(
        "model",
        lambda model, name: change(model / INDEX, lambda index: index.update(weight_map={"lm_head.weight": name})),
        [lambda model: open_model(str(model))],
    ),
    "checksums of an export": Kind(
        "model",
        lambda model, name: (model / ALL).write_text(json.dumps({name: [1, DIGEST]})),
        [lambda model: refuse_damaged_model(str(model)), verified],
    ),
    "packed files": Kind(
        "packed", lambda folder, name: change(folder / packed.INDEX, lambda index: index["files"].update({name: DIGEST})), PACKED
    ),
    "packed weights": Kind(
        "packed",
        lambda folder, name: change(folder / packed.INDEX, lambda index: [*index["weights"].values()][0].update(packed=name)),
        PACKED,
    ),
    "unpacked weights": Kind(
        "packed",
        lambda folder, name: change(
            folder / packed.INDEX, lambda index: index["weights"].update({name: index["weights"].popitem()[1]})
        ),
        PACKED,
    ),
}

VICTIM = "victim"
LINKS = {"out-link": Path("..", VICTIM), "file-link": Path("..", VICTIM, "model.safetensors"), "inner-link": Path()}
PARTS = ["..", "..", "..", ".", "", VICTIM, "model.safetensors", "sub", "assets", "ASSETS", "inner-link", "out-link", "file-link", "\u00e9", "e\u0301"]
NAMES = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("/".join),
    st.sampled_from(["/", "//", "///", "C:", "C:\\", "\\\\host\\", "file:///", "~/", "\uff0e\uff0e/", ".\0./", "..\\"]).flatmap(
        lambda start: st.sampled_from([f"{start}{VICTIM}", f"{start}../{VICTIM}", start])
    ),
    st.sampled_from(["a" * 10_000, "a/" * 5_000, "../" * 3_000 + "a", "sub/../" * 1_500 + f"../{VICTIM}", "\ud800", "a\udcff/..", "\0"]),
    st.text(max_size=8).flatmap(lambda text: st.sampled_from([text, f"../{VICTIM}/{text}", unicodedata.normalize("NFD", text)])),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One folder of each kind, whole."""
    root = tmp_path_factory.mktemp("whole")
    finished_run(root / "run", small_model())
    open_journal(root / "stopped", MANIFEST, ASSETS).save(0, *pruned_block(small_model(), 0))
    tiny_folder(root / "model")
    export_run(root / "run", root / "packed", form="packed")
    return root


def with_links(whole: Path, kind: str, root: Path) -> Path:
    """A copy of a folder, with links in it to the folder beside it that nothing may touch."""
    folder = Path(shutil.copytree(whole / kind, root / kind))
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)
    return folder


def leads_out(folder: Path, name: str) -> bool:
    try:
        return not Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # NUL, or no Unicode: no path at all
        return True


def refusal(read: Callable[[], object]) -> str:
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_no_name_in_a_file_leads_out_of_its_folder(whole, tmp_path_factory, monkeypatch, kind):
    monkeypatch.setattr("optima_tpu.runtime.files.os.fsync", lambda descriptor: None)  # hundreds of them, which a power cut would need
    root = tmp_path_factory.mktemp("each")
    (victim := root / VICTIM).joinpath("sub").mkdir(parents=True)
    for name in ("model.safetensors", "sub/file"):
        (victim / name).write_bytes(b"a letter")
    before, held = contents(victim), os.path.realpath(victim)

    @given(NAMES)
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def check(name):
        folder = root / kind.folder
        for each in (folder, root / "unpacked"):
            shutil.rmtree(each, ignore_errors=True)
        with_links(whole, kind.folder, root)
        if "link" not in name and kind.folder in ("run", "stopped"):  # else it is refused for its links, whatever it names
            for link in LINKS:
                (folder / link).unlink()
        outside = leads_out(folder, name)
        kind.write(folder, name)
        with touched() as paths:
            refusals = [refusal(lambda: read(folder)) for read in kind.readers]
        assert contents(victim) == before
        assert [path for path in paths if Path(path).is_relative_to(held)] == []
        assert not outside or all(refusals)

    check()
