"""Wrong input gives one line that says so, and nothing on disk changes."""

import dataclasses
import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import LlamaConfig

from optima_tpu.config.run_config import Calibration, Evaluation, RunConfig
from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.pipeline import run as running
from optima_tpu.pipeline.inputs import on_model, open_model_on_mesh, read_texts
from optima_tpu.runtime.files import LOCK, only_program
from optima_tpu.runtime.mesh import _between_hosts, make_mesh
from tests.support.processes import process_environment, python
from tests.support.refusals import refusal
from tests.support.runs import SMALL, only_error, snapshot
from tests.support.tiny_models import tiny_folder

pytestmark = pytest.mark.usefixtures("one_device")

TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def refused(tmp_path, capfd):
    """Runs the command line; returns the message that it is refused with."""

    def run(*arguments, output=tmp_path / "run"):
        before = snapshot(output)
        status = main([*map(str, arguments), "--output", str(output)])
        printed, error = capfd.readouterr()
        assert status == 2 and only_error(error) and "Traceback" not in error + printed
        after = snapshot(output)
        # A run that reads all of the model before it finds what is wrong has made, and locked, the directory for its result.
        assert after == before or (not before and after.keys() <= {str(output), str(output / LOCK)})
        return error

    return run


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--pattern", "0.25/neuron", "--preset", "fast"], "is rounded up to a multiple of 128; take 0.25/neuron@4\n"),
        (["--pattern", "0.1/head", "--preset", "fast"], "0.1/head prunes none of 3 heads; take 0.34/head\n"),
        (["--pattern", "0.9/head", "--preset", "fast"], "0.9/head leaves none of 3 heads; take 0.67/head\n"),
        (["--pattern", "0.25/input", "--preset", "best"], "; take --preset fast or --refine null"),
        (["--pattern", "0.25/input@4", "--preset", "fast", "--selector", "sparsegpt"], "; take --selector wanda"),
        (
            ["--pattern", "0.25/neuron@4", "--preset", "fast", "--quantize", "int4"],
            "takes groups of inputs apart, got groups of 32",
        ),
        (["--cut", "0.25"], "there is no setting --cut; did you mean --pattern, as in --pattern 0.25/neuron?"),
        (["--pattern", "3:8"], "divisible by 8, got 36 in self_attn.q_proj, "),
        (["--mesh", "2x2"], "mesh 2x2 needs 4 devices, there are 8 (cpu): choose a mesh whose product is 8"),
        (["--mesh", "1000000000x1"], "there are 8 (cpu): choose a mesh whose product is 8\n"),
        (["--device_memory", "1e-9"], "expected less than 1e-09 GiB, the --device_memory: give at least 0.00"),
        (["--calibration.source", "file:"], "expected file:PATH, such as file:texts/a.txt, got 'file:'"),
        (["--calibration.source", "file:a\nb.txt"], "a\\nb.txt does not exist"),
        (["--calibration.source", "file:" + "a" * 5000], "File name too long; check the path"),
        (["--config", "a\x1b[31mb\r.yaml"], "cannot read a\\x1b[31mb\\r.yaml"),
        (["--no\nsuch", "1"], "there is no setting --no\\nsuch"),
        (["--selector", "imported", "--selector.path", "a" * 5000], "File name too long; check the path"),
        (["--calibration.length", "129"], "expected --calibration.length of at most 128, the model's context, got 129"),
        (["--evaluation.length", "129"], "expected --evaluation.length of at most 128, the model's context, got 129"),
        (["--config", "/dev/zero"], "expected a file, but /dev/zero is a pipe, a socket or a device"),
        (["--calibration.source", "file:/dev/zero"], "expected a text file, but /dev/zero is a device or a pipe"),
        (["--calibration.source", "file:nowhere.txt"], "nowhere.txt"),
    ],
    ids=lambda value: ascii(" ".join(value))[:40] if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_be(model, refused, settings, expected):
    assert expected in refused("--model", model, *SMALL, *settings)


