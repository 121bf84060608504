"""One command for all command lines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import optima_tpu.report.__main__ as report
from optima_tpu import export, figures, plan, sweep, unpack, verify
from optima_tpu.cli import main
from optima_tpu.data import build
from optima_tpu.runtime.program import COMMANDS, program
from optima_tpu.runtime.version import code_version
from tests.support.runs import only_error

OPTIMA = Path(sys.executable).with_name("optima")


def test_alone_it_says_what_there_is(capsys):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{command.text}$", printed, re.MULTILINE)


def test_the_version_is_the_one_that_a_run_records(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"optima-tpu {code_version()}\n"


@pytest.mark.parametrize(
    "words, said",
    [
        (["prun"], "got prun; did you mean optima prune?"),
        (["--model", "x"], "got --model; did you mean optima prune --model?"),
        (["xyz"], "expected a command, one of prune, evaluate, recover, plan"),
    ],
)
def test_an_unknown_command_is_one_line(words, said, capsys):
    assert main(words) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["evaluate"], "expected the model before everything else, got nothing"),
        (["sweep"], "expected the file of the sweep as first argument, got nothing"),
        (["export"], "the following arguments are required: RUN, OUT"),
        (["export", "a", "b", "--nope"], "unrecognized arguments: --nope; see "),
        (["export", "a", "b", "--pakced"], "unrecognized arguments: --pakced; did you mean --packed?"),
        (["report", "a", "--ouput=b"], "unrecognized arguments: --ouput=b; did you mean --output?"),
        (["export", "a", "b", "--format", "ggml"], "did you mean gguf?"),
        (["report"], "the following arguments are required: RUN"),
        (["report", "a", "-o"], "argument -o/--output: expected one argument"),
        (["figures"], "the following arguments are required: FIGURE"),
        (["figures", "nonsense"], "invalid choice: 'nonsense'"),
        (["figures", "layer_errors"], "did you mean layer-errors?"),
        (["figures", "layer-errors", "a"], "the following arguments are required: -o/--output"),
        (["data", "a@b", "c.txt", "--validation-share", "x"], "invalid float value: 'x'"),
        (["plan", "--json"], "argument --json: expected one argument"),
        (["pru\nne"], "got pru\\nne"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_missing_or_wrong_is_one_line(words, said, capsys):
    assert main(words) == 2
    message = only_error(capsys.readouterr().err)
    assert said in message and (words[0] not in COMMANDS or "--help" in message)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--unscanned"], "--unscanned belongs to --format maxtext: the format plain has no stacked blocks"),
        (["--format", "gguf", "--quantize", "int8"], "--quantize is a setting of "),
        (["--quantize.group=null"], "--quantize is a setting of "),
    ],
)
def test_an_option_of_something_else_is_refused_by_the_export(words, said, capsys):
    assert main(["export", "runs/a", "b", *words]) == 2
    assert said in only_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    "module", [build, export, figures, plan, report, sweep, unpack, verify], ids=lambda module: module.__name__
)
def test_every_option_has_dashes_or_underscores(module):
    parser = module.make_parser()
    own = [action for action in parser._actions if action.option_strings and "--help" not in action.option_strings]
    for action in own:
        (name,) = (name for name in action.option_strings if name.startswith("--"))
        value = [] if action.nargs == 0 else ["0.5" if action.choices is None else list(action.choices)[-1]]
        parsed = [parser.parse_known_args([*"abc", "--" + name[2:].replace("-", dash), *value])[0] for dash in "-_"]
        assert parsed[0] == parsed[1] and vars(parsed[0])[action.dest] != action.default


@pytest.mark.parametrize(
    "words, path",
    [
        (["report", "nowhere", "-o"], "page.html"),
        (["figures", "layer-errors", "nowhere", "-o"], "figure.png"),
        (["plan", "--model", "nowhere", "--json"], "plan.json"),
    ],
)
def test_a_file_of_another_program_is_replaced_only_by_force(words, path, tmp_path, capsys):
    path = tmp_path / path
    path.write_text("years of work about OPTIMA-TPU")
    for more in ([], ["--force"]):
        assert main([*words, str(path), *more]) == 2  # there is no such run or model
        message = only_error(capsys.readouterr().err)
        refused = f"expected a new file, got {path}, which this program did not write: choose another, or add --force"
        assert (refused in message) == (not more) and path.read_text() == "years of work about OPTIMA-TPU"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {program(name)}")


def test_installed_it_names_itself_as_it_was_called():
    printed = subprocess.run([OPTIMA, "prune", "--help"], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("usage: optima prune")


def test_the_exit_status_is_that_of_the_command(tmp_path, capsys):
    assert main(["prune", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
