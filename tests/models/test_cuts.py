"""Exports without the cut neurons or heads equal the model with zeros."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from transformers import LlamaConfig

from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.launch import main
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.patterns import Heads, Neurons, Place, WholeInputs, parse_pattern
from optima_tpu.models import FAMILIES
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.cuts import cuts_of
from optima_tpu.models.checkpoints.export import export, read_masks
from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.family import Cut
from optima_tpu.pipeline import speed
from optima_tpu.pipeline.inputs import on_model
from optima_tpu.pipeline.opening_lines import recipe_line
from optima_tpu.plan import main as planning
from optima_tpu.recover import main as recover
from optima_tpu.unpack import unpack
from tests.support.fake_run import pruned_run
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.references import BESIDE_IMAGES, BY_MODEL, LLAMA_IMAGES, REFERENCES, Reference, tiny
from tests.support.runs import SMALL, folder_tensors, only_error
from tests.support.tiny_models import tiny_folder, tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PATTERNS = {"neuron": "0.25/neuron@4", "head": "0.5/head"}


def cuts(reference: Reference, settings) -> dict[str, tuple[Cut, ...]]:
    """The kinds of parts that can be cut, by the word of their pattern."""
    return {word: kinds for word, kinds in cuts_of(reference.configuration(settings)).items() if not isinstance(kinds, str)}


TIMES = True  # its runs compare the speed, see conftest.py


def cases():
    """The first, bias and head variants of all families that can be cut."""
    # transformers 5.24 computes no text without images with the other class of Llama 4.
    for reference in (*REFERENCES, *(each for each in BESIDE_IMAGES if each is not LLAMA_IMAGES)):
        for index, (name, settings) in enumerate(reference.variants.items()):
            if (not index or any(word in name for word in ("bias", "head"))) and cuts(reference, settings):
                yield pytest.param(reference, settings, id=f"{reference.model.removesuffix('ForCausalLM')}-{name}")
    for model, number, name in (("Llama", 1, "one key"), ("Llama", 2, "one key left"), ("Phi3", 1, "one key")):
        yield pytest.param(BY_MODEL[f"{model}ForCausalLM"], dict(num_key_value_heads=number), id=f"{model}-{name}")


def test_every_family_says_of_each_pattern_what_it_cuts_or_why_not():
    for model, family in FAMILIES.items():
        assert family.cuts.keys() == PATTERNS.keys(), model


def of_inputs(model, name: str, columns: int):
    """A layer's matrix [d_out, d_in]; for an expert, from its stack."""
    weights = dict(model.named_parameters())
    if (expert := re.fullmatch(r"(.*\.layers\.\d+\.).*experts\.(\d+)\..*", name)) is None:
        return weights[name]
    stacks = (weight for each, weight in weights.items() if each.startswith(expert[1]) and each.endswith("experts.down_proj"))
    matrix = next(stacks)[int(expert[2])]
    return matrix if matrix.shape[1] == columns else matrix.T


@pytest.mark.parametrize(("reference", "settings"), list(cases()))
def test_the_exported_model_computes_what_zeros_do(reference: Reference, settings, tmp_path):
    """With all kinds of parts cut in one run."""
    config, model, source = tiny(reference, settings)
    kinds = cuts(reference, settings)
    first, *others = (PATTERNS[word] for word in kinds)
    run = pruned_run(tmp_path / "run", config, source, first, ",".join(f"*={pattern}" for pattern in others))

    export(run, tmp_path / "out")
    small, info = type(model).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens, masks = torch.arange(40)[None] * 7 % 60, CheckpointTensors(run)
    keeps = {name: mask[0] for name, mask in masks.masks(masks.pruned()).items()}
    for word, every in kinds.items():
        pattern = parse_pattern(PATTERNS[word])
        assert isinstance(pattern, WholeInputs)
        for kind in every:
            endings = [f"*.{layer}.weight" for layer in kind.read_by]
            readers = {name for name in masks.names() if any(fnmatchcase(name, ending) for ending in endings)}
            read = {name for name in readers if "vision" not in name and "visual" not in name}
            stay = {keeps[name].reshape(kind.total, -1).any(axis=1).tobytes() for name in read}
            left = pattern.kept(kind.total)
            assert 0 < left < kind.total and {sum(each) for each in stay} == {left} and (len(stay) > 1 or len(read) == 1)
            saved = json.loads((tmp_path / "out" / "config.json").read_text())
            saved = saved.get("text_config", saved)
            for name, number in kind.config(left).items():
                outer, _, inner = name.partition(".*.")
                assert {each.get(inner, number) for each in saved[outer].values()} == {number} if inner else saved[name] == number
    with torch.no_grad():
        dense = model(tokens).logits
        for name, keep in keeps.items():
            of_inputs(model, name, len(keep))[:, ~keep] = 0
        # In float64, which grouped products of experts don't take: a sum over fewer heads is rounded differently.
        for each in (model, small.eval()):
            each.double().set_experts_implementation("eager")
        expected, actual = (each(tokens).logits for each in (model, small))
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max() < 0.1 * (dense - expected).abs().max()


