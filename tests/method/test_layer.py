"""One layer is pruned with no other packages than jax, numpy, jaxtyping."""

import subprocess
import sys
from pathlib import Path

from optima_tpu.config.parse import chosen_run
from optima_tpu.method.layer import FAST

ROOT = Path(__file__).parents[2]

ALONE = """
import importlib.abc, importlib, pathlib, sys
import jax, jaxtyping, numpy

KNOWN = {name.partition(".")[0] for name in sys.modules} | {"optima_tpu", "scipy", "wadler_lindig"}
# jax and jaxtyping import the last two themselves, but later.

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in KNOWN | sys.stdlib_module_names:
            raise ModuleNotFoundError(f"the mathematics needs no {name}", name=name)

sys.meta_path.insert(0, Refuse())
for path in sorted(pathlib.Path("optima_tpu/method").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))

import dataclasses
import numpy as np
from optima_tpu.method import prune_layer
from optima_tpu.method.layer import FAST
from optima_tpu.method.patterns import NM

rng = np.random.default_rng(0)
weight, x = rng.standard_normal((6, 16)), rng.standard_normal((64, 16))
layer = prune_layer(weight.astype(np.float32), inputs=x, recipe=dataclasses.replace(FAST, pattern=NM(2, 4)))
assert layer.error_after < layer.error_before
assert (np.asarray(layer.mask).reshape(-1, 4).sum(axis=1) == 2).all() and (layer.gap <= 1e-3).all()
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("optima_tpu.")}
assert rooms == {"errors", "method", "runtime"}, rooms
"""


def test_a_layer_is_pruned_with_jax_numpy_and_jaxtyping_alone():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_recipe_of_a_layer_is_the_preset_fast():
    assert FAST == chosen_run({"preset": "fast", "model": "a model"}).recipe
