"""A machine's record: complete on a CPU, whole if the machine goes away."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accelerator.parts import PARTS
from benchmarks.accelerator.results import Layer, Result, differences

ROOT = Path(__file__).parents[1]


def start(record: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.accelerator", str(record), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("accelerator") / "cpu.json"
    assert start(path, "--limit", "3000").wait() == 0
    return json.loads(path.read_text())


def rows(record, name):
    (part,) = (part for part in record["parts"] if part["name"] == name)
    return part["rows"]


@pytest.mark.slow
def test_every_part_has_its_rows(record):
    assert record["ended"] == "complete" and record["small"] and record["hardware"]
    assert [part["name"] for part in record["parts"]] == [part.name for part in PARTS]
    for part in record["parts"]:
        assert part["notes"] == [] and part["rows"]
        assert {len(row) for row in part["rows"]} == {len(part["columns"])}


@pytest.mark.slow
def test_the_results_are_those_of_float64(record):
    by_method = {name: numbers for name, *numbers in rows(record, "results")}
    for name in ("wanda", "magnitude", "sparsegpt", "thanos", "admm", "price"):
        masks, weights, *_ = by_method[f"`{name}`"]
        assert masks == 0 and weights < 1e-5
    assert by_method["`exact`"][2] < 1e-9 and by_method["`cg`"][2] < 2e-3 and by_method["`mpax`"][2] < 1e-2


@pytest.mark.slow
def test_the_killed_run_ends_with_the_same_bits(record):
    assert rows(record, "run")[-1][-1] == "yes"


def test_a_machine_that_is_taken_away_leaves_the_record_up_to_there(tmp_path):
    path = tmp_path / "record.json"
    process = start(path)

    def known():
        return [(part["name"], len(part["rows"])) for part in json.loads(path.read_text())["parts"]] if path.exists() else []

    while process.poll() is None and ("results", 1) not in known():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    (devices, count), (results, some) = known()
    assert (devices, results) == ("devices", "results") and count and 0 < some
    assert json.loads(path.read_text())["ended"] == "stopped by SIGTERM"


def test_differences_see_a_mask_and_a_weight():
    weight, keep = np.eye(2), np.eye(2, dtype=bool)
    assert differences(Result(weight, keep), Result(weight, keep)) == (0, 0)
    assert differences(Result(weight, keep), Result(weight, ~keep)) == (100, 0)
    assert differences(Result(weight * 2, keep), Result(weight * 4, keep)) == (0, 0.5)


def test_no_weights_of_a_mask_are_better_than_the_optimum():
    layer, rng = Layer.drawn(4, 12), np.random.default_rng(1)
    keep = rng.random((4, 12)) < 0.5
    best = layer.optimum(keep)
    assert (best[~keep] == 0).all()
    nearby = np.where(keep, best + 1e-3 * rng.standard_normal(best.shape), 0)
    assert (layer.objective(nearby) > layer.objective(best)).all()
