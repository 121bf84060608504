"""Reports, progress lines and summaries say what happened."""

import io
import json
import math
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from msgspec import structs
from rich.console import Console
from rich.table import Table

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.run_config import EMBEDDED, to_dict
from optima_tpu.errors import legible
from optima_tpu.method.outcomes import RowOutcomes
from optima_tpu.report import file, layer_means
from optima_tpu.report.contents import Perplexities
from optima_tpu.report.findings import unusual
from optima_tpu.report.numbers import duration, hms, number, percent
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Progress, Terminal, show
from optima_tpu.report.records import BlockReport
from optima_tpu.report.rows import layer_report
from optima_tpu.report.summary import print_summary
from optima_tpu.runtime.records import json_values
from tests.support.fake_reports import ENTRIES, TEXT, blocks_of, layer, report_of
from tests.support.meshes import mesh

DOWN = {"name": "mlp.down_proj", "shape": (2, 30), "rows": 2, "rows_converged": 2, "pruned": 30}
BLOCKS = (
    BlockReport(0, 1.5, (layer(0), layer(0, **DOWN, error_before=0.3, dead_inputs=7))),
    BlockReport(
        1,
        2.5,
        (
            layer(1, error_before=0.2, rows_converged=1, gap_max=math.inf, steps_median=10, rows_refused=3),
            layer(1, **DOWN, rows_refused=2),
        ),
    ),
)
LAYERS = [each for block in BLOCKS for each in block.layers]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=100, **options)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_keeps_its_digits_whatever_the_width(terminal):
    numbers = [f"{1234567 + index:,}" for index in range(9)]
    table = Table("program", *(f"column {index}" for index in range(9)), box=None)
    table.add_row("down", *numbers)
    out = Console(file=io.StringIO(), width=60, force_terminal=terminal, color_system=None)
    show(out, table)
    lines = out.file.getvalue().splitlines()
    if terminal:  # folded
        assert max(map(len, lines)) <= 60
        assert all(out.file.getvalue().count(digit) >= 9 for digit in "2345")
    else:
        assert lines[1].split() == ["down", *numbers]


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (1, "1.00"),
        (12.345, "12.3"),
        (9.996, "10.0"),
        (0.09996, "0.100"),
        (0.0001234, "0.000123"),
        (1234.5, "1234"),
        (-0.5, "-0.500"),
        (1e-5, "0.0000100"),
        (2e-9, "2.00e-9"),
        (-9.999e-6, "-1.00e-5"),
        (1.5e15, "1.50e15"),
        (math.inf, "not finite"),
        (math.nan, "not finite"),
    ],
)
def test_numbers_have_three_significant_digits_and_few_zeros(value, text):
    assert number(value) == text


def test_shares_have_three_digits_and_durations_their_largest_unit():
    shares = {0: "0%", 0.5: "50.0%", 0.07123: "7.12%", 1e-6: "0.000100%", 1e-9: "< 0.00001%", 1: "100%"}
    assert {share: percent(share) for share in shares} == shares
    times = (0.4, 7, 59.7, 725, 3599.7, 3723)
    assert [hms(seconds) for seconds in times] == ["0:00", "0:07", "1:00", "12:05", "1:00:00", "1:02:03"]
    assert [duration(seconds) for seconds in times] == ["0 s", "7 s", "1:00 min", "12:05 min", "1:00:00 h", "1:02:03 h"]


def test_experts_that_no_token_reached_are_in_no_mean():
    errors = dict(error_before=0.2, error_after=0.1, held_out_before=0.4, held_out_after=0.3)
    seen = layer(**errors, tokens=9, dense_before=0.5, dense_after=0.4, dense_drift=0.2)
    unseen, never = structs.replace(layer(tokens=9), error_before=0.4, error_after=0.3), layer(error_after=0.9, tokens=0)
    means = {
        "error_before": 0.3,
        "error_after": 0.2,
        "held_out_after": 0.3,
        "dense_before": 0.5,
        "dense_after": 0.4,
        "dense_drift": 0.2,
    }
    assert {name: layer_means.mean([seen, unseen, never], name) for name in means} == pytest.approx(means)
    assert math.isnan(layer_means.mean([seen, structs.replace(seen, held_out_after=math.inf)], "held_out_after"))
    assert layer_means.mean([never], "error_after") == 0.9 and layer_means.mean([never], "held_out_after") is None