def test_without_a_length_windows_are_as_long_as_the_models_context(model, tmp_path, capsys):
    config = RunConfig(str(model), calibration=Calibration("random", windows=3, held_out=1), evaluation=Evaluation(windows=2))
    words = f"--mesh 1x8 --calibration.source random --evaluation.windows 2 --pattern 3:8 --output {tmp_path / 'run'}"
    assert main([str(model), *words.split()]) == 2  # the pattern does not fit
    assert "no --calibration.length was given: windows of 128 tokens, the model's context\n" in capsys.readouterr().out
    calibration, evaluation, *_ = read_texts(config, open_model_on_mesh(config))
    assert calibration.ids.shape == (4, 128) and evaluation.ids.shape[1] == 128
    assert on_model(config, LlamaConfig(max_position_embeddings=4096)).calibration.length == 2048
    assert on_model(config, LlamaConfig(max_position_embeddings=64)).calibration.length == 64


def test_a_model_that_is_not_there(refused, tmp_path):
    assert f"no such path: '{tmp_path / 'nowhere'}'" in refused("--model", tmp_path / "nowhere", *SMALL)
    assert "is no model: expected config.json" in refused("--model", tmp_path, *SMALL)
    assert "File name too long; check the path" in refused("--model", "a" * 5000, *SMALL)
    assert "expected the name of an installed package after wheel:" in refused("--model", "wheel:", *SMALL)
    assert "the package 'no-such-model' is not installed" in refused("--model", "wheel:no-such-model", *SMALL)


def test_an_architecture_that_is_not_supported(refused, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["JetMoeForCausalLM"], "model_type": "jetmoe"}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused("--model", folder, *SMALL)
    assert "the general way cannot run a JetMoeForCausalLM: " in message and "give a model of another architecture" in message


def test_a_calibration_text_that_is_too_short(model, refused, tmp_path):
    (tmp_path / "short.txt").write_text("seventeen letters")
    message = refused("--model", model, *SMALL, "--calibration.source", f"file:{tmp_path / 'short.txt'}")
    assert "holds 17 tokens of calibration text, 16 windows of 32 need 512, and 0 would fit: " in message
    message = refused("--model", model, *SMALL, "--evaluation.source", f"file:{tmp_path / 'short.txt'}")
    assert "holds 17 tokens of evaluation text, one window needs 32" in message


@pytest.mark.parametrize("name", ["[1]", "a[", "a\\b", "[1]/run"])
def test_a_path_in_which_orbax_would_not_find_its_files(model, refused, tmp_path, name, monkeypatch):
    message = refused("--model", model, *SMALL, output=tmp_path / name)
    assert f"without {'[' if '[' in name else chr(92)} in its path" in message and "choose another --output" in message
    (tmp_path / "p[x]").mkdir()
    monkeypatch.chdir(tmp_path / "p[x]")
    assert "without [ in its path" in refused("--model", model, *SMALL, output=Path("run"))
    (tmp_path / "a\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "a\udcff")
    assert "without \\udcff in its path" in refused("--model", model, *SMALL, output=Path("run"))
    assert RunConfig(model="models/a [1]\\b").run_directory.name.startswith("a _1__b-wanda")


def test_an_output_directory_in_use(model, finished, refused, tmp_path, monkeypatch):
    other = tiny_folder(tmp_path / "other", seed=1)
    message = refused("--model", other, *finished.arguments[2:], output=finished.directory)
    assert f"holds another run: model is {finished.model} there, {other} here. To resume it, type " in message
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    monkeypatch.delattr(running, "open_model_on_mesh")  # refused before it is called
    message = refused("--model", model, *SMALL, output=tmp_path / "thesis")
    assert "holds files that are not a run of this program; choose another --output" in message
    message = refused("--model", model, *SMALL, output=tmp_path / "thesis" / "thesis.tex")
    assert "Not a directory" in message


def test_an_output_directory_that_another_process_is_at_work_in(model, refused, tmp_path):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from optima_tpu.runtime.files import only_program\n"
            "with only_program(Path(sys.argv[1])): print(flush=True); input()",
            str(tmp_path / "run"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=process_environment(),
    )
    holder.stdout.readline()
    assert f"another process is at work in {tmp_path / 'run'}; wait for it" in refused("--model", model, *SMALL)
    holder.kill()
    holder.wait()
    with only_program(tmp_path / "run"):  # nobody's any more
        pass


def test_weights_of_another_model(refused, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "model.layers.0.mlp.down_proj.weight: expected shape (36, 64)" in refused("--model", folder, *SMALL)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "9 tensors missing (model.layers.3.input_layernorm.weight" in refused("--model", folder, *SMALL)


@pytest.mark.parametrize(
    ("name", "value"), [(TENSOR, np.nan), (TENSOR, -np.inf), ("model.norm.weight", np.nan), ("model.embed_tokens.weight", np.inf)]
)
def test_a_weight_that_is_not_finite(refused, tmp_path, name, value):
    folder = tiny_folder(tmp_path / "model", change=lambda arrays: arrays[name].reshape(-1).__setitem__(5, value))
    message = refused("--model", folder, *SMALL)
    assert f"{name} holds 1 value of NaN or infinity in" in message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("model.layers.1.", "all matrices of model.layers.1 hold only zeros"),
        ("model.embed", "embed_tokens.weight holds only zeros"),
    ],
)
def test_weights_of_zeros_are_refused_by_name(refused, tmp_path, names, message):
    def change(arrays):
        for name, array in arrays.items():
            array[...] *= not name.startswith(names) or "norm" in name

    assert message in refused("--model", tiny_folder(tmp_path / "model", change=change), *SMALL)


