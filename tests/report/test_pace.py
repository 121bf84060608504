"""The time left, from steps and seconds of many kinds of machines."""

import pytest

from optima_tpu.report.pace import Pace, Step, remaining


def after(*steps: tuple[str, float]) -> Pace:
    """The pace after steps of a unit of work each, with their seconds."""
    pace = Pace()
    for kind, seconds in steps:
        pace = pace.after(Step(kind), seconds)
    return pace


def block(pruned: bool) -> list[Step]:
    return [Step("solving")] * pruned + [Step("passing")]


def test_blocks_that_stay_dense_cost_what_a_dense_block_costs():
    pace = after(("solving", 30), ("passing", 5), ("solving", 10), ("passing", 1))
    assert pace.left([step for pruned in (True, *[False] * 9) for step in block(pruned)]) == pytest.approx(10 + 10 * 1)


def test_the_first_step_of_a_kind_is_never_multiplied():
    pace = after(("training step", 60.0))
    assert pace.left([Step("training step")] * 30) is None
    assert pace.left([Step("training step")]) is None
    assert pace.after(Step("training step"), 7.0).left([Step("training step")] * 30) == pytest.approx(30 * 7)


@pytest.mark.parametrize("factor", [0.5, 2, 4])
def test_a_machine_that_changes_its_speed_is_followed_within_three_steps(factor):
    pace = after(("step", 40.0), *[("step", 10.0)] * 20, *[("step", 10.0 * factor)] * 3)
    assert pace.left([Step("step")] * 10) == pytest.approx(10 * 10 * factor)


def test_one_step_that_the_machine_delayed_does_not_change_the_time_left():
    assert after(("step", 40.0), *[("step", 2.0)] * 4, ("step", 90.0)).left([Step("step")] * 10) == pytest.approx(20)


def test_work_of_other_sizes_takes_time_in_proportion():
    pace = Pace().after(Step("text", 8), 99).after(Step("text", 8), 4)
    assert pace.left([Step("text", 2), Step("text", 6)]) == pytest.approx(4)


def test_the_step_that_goes_on_counts_only_what_is_left_of_it():
    pace, steps = after(("step", 9.0), ("step", 4.0)), [Step("step")] * 3
    assert pace.left(steps, into=3) == pytest.approx(9)
    assert pace.left(steps, into=300) == pytest.approx(8)  # late, and the others still take their time


def test_a_few_steps_that_nothing_is_known_of_count_like_the_others_and_many_make_the_time_unknown():
    pace = after(("block", 9.0), ("block", 2.0))
    assert pace.left([Step("block")] * 10 + [Step("head")]) == pytest.approx(22)
    assert pace.left([Step("block")] * 10 + [Step("training step")] * 10) is None


def test_a_kind_that_was_never_measured_takes_the_rate_of_the_kind_that_it_is_like():
    pace, head = after(("block", 9.0), ("block", 2.0)), [Step("head", 3.0, like="block")] * 10
    assert pace.left([*[Step("block")] * 10, *head]) == pytest.approx(80)
    pace = pace.after(head[0], 99.0).after(head[0], 12.0)
    assert pace.left([Step("block"), *head]) == pytest.approx(2 + 10 * 12)


def test_the_time_of_a_whole_run_comes_from_stages_that_share_their_steps():
    """From block 1 on, the estimate is within a tenth of the truth.

    The run measures the dense perplexity, prunes, and measures the pruned perplexity.
    """
    perplexity = [Step("evaluation")] * 10
    pace = after(("evaluation", 8.0), *[("evaluation", 1.0)] * 9)
    ahead, pruning = [perplexity, [Step("prompts", 0)]], [step for _ in range(10) for step in block(True)]
    left = remaining(pace, pruning, ahead)
    assert left.stage is None and left.run is None
    for number in range(10):
        for kind, seconds in (("solving", 3.0), ("passing", 1.0)):
            pace, pruning = pace.after(Step(kind), seconds * (4 if number == 0 else 1)), pruning[1:]
        left, truth = remaining(pace, pruning, ahead), 4.0 * (9 - number)
        if number:
            assert left.stage == pytest.approx(truth, rel=0.1) and left.run == pytest.approx(truth + 10, rel=0.1)
    assert not left.whole and remaining(pace, pruning, ahead[:1]).whole


def test_the_time_of_a_run_is_unknown_while_that_of_a_stage_is_unless_it_is_short():
    """A sum without pruning or training was at most half of the truth."""
    pace, steps = after(("evaluation", 8.0), ("evaluation", 1.0)), [Step("evaluation")] * 9
    assert remaining(pace, steps, [[Step("training step")] * 3, steps]).run is None
    left = remaining(pace, steps, [steps, [Step("prompts", 0)] * 2])
    assert left.run == pytest.approx(18) and not left.whole
