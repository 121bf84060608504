"""The rooms of the package import only what is below them; pyproject.toml names their order."""

from importlinter.cli import lint_imports

from tests.support import ROOT


def test_imports_go_one_way(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out