def test_libraries_say_nothing_before_the_one_line(tmp_path):
    """Takes a process of its own: the hub's client reads its setting once.

    transformers warns of the ids.
    """
    model = tiny_folder(tmp_path / "model")
    odd = {"bos_token_id": 99999, "rope_scaling": {"type": "odd", "factor": 2.0}}
    (model / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | odd))
    code = (
        "import os, sys; from optima_tpu.launch import main\n"
        "statuses = []\n"
        "for os.environ['JAX_PLATFORMS'], model in zip(('rocm', 'cpu', 'cpu'), sys.argv[2].split()):\n"
        "    if 'jax' in sys.modules: sys.modules['jax'].config.update('jax_platforms', os.environ['JAX_PLATFORMS'])\n"
        "    statuses.append(main(['--model', model, '--output', sys.argv[1], *sys.argv[3:]]))\n"
        "print(statuses)"
    )
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = python("-c", code, tmp_path / "run", f"{model} {model} no-such-owner/no-such-model", *SMALL, **hub)
    *printed, statuses = done.stdout.splitlines()
    assert {line.split()[0] for line in printed} == {"starting", "opening"} and (done.returncode, statuses) == (0, "[2, 2, 2]"), (
        done.stderr
    )
    no_devices, odd_rope, no_hub = done.stderr.splitlines()
    assert no_devices.startswith("error: expected devices of JAX_PLATFORMS=rocm, but JAX finds none")
    assert odd_rope.startswith("error: expected rope_type")
    assert no_hub.startswith("error: ") and "its cache does not hold no-such-owner/no-such-model" in no_hub
    assert not (tmp_path / "run").exists()


def test_a_weight_of_whole_numbers(refused, tmp_path):
    def change(arrays):
        arrays[TENSOR] = arrays[TENSOR].astype(np.int8)

    message = refused("--model", tiny_folder(tmp_path / "model", change=change), *SMALL)
    assert f"1 tensor in int8 ({TENSOR}); " in message and "quantised" in message


@pytest.mark.parametrize(
    ("norm", "layer"), [("post_attention_layernorm", "mlp.gate_proj"), ("input_layernorm", "self_attn.q_proj")]
)
def test_activations_that_overflow_are_refused_with_a_wider_dtype(refused, tmp_path, norm, layer):
    """Every weight is a finite float16, but not the activations behind it."""

    def change(arrays):
        arrays[f"model.layers.1.{norm}.weight"][:] = 6e4

    folder = tiny_folder(tmp_path / "model", dtype="float16", change=change)
    message = refused("--model", folder, *SMALL)
    assert f"the input of model.layers.1.{layer} holds NaN or infinite values" in message and "try --dtype float32" in message


def test_activations_that_overflow_in_float32_are_not_advised_float32(refused, tmp_path):
    def change(arrays):
        arrays["model.layers.1.post_attention_layernorm.weight"][:] = 3e38

    message = refused("--model", tiny_folder(tmp_path / "model", change=change), *SMALL)
    assert "the model overflows even in float32, so its weights are damaged" in message and "--dtype" not in message


