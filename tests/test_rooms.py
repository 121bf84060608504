"""The rooms of the package import only what is below them; pyproject.toml names their order."""

import subprocess
import sys

from tests.support import ROOT

# In a process of its own: import-linter configures logging anew, which closes and disables what other tests log to.
LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"


def test_imports_go_one_way():
    linted = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, text=True, capture_output=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr
