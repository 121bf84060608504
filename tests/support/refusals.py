"""The error that a person reads who typed something wrong."""

from collections.abc import Callable

import pytest

from optima_tpu.errors import UserError


def refusal(call: Callable, *given, **named) -> str:
    """The one line by which a call refuses what it was given."""
    with pytest.raises(UserError) as caught:
        call(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)
