"""What the benchmarks print of a model: the same as a whole run. What they do to a block: the same function in another order."""

import json
import re
import statistics

import numpy as np
import pytest

from benchmarks import layer_errors, permutations, records
from optima_tpu.method.patterns import NM
from optima_tpu.models.decoder import Decoder
from optima_tpu.report.runs import read_report
from tests.support.meshes import mesh
from tests.support.tiny_models import tiny_llama


def test_layer_errors_are_those_of_a_whole_run(finished, capsys):
    report = read_report(finished.directory)
    layers = report.layers
    layer_errors.main([str(len(report.blocks)), "--beside", "cg,cg-undamped", *finished.arguments])
    printed = capsys.readouterr().out
    means = {
        name: statistics.fmean(getattr(layer, name) for layer in layers)
        for name in ("error_before", "error_after", "held_out_after")
    }
    found = re.search(r"selector (\S+), final (\S+), held out (\S+)", printed).groups()
    assert [float(value) for value in found] == pytest.approx(list(means.values()), abs=6e-5)
    assert float(re.search(r"perplexity (\S+),", printed)[1]) == pytest.approx(report.perplexity.pruned, abs=6e-4)
    # Beside the run's cg one with a gap of 0.1%, not of 0.0001%, and one without damping, which makes the error itself smallest.
    beside = {name: float(value) for name, value in re.findall(r"(\S+): mean error (\S+),", printed)}
    assert beside["cg"] == pytest.approx(means["error_after"], rel=2e-3, abs=6e-5)
    assert beside["cg-undamped"] <= means["error_after"] + 6e-5  # printed with four digits


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["9"], "expected 1 to"),
        (["1", "--beside", "mpax"], "got mpax"),
        (["1", "--target", "dense"], "own outputs"),
        (["1", "--allocation", "owl"], "the same sparsity for every block"),
        (["1", "--no-such", "2"], "no setting"),
    ],
)
def test_what_layer_errors_refuses(finished, arguments, expected):
    with pytest.raises(SystemExit, match=expected):
        layer_errors.main([*arguments, *finished.arguments])


def kept_scores(scores, order, n, m):
    return np.sort(scores[:, order].reshape(len(scores), -1, m), axis=-1)[..., m - n :].sum(dtype=np.float64)


@pytest.mark.parametrize("n, m", [(2, 4), (3, 4), (1, 2)])
def test_the_search_keeps_more_of_the_scores_the_longer_it_searches(n, m):
    rng = np.random.default_rng(0)
    scores = np.square(rng.standard_normal((24, 32)) * rng.lognormal(size=32)).astype(np.float32)
    orders = [np.arange(32), *(permutations.search(scores, NM(n, m), rounds) for rounds in (0, 2, 20))]
    assert all(sorted(order) == list(range(32)) for order in orders)
    kept = [kept_scores(scores, order, n, m) for order in orders]
    assert kept[1] <= kept[2] * (1 + 1e-6) and kept[2] < kept[3] and kept[0] < kept[3]


def test_a_reordered_block_computes_the_same_function():
    config, tensors = tiny_llama(hidden_size=72, num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    decoder, rng = Decoder.open(config, tensors, mesh(1, 1), batch=1), np.random.default_rng(1)
    whole = next(decoder.blocks([0]))
    moved = permutations.reordered(decoder, whole, [rng.lognormal(size=size) for size in (72, 60)], NM(2, 4))
    assert {name for name in whole if not np.array_equal(whole[name], moved[name])} == {
        f"{layer}.{part}"
        for layer, parts in (
            ("self_attn.v_proj", ("weight", "bias")),
            ("self_attn.o_proj", ("weight",)),
            ("mlp.gate_proj", ("weight", "bias")),
            ("mlp.up_proj", ("weight", "bias")),
            ("mlp.down_proj", ("weight",)),
        )
        for part in parts
    }
    tokens = rng.integers(64, size=(2, 24))
    before, after = decoder.embed(tokens), decoder.embed(tokens)
    decoder.apply(0, whole, before)
    decoder.apply(0, moved, after)
    assert after.values == pytest.approx(before.values, rel=1e-5, abs=1e-5)


def test_new_rows_of_a_record_leave_its_notes_and_the_commits_of_the_others(tmp_path, monkeypatch):
    path, facts = tmp_path / "record.json", dict(title="new", hardware=None, notes=[])
    monkeypatch.setattr(records, "commit", lambda: "aaa")
    records.write_rows(path, facts, [["a", 1], ["b", 2], ["c", 3]])
    assert json.loads(path.read_text()) == dict(facts, commit="aaa", rows=[["a", 1], ["b", 2], ["c", 3]])
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(title="old", hardware="a core", notes=["a note"])))
    monkeypatch.setattr(records, "commit", lambda: "bbb")
    records.write_rows(path, facts, [["b", 4], ["d", 5]])
    monkeypatch.setattr(records, "commit", lambda: "ccc")
    records.write_rows(path, facts, [["d", 6]])
    assert json.loads(path.read_text()) == dict(
        title="new",
        hardware="a core",
        notes=["a note"],
        commit={"b": "bbb", "d": "ccc", "the others": "aaa"},
        rows=[["a", 1], ["b", 4], ["c", 3], ["d", 6]],
    )
