"""The user's own classes, by import path: "my_lab.masks:MyMask".

Only :func:`import_class` imports, and only what the person typed or wrote in a file for ``--config``. Run directories and
exported folders travel between people, so an import path in their records is text: it is shown and compared, and stands for
nothing to run.
"""

import dataclasses
import hashlib
import importlib
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from optima_tpu.errors import UserError, did_you_mean, one_line, refusing
from optima_tpu.runtime.bounds import refuse_beyond, whole

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(\?.*)?")

T = TypeVar("T")

_READERS: Mapping[type, Callable[[str], Any]] = MappingProxyType({int: whole, float: float, bool: lambda text: text == "true"})
"""Type of an option -> its parser. Text needs none."""


def is_import_path(text: str) -> bool:
    """Whether a text is like "my_lab.masks:MyMask" or "...:MyMask?OPTIONS"."""
    return _IMPORT_PATH.fullmatch(text) is not None


def import_class(path: str, base: type[T]) -> type[T]:
    """Imports and returns the class of an import path that a person typed.

    A path from a file's record is never imported.

    Args:
      path: "module:Name". The module is installed, or is in the working directory.
      base: what the class must be derived from.

    Raises:
      UserError: there is no such module or class, importing it fails, or it is no frozen dataclass derived from ``base``.
    """
    module, _, _ = path.partition(":")
    # An installed command looks for modules beside its script, python -m in the working directory. At the end: nothing is hidden.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{path}: importing {module} failed: {one_line(error)}") from error
        raise UserError(
            f"{path}: there is no module {error.name}; expected one that is installed, or that is in the working directory "
            f"({Path.cwd()})"
        ) from None
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{path}: importing {module} failed: {type(error).__name__}: {one_line(error)}") from error
    return imported_class(path, base)


def imported_class(path: str, base: type[T]) -> type[T]:
    """Returns the class of a path that :func:`import_class` imported before.

    Raises:
      UserError: the module was not imported, has no such class, or the class is no frozen dataclass derived from ``base``.
    """
    module, _, name = path.partition(":")
    if module not in sys.modules:
        raise only_named(path)
    try:
        cls = getattr(sys.modules[module], name)
    except AttributeError:
        classes = [each for each, value in vars(sys.modules[module]).items() if isinstance(value, type)]
        raise UserError(f"{path}: the module {module} has no class {name}{did_you_mean(name, classes)}") from None
    expected = f"{base.__module__.removesuffix('.base')}.{base.__qualname__}"
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"{path}: expected a class derived from {expected}, got {cls!r:.80}")
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise UserError(f"{path}: expected a frozen dataclass; write @dataclasses.dataclass(frozen=True) above class {name}")
    return cls


def only_named(path: str) -> UserError:
    """The error for a class that only a record names: it is never imported."""
    return UserError(
        f"{path} is named by a record alone, which is never imported: name it yourself, on the command line or in --config"
    )


def import_path(cls: type) -> str:
    """The text by which :func:`import_class` finds a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def code_digest(cls: type) -> str:
    """SHA-256 of a class's source file: one name may mean other code later."""
    file = getattr(sys.modules[cls.__module__], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def outside_code(values: Iterable[object]) -> dict[str, str]:
    """Import path -> :func:`code_digest`, for classes outside this package."""
    own = __package__.partition(".")[0] + "."
    return {import_path(cls): code_digest(cls) for cls in map(type, values) if not cls.__module__.startswith(own)}


def read_options(cls: type[T], text: str) -> T:
    """Makes a frozen dataclass from options such as "width=4&offset=1".

    Raises:
      UserError: the class has no such option, or the option cannot have this value.
    """
    kinds, values = typing.get_type_hints(cls), {}
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for part in filter(None, text.split("&")):
        name, equals, value = part.partition("=")
        if name not in names or not equals:
            raise UserError(f"{import_path(cls)}: expected options such as {names[0] if names else 'NONE'}=VALUE, got {part!r}")
        with refusing(ValueError, f"{import_path(cls)}: expected {name} to be a number, got {value!r}"):
            values[name] = _READERS.get(kinds[name], str)(value)
        refuse_beyond({name: values[name]})
    return cls(**values)


def write_options(value: Any) -> str:
    """The options as "?" and text of :func:`read_options`; empty if none."""
    words = []
    for name, option in dataclasses.asdict(value).items():
        words.append(f"{name}={str(option).lower() if isinstance(option, bool) else option}")
    return "?" + "&".join(words) if words else ""
