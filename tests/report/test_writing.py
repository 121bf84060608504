"""Which tokens got worse, and what models write: counted, shown as text."""

import math

import numpy as np
import pytest
from msgspec import structs

from optima_tpu.evaluate.token_changes import EDGES, pieces, readable, token_changes
from optima_tpu.report import writing
from optima_tpu.report.contents import ChangedToken, Continuation, Continuations, TokenChanges
from optima_tpu.report.runs import FinishedRun, read_report
from optima_tpu.runtime.records import encoded
from tests.report.test_html_report import drawn, unplotted  # noqa: F401  (a fixture)
from tests.support.fake_reports import report_of, write_run
from tests.support.records import put


def changes(rise, dense=1.0, decode=lambda ids: " ".join(map(str, ids))):
    rise = np.asarray(rise, np.float32)
    before = np.full_like(rise, dense)
    ids = np.arange(rise.shape[0] * (rise.shape[1] + 1), dtype=np.int32).reshape(rise.shape[0], -1)
    return token_changes(before, before + rise, ids, decode)


def test_every_token_is_in_one_class():
    rise = np.array([[-3.0, -1.0, -0.2, 0.0, 0.05, 0.2, 1.0, 3.0]])
    changed = changes(rise, dense=4.0)
    assert changed.shares == (0.125, 0.125, 0.125, 0.25, 0.125, 0.125, 0.125) and changed.edges == EDGES
    assert changed.tokens == 8 and changed.mean == pytest.approx(rise.mean(), abs=1e-6)
    assert changed.mean_stderr is None  # of one window
    windows = np.random.default_rng(0).normal(0.3, 1, (5, 8)).astype(np.float32)
    assert changes(windows).mean_stderr == pytest.approx(windows.mean(axis=1).std(ddof=1) / 5**0.5, rel=1e-4)
    assert changed.median == pytest.approx(0.025, abs=1e-6) and changed.rise_share == pytest.approx(3 / 0.05, rel=1e-3)
    assert changes(np.zeros((2, 3))).rise_share is None and changes(np.zeros((2, 3))).worst == ()


def test_the_worst_tokens_have_their_place_their_text_and_both_probabilities():
    rise = np.zeros((3, 40))
    rise[1, 4], rise[1, 5], rise[2, 30], rise[0, 0] = 3.0, 2.9, 2.0, 1.0
    worst = changes(rise).worst
    # The second one is beside the first.
    assert [(each.window, each.position) for each in worst] == [(1, 5), (2, 31), (0, 1)]
    first, second, third = worst
    assert (first.before, first.token, first.after) == ("41 42 43 44 45", " 46", " 47 48 49 50 51 52")
    assert second.before.split()[0] == str(2 * 41 + 11) and third.before == "0"
    assert (first.dense, first.pruned) == pytest.approx((math.exp(-1), math.exp(-4)))


def test_it_stays_small_whatever_the_text():
    random = np.random.default_rng(0)
    changed = changes(random.normal(size=(50, 511)), decode=lambda ids: "𝒳" * 1000)
    assert len(changed.worst) == 10
    assert len(encoded(changed)) < 22_000  # twelve bytes for each of these letters


def test_what_is_not_printed_has_a_sign():
    assert readable("a\r\nb\tc\x00d\u202ee é") == "a⏎b⇥c�d�e é"


TOKENS = TokenChanges(
    tokens=1000,
    mean=0.128,
    mean_stderr=None,
    median=0.03,
    edges=EDGES,
    shares=(0.01, 0.04, 0.15, 0.4, 0.2, 0.15, 0.05),
    rise_share=0.31,
    worst=(ChangedToken(0, 3, "<script>alert(1)</script>{{ 7 * 7 }}", "<b onload=x>", '" & more', 0.9, 0.0009),),
)
CONTINUATIONS = Continuations(
    (
        Continuation("<i>Once", ("upon a <u>time", " there", " was"), ("upon a <u>time", "<br>", " the")),
        Continuation("Two", (" and two", "", ""), (" and two", "", "")),
    )
)


def with_writing(run, **changes):
    report = structs.replace(read_report(str(run)), **{"tokens": TOKENS, "continuations": CONTINUATIONS} | changes)
    put(run / "report.json", encoded(report).decode())
    return run


