"""No name in a folder's files leads out of it, and no file blocks a reader."""

import contextlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optima_tpu import push, unpack
from optima_tpu.config.document import load_file
from optima_tpu.data.file import File
from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints import open_model, packed, refuse_damaged_model
from optima_tpu.models.checkpoints.export import MASKS, read_masks
from optima_tpu.models.checkpoints.export import export as export_run
from optima_tpu.models.checkpoints.folder import INDEX
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.models.checkpoints.packing import sealed
from optima_tpu.models.masks import open_masks
from optima_tpu.pipeline.journal import open_journal
from optima_tpu.pipeline.repair import mend, verified
from optima_tpu.pipeline.sweep.grid import read_grid
from optima_tpu.report.run_record import RUN, read_assets, read_run
from optima_tpu.report.runs import read_report
from optima_tpu.runtime.checksums import ALL
from tests.support.fake_run import ASSETS, MANIFEST, finished_run, pruned_block, small_model
from tests.support.tiny_models import tiny_folder

CALLS = "listdir", "scandir", "rename", "remove", "rmdir", "mkdir", "link", "symlink", "truncate"
WATCHED = {"open", *(f"os.{name}" for name in CALLS)}
_touched: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _touched is not None and event in WATCHED:
        _touched.extend(
            os.path.realpath(os.fsdecode(each)) for each in arguments[:2] if isinstance(each, (str, bytes, os.PathLike))
        )


sys.addaudithook(_watch)  # stays, and does nothing outside of ``touched``


@contextlib.contextmanager
def touched() -> Iterator[list[str]]:
    """Collects all paths that Python touches in the body, links resolved."""
    global _touched
    _touched = paths = []
    try:
        yield paths
    finally:
        _touched = None


def contents(folder: Path) -> dict[str, tuple]:
    """Modification time, inode and bytes of every path in a folder."""
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
    """Changes the record of a JSON file; reseals a packed folder's index."""
    record = json.loads(path.read_text())
    add(record)
    was_sealed = record.pop("sha256", None)
    path.write_bytes(sealed(record) if was_sealed else json.dumps(record).encode())


def names_a_part(run: Path, name: str) -> None:
    path = next(each for each in (run / "checkpoint").rglob("*") if each.is_file() and b'"parts"' in each.read_bytes())
    change(path, lambda record: record["custom_metadata"].update(parts=[name]))


def unpacked(folder: Path) -> None:
    unpack.unpack(folder, folder.parent / "unpacked")


DIGEST = "ab" * 32
CHECKED = (mend, verified, lambda run: open_journal(run, MANIFEST, ASSETS))
PACKED = (unpacked, lambda folder: open_model(str(folder)))
KINDS = {
    "checksums of a run": Kind(
        "stopped", lambda run, name: change(run / ALL, lambda sums: sums.update({name: [1, DIGEST]})), CHECKED
    ),
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
        lambda folder, name: change(
            folder / packed.INDEX, lambda index: next(iter(index["weights"].values())).update(packed=name)
        ),
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
PARTS = ["..", "..", "..", ".", "", VICTIM, "model.safetensors", "sub", "assets", "ASSETS"]
PARTS += ["inner-link", "out-link", "file-link", "\u00e9", "e\u0301"]
NAMES = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("/".join),
    st.sampled_from(["/", "//", "///", "C:", "C:\\", "\\\\host\\", "file:///", "~/", "\uff0e\uff0e/", ".\0./", "..\\"]).flatmap(
        lambda start: st.sampled_from([f"{start}{VICTIM}", f"{start}../{VICTIM}", start])
    ),
    st.sampled_from(
        ["a" * 10_000, "a/" * 5_000, "../" * 3_000 + "a", "sub/../" * 1_500 + f"../{VICTIM}", "\ud800", "a\udcff/..", "\0"]
    ),
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
    (root / "masks").mkdir()
    packed.write_masks(root / "masks" / MASKS, [("weight", np.ones((4, 8), bool))])
    return root


def with_links(whole: Path, kind: str, root: Path) -> Path:
    """Copies a folder and adds ``LINKS``, which lead out of it or into it."""
    folder = Path(shutil.copytree(whole / kind, root / kind))
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)
    return folder


def leads_out(folder: Path, name: str) -> bool:
    try:
        return not Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # NUL, or no Unicode: no path at all
        return True


