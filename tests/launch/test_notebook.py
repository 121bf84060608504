"""The notebook of the documentation runs from top to bottom."""

import json

import pytest

from tests.support import ROOT
from tests.support.tiny_models import tiny_folder

pytestmark = pytest.mark.usefixtures("one_device")
DRAWS = True  # its pages have their drawings, see conftest.py


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", str(tiny_folder(tmp_path / "model")))
    monkeypatch.setenv("TEXT", "random")
    notebook = json.loads((ROOT / "docs" / "guides" / "notebook.ipynb").read_text())
    namespace: dict = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "outputs are not committed"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert "sparsegpt, 0.5 per layer" in capsys.readouterr().out
    assert namespace["both"].shape[0] == len(namespace["fast"].layers) == 21