def test_a_layer_without_held_out_tokens_has_no_error_on_them():
    ones, nothing = np.ones(4), np.zeros((4, 4))
    rows = RowOutcomes(ones, ones, ones, ones, ones, ones > 0, ones < 0, nothing[:3], nothing)
    others = {"block": 0, "name": "mlp.experts.0.up_proj", "dead_inputs": 0, "tokens": 9}
    record = layer_report(rows, (4, 8), 16, others)
    assert {record.held_out_before, record.held_out_after, record.dense_before, record.dense_after, record.dense_drift} == {None}
    record = layer_report(rows._replace(held_out=nothing[:3] + 2), (4, 8), 16, others)
    assert (record.held_out_before, record.held_out_after, record.dense_after) == (1, 1, None)


def test_sparsity_counts_weights_not_layers():
    assert layer_means.sparsity([layer(shape=(1, 10), pruned=10), layer(shape=(9, 10), pruned=0)]) == 0.1
    assert layer_means.sparsity([]) == 0


def test_unusual_is_named_and_only_unusual_is():
    assert unusual(LAYERS) == {
        "worse_on_held_out": {},
        "few_tokens": {},
        "dead_inputs": {"block 0 mlp.down_proj": 7},
        "rows_not_converged": {"block 1 self_attn.q_proj": 3},
        "rows_refused": {"block 1 self_attn.q_proj": 3},
        "layers_refused": {"block 1 mlp.down_proj": 2},
    }
    assert not any(unusual([layer()]).values())


def test_the_layer_that_the_fewest_tokens_reached_is_named_first():
    layers = [layer(index, shape=(4, 10), tokens=tokens) for index, tokens in enumerate((10, 9, 0))]
    assert list(unusual(layers)["few_tokens"].items()) == [("block 2 self_attn.q_proj", 0), ("block 1 self_attn.q_proj", 9)]
    line = next(line for line in printed(blocks_of(layers)).splitlines() if "fewer calibration tokens" in line)
    assert line.index("block 2 self_attn.q_proj (0 tokens)") < line.index("block 1 self_attn.q_proj (9 tokens)")


def walk(progress: Progress, clock: Clock) -> None:
    with progress:
        progress.stage("dense perplexity", total=2)
        for _ in range(2):
            clock.now += 3
            progress.advance()
        progress.stage("pruning", total=4, steps=[Step("block")] * 4)
        for index in range(4):
            progress.block(index, 4)
            clock.now += 10
            progress.layer(layer(index, error_before=0.2, error_after=0.1))
            progress.layer(layer(index, "mlp.down_proj", error_before=0.4, error_after=0.2))
            progress.advance()
        progress.stage("pruned perplexity", total=1)
        clock.now += 5
        progress.advance()


def test_a_block_shows_the_error_that_its_update_minimises(clock):
    progress = Progress(out := console(), clock)
    with progress:
        progress.stage("pruning", total=1)
        progress.block(0, 1)
        progress.layer(layer(error_before=0.0, error_after=0.01, dense_before=0.2, dense_after=0.1))
        progress.advance()
    assert "block 0 (1 of 1): error against dense 20.0% -> 10.0%, sparsity" in out.file.getvalue()


