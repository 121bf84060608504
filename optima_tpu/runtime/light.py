"""Runs functions of this package without the libraries they do not use.

Settings are declared beside the mathematics: the module of a solver imports JAX, its dataclass has the names, types, defaults,
help texts and checks of the solver's options. Reading or refusing settings needs the second alone, and importing JAX takes half a
second to several. So the modules are loaded once more, beside the real ones, with :class:`_Absent` in the place of each library.
It can be named, as in annotations, decorators and base classes. Whatever needs its value raises :class:`NeedsLibraries`, and the
real function is called. So a function either does here what it does with its libraries, or nothing.
"""

import builtins
import importlib
import importlib.machinery
import operator
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optima_tpu.errors import UserError

_PACKAGE = __package__.partition(".")[0]
_ROOT = Path(__file__).parents[1]
_LIBRARIES = ("docstring_parser", "jsonargparse", "msgspec", "rich", "ruamel")
"""The libraries that light modules share with the real ones, beside the standard library."""
_SHARED = (f"{_PACKAGE}.errors", f"{_PACKAGE}.runtime.program", f"{_PACKAGE}.runtime.signals", __name__)
"""The modules of this package that are shared: an exception is caught by its class, and signals come to one listener."""


class NeedsLibraries(BaseException):
    """A function needs a library. ``except Exception`` does not catch it."""


def rehearsed(name: str, *arguments: Any, first: Callable[[Any], None] = lambda result: None) -> Any:
    """The result of a function, "module:name", after its rehearsal.

    Args:
      first: called once with the result, before the libraries load if the function needs none of them.
    """
    try:
        first(_tried(name, *arguments))
    except _Undecided:
        result = real(name)(*arguments)
        first(result)
        return result
    return real(name)(*arguments)


def lightly(name: str, *arguments: Any) -> Any:
    """Runs "module:name", without libraries if it needs none of them."""
    try:
        return _tried(name, *arguments)
    except _Undecided:
        return real(name)(*arguments)


class _Undecided(Exception):
    """A function has no result without its libraries."""


def _tried(name: str, *arguments: Any) -> Any:
    if "jax" in sys.modules:  # nothing is to be saved
        raise _Undecided
    try:
        return without_libraries(name, *arguments)
    except (UserError, OSError):
        raise
    # Another error may be a consequence, as of ``except library.Error``. If it is a defect, the real call shows it.
    except (NeedsLibraries, Exception) as error:
        raise _Undecided from error


def without_libraries(name: str, *arguments: Any) -> Any:
    """The result of a function, "module:name", in light modules.

    Raises:
      NeedsLibraries: it needs a library.
    """
    module, _, function = name.partition(":")
    return getattr(_Modules().load(module), function)(*arguments)


def real(name: str) -> Callable[..., Any]:
    """The function "module:name", imported with the libraries it needs."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


class _Modules:
    """Light modules of this package, by name, and how they import others."""

    def __init__(self) -> None:
        self.loaded: dict[str, types.ModuleType] = {}
        self.loading = 0
        self.absent = _Absent(self)
        self.importlib = types.SimpleNamespace(**vars(importlib) | {"import_module": self.absent})
        self.builtins = vars(builtins) | {"__import__": self.import_}

    def load(self, name: str) -> types.ModuleType:
        if name in _SHARED:
            return importlib.import_module(name)
        if name not in self.loaded:
            path = _ROOT.joinpath(*name.split(".")[1:])
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            module = self.loaded[name] = types.ModuleType(name)
            # Kept in __pycache__, like the real one's.
            code = importlib.machinery.SourceFileLoader(name, str(path)).get_code(name)
            assert code is not None
            vars(module).update(__builtins__=self.builtins, __file__=str(path), __package__=name.rpartition(".")[0])
            self.loading += 1
            # ``dataclasses`` asks sys.modules for the module of a class that has an annotation in quotes.
            beside = sys.modules.setdefault(name, module) is module
            try:
                exec(code, vars(module))
            finally:
                self.loading -= 1
                if beside:
                    del sys.modules[name]
        return self.loaded[name]

    def import_(self, name: str, names: Any = None, local: Any = None, wanted: Sequence[str] | None = (), level: int = 0) -> Any:
        """What ``import`` calls in light modules; see ``__import__``."""
        root = name.partition(".")[0]
        if root == "importlib":
            return self.importlib
        if root in sys.stdlib_module_names or root in _LIBRARIES:
            return builtins.__import__(name, names, local, wanted or (), level)
        if root != _PACKAGE:
            return self.absent
        module = self.load(name)
        for each in wanted or ():
            if not hasattr(module, each):  # from package import module
                setattr(module, each, self.load(f"{name}.{each}"))
        return module


class _Base:
    """A base class in the place of a library's class, without values."""

    def __new__(cls, *arguments: Any, **options: Any) -> "_Base":
        raise NeedsLibraries

    def __init_subclass__(cls, **options: Any) -> None:
        pass


class _Absent:
    """An absent library or a part of it, which can be named but not used."""

    def __init__(self, modules: _Modules):
        self._modules = modules

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):  # the standard library asks types and functions for such attributes
            raise AttributeError(name)
        return self._named()

    def _named(self, *arguments: Any, **options: Any) -> "_Absent":
        if not object.__getattribute__(self, "_modules").loading:
            raise NeedsLibraries
        return self

    def _used(self, *arguments: Any, **options: Any) -> Any:
        raise NeedsLibraries

    def __eq__(self, other: object) -> bool:
        self._named()
        return self is other

    __hash__ = object.__hash__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (_Base,)

    @property  # type: ignore[misc]  # isinstance(absent, type) asks for it
    def __class__(self) -> Any:
        self._named()
        return _Absent

    __instancecheck__ = __subclasscheck__ = __bool__ = __len__ = __iter__ = __enter__ = _used
    __int__ = __float__ = __str__ = __format__ = __fspath__ = _used


for _name in {each for each in vars(operator) if each.startswith("__") and callable(getattr(operator, each))}:
    for _method in (_name, _name.replace("__", "__r", 1)):  # __add__ and __radd__
        if _method not in vars(_Absent):
            setattr(_Absent, _method, _Absent._named)
