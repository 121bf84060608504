"""Killed and signalled runs, in one or two processes, end with equal bits.

python -m pytest -m slow tests/launch/test_kills.py
"""

import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optima_tpu.runtime.signals import INTERRUPTED, RESUME
from tests.support.processes import free_port, hearing_ctrl_c, process_environment, without_gloo
from tests.support.runs import SMALL, assert_same_weights
from tests.support.tiny_models import tiny_folder

pytestmark = pytest.mark.slow
VICTIMS = ((0,), (1,), (0, 1))
ROUTERS = shlex.split("--distill kl --distill.train routers --distill.windows 8 --distill.learning_rate 1e-2")
STATUS = {signal.SIGTERM: RESUME, signal.SIGINT: INTERRUPTED}


def start(arguments: list[str], count: int) -> list[subprocess.Popen]:
    several = ["--mesh", "2x2", "--cpu-devices", str(4 // count)]
    if count > 1:
        several += ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(count)]
    with hearing_ctrl_c():
        return [
            subprocess.Popen(
                [
                    *(sys.executable, "-W", "ignore", "-m", "optima_tpu.launch", *arguments, *several),
                    *(["--process-id", str(number)] if count > 1 else []),
                ],
                env=process_environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]


def finish(arguments: list[str], count: int) -> None:
    started = start(arguments, count)
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * count, errors


def unstopped(root: Path, count: int, arguments: list[str]) -> tuple[int, list[str], Path, float]:
    """An unstopped run in ``count`` processes.

    Returns (count, arguments, directory, seconds) of the second of two runs, for which everything is compiled already.
    """
    for name in ("first", "run"):
        began = time.monotonic()
        finish([*arguments, "--output", str(root / name)], count)
        seconds = time.monotonic() - began
    assert_same_weights(root / "first", root / "run")
    return count, arguments, root / "run", seconds


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return unstopped(root, request.param, ["--model", str(tiny_folder(root / "model", num_hidden_layers=6)), *SMALL])


@pytest.fixture(scope="module")
def fewer_experts(tmp_path_factory):
    """A run that removes experts, prunes the others and trains the routers."""
    from tests.pipeline.test_cut_runs import mixture_folder  # needs torch

    root = tmp_path_factory.mktemp("experts")
    model = mixture_folder(root / "model", num_hidden_layers=4)
    return unstopped(root, 1, ["--model", str(model), "--cut.experts", "0.5", "--cut.score", "reap", *SMALL, *ROUTERS])


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, seed):
    killed_at_random(whole, tmp_path, seed)


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_removal_of_experts_goes_on_to_the_same_bits(fewer_experts, tmp_path, seed):
    killed_at_random(fewer_experts, tmp_path, seed)


def killed_at_random(whole: tuple[int, list[str], Path, float], tmp_path: Path, seed: int) -> None:
    """Kills a run at a random moment, restarts it and compares the result."""
    count, arguments, expected, seconds = whole
    arguments = [*arguments, "--output", str(tmp_path / "run")]
    chance = random.Random(seed)
    started = start(arguments, count)
    time.sleep(chance.uniform(0.1, 1.0) * seconds)
    victims = chance.choice(VICTIMS) if count > 1 else (0,)
    for number in victims:
        started[number].kill()
    for process in started:  # the other one ends by itself
        process.communicate(timeout=300)
    for number in victims:
        assert started[number].returncode in (-signal.SIGKILL, 0)
    finish(arguments, count)
    assert_same_weights(tmp_path / "run", expected)


@pytest.mark.parametrize("sent", STATUS)
@pytest.mark.parametrize("seed", range(25))
def test_a_signalled_run_ends_with_its_status_and_goes_on_to_the_same_bits(whole, tmp_path, seed, sent):
    count, arguments, expected, seconds = whole
    arguments = [*arguments, "--output", str(tmp_path / "run")]
    chance = random.Random(f"{seed} {sent}")
    started = start(arguments, count)
    time.sleep(chance.uniform(0.05, 0.95) * seconds)
    # Ctrl-C on a terminal reaches all processes, and so do most schedulers.
    for process in started:
        process.send_signal(sent)
    errors = [process.communicate(timeout=300)[1] for process in started]
    statuses = [process.returncode for process in started]
    assert statuses in ([STATUS[sent]] * count, [0] * count), errors
    assert "Traceback" not in "".join(errors)
    if statuses[0]:
        assert all(sum(line.startswith("stopped") for line in without_gloo(text)) == 1 for text in errors), errors
    finish(arguments, count)
    assert_same_weights(tmp_path / "run", expected)
