"""A sweep's label stands for its settings, whatever the command line says."""

import re

import pytest

from optima_tpu.errors import UserError
from optima_tpu.method.acceptance import PerLayer
from optima_tpu.method.selectors import Wanda
from optima_tpu.method.solvers import CG, MPAX
from optima_tpu.pipeline.sweep.grid import read_grid
from tests.support.sweeps import TABLE

LABELLED = {
    "masks": {"wanda": {"selector": "wanda"}},
    "patterns": {"0.5": {"pattern": 0.5}},
    "updates": {"mpax": {"solver": "mpax"}, "cg": {"solver": {"name": "cg", "damping": 0.03}, "target": "dense"}},
}
DAMPED = {"run": TABLE["run"] | {"solver": "cg"}, "updates": {"damped": {"solver": {"damping": 0.5}}}}


@pytest.mark.parametrize(
    ("changes", "argv", "said"),
    [
        (
            {},
            ["--pattern", "0.6"],
            "cell wanda + mpax, 0.5: expected pattern 0.5, as the labels of the file say, got 0.6; "
            "leave --pattern out, or change the file",
        ),  # also where the axis has one label
        ({}, ["--selector=magnitude"], "expected selector wanda, as the labels of the file say, got magnitude"),
        ({}, ["--solver", "cg"], "cell wanda + mpax, 0.5: expected solver mpax, as the labels of the file say, got cg"),
        ({}, ["--solver.name", "cg"], "cell wanda + mpax, 0.5: expected solver mpax, as the labels of the file say, got cg"),
        ({}, ["--solver.name=null"], "expected solver mpax, as the labels of the file say, got null; leave --solver out"),
        ({}, ["--target", "dense"], "cell wanda + mpax, 0.5: expected target self, as the labels of the file say, got"),
        ({}, ["--preset", "best"], "expected target self, as the labels of the file say, got dense; leave --preset out"),
        (
            {},
            ["--solver", "mpax", "--solver.eps_abs", "0.1"],
            "cell wanda + cg, 0.5: --solver would change settings that labels of the file set; change the file instead "
            "(error without it: "
            "--solver.eps_abs is an option of solver mpax",
        ),
        (DAMPED, ["--solver.damping", "0.1"], "expected solver.damping 0.5, as the labels of the file say, got 0.1"),
        (DAMPED, ["--solver", "exact"], "expected solver cg, as the labels of the file say, got exact"),
        (
            {"updates": {"best": {"preset": "best"}}},
            ["--preset", "paper"],
            "expected accept per_row, as the labels of the file say",
        ),
        ({"updates": {"u": {"calibration": {"length": 8}}}}, ["--calibration.length", "16"], "expected calibration.length 8, as"),
    ],
)
def test_the_command_line_leaves_what_labels_stand_for(file, changes, argv, said):
    path = file(**(LABELLED | changes))
    assert read_grid(path).cells
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_grid(path, argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "argv", "changed"),
    [
        ({}, ["--pattern", "0.5", "--selector", "WANDA"], {}),  # what the file says too
        ({}, ["--accept", "per_layer"], {"accept": PerLayer()}),
        ({}, ["--selector.shift_zero", "true"], {"selector": Wanda(shift_zero=True)}),
        (DAMPED, ["--solver.tolerance", "1e-5"], {"solver": CG(tolerance=1e-5, damping=0.5)}),
        (
            {"updates": {"all": {"batch": 2}}},
            ["--preset", "paper"],
            {
                "solver": MPAX(eps_abs=1e-2, eps_rel=1e-2, iteration_limit=100_000),
                "accept": PerLayer(min_converged=0.95),
                "selector": Wanda(shift_zero=True),
            },
        ),
    ],
)
def test_settings_under_no_label_are_the_command_line_s(file, changes, argv, changed):
    path = file(**(LABELLED | changes))
    assert [cell.config for cell in read_grid(path, argv).cells] == [
        cell.config.changed(**changed) for cell in read_grid(path).cells
    ]
