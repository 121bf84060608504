"""Twenty kills of a run in two processes, at random times: every one goes on to the bits of a run that nothing stopped.

python -m pytest -m slow tests/launch/test_kills.py
"""

import random
import signal
import subprocess
import sys
import time

import pytest

from tests.support.processes import free_port, process_environment
from tests.support.runs import SMALL, assert_same_weights
from tests.support.tiny_models import tiny_folder

pytestmark = pytest.mark.slow
VICTIMS = ((0,), (1,), (0, 1))


def start(arguments: list[str]) -> list[subprocess.Popen]:
    several = ["--mesh", "2x2", "--cpu-devices", "2", "--coordinator", f"localhost:{free_port()}", "--num-processes", "2"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "optima_tpu.launch", *arguments, *several, "--process-id", str(number)],
            env=process_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(2)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(arguments, directory, seconds) of a run that nothing stopped. It runs twice: the second time everything is compiled."""
    root = tmp_path_factory.mktemp("whole")
    arguments = ["--model", str(tiny_folder(root / "model", num_hidden_layers=6)), *SMALL]
    for name in ("first", "run"):
        began = time.monotonic()
        assert [process.wait(300) for process in start([*arguments, "--output", str(root / name)])] == [0, 0]
        seconds = time.monotonic() - began
    assert_same_weights(root / "first", root / "run")
    return arguments, root / "run", seconds


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, seed):
    arguments, expected, seconds = whole
    arguments = [*arguments, "--output", str(tmp_path / "run")]
    chance = random.Random(seed)
    started = start(arguments)
    time.sleep(chance.uniform(0.1, 1.0) * seconds)
    victims = chance.choice(VICTIMS)
    for number in victims:
        started[number].kill()
    statuses = [process.wait(300) for process in started]  # the other one ends by itself
    for number in victims:
        assert statuses[number] in (-signal.SIGKILL, 0)
    assert [process.wait(300) for process in start(arguments)] == [0, 0]
    assert_same_weights(tmp_path / "run", expected)