def test_without_a_terminal_a_stage_is_a_line_and_a_block_is_a_line(clock):
    out = console()
    walk(progress := Progress(out, clock), clock)
    assert progress.seconds == {"dense perplexity": 6, "pruning": 40, "pruned perplexity": 5}
    assert out.file.getvalue().splitlines() == [
        "   0:00  dense perplexity",
        "   0:06  pruning",
        "   0:06  block 0 (1 of 4): its programs are compiled first, or read from an earlier run; blocks like it reuse them",
        "   0:16  block 0 (1 of 4): calibration error 30.0% -> 15.0%, sparsity 50.0%, 10.0 s",
        "   0:26  block 1 (2 of 4): calibration error 30.0% -> 15.0%, sparsity 50.0%, 10.0 s, about 20 s left for pruning",
        "   0:36  block 2 (3 of 4): calibration error 30.0% -> 15.0%, sparsity 50.0%, 10.0 s, about 10 s left for pruning",
        "   0:46  block 3 (4 of 4): calibration error 30.0% -> 15.0%, sparsity 50.0%, 10.0 s",
        "   0:46  pruned perplexity",
    ]


def test_the_time_left_leaves_out_the_first_block_which_compiles(clock):
    out = console()
    progress = Progress(out, clock)
    progress.stage("pruning", total=30)
    for index, seconds in enumerate((10, 2, 4, 4)):
        progress.block(index, 30)
        clock.now += seconds
        progress.advance()
    left = ["2.0 s, about 56 s", "4.0 s, about 1:21 min", "4.0 s, about 1:44 min"]
    endings = [line.partition(" of 30): ")[2] for line in out.file.getvalue().splitlines()[2:]]
    assert endings == ["10.0 s", *(f"{each} left for pruning" for each in left)]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_silent_stage_says_how_far_it_is_ever_less_often_where_no_bar_shows_it(clock, terminal):
    out = console(force_terminal=terminal, color_system=None)
    progress = Progress(out, clock)
    progress.stage("dense perplexity", total=60)
    for step in range(60):
        if step == 40:
            progress.note("a line")  # the next one need not come before a minute from here
        clock.now += 4
        progress.advance()
    lines = [line for line in out.file.getvalue().splitlines() if " of 60 is done, " in line]
    expected = [(12, 3, "3:48 min"), (32, 8, "3:28 min"), (72, 18, "2:48 min"), (132, 33, "1:48 min"), (220, 55, "20 s")]
    assert lines == [
        f"{hms(second):>7}  dense perplexity, step {step} of 60 is done, about {left} left for dense perplexity"
        for second, step, left in ([] if terminal else expected)
    ]


def test_a_stage_that_is_late_in_its_last_step_does_not_say_that_nothing_is_known(clock):
    out = console()
    progress = Progress(out, clock)
    progress.stage("dense perplexity", total=3)
    for seconds in (1, 1, 30):
        clock.now += seconds
        progress._tell_if_quiet()
        progress.advance()
    assert out.file.getvalue().splitlines()[1:] == ["   0:32  dense perplexity, step 2 of 3 is done"]


def test_on_a_terminal_a_bar_shows_step_layer_and_time_left(clock):
    out = console(force_terminal=True, color_system=None)
    progress = Progress(out, clock)
    with progress:
        progress.stage("pruning", total=4)
        for index in range(2):
            progress.block(index, 4)
            clock.now += 10
            progress.advance()
        progress.block(2, 4)
        progress.layer(layer(2))
        progress._bars.refresh()
        text = out.file.getvalue()
    solved = "block 2 self_attn.q_proj: calibration error 12.3% -> 5.00%, sparsity 50.0%"
    for words in ("2/4", "about 20 s left for pruning", solved):
        assert words in text


def drawn(progress: Progress, out: Console) -> str:
    """What the bar shows now."""
    progress._bars.refresh()
    return out.file.getvalue()


