"""Checks types in ``optima_tpu.method`` while tests run; see conftest.py."""

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPepUnsupportedException

Function = TypeVar("Function", bound=Callable)

# An int will do for a float, as it does for a type checker.
_AS_TYPE_CHECKERS = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Function) -> Function:
    """Makes a function check the types of its arguments and its result.

    Two kinds are not checked. Constructors take anything, because the leaves of a tree may be shapes or shardings instead of
    arrays. And beartype (0.23) has no check for a generic NamedTuple in a signature: ``TokenSets``, ``Given``, ``Best``.
    """
    if function.__name__ == "__init__":
        return function
    try:
        return _AS_TYPE_CHECKERS(function)
    except BeartypeDecorHintPepUnsupportedException:
        return function
