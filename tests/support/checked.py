"""The type checker of the functions of ``optima_tpu.method`` while tests run; see ``tests/conftest.py``."""

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPepUnsupportedException

Function = TypeVar("Function", bound=Callable)

# An int will do for a float, as it does for a type checker.
_AS_TYPE_CHECKERS = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Function) -> Function:
    """The function with its arguments and its result checked, but for two kinds.

    Values are trees, whose leaves may be shapes or shardings in the place of arrays: what makes one takes anything. And beartype
    (0.23) has no check for a generic NamedTuple in a signature: ``TokenSets``, ``Given``, ``Best``.
    """
    if function.__name__ == "__init__":
        return function
    try:
        return _AS_TYPE_CHECKERS(function)
    except BeartypeDecorHintPepUnsupportedException:
        return function