def test_the_bar_says_which_time_is_elapsed_and_which_is_left_of_stage_and_run(clock):
    out = console(force_terminal=True, color_system=None)
    progress = Progress(out, clock)
    with progress:
        progress.ahead = [[Step("evaluation")] * 20, [Step("prompts", 0)]]
        progress.stage("dense perplexity", total=3, steps=[Step("evaluation")] * 3)
        assert "0:00 elapsed, time left not known yet" in drawn(progress, out)
        for seconds in (20, 6):
            clock.now += seconds
            progress.advance()
        clock.now += 5
        text = drawn(progress, out)
    assert "0:31 elapsed, about 1 s left" in text
    assert "the run: 0:31 elapsed, at least 2:01 min left" in text


def test_a_stage_that_an_earlier_one_measured_says_its_time_before_it_begins(clock):
    out = console()
    progress, steps = Progress(out, clock), [Step("evaluation")] * 5
    prompts = [Step("prompts", 0)]
    stages = {"dense perplexity": [steps] * 4, "a text": [steps] * 2, "another": [steps, prompts], "pruned perplexity": [prompts]}
    for name, ahead in stages.items():
        progress.ahead = ahead
        progress.stage(name, 5, steps)
        for seconds in (5, 1, 1, 1, 1):
            clock.now += seconds
            progress.advance()
    assert out.file.getvalue().splitlines() == [
        "   0:00  dense perplexity",
        "   0:09  a text, about 5 s, about 15 s left for the run",
        "   0:18  another, about 5 s",
        "   0:27  pruned perplexity, about 5 s",
    ]


def test_a_long_step_says_what_is_done_before_its_end(clock):
    """Once, the first block was silent for 4:31 minutes until it ended."""
    out = console()
    progress = Progress(out, clock)
    progress.stage("pruning", total=2, steps=[Step("calibrating"), Step("solving")] * 2)
    progress.block(0, 2)
    progress.begin("calibrating", "reading the calibration text")
    for seconds in (9, 1, 15):
        clock.now += seconds
        progress._tell_if_quiet()  # a thread asks every second
    progress.begin("solving", "pruning mlp.up_proj")
    clock.now += 5
    progress._tell_if_quiet()
    assert out.file.getvalue().splitlines() == [
        "   0:00  pruning",
        "   0:00  block 0 (1 of 2): its programs are compiled first, or read from an earlier run; blocks like it reuse them",
        "   0:10  block 0 (1 of 2), reading the calibration text (first time, slower), time left not known yet",
        "   0:30  block 0 (1 of 2), pruning mlp.up_proj (first time, slower), time left not known yet",
    ]


def test_a_stage_of_one_step_says_how_long_it_goes_on(clock):
    out = console()
    progress = Progress(out, clock)
    progress.stage("measuring the speed", total=1)
    for _ in range(2):
        clock.now += 20
        progress._tell_if_quiet()
    assert out.file.getvalue().splitlines()[1:] == [
        "   0:20  measuring the speed, 0:20 elapsed",
        "   0:40  measuring the speed, 0:40 elapsed",
    ]


def test_without_an_update_a_block_has_one_error(clock):
    out = console()
    progress = Progress(out, clock)
    progress.block(0, 2)
    progress.layer(layer(error_before=0.3, error_after=0.3))
    progress.advance()
    assert "calibration error 30.0%, sparsity" in out.file.getvalue()


def test_a_resumed_walk_begins_where_the_earlier_start_ended_and_says_what_it_does_before_its_first_block(clock):
    out = console()
    progress = Progress(out, clock)
    progress.stage("pruning", total=30, steps=[Step("calibrating")] * 7, done=23)
    progress.begin("before", "getting the hidden states that enter block 23")
    clock.now += 30
    progress._tell_if_quiet()  # a thread asks every second
    progress.block(23, 30)
    for seconds in (50, 2, 2):
        progress.begin("calibrating", "reading the calibration text")
        clock.now += seconds
    assert out.file.getvalue().splitlines() == [
        "   0:00  pruning",
        "   0:30  pruning, step 23 of 30 is done, getting the hidden states that enter block 23 (first time, slower), time left "
        "not known yet",
        "   0:30  block 23 (24 of 30): its programs are compiled first, or read from an earlier run; blocks like it reuse them",
    ]
    assert progress.left() == "about 8 s left for pruning"  # not of the 30 seconds before the block


