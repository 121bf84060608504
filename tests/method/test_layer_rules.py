"""Which layers are pruned, and how."""

import json

import pytest

from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.method.layer_rules import LayerRule, check_layers, kind_name, layers_text, parse_layers, pattern_of
from optima_tpu.method.patterns import NM, Neurons, Place, Unstructured
from optima_tpu.models.checkpoints.export import read_masks
from tests.support.refusals import refusal
from tests.support.runs import SMALL, folder_tensors
from tests.support.tiny_models import tiny_folder

HALF = Unstructured(0.5)
SHAPES = [
    (f"model.layers.{index}.{name}", name, (12, 20))
    for index in range(12)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    "text, rules",
    [
        ("", ()),
        ("self_attn.*=dense", (LayerRule("self_attn.*", None),)),
        (
            " mlp.down_proj = 0.6 , model.layers.0.*=2:4,",
            (LayerRule("mlp.down_proj", Unstructured(0.6, "layer")), LayerRule("model.layers.0.*", NM(2, 4))),
        ),
        ("*=0.3/row", (LayerRule("*", Unstructured(0.3, "row")),)),
    ],
)
def test_rules_are_read_and_written(text, rules):
    assert parse_layers(text, "layer") == rules
    assert parse_layers(layers_text(rules, "layer"), "layer") == parse_layers(layers_text(rules)) == rules


@pytest.mark.parametrize("text", ["self_attn", "=dense", "mlp.*=", "mlp.*=most"])
def test_what_is_not_a_rule_is_refused(text):
    with pytest.raises(UserError, match="expected"):
        parse_layers(text)


def test_the_last_rule_that_matches_holds():
    rules = parse_layers("mlp.*=0.6,model.layers.1.*=dense,model.layers.1.mlp.up_proj=0.1")

    def pattern(index, name):
        return pattern_of(rules, HALF, f"model.layers.{index}.{name}", name)

    assert pattern(0, "self_attn.q_proj") == HALF and pattern(0, "mlp.up_proj") == Unstructured(0.6)
    assert pattern(1, "mlp.down_proj") is None and pattern(1, "mlp.up_proj") == Unstructured(0.1)
    # Block 10 is not block 1.
    assert pattern(10, "mlp.down_proj") == Unstructured(0.6)


def test_check_names_what_is_wrong():
    assert len(check_layers((), HALF, SHAPES)) == len(SHAPES)
    assert len(check_layers(parse_layers("mlp.*=dense"), HALF, SHAPES)) == 12
    with pytest.raises(UserError, match="no layer matches 'attn.q_proj'.*self_attn.q_proj, mlp.up_proj.*model.layers.0.self"):
        check_layers(parse_layers("attn.q_proj=dense"), HALF, SHAPES)
    with pytest.raises(UserError, match="no layer matches 'model.layers.12"):
        check_layers(parse_layers("model.layers.12.*=dense"), HALF, SHAPES)
    with pytest.raises(UserError, match="leaves all of them dense"):
        check_layers(parse_layers("*=dense"), HALF, SHAPES)
    with pytest.raises(UserError, match="pattern 3:8 needs .* divisible by 8, got 20 in mlp.up_proj; choose .* in --layers$"):
        check_layers(parse_layers("mlp.up_proj=3:8"), HALF, SHAPES)


# As in Gemma 3 270M, and a mixture whose experts have other widths.
INPUTS = {
    "self_attn.q_proj": 640,
    "self_attn.o_proj": 1024,
    "mlp.up_proj": 640,
    "mlp.experts.0.down_proj": 96,
    "mlp.experts.1.down_proj": 96,
}
WIDE = [(f"model.layers.{index}.{name}", name, (16, size)) for index in range(2) for name, size in INPUTS.items()]


