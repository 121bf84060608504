"""The table of the commands, how to call them, and their parser.

Imports no module of a command.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from optima_tpu.errors import UserError, did_you_mean, legible
from optima_tpu.runtime.printing import PrintsHelp


class Command(NamedTuple):
    """A row of the table of commands. ``runtime.command.main`` runs it.

    Attributes:
      text: what the command does, for ``optima --help``.
      module: what ``python -m`` runs for it.
      read: "module:name" of the function from arguments to what is asked for; empty for ``read`` in ``module``. ``runtime.light``
        calls it, so it only reads and checks.
      run: "module:name" of the function from that to the exit status, None for 0; empty for ``run`` in ``module``.
      again: what the same command does when it is typed again.
      opens: from what is asked for to the settings that name the model and the processes; None if no model is opened.
    """

    text: str
    module: str
    read: str = ""
    run: str = ""
    again: str = "the same command does it again"
    opens: Callable[[Any], Any] = lambda request: None

    @property
    def reader(self) -> str:
        return self.read or f"{self.module}:read"

    @property
    def runner(self) -> str:
        return self.run or f"{self.module}:run"


_AFTER_BLOCK = "the same command goes on after the last finished block"

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "prune": Command(
            "prune a model and measure what it costs in perplexity",
            "optima_tpu.launch",
            read="optima_tpu.pipeline.arguments:read_run",
            again=_AFTER_BLOCK,
            opens=lambda config: config,
        ),
        "evaluate": Command(
            "measure a model, pruned or dense: perplexity, distance to another model, tasks",
            "optima_tpu.evaluate",
            read="optima_tpu.evaluate.arguments:read",
            run="optima_tpu.evaluate.start:run",
            again="the same command goes on with what was not measured to its end",
            opens=lambda config: config,
        ),
        "recover": Command(
            "train a pruned model on more text, with its masks held",
            "optima_tpu.recover",
            read="optima_tpu.pipeline.arguments:read_recovery",
            again="the same command goes on at the last saved step, or begins again where none was saved",
            opens=lambda config: config,
        ),
        "plan": Command(
            "estimate what a run needs before it starts: memory, disk and time",
            "optima_tpu.plan",
            opens=lambda request: request.config,
        ),
        "check": Command("compare a model here with torch on one window, and say what would be pruned", "optima_tpu.check"),
        "sweep": Command(
            "run a table of masks x updates x patterns over one model",
            "optima_tpu.sweep",
            again=_AFTER_BLOCK,
            opens=lambda request: None if request.options.dry_run else request.grid.cells[0].config,
        ),
        "report": Command(
            "write the HTML page of a finished run, or of several side by side",
            "optima_tpu.report",
            read="optima_tpu.report.__main__:read",
            run="optima_tpu.report.__main__:run",
        ),
        "export": Command("write the folder that transformers loads, from a run's Orbax checkpoint", "optima_tpu.export"),
        "push": Command("publish a pruned model with its card on the Hugging Face hub; asks first", "optima_tpu.push"),
        "unpack": Command("write the folder that transformers loads, from a packed export", "optima_tpu.unpack"),
        "verify": Command("compare every file of a run or of an exported folder with its checksum", "optima_tpu.verify"),
        "figures": Command("draw the paper's figures from finished runs", "optima_tpu.figures"),
        "data": Command("make a data set with random access from text files", "optima_tpu.data.build"),
    }
)
"""Subcommand of ``optima`` -> its row."""


def program(name: str) -> str:
    """How to call a subcommand in the way this process was called."""
    return f"optima {name}" if Path(sys.argv[0]).stem == "optima" else f"python -m {COMMANDS[name].module}"


def refuse_undecodable(words: Iterable[str]) -> None:
    """Raises UserError for a text, such as a path, that is not UTF-8."""
    for word in words:
        if re.search("[\ud800-\udfff]", word):  # reports, records and other libraries could not name such a path
            raise UserError(f"expected text in UTF-8, got {legible(word)}: rename the file or folder")


class Parser(PrintsHelp):
    """A parser that refuses wrong or missing arguments with a UserError.

    Options may have dashes or underscores between their words: --dry-run is --dry_run, as for the settings of a run.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False} | options)  # --pack is no --packed, as among the settings of a run

    @property
    def names(self) -> set[str]:
        """The options, spelled as the settings of a run."""
        return {name[2:].replace("-", "_") for action in self._actions for name in action.option_strings if name[:2] == "--"}

    def parse_known_args(self, args=None, namespace=None):
        options = {_dashed(name): name for action in self._actions for name in action.option_strings}
        words = list(sys.argv[1:] if args is None else args)
        refuse_undecodable(words)
        pieces = [word.partition("=") for word in words]
        spelled = [options.get(_dashed(name), name) + equals + value for name, equals, value in pieces]
        return super().parse_known_args(spelled, namespace)

    def nearest(self, word: str, before: str = "") -> str:
        """As :func:`did_you_mean`, for an option that may be misspelled."""
        # A setting of a run that was meant is seldom so near to an option.
        return did_you_mean(_dashed(word.partition("=")[0]), self._option_string_actions, before, cutoff=0.75)

    def error(self, message: str) -> NoReturn:
        near = ""
        if match := re.search(r"invalid choice: (.*?) \(choose from (.*)\)", message):
            # The choices of one option are few, so a distant likeness, such as gguf for ggml, is worth a guess.
            near = did_you_mean(match[1].strip("'"), re.findall(r"[\w-]+", match[2]), cutoff=0.5)
        elif match := re.search(r"unrecognized arguments: (?:.* )?(--\S+)", message):
            near = self.nearest(match[1])
        raise UserError(f"{message}{near}; see {self.prog} --help")


def _dashed(option: str) -> str:
    return option.replace("_", "-")
