"""Which code runs."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path


@functools.cache  # later changes of the files do not change the running code
def code_version() -> str:
    """The version and a digest of the source files: "0.1.0+3f2a91c0b5d7".

    Part of a run's manifest, so that one model never mixes blocks pruned by different code.
    """
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    try:
        version = importlib.metadata.version("optima-tpu")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout; the digest still identifies the code
        version = "0"
    return f"{version}+{digest.hexdigest()[:12]}"
