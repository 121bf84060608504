"""Every typed number has a bound, beyond which it is refused in one line."""

import json

import pytest

from optima_tpu.config.parse import chosen_run, parse
from optima_tpu.data import parse_source
from optima_tpu.evaluate.answers import read_rules
from optima_tpu.evaluate.config import parse as parse_evaluate
from optima_tpu.export import main as export
from optima_tpu.method.patterns import NM, parse_pattern
from optima_tpu.pipeline.plan.topology import parse_topology
from optima_tpu.pipeline.recover.config import parse as parse_recover
from optima_tpu.pipeline.sweep.grid import read_grid
from optima_tpu.runtime import processes
from optima_tpu.runtime.mesh import parse_mesh
from tests.support.refusals import refusal
from tests.support.runs import only_error

HUGE = ("9" * 19, "9" * 60, "9" * 5000)


@pytest.mark.parametrize("number", HUGE, ids=len)
@pytest.mark.parametrize("pattern", ["2:4@{}", "1:{}", "{}:4", "-{}:4"])
def test_a_pattern_of_a_giant_number_is_refused(pattern, number):
    assert "expected " in refusal(parse_pattern, pattern.format(number))


def test_a_pattern_spans_no_more_inputs_than_a_layer_has():
    assert "from 1 to 16777216, got 1000000000" in refusal(parse_pattern, "1:1000000000")
    assert "from 1 to 16777216, got 4000000000" in refusal(parse_pattern, "2:4@1000000000")
    assert parse_pattern("2:4@4194304") == NM(2, 4, 4194304)


def test_a_stride_that_fits_is_found_among_the_divisors_of_the_widths():
    assert NM(2, 4, 1 << 22).fitting([96, 144]) == NM(2, 4, 12)
    assert NM(2, 4, 3).fitting([96, 144]) == NM(2, 4, 2)
    assert NM(2, 4, 1 << 22).fitting([6]) is None


@pytest.mark.parametrize("text", ["\uff12:\uff14", "2:4@\u0663", "1_0:2_0", "1:+-4"])
def test_a_pattern_is_written_with_the_digits_0_to_9(text):
    assert "such as 0.5, 0.5/layer, 0.25/neuron, 2:4 or 2:4@128" in refusal(parse_pattern, text)


def test_a_mesh_has_a_bound():
    for text in ("\uff14x\uff12", *(f"{number}x1" for number in HUGE), f"data={'9' * 60}"):
        assert "expected a mesh such as 4x2" in refusal(parse_mesh, text)
    assert "devices of a mesh of at most" in refusal(parse_mesh, f"{'9' * 18}x{'9' * 18}")


@pytest.mark.parametrize("setting", ["device_memory", "borrow", "solver.damping", "calibration.seed", "recompute", "process_id"])
@pytest.mark.parametrize("number", ["1e999", "1e300", ".nan", "-.inf", "9" * 60])
def test_a_number_of_a_file_is_finite_and_below_a_bound(setting, number, tmp_path):
    outer, _, inner = setting.partition(".")
    line = {"solver": f"solver: {{name: cg, damping: {number}}}", "calibration": f"calibration: {{seed: {number}}}"}.get(outer)
    (tmp_path / "run.yaml").write_text(line or f"{outer}: {number}")
    assert (inner or outer) in refusal(parse, ["m", "--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    "read", [parse, parse_evaluate, lambda words: parse_recover([*words, "--tokens", "1k"])], ids=["prune", "evaluate", "recover"]
)
@pytest.mark.parametrize("setting", ["batch", "join_timeout", "num_processes", "process_id", "cpu_devices"])
def test_a_number_of_a_command_line_is_below_a_bound(read, setting):
    assert f"expected {setting} of at most" in refusal(read, ["m", f"--{setting}", str(2**63)])


def test_an_infinite_number_from_python_is_refused():
    assert "device_memory to be a finite number" in refusal(chosen_run, {"model": "m", "device_memory": float("inf")})


def test_a_number_of_bytes_is_no_memory_in_gib():
    assert "as in --device_memory 12" in refusal(parse, ["m", "--device_memory", "1e9"])


@pytest.mark.parametrize("port", ["0", "65536", "99999", "9" * 60, "-1", "\u0661"])
def test_a_port_is_from_1_to_65535(port):
    assert "a port from 1 to 65535" in refusal(processes.start, f"localhost:{port}", 2, 0, 1)


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"])
def test_a_number_of_processes_in_the_environment_is_a_number(variable, monkeypatch):
    monkeypatch.setenv(variable, "many")
    assert f"environment variable {variable}, got 'many'" in refusal(processes.start, None, None, None, 1)


@pytest.mark.parametrize("size", ["infGB", "nanGB", "-5GB", "0", "0GB", "1e400GB", "9" * 400 + "GB", "GB", "5 apples"])
def test_a_shard_size_is_a_positive_number_of_bytes(size, tmp_path, capsys):
    assert export([str(tmp_path), str(tmp_path / "out"), f"--max-shard-size={size}"]) == 2
    assert "expected a shard size such as 5GB, from 1 byte to 1000000TB" in only_error(capsys.readouterr().err)


@pytest.mark.parametrize("topology", [f"v5e:{'9' * 60}x2", f"v5e-{'9' * 5000}", "v5p:99999998x99999998x4"], ids=len)
def test_a_topology_has_a_bound(topology):
    assert "topology" in refusal(parse_topology, topology)


@pytest.mark.parametrize("source", ["self?temperature=1e-45", "self?temperature=1e300", f"hub:a/b@train[:{'9' * 5000}]"], ids=len)
def test_a_number_in_a_text_source_has_a_bound(source):
    assert "expected " in refusal(parse_source, source)


def test_a_written_answer_has_a_bound():
    assert "expected max_gen_toks from 1 to" in refusal(read_rules, {"max_gen_toks": 10**12})


def test_the_cells_of_a_sweep_are_counted_before_they_are_made(tmp_path):
    axes = {name: {f"{name}{i}": {} for i in range(3000)} for name in ("masks", "patterns")}
    document = {"run": {"model": "m"}, "updates": {"cg": {}}, "seeds": [0], **axes}
    (tmp_path / "sweep.yaml").write_text(json.dumps(document))
    assert "cells in the table of a sweep from 1 to 10000, got 9000000" in refusal(read_grid, tmp_path / "sweep.yaml")
