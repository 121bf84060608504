"""Sinks get every block once and in order, also of a stopped run.

A missing package is named before anything is read.
"""

import json
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.report import sinks
from optima_tpu.report.records import BlockReport
from optima_tpu.report.run_record import write_run
from tests.support.fake_reports import layers

BLOCKS = [BlockReport(block, 1.5, tuple(layer for layer in layers(0) if layer.block == block)) for block in range(3)]


class Memory:
    """A sink that records its steps."""

    def __init__(self):
        self.steps = []

    def write(self, step, values):
        self.steps.append((step, dict(values)))

    def close(self):
        pass


class FakeJournal(SimpleNamespace):
    def report(self, index):
        return BLOCKS[index]


def test_finished_blocks_are_sent_once_and_in_order():
    memory, journal = Memory(), FakeJournal(finished={0, 2})
    steps = sinks.Steps([memory], journal.finished, journal.report)
    steps.follow()
    assert [step for step, _ in memory.steps] == [0]  # the second was damaged, and the third must not come before it
    steps.follow()
    journal.finished.add(1)
    steps.follow()
    steps.follow()
    assert [step for step, _ in memory.steps] == [0, 1, 2]
    _, values = memory.steps[1]
    for layer in BLOCKS[1].layers:
        for name in ("error_before", "error_after", "held_out_after", "gap_max", "steps_median", "sparsity", "rows_refused"):
            assert values[f"{name}/{layer.name}"] == getattr(layer, name)
        assert values[f"rows_not_converged/{layer.name}"] == 0
    assert values["seconds"] == 1.5


def test_what_is_not_finite_is_left_out():
    memory = Memory()
    sinks.Steps([memory], (), FakeJournal().report).write(4, {"a": 1.0, "b": np.inf, "c": None, "d": np.nan})
    assert memory.steps == [(4, {"a": 1.0})]


def test_a_run_tells_its_sinks_what_its_report_says(finished, monkeypatch, tmp_path):
    memory = Memory()
    monkeypatch.setattr(sinks, "TensorBoard", lambda folder: memory)
    monkeypatch.setattr(sinks, "find_spec", lambda name: SimpleNamespace(origin="here"))
    assert main([*finished.arguments, "--output", str(tmp_path / "run"), "--sinks.tensorboard", "true", "--export", "false"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [step for step, _ in memory.steps] == [0, 1, 2, 3]
    for (_, values), block in zip(memory.steps, report["blocks"]):
        assert {f"error_after/{layer['name']}": layer["error_after"] for layer in block["layers"]}.items() <= values.items()
    assert memory.steps[3][1] == {f"perplexity/{name}": value for name, value in report["perplexity"].items()}


@pytest.mark.parametrize("name, value, package", [("tensorboard", "true", "tensorboardX"), ("wandb", "x", "wandb")])
def test_a_missing_package_is_named_before_anything_is_read(name, value, package, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    assert main(["--model", str(tmp_path), f"--sinks.{name}", value, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and package in error and f"pip install '.[{name}]'" in error


def scalars(folder) -> list[tuple[int, str, float]]:
    """(step, name, value) of the event files in a folder."""
    from tensorboardX.proto.event_pb2 import Event

    values = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # records of a length, its checksum, an event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            values += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return values


def test_event_files_hold_every_step_once_also_after_a_second_start(tmp_path):
    pytest.importorskip("tensorboardX")
    for _ in range(2):
        sink = sinks.TensorBoard(tmp_path / "tensorboard")
        sinks.Steps([sink], range(3), FakeJournal().report).follow()
        sink.close()
    values = scalars(tmp_path / "tensorboard")
    assert len(values) == len({(step, name) for step, name, _ in values}) == 3 * (1 + 11 * 7)
    assert {
        (layer.block, f"error_after/{layer.name}", np.float32(layer.error_after)) for block in BLOCKS for layer in block.layers
    } <= set(values)


def test_a_run_of_weights_and_biases_that_went_on_is_sent_only_what_it_lacks(tmp_path, monkeypatch):
    logged, calls = [], []
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", {"code": "first"}, {})

    class Run:
        step = 2  # the server has the first two

        def log(self, values, step):
            logged.append((step, values))

    fake = SimpleNamespace(Error=RuntimeError, Settings=dict, init=lambda **options: calls.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        sink = sinks.WeightsAndBiases("project", tmp_path / "run", {"model": "x"})
    for step in range(4):
        sink.write(step, {"a": step})
    assert logged == [(2, {"a": 2}), (3, {"a": 3})]
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["project"] == "project" and calls[0]["resume"] == "allow"
    write_run(tmp_path / "run", {"code": "another, in the place of the first"}, {})
    sinks.WeightsAndBiases("project", tmp_path / "run", {"model": "x"})
    assert calls[2]["id"] != calls[0]["id"]

    def refuse(**options):
        raise RuntimeError("no API key\nconfigured")

    fake.init = refuse
    with pytest.raises(UserError, match="no API key configured.*WANDB_MODE=offline"):
        sinks.WeightsAndBiases("project", tmp_path / "run", {})


def test_a_sink_that_cannot_be_closed_fails_no_run(tmp_path, monkeypatch, capsys):
    """A finished run prints the sink's error, and still returns its result."""

    def fail(sink):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks.TensorBoard, "close", fail)
    with sinks.open_sinks(sinks.Sinks(tensorboard=True), tmp_path, {}) as opened:
        assert len(opened) == 1
    assert "sinks.tensorboard may lack the last records: [Errno 28] No space left on device" in capsys.readouterr().err
