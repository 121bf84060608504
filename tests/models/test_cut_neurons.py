"""Runs that cut neurons are exported as ordinary smaller models, which compute what the run's model with zeros does."""

import json
from pathlib import Path

import numpy as np
import pytest

from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.method.patterns import Neurons, parse_pattern
from optima_tpu.models import FAMILIES
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import export, read_masks
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.inputs import pruned_layers
from optima_tpu.unpack import unpack
from tests.support.fake_run import pruned_run
from tests.support.meshes import mesh
from tests.support.references import BESIDE_IMAGES, REFERENCES, Reference, tiny
from tests.support.runs import SMALL, folder_tensors
from tests.support.tiny_models import tiny_folder, tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CUT = Neurons(0.25, multiple=8)


def neurons_of(model: str):
    (layers,) = {family.neurons for family in FAMILIES[model].values()}
    return layers


def cases():
    """Every family from which neurons can be cut: its first variant, and those with biases."""
    for reference in (*REFERENCES, *BESIDE_IMAGES):
        if neurons_of(reference.model):
            for index, (name, settings) in enumerate(reference.variants.items()):
                if not index or "bias" in name:
                    yield pytest.param(reference, settings, id=f"{reference.model}-{name}")


def test_patterns_name_the_layers_that_read_neurons():
    layers = [family.neurons for families in FAMILIES.values() for family in families.values()]
    assert Neurons.layers == {each.read_by for each in layers if each} and None in layers


@pytest.mark.parametrize(("reference", "settings"), list(cases()))
def test_the_exported_model_computes_what_zeros_do(reference: Reference, settings, tmp_path):
    config, model, source = tiny(reference, settings)
    run = pruned_run(tmp_path / "run", config, source, CUT.text())
    export(run, tmp_path / "out")
    masks = CheckpointTensors(run)
    keeps = [mask[0] for mask in masks.masks(masks.pruned()).values()]
    ending = "." + neurons_of(reference.model).read_by
    matrices = [layer.weight for name, layer in model.named_modules() if name.endswith(ending) and "vision" not in name]
    assert len(keeps) == len(matrices) == config.get_text_config().num_hidden_layers
    left = CUT.kept(keeps[0].size)
    assert left < keeps[0].size and all(keep.sum() == left for keep in keeps) and (keeps[0] != keeps[1]).any()
    small, info = type(model).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = torch.arange(40)[None] * 7 % 60
    with torch.no_grad():
        for keep, matrix in zip(keeps, matrices, strict=True):
            matrix[:, torch.from_numpy(~keep)] = 0
        expected, found = (each(tokens).logits for each in (model, small.eval()))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert getattr(small.config.get_text_config(), neurons_of(reference.model).setting) == left


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config, source = tiny_llama(intermediate_size=64)
    return pruned_run(tmp_path_factory.mktemp("cut") / "run", config, source, "0.25/neuron@8")