def test_no_room_for_a_small_file(one_device, model, tmp_path, monkeypatch, capsys):
    """After each failure, the same command goes on."""

    def full(path, data, write=Path.write_bytes):
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    command = ["--model", str(model), *SMALL, "--selector", "magnitude", "--solver", "null"]
    command += ["--allocation", "owl", "--output", str(tmp_path / "run")]
    monkeypatch.setattr(Path, "write_bytes", full)
    for name in ("dense.json", "allocation.json", "report.json"):
        assert main(command) == 2
        error = only_error(capsys.readouterr().err)
        assert error.startswith(f"error: could not write {tmp_path / 'run' / name}: No space left on device; ")
    monkeypatch.undo()
    assert main(command) == 0


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors"])
def test_a_file_of_the_model_that_may_not_be_read(refused, tmp_path, monkeypatch, name):
    folder = tiny_folder(tmp_path / "model")

    def forbidden(path, *arguments, open=Path.open, **options):
        if path == folder / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    assert f"{folder / name} can't be read: Permission denied" in refused("--model", folder, *SMALL)


# In a process of its own, since the hub's client reads its setting once; also what a library would print is seen so.
@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    platform: str
    device_kind: str
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0


def devices(platform: str, slices: int, each: int) -> list[Device]:
    return [
        Device(number, platform, "some", number // each, (number % 2, number // 2 % 2, number % each // 4))
        for number in range(slices * each)
    ]


@pytest.mark.parametrize("data, model", [(1, 8), (2, 4), (8, 1), (4, 2)])
def test_any_mesh_of_gpus_on_several_hosts(monkeypatch, data, model):
    monkeypatch.setattr(jax, "devices", lambda: devices("gpu", 2, 4))
    grid = _between_hosts(data, model)
    assert grid.shape == (data, model) and [device.id for device in grid.flat] == list(range(8))


@pytest.mark.parametrize(
    "processes, needed, hint",
    [
        (1, "2x2", ", or --cpu_devices 4 to simulate it"),
        (2, "2x1", (", or --cpu_devices 1 in every process to simulate it")),
        (2, "3x1", ""),
    ],
)
def test_the_devices_to_simulate_are_those_of_each_process(monkeypatch, processes, needed, hint):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert refusal(make_mesh, needed).endswith(f"choose a mesh whose product is 8{hint}")


def test_only_the_data_axis_of_a_mesh_goes_over_tpu_slices(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: devices("tpu", 2, 4))
    assert [{device.slice_index for device in row} for row in _between_hosts(4, 2)] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="mesh 1x8 does not fit 2 slices of 4 devices"):
        _between_hosts(1, 8)
    monkeypatch.setattr(jax, "devices", lambda: devices("tpu", 1, 8))
    assert _between_hosts(1, 8) is None


def test_a_mesh_that_would_cut_the_dimensions_of_a_slice(monkeypatch):
    def impossible(*arguments, **options):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 0")

    monkeypatch.setattr(jax, "make_mesh", impossible)
    with pytest.raises(UserError, match="mesh 4x2 does not fit this slice of 8 chips"):
        make_mesh("4x2")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("launch", ["--model", "{}"]),
        ("launch", ["model", "--config", "{}"]),
        ("launch", ["model", "--output={}"]),
        ("launch", ["model", "--selector", "imported", "--selector.path", "{}"]),
        ("evaluate.__main__", ["{}"]),
        ("recover", ["{}"]),
        ("plan", ["{}"]),
        ("sweep", ["{}"]),
        ("report.__main__", ["{}"]),
        ("export", ["{}", "out"]),
        ("push", ["{}", "org/name"]),
        ("unpack", ["{}", "out"]),
        ("verify", ["{}"]),
        ("figures", ["{}"]),
        ("data.build", ["mine@{}", "{}"]),
    ],
)
def test_a_path_that_is_not_utf_8_is_refused_by_every_command(tmp_path, monkeypatch, capsys, module, arguments):
    monkeypatch.chdir(tmp_path)
    Path("a\udcff").mkdir()
    command = importlib.import_module(f"optima_tpu.{module}")
    assert command.main([each.replace("{}", "a\udcff") for each in arguments]) == 2
    assert "expected text in UTF-8, got" in only_error(capsys.readouterr().err)
    assert os.listdir() == ["a\udcff"]


def test_a_file_of_the_model_whose_name_is_not_utf_8_is_named(refused, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    (folder / "licen\udce7a.txt").write_text("free")
    assert "names 'licen\\udce7a.txt'" in refused("--model", folder, *SMALL)
