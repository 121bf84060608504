"""Hugging Face hub models: downloaded once, then read as a folder."""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from optima_tpu.errors import UserError, one_line
from optima_tpu.report.licence import CARD
from optima_tpu.runtime.files import user_cache

WANTED = "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", CARD
# Subfolders hold other formats of the same model; only the chat templates in one belong to it.
# consolidated* is a second copy in Mistral's own layout.
UNWANTED = [*(f"*/{pattern}" for pattern in WANTED if pattern != "*.jinja"), "consolidated*"]


@functools.cache  # who checks the files and who opens them ask the hub once, and see one revision
def download(spec: str, wanted: tuple[str, ...] = WANTED, needed: tuple[str, ...] | None = None) -> Path:
    """The local folder of a hub model; downloads what the cache lacks.

    Args:
      spec: ``org/name`` or ``org/name@revision``.
      wanted: patterns of the files; by default all that a run needs.
      needed: patterns of all files that the caller will want, for the remedy of a missing model; None if no others.

    Raises:
      UserError: the model is gated or does not exist, or the hub can't be reached and the cache lacks the model.
    """
    name, _, revision = spec.partition("@")
    with asking(spec, needed or wanted):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(wanted), ignore_patterns=UNWANTED))


@contextlib.contextmanager
def asking(spec: str, needed: tuple[str, ...]) -> Iterator[None]:
    """Turns whatever a request for a hub model raises into a UserError.

    Args:
      spec: see :func:`download`.
      needed: patterns of the files to download elsewhere if the hub can't be reached or refuses them.
    """
    name, _, revision = spec.partition("@")
    files = "" if needed == WANTED else f" {' '.join(needed)}"
    elsewhere = f"download it elsewhere with `hf download {name}{files} --local-dir DIR` and give DIR"
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError: first
        raise UserError(
            f"{name} is gated: accept its licence on https://huggingface.co/{name}, then log in here with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r} on the hub: give a branch, tag or commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"there is no folder {spec} here and no public model {name} on the hub: check the spelling; "
            "for a private model log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"there is no folder {name} here, the hub can't be reached and its cache does not hold {name}: correct the path, or "
            f"{elsewhere}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"the hub refused {name} ({one_line(error)}): try again, or {elsewhere}") from error
    except Exception as error:  # a full or read-only cache, or the HTTP library's own, whose name depends on the version
        raise UserError(
            f"{name} could not be downloaded ({one_line(error)}): the finished part is kept, and the same command "
            "continues the download; HF_HOME is the folder of the cache"
        ) from error


def files_of(folder: Path) -> list[Path]:
    """The files of a model's folder that a run may read."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [folder / name for name in filter_repo_objects(names, allow_patterns=list(WANTED), ignore_patterns=UNWANTED)]


def refuse_damaged(files: Iterable[Path]) -> None:
    """Compares files in the hub's cache with the checksums that name them.

    Leaves out files that no checksum names. Reads each file once: the user's cache remembers sizes and times of whole files.
    The hub names a large file by its SHA-256, a small one by the SHA-1 that git gives it.

    Raises:
      UserError: a file has changed since it was downloaded, or on the way.
    """
    blobs = {path: blob for path in files if _DIGEST.fullmatch((blob := path.resolve()).name) and blob.parent.name == "blobs"}
    seen = [(str(blob), blob.stat().st_size, blob.stat().st_mtime_ns) for blob in blobs.values()]
    marker = user_cache() / "downloads" / hashlib.sha256(repr(sorted(seen)).encode()).hexdigest()
    with contextlib.suppress(OSError):  # the cache of another user
        if marker.exists():
            return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for (path, blob), digest in zip(blobs.items(), threads.map(_digest, blobs.values())):
            if digest != blob.name:
                raise UserError(
                    f"{path} is damaged: it has another checksum than on the hub. Remove {blob}, and the same command "
                    "downloads it again"
                )
    if blobs:
        with contextlib.suppress(OSError):  # then they are read again
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()


_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def _digest(blob: Path) -> str:
    header = b"blob %d\0" % blob.stat().st_size
    with blob.open("rb") as file:
        return hashlib.file_digest(file, "sha256" if len(blob.name) == 64 else lambda: hashlib.sha1(header)).hexdigest()
