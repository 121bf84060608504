"""The names of the commands, for help texts and for messages that say what to type, and their parser."""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from optima_tpu.errors import UserError, did_you_mean, legible
from optima_tpu.runtime.printing import PrintsHelp

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "prune": "optima_tpu.launch",
        "evaluate": "optima_tpu.evaluate",
        "recover": "optima_tpu.recover",
        "plan": "optima_tpu.plan",
        "sweep": "optima_tpu.sweep",
        "report": "optima_tpu.report",
        "export": "optima_tpu.export",
        "push": "optima_tpu.push",
        "unpack": "optima_tpu.unpack",
        "verify": "optima_tpu.verify",
        "figures": "optima_tpu.figures",
        "data": "optima_tpu.data.build",
    }
)
"""Subcommand of ``optima`` -> the module that ``python -m`` runs for it."""


def program(name: str) -> str:
    """How to call a subcommand in the way this process was called: ``optima prune`` or ``python -m optima_tpu.launch``."""
    return f"optima {name}" if Path(sys.argv[0]).stem == "optima" else f"python -m {MODULES[name]}"


def refuse_undecodable(words: Iterable[str]) -> None:
    """Raises UserError for a text that is not UTF-8: reports, records and other libraries could not name such a path."""
    for word in words:
        if re.search("[\ud800-\udfff]", word):
            raise UserError(f"expected text in UTF-8, got {legible(word)}: rename the file or folder")


class Parser(PrintsHelp):
    """Refuses what is wrong or missing with a UserError, like everything else that a user can mend.

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
        """As :func:`did_you_mean`, for an option that may be misspelled. A setting of a run is seldom so near to another name."""
        return did_you_mean(_dashed(word.partition("=")[0]), self._option_string_actions, before, cutoff=0.75)

    def error(self, message: str) -> NoReturn:
        near = ""
        if found := re.search(r"invalid choice: (.*?) \(choose from (.*)\)", message):
            # The choices of one option are few, so a distant likeness, such as gguf for ggml, is worth a guess.
            near = did_you_mean(found[1].strip("'"), re.findall(r"[\w-]+", found[2]), cutoff=0.5)
        elif found := re.search(r"unrecognized arguments: (?:.* )?(--\S+)", message):
            near = self.nearest(found[1])
        raise UserError(f"{message}{near}; see {self.prog} --help")


def _dashed(option: str) -> str:
    return option.replace("_", "-")
