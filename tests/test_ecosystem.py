"""Pruned models in MaxText, Tunix and Qwix, by their own code.

The tests need Python 3.12 and an environment of their own, which docs/guides/jax-programs.md describes. Run them there:
python -m pytest -m slow -n 0 tests/test_ecosystem.py
"""

import subprocess
import sys

import pytest

from tests.support import ROOT

NEEDS = {"maxtext": ["maxtext"], "tunix": ["tunix"], "training": ["maxtext", "tunix"], "qwix": ["qwix", "tunix"]}


@pytest.mark.slow
@pytest.mark.parametrize("what", NEEDS)
def test_logits_and_zeros_arrive_and_zeros_survive_training(what):
    for package in NEEDS[what]:
        pytest.importorskip(package)
    # A process of its own: these programs take all devices that there are.
    done = subprocess.run([sys.executable, "-m", "benchmarks.ecosystem", what], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
