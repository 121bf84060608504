"""Every bound of a field refuses what is beyond it, with name and advice."""

import dataclasses
import math
import typing
from typing import Annotated

import pytest

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.run_config import Calibration, CutStructures, Evaluation, RunConfig
from optima_tpu.errors import UserError
from optima_tpu.evaluate.config import EvaluateConfig
from optima_tpu.method.quantization import Int4, Int8
from optima_tpu.method.selectors import ADMM, SparseGPT, Thanos
from optima_tpu.method.solvers import Adam
from optima_tpu.pipeline.recover.config import RecoverConfig
from optima_tpu.runtime.bounds import MOST, Bound, Bounded, Filled
from tests.support.refusals import refusal


@dataclasses.dataclass(frozen=True)
class Example(Bounded):
    setting: typing.ClassVar[str] = "example"

    count: Annotated[int, Bound(1, 10, hint="4 is usual")] = 4
    share: Annotated[float | None, Bound(above=0, below=1)] = None
    rates: Annotated[tuple[float, ...], Bound(above=0)] = (0.5,)
    open: Annotated[float, Bound(0)] = 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "expected example.count from 1 to 10, got 0; 4 is usual"),
        ({"count": 11}, "expected example.count from 1 to 10, got 11; 4 is usual"),
        ({"share": 0.0}, "expected example.share above 0 and below 1, got 0.0"),
        ({"share": 1.0}, "expected example.share above 0 and below 1, got 1.0"),
        ({"rates": (0.1, -1.0)}, "expected example.rates above 0, got -1.0"),
        ({"open": math.nan}, "expected example.open to be a finite number of at least 0, got nan"),
        ({"open": math.inf}, "expected example.open to be a finite number of at least 0, got inf"),
        ({"open": MOST + 1}, f"expected example.open from 0 to {MOST}, got {MOST + 1}"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(values, message):
    assert refusal(Example, **values) == message


def test_what_is_in_bounds_is_taken():
    for values in ({"count": 1}, {"count": 10}, {"share": 0.5}, {"share": None}, {"rates": ()}, {"open": MOST}):
        assert dataclasses.asdict(Example(**values)) | values == dataclasses.asdict(Example(**values))


METHODS = {(setting, cls) for setting, methods in CHOICES.items() for cls in methods.values() if cls}
COMMANDS = {("", RunConfig), ("", EvaluateConfig), ("", RecoverConfig), ("calibration", Calibration), ("evaluation", Evaluation)}
COMMANDS |= {("cut", CutStructures)}


@pytest.mark.parametrize(
    ("cls", "setting", "value", "words"),
    [
        (ADMM, "damping", -0.1, "of at least 0"),
        (ADMM, "inverses", 13, "of at most the number of levels"),
        (ADMM, "levels", 0, "of at least 1"),
        (ADMM, "rho_first", 2.0, "at most rho_last"),
        (Adam, "learning_rates", (), "one number or more"),
        (Adam, "learning_rates", (1e-2, 0.0), "above 0"),
        (Adam, "steps", 0, "of at least 1"),
        (Int4, "group", 0, "of at least 1"),
        (Int8, "clip", 0.0, "above 0 and at most 1"),
        (Int8, "sweeps", -1, "of at least 0"),
        *((cls, *each) for cls in (SparseGPT, Thanos) for each in (("block", 0, "of at least 1"), ("damping", 0.0, "above 0"))),
    ],
)
def test_a_method_refuses_what_means_nothing(cls, setting, value, words):
    message = refusal(cls, **{setting: value})
    assert f".{setting}" in message and words in message


def beyond_of(bound: Bound | Filled) -> list[tuple[float | str, str]]:
    """Values that a bound refuses, and what the message calls them."""
    if isinstance(bound, Filled):
        return [("", "an empty text"), (" ", "an empty text")]
    low = bound.least - 1 if bound.above is None else bound.above
    return [(low, str(low)), (math.nan, "nan")]


@pytest.mark.parametrize(
    ("setting", "cls"), sorted(METHODS | COMMANDS, key=str), ids=lambda each: getattr(each, "__name__", each)
)
def test_every_setting_is_held_to_its_bound(setting, cls):
    needed = {"model": "org/model", "tokens": "1k"} if setting == "" else {}
    needed = {name: value for name, value in needed.items() if name in {field.name for field in dataclasses.fields(cls)}}
    hints = typing.get_type_hints(cls, include_extras=True)
    bounds = {name: each for name, hint in hints.items() for each in getattr(hint, "__metadata__", ())}
    for name, bound in bounds.items():
        several = "tuple" in str(hints[name])
        for beyond, text in beyond_of(bound):
            with pytest.raises(UserError, match=f"expected {setting and setting + '.'}{name} ") as refused:
                cls(**needed | {name: (beyond,) if several else beyond})
            assert f"got {text}" in str(refused.value)