@pytest.mark.parametrize(
    ("model", "pattern", "why"),
    [
        ("Olmo2ForCausalLM", "0.5/head", "whose heads are normalised all together"),
        ("OlmoeForCausalLM", "0.5/head", "whose heads are normalised all together"),
        *(
            (model, "0.5/head", "whose heads have the width of the model divided by their number")
            for model in ("OPTForCausalLM", "StableLmForCausalLM", "Cohere2ForCausalLM")
        ),
    ],
)
def test_what_a_family_cannot_lose_is_refused_by_name(model, pattern, why):
    message = rf"expected a model whose .*s can be cut where the pattern is {pattern}, got {model}, {why}; take another pattern, such as 2:4"
    with pytest.raises(UserError, match=f"^{message}$"):
        on_model(RunConfig(model="here").changed(pattern=parse_pattern(pattern)), BY_MODEL[model].configuration({}))


@pytest.mark.parametrize("model", ["Cohere2ForCausalLM", "OPTForCausalLM"])
def test_a_width_of_heads_that_config_json_cannot_say_is_seen_when_it_is_read_again(model, monkeypatch):
    """Also a family that wrongly declares its heads as a cut is refused."""
    config = BY_MODEL[model].configuration({})
    cut = Cut("heads", 6, 8, ("self_attn.o_proj",), {}, {"num_attention_heads": 1}, {"head_dim": 8})
    family = FAMILIES[model, config.model_type]

    def heads(config):
        return cut._replace(total=config.heads, width=config.d_model // config.heads)

    monkeypatch.setitem(FAMILIES, (model, config.model_type), dataclasses.replace(family, cuts={"head": (heads,)}))
    with pytest.raises(
        UserError, match=f"{model} .*, which leaves 3 of 6 heads: these are read as of another width than 8; take another pattern"
    ):
        on_model(RunConfig(model="here").changed(pattern=parse_pattern("0.5/head")), config)


def test_a_number_of_heads_that_transformers_refuses_is_refused_with_one_that_it_takes():
    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    message = r"expected a share of LlamaForCausalLM .* got 0.25/head, which leaves 6 of 8 heads: .*64\) is not a multiple of .*6.*; take 0.5/head$"
    with pytest.raises(UserError, match=message):
        on_model(RunConfig(model="here").changed(pattern=parse_pattern("0.25/head")), config)
    run = on_model(
        RunConfig(model="here").changed(pattern=parse_pattern("0.5/head"), layers=parse_layers("*=0.3/neuron@8")), config
    )
    heads, neurons = Place(("self_attn.o_proj",), 8, "heads"), Place(("mlp.down_proj",), 11008, "neurons")
    assert run.recipe.patterns == [Heads(0.5, places=(heads,)), Neurons(0.3, 8, places=(neurons,))]
    assert [str(pattern) for pattern in run.recipe.patterns] == ["4 of 8 heads cut", "3,296 of 11,008 neurons cut"]
    assert [pattern.text() for pattern in run.recipe.patterns] == ["0.5/head", "0.3/neuron@8"]
    on_model(RunConfig(model="here").changed(pattern=parse_pattern("0.8/head")), config)  # leaves two
    few = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
    on_model(RunConfig(model="here").changed(pattern=parse_pattern("0.5/head")), few)  # leaves one


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config, source = tiny_llama(intermediate_size=64)
    return pruned_run(tmp_path_factory.mktemp("cut") / "run", config, source, "0.25/neuron@8", "*=0.33/head")


def test_the_folder_says_how_many_parts_are_left(run, tmp_path):
    lines = []
    export(run, tmp_path / "out", say=lines.append)
    assert "48 of 64 neurons, 2 of 3 key-value heads in every block are left, and the others are not written" in lines
    sidecar, config = (json.loads((tmp_path / "out" / name).read_text()) for name in ("optima_tpu.json", "config.json"))
    assert sidecar["cuts"] == {"neurons": {"left": [48], "total": 64}, "key-value heads": {"left": [2], "total": 3}}
    numbers = {"intermediate_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
    assert {name: config[name] for name in numbers} == numbers
    shapes = {"mlp.down_proj": ([36, 48], [36, 64]), "self_attn.o_proj": ([36, 24], [36, 36])}
    layers = {layer["name"]: layer for layer in sidecar["layers"]}
    assert layers.keys() == {f"model.layers.{block}.{name}.weight" for block in range(3) for name in shapes}
    for name, layer in layers.items():
        assert (layer["shape"], layer["cut_from"]) == shapes[name.removesuffix(".weight").split(".", 3)[3]]
        assert (layer["pruned"], layer["sparsity"]) == (0, 0.0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ", cut to 48 of 64 neurons, 2 of 3 key-value heads in every block\n" in card
    assert (
        "key-value heads in every block are left, the others are deleted, and the matrices that read them were changed to "
        "compensate. All other" in card
    )
    assert (
        "- sparse" not in card and "ordinary smaller model" in card and "not smaller" not in card and "pruning_masks" not in card
    )
    assert not (tmp_path / "out" / "pruning_masks.npz").exists()


def test_greeting_and_card_say_what_is_cut_and_not_what_was_asked_for(tmp_path):
    """Half of three heads is one head."""
    config, source = tiny_llama(intermediate_size=64)
    requested = RunConfig("here").changed(pattern=parse_pattern("0.5/head"), layers=parse_layers("*=0.3/neuron@8"))
    line = recipe_line(on_model(requested, config), Decoder.open(config, source, mesh(1, 1)))
    assert line.endswith(", 1 of 3 key-value heads cut, *=16 of 64 neurons cut") and "0.5" not in line
    run = pruned_run(tmp_path / "run", config, source, "0.5/head", "model.layers.1.*=dense")
    export(run, tmp_path / "out")
    assert ", pruned to 33.3% zeros\n" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_deleted_was_zero_and_what_stays_is_the_runs_bit_for_bit(run, tmp_path):
    export(run, tmp_path / "out")
    source, tensors = CheckpointTensors(run), folder_tensors(tmp_path / "out")
    for name in source.names():
        expected, left = source.load([name])[name], tensors[name]
        block, part, layer = name.removesuffix(".weight").rpartition(".")[0].rpartition(".")[0], *name.split(".")[-3:-1]
        kept = (
            source.mask(f"{block}.{'mlp.down_proj' if part == 'mlp' else 'self_attn.o_proj'}.weight")[0]
            if part in ("mlp", "self_attn")
            else None
        )
        if layer in ("down_proj", "o_proj"):
            assert not expected[:, ~kept].any()
            expected = expected[:, kept]
        elif kept is not None:  # a key-value head of 4 dimensions has three queries
            expected = expected[kept[::3] if layer in ("k_proj", "v_proj") else kept]
        np.testing.assert_array_equal(left, expected)


def test_other_layers_keep_their_masks(tmp_path):
    """The rows of what is cut leave with their masks."""
    config, source = tiny_llama(intermediate_size=64)
    run = pruned_run(tmp_path / "run", config, source, "2:4", "*=0.25/neuron@8,*=0.33/head,mlp.up_proj=0.5/layer")
    export(run, tmp_path / "out")
    masks, tensors = read_masks(tmp_path / "out"), folder_tensors(tmp_path / "out")
    assert len(masks) == 15 and masks["model.layers.0.mlp.gate_proj.weight"].shape == (48, 36)
    assert masks["model.layers.0.self_attn.q_proj.weight"].shape == (24, 36)
    for name, keep in masks.items():
        assert keep.shape == tensors[name].shape and not tensors[name][~keep].any()
        if not name.endswith("up_proj.weight"):
            assert parse_pattern("2:4").violation(keep) is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "2 of 3 key-value heads in every block are left, the others are deleted, and the matrices" in card
        and "`pruning_masks.npz`" in card
    )
    assert ", cut to 48 of 64 neurons, 2 of 3 key-value heads in every block and pruned 2:4\n" in card


@pytest.mark.parametrize(
    "pattern, layers, said",
    [
        ("0.25/neuron@8", "model.layers.1.*=dense", "the blocks keep 48 or 64 of 64, and config.json has one number for all"),
        (
            "0.25/neuron@8",
            "model.layers.1.*=0.5/neuron@8",
            "the blocks keep 32 or 48 of 64, and config.json has one number for all",
        ),
        (
            "0.5",
            "*=dense,self_attn.o_proj=0.25/input@4",
            "stay as zeros where they are no parts that can be cut, as in model.layers.0.self_attn.o_proj.weight",
        ),
        ("0.33/head", "model.layers.1.*=dense", "pruned key-value heads stay as zeros, since the blocks keep 2 or 3 of 3"),
    ],
)
def test_what_cannot_be_cut_stays_as_zeros_and_the_export_says_why(pattern, layers, said, tmp_path):
    config, source = tiny_llama(intermediate_size=64)
    run, lines = pruned_run(tmp_path / "run", config, source, pattern, layers), []
    export(run, tmp_path / "out", say=lines.append)
    assert any(said in line for line in lines)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"]) == (64, 9)
    assert len(read_masks(tmp_path / "out")) == (2 if layers == "model.layers.1.*=dense" else 3)


def test_blocks_for_further_tokens_leave_with_the_parts_that_they_did_not_lose(tmp_path):
    """Such blocks keep all neurons, which config.json no longer describes."""
    config, _, source = tiny(BY_MODEL["Glm4MoeForCausalLM"], {})
    further = {f"model.layers.46.mlp.experts.0.{name}.weight": np.ones((24, 36), np.float32) for name in ("up_proj", "gate_proj")}
    source.arrays.update(further)
    lines, run = [], pruned_run(tmp_path / "run", config, source, "0.25/neuron@4")
    export(run, tmp_path / "out", say=lines.append)
    assert folder_tensors(tmp_path / "out").keys() == set(source.names()) - further.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert "2 tensors for predicting tokens behind the next one did not lose these parts, and leave" in lines
    dense, left = (sum(weight.size for weight in each.values()) for each in (source.arrays, folder_tensors(tmp_path / "out")))
    opened = Exported.open(run)
    columns = sum(layer.pruned for block in opened.source.run.blocks for layer in block.layers)  # counted as zeros
    assert opened.removed() + columns == dense - left


def test_weights_of_neurons_that_are_not_zero_are_not_deleted(run, tmp_path, monkeypatch):
    masks = CheckpointTensors.masks
    monkeypatch.setattr(
        CheckpointTensors,
        "masks",
        lambda self, names: {name: np.roll(keep, 1, axis=1) for name, keep in masks(self, names).items()},
    )
    with pytest.raises(RuntimeError, match="holds weights other than zero in inputs that were cut"):
        export(run, tmp_path / "out")


class Command(NamedTuple):
    """A run of the command line that cut a model.

    Attributes:
      words: without --output.
      measured: the decoders whose speed was measured.
    """

    model: Path
    run: Path
    words: list[str]
    printed: str
    measured: list[Decoder]


@pytest.fixture(scope="module")
def command(tmp_path_factory, one_device) -> Command:
    root, printed, measured, load = tmp_path_factory.mktemp("command"), io.StringIO(), [], speed.load
    model = tiny_folder(root / "model", intermediate_size=64, num_hidden_layers=2)
    words = ["--preset", "fast", "--pattern", "0.25/neuron@8", "--layers", "*=0.33/head", *SMALL]
    words = ["--model", str(model), *words]
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "load", lambda decoder, length: measured.append(decoder) or load(decoder, length))
        patch.setattr(speed, "_TURNS", 1)
        assert main([*words, "--output", str(root / "run")]) == 0
    return Command(model, root / "run", words, printed.getvalue(), measured)


def test_the_command_writes_a_smaller_model_in_every_form(command, tmp_path, capsys):
    model, run, words, printed, _ = command
    summary = "48 of 64 neurons, 2 of 3 key-value heads in every block (the exported model is without the others)"
    assert f"kept        {summary}\n" in printed
    report = json.loads((run / "report.json").read_text())
    assert report["cuts"] == {"neurons": {"left": [48], "total": 64}, "key-value heads": {"left": [2], "total": 3}}
    assert report["removed"] == 2 * (2 * 16 + 12 + 4 + 4) * 36
    small, dense = folder_tensors(run / "hf"), folder_tensors(model)
    weights, left = (sum(weight.size for weight in tensors.values()) for tensors in (dense, small))
    assert report["model_sparsity"] == (weights - left) / weights and report["model"]["weights"] == weights
    assert report["sizes"]["dense"] - report["sizes"]["transformers"] > 4 * (weights - left) - 20_000
    assert {layer["name"] for block in report["blocks"] for layer in block["layers"]} == {"mlp.down_proj", "self_attn.o_proj"}
    for name, weight in small.items():
        if ".mlp." not in name and ".self_attn." not in name:
            assert weight.tobytes() == dense[name].tobytes(), name
    rates = report["speed"]
    assert json.loads((run / "speed.json").read_text()) == rates
    assert rates["how"].endswith("float32, batch 1, 112 tokens read and 16 written")
    assert all(rates[model][what] > 0 for model in ("dense", "cut") for what in ("reading", "writing"))
    assert re.search(rf"\nspeed       \S+ times dense in reading .* in writing .*, on this machine: {rates['how']}\n", printed)
    assert f"Where it was made ({rates['how']}): " in (run / "hf" / "README.md").read_text()
    assert planning([*words, "--no-compile", "--json", str(tmp_path / "plan.json")]) == 0
    assert "\ncut model    " in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["storage"]["disk"]["export for transformers"] == plan["serving"]["cut"]["weights"] == 4 * left
    assert plan["serving"]["dense"]["weights"] == 4 * weights
    assert 3 * plan["serving"]["cut"]["cache"] == 2 * plan["serving"]["dense"]["cache"] > 0
    export(run, tmp_path / "packed", form="packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    names = {path.name for path in (run / "hf").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()} and "pruning_masks.npz" not in names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (run / "hf" / name).read_bytes(), name
    export(run, tmp_path / "maxtext", form="maxtext")
    settings = (tmp_path / "maxtext" / "maxtext.yml").read_text()
    numbers = {"base_mlp_dim": 48, "base_num_query_heads": 6, "base_num_kv_heads": 2, "head_dim": 4}
    assert all(f"{name}: {number}\n" in settings for name, number in numbers.items())
    export(run, tmp_path / "gguf", form="gguf")
    opened = open_model(str(tmp_path / "gguf" / "model.gguf"))
    sizes = opened.config
    assert (sizes.intermediate_size, sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim) == (48, 6, 2, 4)
    for name in opened.tensors.names():
        np.testing.assert_array_equal(opened.tensors.read(name), small[name])


def test_the_speed_is_measured_once_of_the_narrow_model_and_only_where_both_models_fit(command, tmp_path, capsys, monkeypatch):
    assert [decoder.block_shapes["mlp.down_proj.weight"] for decoder in command.measured] == [(36, 64), (36, 48)]
    run = shutil.copytree(command.run, tmp_path / "run")
    words = [*command.words, "--output", str(run)]
    first = json.loads((run / "report.json").read_text())["speed"]
    monkeypatch.setattr(speed, "_SHARE", 1e-9)
    (run / "report.json").unlink()
    assert main(words) == 0
    assert json.loads((run / "report.json").read_text())["speed"] == first
    (run / "report.json").unlink()
    (run / "speed.json").unlink()
    capsys.readouterr()
    assert main(words) == 0
    assert "\nspeed       not measured because the whole model and its cache take " in capsys.readouterr().out


def test_parts_that_were_cut_stay_so_and_the_recovered_model_is_as_narrow(command, tmp_path, capsys):
    words = ["--tokens", "512", "--source", "random", "--windows", "8", "--length", "32", "--distill.batch", "4"]
    words += ["--distill.learning_rate", "1e-3", "--distill.checks", "2"]
    assert recover([str(command.run), *words, "--output", str(tmp_path / "out")]) == 0
    cuts = json.loads((tmp_path / "out" / "report.json").read_text())["cuts"]
    assert {called: cut["left"] for called, cut in cuts.items()} == {"neurons": [48], "key-value heads": [2]}
    before, after = (folder_tensors(run / "hf") for run in (command.run, tmp_path / "out"))
    for name, weight in after.items():
        assert weight.shape == before[name].shape
    assert {name for name in after if (after[name] != before[name]).any()} >= {"model.layers.0.mlp.down_proj.weight"}
    capsys.readouterr()
    assert recover([str(command.run / "hf"), *words, "--output", str(tmp_path / "again")]) == 2
    error = only_error(capsys.readouterr().err)
    assert "have fewer neurons" in error and f"give the directory of its run, {command.run}" in error


def test_no_speed_is_measured_of_a_model_that_keeps_its_zeros(tmp_path, one_device):
    model = tiny_folder(tmp_path / "model", intermediate_size=64, num_hidden_layers=2)
    words = ["--preset", "fast", "--pattern", "0.25/neuron@8", "--layers", "model.layers.1.*=dense", *SMALL]
    assert main(["--model", str(model), *words, "--output", str(tmp_path / "zeros")]) == 0
    assert json.loads((tmp_path / "zeros" / "report.json").read_text())["speed"] is None


def with_merges(folder: Path) -> Path:
    """Gives a :func:`tiny_folder` a tokenizer that llama.cpp loads.

    Each token is a text of its own, and one token is merged from two others.
    """
    path, digits = folder / "tokenizer.json", "0123456789abcdef"
    tokenizer = json.loads(path.read_text())
    words = [*digits, *(first + second for first in digits for second in digits)][:256]
    tokenizer["model"] |= {"vocab": {word: index for index, word in enumerate(words)}, "merges": [["0", "0"]]}
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--pattern", "0.25/neuron@8"],
        ["--pattern", "0.33/head"],
        ["--pattern", "0.25/neuron@8", "--layers", "*=0.33/head"],
        ["--pattern", "dense", "--cut.blocks", "2"],
    ],
    ids=["neurons", "heads", "both", "blocks"],
)
def test_llama_cpp_predicts_the_next_token_as_the_run_does(words, tmp_path, one_device):
    """Against the ten likeliest tokens behind ten prompts, in float32."""
    llama_cpp = pytest.importorskip("xllamacpp")
    model = with_merges(tiny_folder(tmp_path / "model", intermediate_size=64, num_hidden_layers=4))
    method = ["--preset", "fast", "--solver", "null", "--export", "false"]
    assert main(["--model", str(model), *method, *words, *SMALL, "--output", str(tmp_path / "run")]) == 0
    export(tmp_path / "run", tmp_path / "gguf", form="gguf")
    settings = llama_cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(tmp_path / "gguf" / "model.gguf"), 64, 1
    settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = llama_cpp.Server(settings)
    tokens = np.random.default_rng(0).integers(3, 250, (10, 16)).astype(np.int32)
    logits = logits_of(open_evaluated(str(tmp_path / "run"), mesh(1, 1)).model.decoder, tokens)[:, -1].astype(np.float64)
    for prompt, own in zip(tokens, logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)):
        request = {"prompt": prompt.tolist(), "max_tokens": 1, "temperature": 0, "ignore_eos": True, "logprobs": 10}
        likeliest = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        assert [each["id"] for each in likeliest] == np.argsort(-own)[:10].tolist()
        np.testing.assert_allclose([each["logprob"] for each in likeliest], np.sort(own)[:-11:-1], atol=1e-5, rtol=0)
