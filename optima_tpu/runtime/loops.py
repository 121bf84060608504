"""Loops whose length is known only while they run say how long they usually are, for plans."""

import contextlib
import re

import jax


def usual_turns(turns: float) -> contextlib.AbstractContextManager[None]:
    """A context in which a loop of unknown length is traced, to say how often its body usually runs. The program is the same.

    Of a kernel, which has a step for each block of its grid, it says the share of the steps that do something.
    """
    return jax.named_scope(f"usually_{turns:.6g}_turns")


def stated_turns(scopes: str) -> float | None:
    """What :func:`usual_turns` said, from the scopes around a loop: the innermost counts. None if nothing was said."""
    said = re.findall(r"usually_([\d.e+]+)_turns", scopes)
    return float(said[-1]) if said else None