def test_a_thread_asks_whether_a_step_is_silent_only_where_no_bar_moves(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(Progress, "_tell_if_quiet", lambda self: asked.set())
    with Progress(console()):
        assert asked.wait(30)
    asked.clear()
    with Progress(console(force_terminal=True)) as progress:
        assert not progress._watching


def test_steps_that_an_earlier_start_did_count_as_done_and_not_as_measured(clock):
    out = console(force_terminal=True, color_system=None)
    progress = Progress(out, clock)
    with progress:
        progress.stage("training", total=100)
        progress.skip(["training"] * 90)
        for seconds in (60, 2):
            clock.now += seconds
            progress.advance()
        assert "92/100" in drawn(progress, out) and progress.left() == "about 16 s left for training"


def test_a_training_counts_its_steps_as_its_own_lines_do_and_not_the_checks(clock):
    out = console()
    progress, one = Progress(out, clock), [Step("training step"), Step("check")]
    progress.stage("training", total=4, steps=[Step("dense"), Step("check"), *one * 4], counted="training step")
    progress.skip(["check", "training step", "check"])  # an earlier start took a step, and the dense model reads the text again
    for seconds in (1, 1, 1, 30):
        clock.now += seconds
        progress.advance()
    progress._tell_if_quiet()  # a thread asks every second
    assert " training, step 3 of 4 is done" in out.file.getvalue()


def test_only_process_0_speaks(clock, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for terminal in (False, True):
        out = console(force_terminal=terminal)
        progress = Progress(out, clock)
        walk(progress, clock)
        assert out.file.getvalue() == ""
        assert progress.seconds["pruning"] == 40


def test_an_exception_passes_and_leaves_the_terminal_usable(clock):
    out = console(force_terminal=True)
    with pytest.raises(ZeroDivisionError), Progress(out, clock) as progress:
        progress.stage("pruning", total=4)
        raise ZeroDivisionError
    assert out.file.getvalue().rindex("\x1b[?25h") > out.file.getvalue().rindex("\x1b[?25l")  # the cursor is back


def printed(blocks, solver="cg", width=80, **changes) -> str:
    out = Console(file=io.StringIO(), width=width)
    changes = {
        "configuration": to_dict(EMBEDDED.changed(solver=CHOICES["solver"][solver]() if solver else None)),
        "perplexity": Perplexities(29.187, 48.351),
        "evaluation": structs.replace(TEXT, how="pydoc, 40 windows of 512"),
        "files": {"report": "elsewhere/report.json"},
    } | changes
    print_summary(out, report_of(blocks, **changes), Path("runs/x"))
    return out.file.getvalue()


def test_the_summary_tells_errors_against_the_dense_model_where_there_are_some():
    aiming = [BlockReport(0, 1.0, (layer(held_out_before=0.2, held_out_after=0.1, dense_before=0.3, dense_after=0.25),))]
    row = next(line for line in printed(aiming).splitlines() if line.startswith("q_proj")).split()
    assert row[1:6] == ["25.0%", "12.3%", "5.00%", "10.0%", "50.0%"] and "Against dense:" in printed(aiming)
    assert "Against dense:" not in printed(BLOCKS) and "against" not in printed(BLOCKS)
    weighing = printed(aiming, weighed_layers=("self_attn.o_proj", "mlp.down_proj"))
    assert "o_proj and down_proj: tokens weighed" in weighing and "weighed" not in printed(aiming)


def test_a_narrow_console_cuts_no_number_of_the_summary():
    def table(text):
        return [line.split() for line in text.splitlines() if line.startswith(("layer", "q_proj", "down_proj"))]

    narrow = printed(BLOCKS, width=30)
    assert "…" not in narrow and table(narrow) == table(printed(BLOCKS, width=200))


def test_the_summary_says_what_it_cost_what_was_unusual_and_where_it_is():
    text = printed(BLOCKS)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["q_proj"] == ["16.2%", "5.00%", "50.0%", "not", "finite", "9", "3", "3"]
    assert rows["down_proj"] == ["21.2%", "5.00%", "50.0%", "0.100%", "8", "0", "2"]
    assert "dense 29.19, pruned 48.35, 1.66 times, worse, on pydoc, 40 windows of 512" in text
    assert "50.0% of the 200 weights in 4 matrices" in text
    assert "1.50 GiB on the host" in text
    named = ("block 0 mlp.down_proj (7 inputs)", "block 1 self_attn.q_proj (3 rows)", "block 1 mlp.down_proj (2 rows)")
    for words in (*named, "record  runs/x/report.json", "in percent of the output's energy"):
        assert words in text


@pytest.mark.parametrize("solver, said", [("cg", "a certified upper bound"), ("mpax", "by mpax's own measure")])
def test_only_a_certified_gap_is_called_a_bound(solver, said):
    (line,) = [line for line in printed(BLOCKS, solver, width=200).splitlines() if line.startswith("Gap:")]
    assert said in line and ("bound" in line) == (solver == "cg")
    assert line.endswith(". A row stops at 0.100%, solver.tolerance.") == (solver == "cg")


def test_without_a_solver_nothing_is_said_about_one():
    text = printed([BlockReport(0, 1.0, (layer(),))], solver=None)
    for words in ("gap", "after", "converged", "refused", "steps"):
        assert words not in text.lower()
    assert "unusual     nothing" in text


def test_layers_whose_last_names_agree_keep_their_whole_names():
    text = printed([BlockReport(0, 1.0, (layer(0, "self_attn.proj"), layer(0, "mlp.proj")))])
    assert "self_attn.proj" in text and "mlp.proj" in text


def test_many_troubles_are_counted_not_listed():
    blocks = [BlockReport(index, 1.0, (layer(index, dead_inputs=index + 1),)) for index in range(9)]
    line = next(line for line in printed(blocks).splitlines() if "dead inputs" in line)
    assert "block 8 self_attn.q_proj (9 inputs)" in line and "block 4" not in line
    assert line.endswith("5 more in the report")


def written(path, **changes):
    entries = ENTRIES | {"environment": file.environment(mesh(4, 2)), "memory": file.memory_peaks()}
    return file.write_report(path, entries | changes, BLOCKS)


def test_report_json_holds_it_all(tmp_path):
    report = written(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read == json_values(report) and report.blocks == BLOCKS
    assert (read["sparsity"], read["weights"], read["pruned"]) == (0.5, 200, 100)
    assert 2**26 < read["memory"]["host_peak"] < 2**40, "bytes, and Python with jax needs more than 64 MiB"
    assert read["unusual"] == unusual(LAYERS)
    assert read["environment"]["mesh"] == {"data": 4, "model": 2}
    assert read["environment"]["packages"]["jax"] == jax.__version__
    assert read["blocks"][1]["layers"][0]["gap_max"] is None
    assert read["perplexity"] == {"dense": 2.0, "pruned": 3.0} and read["configuration"] == to_dict(EMBEDDED)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    written(tmp_path / "report.json")
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(TypeError):
        written(tmp_path / "report.json", recipe=object())
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_perplexity_of_308_digits_is_shown_with_an_exponent():
    assert number(math.exp(709), 4) == "8.218e307" and number(None) == "not finite"
    assert number(999999999999999.0) == "999999999999999"


@pytest.mark.parametrize("text", ["[/bold]", "[link=file:///x]here[/link]", ":smile:", "a\x1b[31mred\rb"])
def test_a_text_from_a_file_is_printed_as_it_is(text):
    out = Terminal(file=io.StringIO(), width=120)
    shown = Table("label")
    shown.add_row(text)
    show(out, shown)
    out.print(text)
    assert out.file.getvalue().count(legible(text)) == 2