def test_the_folder_says_how_many_neurons_are_left(run, tmp_path):
    said = []
    export(run, tmp_path / "out", say=said.append)
    assert "every MLP has 48 of 64 neurons left, and the others are not written" in said
    sidecar, config = (json.loads((tmp_path / "out" / name).read_text()) for name in ("optima_tpu.json", "config.json"))
    assert sidecar["neurons"] == {"kept": 48, "total": 64} and config["intermediate_size"] == 48
    assert [layer["name"] for layer in sidecar["layers"]] == [f"model.layers.{block}.mlp.down_proj.weight" for block in range(3)]
    for layer in sidecar["layers"]:
        assert (layer["shape"], layer["cut_from"], layer["pruned"], layer["sparsity"]) == ([36, 48], [36, 64], 0, 0.0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "every MLP has 48 of 64 neurons left, and the others are deleted. All other" in card
    assert "- sparse" not in card and "narrower MLPs" in card and "not smaller" not in card
    assert not (tmp_path / "out" / "pruning_masks.npz").exists()


def test_what_is_deleted_was_zero_and_what_stays_is_the_runs_bit_for_bit(run, tmp_path):
    export(run, tmp_path / "out")
    source, tensors = CheckpointTensors(run), folder_tensors(tmp_path / "out")
    for name in source.names():
        whole, left = source.load([name])[name], tensors[name]
        kept = source.mask(f"{name.partition('.mlp.')[0]}.mlp.down_proj.weight")[0] if ".mlp." in name else None
        if name.endswith("down_proj.weight"):
            assert not whole[:, ~kept].any()
            whole = whole[:, kept]
        elif kept is not None:
            whole = whole[kept]
        np.testing.assert_array_equal(left, whole)


def test_other_layers_keep_their_masks(tmp_path):
    """Of gate and up the rows of neurons that are cut leave with them."""
    config, source = tiny_llama(intermediate_size=64)
    run = pruned_run(
        tmp_path / "run", config, source, "2:4", "*=0.25/neuron@8,self_attn.o_proj=0.25/input@4,mlp.up_proj=0.5/layer"
    )
    export(run, tmp_path / "out")
    masks, tensors = read_masks(tmp_path / "out"), folder_tensors(tmp_path / "out")
    assert len(masks) == 18 and masks["model.layers.0.mlp.gate_proj.weight"].shape == (48, 36)
    for name, keep in masks.items():
        assert keep.shape == tensors[name].shape and not tensors[name][~keep].any()
        if not name.endswith("up_proj.weight"):
            assert parse_pattern("0.25/input@4" if "o_proj" in name else "2:4").violation(keep) is None
    assert "every MLP has 48 of 64 neurons left, and the others are deleted; " in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "pattern, layers, said",
    [
        ("0.25/neuron@8", "model.layers.1.*=dense", "the blocks keep 48 or 64 of 64, and config.json has one number for all"),
        (
            "0.25/neuron@8",
            "model.layers.1.*=0.5/neuron@8",
            "the blocks keep 32 or 48 of 64, and config.json has one number for all",
        ),
        ("0.5", "*=dense,self_attn.o_proj=0.25/input@4", "since those of model.layers.0.self_attn.o_proj.weight are no neurons"),
    ],
)
def test_what_cannot_be_cut_stays_as_zeros_and_the_export_says_why(pattern, layers, said, tmp_path):
    config, source = tiny_llama(intermediate_size=64)
    run, lines = pruned_run(tmp_path / "run", config, source, pattern, layers), []
    export(run, tmp_path / "out", say=lines.append)
    assert any(said in line for line in lines)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 64
    assert len(read_masks(tmp_path / "out")) == (2 if "dense" in layers and "neuron" in pattern else 3)


def test_weights_of_neurons_that_are_not_zero_are_not_deleted(run, tmp_path, monkeypatch):
    masks = CheckpointTensors.masks
    monkeypatch.setattr(
        CheckpointTensors,
        "masks",
        lambda self, names: {name: np.roll(keep, 1, axis=1) for name, keep in masks(self, names).items()},
    )
    with pytest.raises(RuntimeError, match="holds weights other than zero in inputs that were cut"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("model", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_a_model_of_experts_is_refused_by_name(model):
    reference = next(each for each in REFERENCES if each.model == model)
    config, _, source = tiny(reference, {})
    decoder = Decoder.open(config, source, mesh(1, 1))
    with pytest.raises(UserError, match=f"one MLP in every block where the pattern is 0.25/neuron@8, got {model}, from which"):
        pruned_layers(RunConfig(model="here").changed(pattern=CUT), decoder, config)
    assert len(pruned_layers(RunConfig(model="here").changed(pattern=parse_pattern("0.25/input@4")), decoder, config)) > 8


def test_the_command_writes_a_smaller_model_in_every_form(tmp_path, capsys):
    model = tiny_folder(tmp_path / "model", intermediate_size=64)
    run, words = tmp_path / "run", ["--preset", "fast", "--pattern", "0.25/neuron@8", "--mesh", "4x2"]
    assert main(["--model", str(model), "--output", str(run), *words, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "neurons     48 of 64 left in every MLP; the exported model is without the others\n" in printed
    report = json.loads((run / "report.json").read_text())
    assert report["neurons"] == {"left": [48], "total": 64} and report["sparsity"] == 0.25
    assert report["sizes"]["dense"] - report["sizes"]["transformers"] > 3 * 16 * 36 * 3 * 4 - 20_000
    assert {layer["name"] for block in report["blocks"] for layer in block["layers"]} == {"mlp.down_proj"}
    small, dense = folder_tensors(run / "hf"), folder_tensors(model)
    for name, weight in small.items():
        if ".mlp." not in name:
            assert weight.tobytes() == dense[name].tobytes(), name
    export(run, tmp_path / "packed", form="packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    names = {path.name for path in (run / "hf").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()} and "pruning_masks.npz" not in names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (run / "hf" / name).read_bytes(), name
    export(run, tmp_path / "maxtext", form="maxtext")
    assert "base_mlp_dim: 48\n" in (tmp_path / "maxtext" / "maxtext.yml").read_text()
    export(run, tmp_path / "gguf", form="gguf")
    opened = open_model(str(tmp_path / "gguf" / "model.gguf"))
    assert opened.config.intermediate_size == 48
    for name in opened.tensors.names():
        np.testing.assert_array_equal(opened.tensors.read(name), small[name])