@pytest.mark.parametrize(
    "pattern, given, named, stride",
    [
        (NM(2, 4, 128), "mlp.experts.*=dense", "640 in self_attn.q_proj, mlp.up_proj;", 16),
        (NM(2, 4, 128), "", "640 in self_attn.q_proj, mlp.up_proj, and 96 in mlp.experts.*.down_proj;", 8),
        (NM(2, 4, 160), "mlp.experts.*=dense,mlp.up_proj=0.5", "1024 in self_attn.o_proj;", 16),
        (NM(2, 3), "", "640 in self_attn.q_proj, mlp.up_proj, and 1024 in self_attn.o_proj;", None),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused_with_what_to_type(pattern, given, named, stride):
    rules = parse_layers(given)
    text = refusal(check_layers, rules, pattern, WIDE)
    assert f"got {named}" in text
    other = stride and NM(pattern.n, pattern.m, stride)
    assert ("take --pattern" in text) == (other is not None)
    if other:
        assert f"take --pattern {other}, " in text
        assert set(check_layers(rules, other, WIDE).values()) >= {other}
    # The rule to paste settles all of them, and changes nothing else.
    pasted = parse_layers(text.partition('--layers "')[2].removesuffix('"'))
    before = {path: pattern_of(rules, pattern, path, name) for path, name, _ in WIDE}
    wrong = {path for path, _, (_, size) in WIDE if before[path] == pattern and size % (pattern.m * pattern.stride)}
    changed = {path: other if path in wrong else before[path] for path in before}
    assert check_layers(pasted, pattern, WIDE) == {path: kept for path, kept in changed.items() if kept}


def test_a_pattern_that_fits_no_layer_has_no_rule_to_paste():
    with pytest.raises(UserError, match="got 96 in mlp.up_proj; take --pattern 2:4@24$"):
        check_layers((), NM(2, 4, 128), [("model.layers.0.mlp.up_proj", "mlp.up_proj", (16, 96))])


def test_a_pattern_that_does_not_fit_is_refused_before_the_texts_are_read(tmp_path, monkeypatch, capsys):
    read = []
    monkeypatch.setattr("optima_tpu.pipeline.run.read_texts", lambda *_: read.append(True))
    model = tiny_folder(tmp_path / "model")
    arguments = ["--model", str(model), "--output", str(tmp_path / "run"), "--preset", "fast", "--pattern", "3:7", *SMALL]
    assert main(arguments) == 2
    assert "pattern 3:7 needs" in capsys.readouterr().err and not read


def test_a_run_leaves_alone_what_it_is_told_to(one_device, tmp_path, capsys):
    model = tiny_folder(tmp_path / "model")
    rules = "self_attn.*=dense,mlp.down_proj=0.25,model.layers.2.*=dense"
    words = ["--model", str(model), "--output", str(tmp_path / "run"), "--preset", "fast", "--pattern", "2:4@3"]
    words += ["--layers", rules, *SMALL]
    assert main(words) == 0
    before, after = folder_tensors(model), folder_tensors(tmp_path / "run" / "hf")
    masks = read_masks(tmp_path / "run" / "hf")
    pruned = {f"model.layers.{index}.mlp.{name}_proj.weight" for index in (0, 1) for name in ("gate", "up", "down")}
    assert set(masks) == pruned
    for name, weight in after.items():
        if name not in pruned:
            assert weight.tobytes() == before[name].tobytes(), name
        elif "down" in name:
            assert ((weight == 0).sum(axis=1) == weight.shape[1] // 4).all(), name
        else:
            assert (NM(2, 4, stride=3).groups(weight == 0).sum(axis=-1) == 2).all(), name
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [len(block["layers"]) for block in report["blocks"]] == [3, 3, 0]
    assert report["weights"] == sum(before[name].size for name in pruned)
    # The dense block still passes on what the pruned ones changed; the perplexity is that of the exported model.
    assert report["perplexity"]["pruned"] != report["perplexity"]["dense"]
    assert ", self_attn.*=dense, mlp.down_proj=0.25 per row, model.layers.2.*=dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--layers", "attention.*=dense"), "no layer matches 'attention.*'"),
        (("--layers", "*=dense"), "leaves all of them dense"),
        (("--layers", "mlp.down_proj=5:7"), "pattern 5:7 needs a number of inputs divisible by 7, got 36 in mlp.down_proj; "),
    ],
)
def test_rules_that_do_not_fit_the_model_are_one_line_before_anything_is_written(arguments, words, tmp_path, capsys):
    model = tiny_folder(tmp_path / "model")
    assert main(["--model", str(model), "--output", str(tmp_path / "run"), *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_pattern_of_neurons_leaves_the_other_layers_as_they_would_be_without_it():
    blocks = [(f"model.layers.{index}.{name}", name, (8, 16)) for index in range(2) for name in ("mlp.up_proj", "mlp.down_proj")]
    places = (Place(("mlp.down_proj",), 16, "neurons"),)
    cut, coarse = Neurons(0.5, 8, 16, places), Neurons(0.5, total=16, places=places)
    assert check_layers((), cut, blocks) == {f"model.layers.{index}.mlp.down_proj": cut for index in range(2)}
    patterns = check_layers([LayerRule("*", cut)], HALF, blocks)
    assert [patterns[path] for path, _, _ in blocks] == [HALF, cut] * 2
    with pytest.raises(UserError, match="expected a layer to prune, but the pattern 0.5/neuron@8 leaves all of them dense"):
        check_layers((), cut, WIDE)
    with pytest.raises(
        UserError, match=r"model.layers.0.mlp.down_proj: 0.5/neuron prunes none of 16 neurons, .* take 0.5/neuron@8"
    ):
        check_layers((), coarse, blocks)


def test_only_layers_of_experts_share_a_kind():
    """A CTRL's ffn.0 and ffn.2 are no experts: their inputs differ."""
    assert kind_name("mlp.experts.7.up_proj") == kind_name("mlp.experts.12.up_proj") == "mlp.experts.*.up_proj"
    assert [kind_name(name) for name in ("ffn.0", "ffn.2", "mlp.shared_experts.up_proj")] == [
        "ffn.0",
        "ffn.2",
        "mlp.shared_experts.up_proj",
    ]
