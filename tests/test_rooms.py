"""Rooms of the package import only the rooms below, as pyproject.toml says."""

import re
import subprocess
import sys
import tomllib

from tests.support import ROOT

# In a process of its own: import-linter configures logging anew, which closes and disables what other tests log to.
LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"


def test_imports_go_one_way():
    linted = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, text=True, capture_output=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_every_file_of_the_package_is_in_its_wheel():
    """Setuptools takes only modules and files that pyproject.toml names."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    named = {f"{package.replace('.', '/')}/{name}" for package, names in data.items() for name in names}
    other = {path for path in (ROOT / "optima_tpu").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {path.relative_to(ROOT).as_posix() for path in other} == named
    # A folder without __init__.py is no package, so its modules would be missing.
    assert all((path.parent / "__init__.py").is_file() for path in (ROOT / "optima_tpu").rglob("*.py"))


def test_one_file_reads_the_texts_of_errors():
    """Elsewhere what happens hangs on an error's class, number or status."""
    text = r"(str|repr|one_line)\((error|refused)\)"
    looks = re.compile(rf"(search|match|find\w*)\([^()]*\b{text}|\bin {text}|{text}\.(\w+with|r?find|index|r?partition)\b")
    files = {path.name for path in (ROOT / "optima_tpu").rglob("*.py") if looks.search(path.read_text())}
    assert files == {"error_texts.py"}
