"""One command for all command lines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from optima_tpu.cli import TEXTS, main
from optima_tpu.runtime.program import MODULES, program

OPTIMA = Path(sys.executable).with_name("optima")


def test_alone_it_says_what_there_is(capsys):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert TEXTS.keys() == MODULES.keys()
    for name, text in TEXTS.items():
        assert re.search(rf"^  {name} +{text}$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    "words, said",
    [
        (["prun"], "got prun; did you mean optima prune?"),
        (["--model", "x"], "got --model; did you mean optima prune --model?"),
        (["xyz"], "expected a command, one of prune, evaluate, plan"),
    ],
)
def test_an_unknown_command_is_one_line(words, said, capsys):
    assert main(words) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


@pytest.mark.parametrize("name", MODULES)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {program(name)}")


def test_installed_it_names_itself_as_it_was_called():
    printed = subprocess.run([OPTIMA, "export", "--help"], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("usage: optima export")


def test_the_exit_status_is_that_of_the_command(tmp_path, capsys):
    assert main(["prune", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