def told_of(**changes) -> str:
    run = FinishedRun("", "run", report_of((), tokens=structs.replace(TOKENS, **changes)), None)
    return writing.tokens([run])[0].text[0]


@pytest.mark.parametrize("mean, noise, certain", [(0.128, 0.05, True), (0.0004, None, False), (0.09, 0.05, False)])
def test_a_share_of_a_rise_that_may_be_none_is_not_told(mean, noise, certain):
    assert ("of the total rise" in told_of(mean=mean, mean_stderr=noise)) == certain


@pytest.mark.parametrize(
    "mean, median, sentence",
    [
        (0.285, 0.145, "The loss rises by 0.285 nats on average; its median rises by 0.145 nats."),
        (-0.0075, 0.0, "The loss falls by 0.00750 nats on average; its median does not change."),
    ],
)
def test_a_loss_rises_or_falls_by_a_positive_number(mean, median, sentence):
    assert sentence in told_of(mean=mean, median=median)


def test_text_with_markup_is_shown_and_not_run(tmp_path, unplotted):  # noqa: F811
    page = drawn(with_writing(write_run(tmp_path / "run")), to=tmp_path / "x.html")
    assert not {"script", "b", "i", "u"} & {tag for tag, *_ in page.attributes}
    text = (tmp_path / "x.html").read_text()
    assert "<script" not in text and "<br" not in text and "49" not in page.sections["tokens"]
    (row,) = page.tables["Tokens with the largest rise of the loss"][1:]
    assert row == ['<script>alert(1)</script>{{ 7 * 7 }}<b onload=x>" & more', "90.0%", "< 0.1%"]
    assert "<mark>&lt;b onload=x&gt;</mark>" in text
    for words in ("40.0% of 1,000 tokens worse", "20.0% better", "within 0.1 nats", "cause 31.0%"):
        assert words in page.sections["tokens"]
    classes = {row[0]: row[1] for row in page.tables["Tokens by the change of their loss"][1:]}
    assert list(classes.values()) == ["1.00%", "4.00%", "15.0%", "40.0%", "20.0%", "15.0%", "5.00%"]
    assert [list(classes)[index] for index in (0, 2, 3, 4, 6)] == [
        "more than 2 better",
        "0.1 to 0.5 better",
        "alike, within 0.1",
        "0.1 to 0.5 worse",
        "more than 2 worse",
    ]
    assert page.tables["After a prompt"][1:] == [
        ["<i>Once", "upon a <u>time there was", "upon a <u>time<br> the"],
        ["Two", " and two", " and two"],
    ]
    assert "upon a &lt;u&gt;time<mark>&lt;br&gt;</mark> the" in text


def test_a_reason_stands_in_for_what_was_not_tried(tmp_path, unplotted):  # noqa: F811
    run = with_writing(write_run(tmp_path / "run"), tokens=None, continuations=Continuations(reason="It is <too> large."))
    page = drawn(run, to=tmp_path / "x.html")
    assert "tokens" not in page.sections and "It is <too> large." in page.sections["continuations"]


def test_runs_side_by_side_have_their_own(tmp_path, unplotted):  # noqa: F811
    runs = [with_writing(write_run(tmp_path / "a")), write_run(tmp_path / "b")]
    page = drawn(*runs, to=tmp_path / "x.html")
    assert f"Tokens with the largest rise of the loss, wanda + cg, {runs[0]}" in page.tables
    assert page.sections["tokens"].count("tokens worse than the dense") == 1


def test_a_token_keeps_the_space_before_it():
    """As with tokenizers that drop it where a token is decoded alone."""
    words = {1: "▁the", 2: "▁stone", 3: "s"}

    def decode(ids):
        return "".join(words[token] for token in ids).replace("▁", " ").removeprefix(" ")

    assert pieces(decode, [1], [2], [3]) == ["the", " stone", "s"]
    # A letter of two tokens reads otherwise once it is whole: then each part is decoded alone.
    halves = {(4,): "�", (4, 5): "é", (5,): "�", (1, 4): "the�", (1, 4, 5): "theé", (1,): "the"}
    assert pieces(lambda ids: halves[tuple(ids)], [1, 4], [5]) == ["the�", "�"]
