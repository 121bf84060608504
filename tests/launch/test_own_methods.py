"""A user's own methods, by import path from the working directory."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from optima_tpu.launch import main
from tests.launch.test_launch import OF_ONE_SHAPE
from tests.support.runs import SMALL, folder_tensors, only_error
from tests.support.tiny_models import tiny_folder

pytestmark = pytest.mark.usefixtures("one_device")

OWN = '''
import dataclasses
import jax.numpy as jnp
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import Pruned
from optima_tpu.method.selectors import Selector
from optima_tpu.method.solvers import CG, Solver
from optima_tpu.method.targets import DenseTarget


@dataclasses.dataclass(frozen=True)
class MyMask(Selector):
    """Keeps the weights with the largest ``|w_ij|^strength * ||x_j||``.

    Attributes:
      strength: how much the weight counts beside its input; 1 is Wanda.
    """

    strength: float = 1.0

    def __call__(self, problem, pattern):
        norms = jnp.sqrt(jnp.diagonal(problem.hessian))
        keep = pattern.keep_mask(jnp.abs(problem.weight) ** self.strength * norms)
        return Pruned(jnp.where(keep, problem.weight, 0.0), keep)


@dataclasses.dataclass(frozen=True)
class Lazy(Solver):
    """CG with few steps."""

    steps: int = 4

    def __call__(self, problem, pruned):
        return CG(max_steps=self.steps)(problem, pruned)


@dataclasses.dataclass(frozen=True)
class Far(DenseTarget):
    """Twice as far from the own outputs."""

    def pull(self, term, alpha):
        return 2 * super().pull(term, alpha)


@dataclasses.dataclass(frozen=True)
class Comb(Pattern):
    """Prunes every n-th input of all rows."""

    every: int = 4

    def pruned_count(self, shape):
        return shape[0] * (shape[1] // self.every)

    def keep_mask(self, scores):
        return jnp.broadcast_to((jnp.arange(scores.shape[1]) + 1) % self.every != 0, scores.shape)


class Thawed(Selector):
    def __call__(self, problem, pattern): ...
'''


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory) -> Iterator[Path]:
    """A folder with the user's module and a model."""
    root = tmp_path_factory.mktemp("lab")
    tiny_folder(root / "model", num_hidden_layers=1)
    (root / "my_lab").mkdir()
    (root / "my_lab" / "methods.py").write_text(OWN)
    path = sys.path.copy()
    yield root
    sys.path[:] = path
    for name in ("my_lab", "my_lab.methods"):
        sys.modules.pop(name, None)


@pytest.fixture
def lab(module_folder, monkeypatch) -> Path:
    """The working directory, in which the user's module is."""
    monkeypatch.chdir(module_folder)
    return module_folder


def launch(*arguments: str) -> int:
    return main(["--model", "model", *SMALL, *OF_ONE_SHAPE, *arguments])


def test_a_selector_of_ones_own_prunes_and_is_named(lab, capsys):
    own = ("--selector", "my_lab.methods:MyMask")
    assert launch(*own, "--selector.strength", "1", "--solver", "null", "--output", "own") == 0
    report = json.loads((lab / "own" / "report.json").read_text())
    assert report["recipe"].startswith("my_lab.methods:MyMask,")
    assert re.fullmatch("[0-9a-f]{64}", report["manifest"]["methods"]["my_lab.methods:MyMask"])
    # At this strength it is Wanda.
    assert launch("--selector", "wanda", "--solver", "null", "--output", "wanda") == 0
    for name, weight in folder_tensors(lab / "own" / "hf").items():
        assert (weight == folder_tensors(lab / "wanda" / "hf")[name]).all(), name
    capsys.readouterr()
    with pytest.raises(SystemExit):
        launch(*own, "--help")
    page = capsys.readouterr().out
    assert "--selector.strength X" in page and "how much the weight counts beside its input; 1 is Wanda" in " ".join(page.split())
    # Other code under the same name is another run.
    (lab / "my_lab" / "methods.py").write_text(OWN + "\n# edited\n")
    assert launch(*own, "--selector.strength", "1", "--solver", "null", "--output", "own") == 2
    assert "methods.my_lab.methods:MyMask" in only_error(capsys.readouterr().err)
    (lab / "my_lab" / "methods.py").write_text(OWN)


def test_solver_target_and_pattern_of_ones_own(lab):
    methods = ["--preset", "fast", "--solver", "my_lab.methods:Lazy", "--solver.damping", "0.1", "--solver.steps", "8"]
    methods += ["--target", "my_lab.methods:Far"]
    assert launch(*methods, "--recapture", "true", "--pattern", "my_lab.methods:Comb?every=3", "--output", "all") == 0
    manifest = json.loads((lab / "all" / "run.json").read_text())["manifest"]
    assert manifest["recipe"]["solver"] == {"name": "my_lab.methods:Lazy", "damping": 0.1, "steps": 8}
    assert manifest["recipe"]["pattern"] == "my_lab.methods:Comb?every=3"
    assert set(manifest["methods"]) == {f"my_lab.methods:{name}" for name in ("Lazy", "Far", "Comb")}
    weight = folder_tensors(lab / "all" / "hf")["model.layers.0.self_attn.o_proj.weight"]
    assert ((weight == 0) == (np.arange(1, 37) % 3 == 0)).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--selector", "my_lab.methods:Nope"], "the module my_lab.methods has no class Nope"),
        (["--selector", "my_lab.nope:X"], "there is no module my_lab.nope; expected one that is installed"),
        (["--selector", "my_lab.methods:Thawed"], "expected a frozen dataclass"),
        (["--solver", "my_lab.methods:MyMask"], "expected a class derived from optima_tpu.method.solvers.Solver"),
        (["--selector", "my_lab.methods:MyMask", "--selector.strenght", "2"], "did you mean --selector.strength"),
        (["--pattern", "my_lab.methods:Comb?each=3"], "expected options such as every=VALUE, got 'each=3'"),
        (["--refine", "swaps", "--pattern", "my_lab.methods:Comb"], "take --preset fast or --refine null"),
        (["--selector", "sparsegpt", "--pattern", "my_lab.methods:Comb"], "take --selector wanda"),
        (["--selector", "wandaa"], "the import path of your own"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(lab, capsys, arguments, words):
    assert launch(*arguments, "--output", "refused") == 2
    assert words in only_error(capsys.readouterr().err)
    assert not (lab / "refused").exists()


def test_an_installed_command_finds_what_is_in_the_working_directory(tmp_path):
    """pip's scripts put their own folder on sys.path, not the working one."""
    (tmp_path / "own_lab.py").write_text(OWN)
    script = (
        "import os, sys; sys.path = [place for place in sys.path if place not in ('', os.getcwd())]; sys.argv[0] = 'optima'; "
        "from optima_tpu.cli import main; sys.exit(main(['prune', '--selector', 'own_lab:MyMask', '--print_config']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "own_lab:MyMask" in done.stdout, done.stderr
