"""The command line that publishes a pruned model: ``optima_tpu.push``."""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optima_tpu.errors import UserError, one_line, plural, refusing
from optima_tpu.runtime import command, signals
from optima_tpu.runtime.buckets import as_path, refuse_bucket
from optima_tpu.runtime.inside import refuse_links
from optima_tpu.runtime.program import Parser, program

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationCopy, HfApi

_PATH = re.compile(
    r"""(?<![\w.:/-])(?:/(?:home|Users|root|mnt|data|scratch|tmp|workspace|content|work|gpfs|lustre)/[^\s"'<>\\|]+"""
    r"""|[A-Za-z]:\\\\?Users\\[^\s"'<>|]+|gs://[^\s"'<>|]+)"""
)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[A-Z0-9]{16}|ya29\.[\w-]{30,})"
    r"|(?i:api_?key|secret|password)\w*[\"']?\s*[=:]\s*[\"']?[\w/+-]{16,}"
)
_ARRAYS = ".safetensors", ".npz", ".gguf"
_SEARCHED = 1 << 26
"""Arrays, by their names or as files of more bytes, are not searched for paths and tokens."""
_WEIGHTS = re.compile(r"(^|/)(packed\.json|.*\.safetensors(\.index\.json)?|pytorch_model.*)$")


