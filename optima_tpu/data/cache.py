"""A cache of token windows, which changes only how long a run waits."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from optima_tpu.data.source import Source, Split, Tokens
from optima_tpu.models.checkpoints import Pretrained
from optima_tpu.report.licence import CARD
from optima_tpu.runtime.files import user_cache, write_bytes
from optima_tpu.runtime.processes import from_first


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """A directory with a file of tokens for every draw.

    Any number of programs may use the directory at once. It may be deleted at any time.

    Attributes:
      directory: made at the first save.
    """

    directory: Path

    def tokens(self, key: Callable[[], str | None], draw: Callable[[], Tokens]) -> Tokens:
        """Returns the cached result of ``draw()``, or draws and saves it.

        Every process calls it. The result's ``cache`` says whether the tokens came from the cache.

        Args:
          key: returns :func:`token_key`, in process 0. With None nothing is cached.
          draw: called by every process or by none; returns the same in each.
        """

        def cached() -> tuple[str | None, Tokens | None]:
            name = key()
            return name, self.load(name) if name else None

        name, tokens = from_first(cached)
        if tokens is not None:
            return tokens._replace(cache="from the token cache")
        tokens = draw()
        refused = from_first(lambda: name and self.save(name, tokens))
        return tokens._replace(cache=f"could not be saved in {self.directory}: {refused}") if refused else tokens

    def load(self, key: str) -> Tokens | None:
        """The tokens saved under a key; None if missing or damaged."""
        try:
            with safetensors.safe_open(self._path(key), framework="np") as file:
                about = file.metadata()
                tokens = Tokens(file.get_tensor("ids"), about["how"], int(about["available"]))
            return tokens if about["digest"] == _digest(key, tokens) else None
        except Exception:  # what a missing, unreadable or damaged file raises: it is written again
            return None

    def save(self, key: str, tokens: Tokens) -> str | None:
        """Saves tokens under a key. Returns why it failed, or None."""
        about = {"how": tokens.how, "available": str(tokens.available), "digest": _digest(key, tokens)}
        try:
            write_bytes(self._path(key), safetensors.numpy.save({"ids": np.ascontiguousarray(tokens.ids)}, about))
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"


def kept_tokens(
    use: bool, source: Source, split: Split, pretrained: Pretrained, draw: Callable[[], Tokens], **settings: int | None
) -> Tokens:
    """Returns the windows of ``draw``, from the user's cache if ``use``.

    See :meth:`TokenCache.tokens` and :func:`token_key`, which takes ``settings``.
    """
    cache = TokenCache(user_cache() / "tokens")
    return cache.tokens(lambda: token_key(source, split, pretrained, **settings), draw) if use else draw()


def token_key(source: Source, split: Split, pretrained: Pretrained, **draw: int | None) -> str | None:
    """Hashes all that decides the tokens of a draw.

    These are the text, the tokenizer, the settings of the draw, and the versions of code and libraries.

    Args:
      draw: the settings of :func:`optima_tpu.data.calibration_tokens` or :func:`optima_tpu.data.evaluation_tokens`.

    Returns:
      None if the source can't tell whether its text has changed.

    Raises:
      UserError: the source can't be read.
    """
    fingerprint = source.fingerprint(split)
    if fingerprint is None:
        return None
    assets = {name: hashlib.sha256(content).hexdigest() for name, content in pretrained.assets.items() if name != CARD}
    record = {"source": str(source), "text": fingerprint, "split": split, "tokenizer": assets, "draw": draw, "code": _code()}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> dict[str, str]:
    """The versions of this code, and of the libraries that it calls."""
    ours = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
    # numpy may change its random streams between two versions.
    return {"ours": ours} | {name: importlib.metadata.version(name) for name in ("numpy", "tokenizers", "transformers")}


def _digest(key: str, tokens: Tokens) -> str:
    about = json.dumps([key, tokens.how, tokens.available, tokens.ids.shape]).encode()
    return hashlib.sha256(about + np.ascontiguousarray(tokens.ids, np.int32).tobytes()).hexdigest()
