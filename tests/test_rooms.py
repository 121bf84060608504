"""The rooms of the package import only what is below them; pyproject.toml names their order."""

from pathlib import Path

from importlinter.cli import lint_imports


def test_imports_go_one_way(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out