def refusal(read: Callable[[Path], object], folder: Path) -> str:
    try:
        read(folder)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_no_name_in_a_file_leads_out_of_its_folder(whole, tmp_path_factory, kind):
    root = tmp_path_factory.mktemp("each")
    (victim := root / VICTIM).joinpath("sub").mkdir(parents=True)
    for name in ("model.safetensors", "sub/file"):
        (victim / name).write_bytes(b"a letter")
    before, resolved = contents(victim), os.path.realpath(victim)

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
            refusals = [refusal(read, folder) for read in kind.readers]
        assert contents(victim) == before
        assert [path for path in paths if Path(path).is_relative_to(resolved)] == []
        assert not outside or all(refusals)

    check()


READERS = {
    "configuration": ("model", "config.json", lambda model: open_model(str(model))),
    "weights": ("model", "model-00001-of-*", lambda model: open_model(str(model))),
    "index of weights": ("model", INDEX, lambda model: open_model(str(model))),
    "packed index": ("packed", packed.INDEX, lambda folder: open_model(str(folder))),
    "packed index to unpack": ("packed", packed.INDEX, unpacked),
    "file to unpack": ("packed", "config.json", unpacked),
    "weights to unpack": ("packed", "packed-*.safetensors", unpacked),
    "file to publish": ("packed", "config.json", lambda folder: push.collect(str(folder))),
    "masks": ("masks", MASKS, lambda folder: open_masks(str(folder))),
    "masks in Python": ("masks", MASKS, read_masks),
    "record of a run": ("run", RUN, read_run),
    "report of a run": ("run", RUN, lambda run: read_report(str(run))),
    "assets of a run": ("run", "assets/config.json", read_assets),
    "checkpoint of a run": ("run", "checkpoint/*/manifest.ocdbt", CheckpointTensors),
    "block of a run to export": (
        "run",
        "journal/block_0001/*/manifest.ocdbt",
        lambda run: export_run(run, run.parent / "exported"),
    ),
    "checksums of a block": ("run", f"journal/block_0001/{ALL}", verified),
    "block of a run to resume": ("run", "journal/block_0001/*/manifest.ocdbt", lambda run: open_journal(run, MANIFEST, ASSETS)),
}


@pytest.mark.parametrize("replaced", ["link", "pipe"])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_every_reader_refuses_a_link_out_of_the_folder_and_a_pipe(whole, tmp_path, reader, replaced):
    kind, pattern, read = reader
    folder = Path(shutil.copytree(whole / kind, tmp_path / kind))
    (path,) = folder.glob(pattern)
    path.rename(tmp_path / "outside")
    if replaced == "link":
        path.symlink_to(tmp_path / "outside")
    else:
        os.mkfifo(path)
    before = contents(tmp_path)
    with touched() as paths, pytest.raises(UserError) as error:
        read(folder)
    reason = "is a link to .*outside" if replaced == "link" else "is a pipe, a socket or a device: copy its contents into a file"
    assert re.search(f"{re.escape(str(path))} {reason}", str(error.value))
    assert str(tmp_path / "outside") not in paths and contents(tmp_path) == before


def test_a_folder_of_the_hubs_cache_has_its_files_beside_it(whole, tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/1"
    snapshot.mkdir(parents=True)
    shutil.copytree(whole / "packed", tmp_path / "models--a--b/blobs")
    for path in (whole / "packed").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert verified(snapshot).damaged == {}
    unpack.unpack(snapshot, tmp_path / "out")
    assert verified(tmp_path / "out").damaged == {}


@pytest.mark.parametrize("part", ["journal", "checkpoint", "assets", "journal/block_0001", "tensorboard"])
def test_a_run_of_which_a_part_is_a_link_is_refused_and_stays(whole, tmp_path, part):
    run = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    (run / "tensorboard").mkdir()
    (run / part).rename(tmp_path / "elsewhere")
    (run / part).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    for read in (lambda: open_journal(run, MANIFEST, ASSETS), lambda: verified(run), lambda: export_run(run, run / "hf")):
        with pytest.raises(UserError, match=f"{run / part} is a link to "):
            read()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "read",
    {
        "a.yaml": load_file,
        "sweep.yaml": read_grid,
        "text.txt": lambda path: list(File(path).documents("calibration")),
        "masks.npz": lambda path: open_masks(str(path)),
        "masks.safetensors": lambda path: open_masks(str(path)),
        "model.gguf": lambda path: open_model(str(path)),
        "report.json": lambda path: read_report(str(path)),
    }.items(),
    ids=lambda read: read[0],
)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path, read):
    name, read = read
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a (device or a )?pipe"):
        read(tmp_path / name)


def test_settings_come_through_a_pipe_that_the_shell_made():
    """As of ``--config <(COMMAND)``."""
    reads, writes = os.pipe()
    with os.fdopen(writes, "w") as file:
        file.write("pattern: 0.6")
    try:
        assert load_file(f"/dev/fd/{reads}") == {"pattern": 0.6}
    finally:
        os.close(reads)
