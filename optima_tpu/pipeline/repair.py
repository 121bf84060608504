"""What is damaged in a run directory, and what of it is done again.

Journal, hidden states and distilled blocks are not looked at here: whoever reads them compares their checksums, and does a
damaged block again.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.export import FOLDER
from optima_tpu.models.checkpoints.orbax import CHECKPOINT, checkpoint_damage
from optima_tpu.models.checkpoints.packed import INDEX
from optima_tpu.pipeline.journal import JOURNAL, finished_blocks
from optima_tpu.report.run_directory import FILES, lost_with, names_kept
from optima_tpu.report.run_record import ASSETS, RUN, RunRecord, recorded_command
from optima_tpu.runtime.buckets import BucketError
from optima_tpu.runtime.checksums import ALL, MISSING, SUMS, changes, damage, forget, known, listed
from optima_tpu.runtime.files import complete, files_in, left_over, remove, remove_unfinished, unfinished, writing
from optima_tpu.runtime.inside import OutsideError, inside, refuse_links
from optima_tpu.runtime.program import program
from optima_tpu.runtime.records import known_record
from optima_tpu.runtime.version import code_version

_FOLDERS = names_kept("by block")
"""The folders of the folders that are written block by block, or check by check."""

_RECORDS = names_kept("whole")
"""The files beside the folders that a resume reads back. The results of evaluations are read by the report alone."""


def faults(directory: Path) -> dict[str, str]:
    """What is wrong with each damaged file: name -> "is missing" or the like.

    Checks the files that a resume would read. Reads all of the checkpoint.
    """
    wrong = _wrong_records(directory)
    if complete(directory / CHECKPOINT) and (why := checkpoint_damage(directory)):
        wrong[CHECKPOINT] = f"is damaged: {why}"
    return wrong


def _wrong_records(directory: Path) -> dict[str, str]:
    names = [name for name in _RECORDS if (directory / name).exists()]
    names += [path.relative_to(directory).as_posix() for path in files_in(directory / ASSETS)]
    try:
        sums = listed(directory)
    except (BucketError, OutsideError):
        raise
    except UserError as error:
        return {ALL: f"is damaged ({error})"} | dict.fromkeys(names, f"cannot be checked without {ALL}")
    own_sums = {name: recorded for name, recorded in sums.items() if name in _RECORDS or name.startswith(f"{ASSETS}/")}
    return changes(directory, own_sums) | {name: f"is not in {ALL}" for name in names if name not in sums}


class Verified(NamedTuple):
    """What :func:`verified` found.

    Attributes:
      damaged: name below the folder -> what is wrong with the file.
      files: the number of files that were compared.
      size: their bytes.
      unlisted: names below the folder of files that were added to a folder after it was written, but for hidden files, which no
        program loads.
      remedy: what to type if a file is damaged.
      left_over: a line on what killed programs left; empty if nothing is.
    """

    damaged: dict[str, str]
    files: int
    size: int
    unlisted: tuple[str, ...]
    remedy: str
    left_over: str


def verified(folder: Path) -> Verified:
    """Compares the files of a run or exported folder with their checksums.

    Raises:
      UserError: nothing there was written by this program.
    """
    is_run = (folder / RUN).exists()
    if is_run:
        refuse_links(folder)
    sums = {
        path for path in files_in(folder) if re.fullmatch(SUMS.format(r"\w+"), path.name) and not _in_unfinished(path, folder)
    }
    folders = {path.parent for path in sums}
    if is_run:
        folders |= {folder, *(path for path in _in_one_step(folder) if complete(path))}
    elif not folders:
        raise UserError(
            f"expected a run directory or an exported folder, but {folder} has neither {RUN} nor {ALL}: check the path"
        )
    damaged = _wrong_records(folder) if is_run else {}
    compared: dict[str, int] = {}
    for each in sorted(folders):
        inside = each.relative_to(folder)
        damaged |= {str(inside / name): why for name, why in changes(each).items()}
        for record in each.glob(SUMS.format("*")):
            compared |= {str(inside / name): size for name, (size, _) in known(each, record.name).items()}
    sealed = folders - {folder} if is_run else folders  # beside its folders a run has files that only people read
    unlisted = [name for each in sorted(sealed) for name in _unlisted(each, folder, compared)]
    remedy = _remedy(folder) if damaged else ""
    return Verified(damaged, len(compared), sum(compared.values()), tuple(unlisted), remedy, left_over(folder))


def _unlisted(sealed: Path, folder: Path, compared: Mapping[str, int]) -> Iterator[str]:
    """Yields the files without a checksum, as names below ``folder``.

    Args:
      sealed: a folder that was written in one step.
    """
    for path in files_in(sealed):
        inside = path.relative_to(sealed)
        hidden = any(part.startswith(".") for part in inside.parts)
        if not hidden and not re.fullmatch(SUMS.format(r"\w+"), path.name) and str(path.relative_to(folder)) not in compared:
            yield str(path.relative_to(folder))


def _remedy(folder: Path) -> str:
    """What to type if a file of a run or of an exported folder is damaged."""
    if run := next((each for each in (folder, folder.parent) if (each / RUN).is_file()), None):
        record = known_record(run / RUN, RunRecord)
        # The folder may be a copy: the command must name the one that is damaged.
        recorded = recorded_command({**record.configuration, "output": str(run)}) if record else ""
        command = recorded or "the command that made the run"
        code = record.manifest.get("code") if record else None
        if code not in (None, code_version()):  # a run goes on with the code that began it
            return (
                f"optima-tpu {code} made this run, and this is {code_version()}, which does not go on with it: with that "
                f"version, {command} writes again what is damaged; with this one, take another --output"
            )
        return f"{command} writes again what is damaged, and keeps the rest"
    form = " --packed" if (folder / INDEX).is_file() else ", with its --format"
    return f"copy the folder again, or export its run to a new one: {program('export')} RUN OUT{form}"


def _in_one_step(directory: Path) -> list[Path]:
    """The folders of a run that appear in one step, each with checksums."""
    several = [path for name in _FOLDERS for path in (directory / name).glob("*_*") if not unfinished(path)]
    return [path for path in (directory / CHECKPOINT, directory / FOLDER, *several) if path.is_dir()]


def _in_unfinished(path: Path, folder: Path) -> bool:
    return any(unfinished(folder / parent) for parent in path.relative_to(folder).parents)


def mend(directory: Path, exported: bool = True) -> list[str]:
    """Removes damaged files of a run directory and returns a line on each.

    The run makes these files again. What killed programs left unfinished is removed too.

    Call it as the only program in the directory, after its manifest was compared. ``open_journal`` writes run.json again.

    Args:
      exported: whether the run makes RUN/hf.

    Raises:
      UserError: the allocation, or the choice of blocks that are left out, is damaged. Finished blocks depend on it, and a
        new one might differ.
    """
    remove_unfinished(directory)
    wrong = faults(directory) if (directory / RUN).exists() else {}
    lost = lost_with(set(wrong) - {RUN})
    if JOURNAL in lost and finished_blocks(directory):
        name = next(name for name in FILES[JOURNAL].after if name in wrong)
        raise UserError(f"{directory / name} {wrong[name]}, and the run cannot be resumed; choose another --output")
    for name in sorted(lost):
        with writing(directory / name, "remove it by hand"):
            remove(inside(directory, name, directory / ALL))
    # A flipped bit in a name leaves an entry without a file.
    forget(directory, [name for name in known(directory) if name in lost or not (directory / name).exists()])
    if exported and complete(directory / FOLDER) and (why := damage(directory / FOLDER)) not in ("", MISSING):
        wrong[FOLDER] = f"is damaged: {why}"  # the export looks at what is in there before it removes it
    return [f"{name} {why}; it is made again" for name, why in wrong.items()]
