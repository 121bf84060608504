"""Loops of unknown length state how often they usually run, for plans."""

import contextlib
import re

import jax


def usual_turns(turns: float) -> contextlib.AbstractContextManager[None]:
    """A context for tracing a loop: states how often its body usually runs.

    The program is the same. For a kernel, which has a step for each block of its grid, ``turns`` is the share of steps that do
    something.
    """
    return jax.named_scope(f"usually_{turns:.6g}_turns")


def stated_turns(scopes: str) -> float | None:
    """What :func:`usual_turns` states about the innermost loop, or None."""
    stated = re.findall(r"usually_([\d.e+]+)_turns", scopes)
    return float(stated[-1]) if stated else None