def make_parser() -> Parser:
    """The parser of the command line."""
    from optima_tpu.report.file import REPORT
    from optima_tpu.report.page import PAGE

    parser = Parser(
        prog=program("push"),
        description="Publishes the exported folder of a pruned model, with its card, masks and checksums, on the Hugging Face "
        "hub. It lists what would go out, looks whether the repository is there, and asks before anything goes out. Log in with "
        "hf auth login.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory, or an exported folder such as its hf/")
    parser.add_argument("repository", metavar="ORG/NAME", help="where to; made if it does not exist")
    parser.add_argument("--public", action="store_true", help="make a new repository public; otherwise it is private")
    parser.add_argument(
        "--include-report", action="store_true", help=f"publish {PAGE} and {REPORT} too, which hold paths of this machine"
    )
    parser.add_argument(
        "--include-private", action="store_true", help="publish files that hold a path of yours or what looks like a token"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the files and look for what is private, and send nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments. Raises UserError if one of them is wrong."""
    return make_parser().parse_args(arguments)


def run(chosen: argparse.Namespace) -> None:
    """Publishes a run, or lists what would go out."""
    from huggingface_hub import HfApi

    check_repository(chosen.repository)
    upload = collect(chosen.run, chosen.include_report, chosen.include_private)
    if chosen.dry_run:
        _list(upload)
        print(f"nothing was sent; a new repository {chosen.repository} would be {_seen(chosen.public)}")
        return
    push(upload, chosen.repository, HfApi(), (lambda question: True) if chosen.yes else _ask, chosen.public)


def check_repository(repository: str) -> None:
    """Raises UserError if a text is no repository's id, ORG/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with refusing(HFValidationError, f"expected ORG/NAME, got {repository!r}", "correct the name"):
        validate_repo_id(repository)
    if repository.count("/") != 1:
        raise UserError(f"expected ORG/NAME, got {repository!r}")


def push(files: Mapping[str, Path], repository: str, api: "HfApi", ask: Callable[[str], bool], public: bool = False) -> None:
    """Publishes files in one commit. Nothing goes out before ``ask`` agreed.

    Weights that are in the repository and not among the files are deleted: a loader might take them for this model's.

    Args:
      ask: answers a question.

    Raises:
      UserError: nobody agreed, or the hub refused.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    check_repository(repository)
    total = _list(files)
    try:
        exists = api.repo_exists(repository)
        old = [name for name in api.list_repo_files(repository) if _WEIGHTS.search(name) and name not in files] if exists else []
        what = "adds a commit to it" if exists else f"makes it {_seen(public)}"
        if old:
            what += f" and deletes its {', '.join(old)}"
        if not ask(f"publish {plural(len(files), 'file')}, {total}, as {repository}, which {what}?"):
            raise UserError("nothing was published: expected yes, got another answer; --yes answers beforehand")
        if not exists:
            api.create_repo(repository, private=not public)
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationDelete(name) for name in old),
            *(CommitOperationAdd(name, path) for name, path in files.items()),
        ]
        api.create_commit(repository, operations, commit_message="A pruned model and its card, by OPTIMA-TPU")
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing was sent: unset it, or type --dry-run to see the files") from error
    except LocalTokenNotFoundError as error:
        raise UserError("the hub knows no user here: log in with `hf auth login`") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"the hub refused {repository} ({one_line(error)}): log in with `hf auth login`, or try again") from error
    except UserError:
        raise
    except Exception as error:  # the HTTP library's own, whose name depends on the version
        raise UserError(f"the hub can't be reached ({one_line(error)}): the same command does it again") from error
    signals.ended(0)
    print(f"published https://huggingface.co/{repository}")


def _list(files: Mapping[str, Path]) -> str:
    """Prints each file with its size. Returns the size of all."""
    from optima_tpu.report.facts import size

    for name, path in files.items():
        print(f"{size(path.stat().st_size):>10}  {name}")
    return size(sum(path.stat().st_size for path in files.values()))


def _seen(public: bool) -> str:
    return "public" if public else "private"


def collect(run: str, include_report: bool = False, include_private: bool = False) -> dict[str, Path]:
    """The files of a run that are published, name in the repository -> file.

    Args:
      run: a run directory, or an exported folder.
      include_private: also what looks private.

    Raises:
      UserError: there is no such folder, a file is missing, was changed or does not belong there, or holds something private.
    """
    from optima_tpu.models.checkpoints.export import FOLDER, SIDECAR
    from optima_tpu.report.file import REPORT
    from optima_tpu.report.page import PAGE
    from optima_tpu.report.run_record import RUN
    from optima_tpu.runtime.checksums import ALL, WRITE_AGAIN, changes, listed, refuse_changed
    from optima_tpu.runtime.files import files_in

    path = as_path(run)
    if (path / RUN).is_file():
        refuse_links(path)
    folder = path / FOLDER if (path / RUN).is_file() else path
    refuse_bucket(folder, "to publish", "copy it to a disk first")
    if not (folder / SIDECAR).is_file() and not (folder / "packed.json").is_file():
        raise UserError(f"expected a finished run or an exported folder, got {run}, which has no {SIDECAR}: check the path")
    # The model card may be edited.
    if wrong := [f"{name} {what}" for name, what in changes(folder).items() if name != "README.md"]:
        raise UserError(f"{folder}: {'; '.join(wrong)}: nothing was published; export the run again")
    files = {file.relative_to(folder).as_posix(): file for file in files_in(folder)}
    if include_report:
        missing = [name for name in (PAGE, REPORT) if not (path / name).is_file()]
        if missing:
            raise UserError(
                f"expected {' and '.join(missing)} in {path}, got none: take the run directory, or leave --include-report out"
            )
        refuse_changed(path, [REPORT], WRITE_AGAIN)
        files |= {name: path / name for name in (PAGE, REPORT)}
    searched = {name: file for name, file in files.items() if not name.endswith(_ARRAYS) and file.stat().st_size <= _SEARCHED}
    private = [f"{name} holds {what}" for name, file in searched.items() if (what := _private(file, path))]
    private += [f"{name} was not written by the export" for name in files.keys() - listed(folder).keys() - {ALL, PAGE, REPORT}]
    if include_report and not private:  # of a run that was moved, they hold paths that nothing here tells from other text
        private.append(f"{PAGE} and {REPORT} hold paths of the machine that made them")
    if private and not include_private:
        raise UserError(f"{'; '.join(private)}: nothing was published; --include-private publishes these files as they are")
    return files


def _private(file: Path, run: Path) -> str:
    """What in a file belongs to the user; empty if nothing does."""
    text = file.read_text(encoding="utf-8", errors="replace")
    token = _TOKEN.search(text)
    own_paths = [str(path) for path in (Path.home(), Path.cwd(), run.resolve()) if len(path.parts) > 2]
    private_path = next((path for path in own_paths if path in text), None) or (match[0] if (match := _PATH.search(text)) else "")
    reasons = [f"what looks like a token ({token[0][:6]}...)"] if token else []
    return " and ".join(reasons + ([f"the path {private_path}"] if private_path else []))


def _ask(question: str) -> bool:
    return sys.stdin.isatty() and input(f"{question} [yes/no] ").strip().lower() == "yes"


main = functools.partial(command.main, "push")

if __name__ == "__main__":
    sys.exit(main())
