"""One-shot pruning of language models with certified row solves.

The rooms of the package. Each imports only rooms above it in this list:

- ``errors``: the exception whose message the user reads.
- ``runtime``: where a program runs: mesh, processes, device memory, files, signals.
- ``method``: the mathematics. ``layer`` prunes one array, ``problem`` states the objective of a row. ``patterns``, ``selectors``,
  ``solvers``, ``mask_swaps`` and ``acceptance`` work on the rows of one Hessian. ``recipe`` holds a choice of each.
- ``config``: from a command line or a YAML file to the ``RunConfig`` of a run.
- ``report``: what a run prints and writes about itself.
- ``models``: families, the decoder, activations, checkpoints, imported masks.
- ``data``: text sources and token windows.
- ``evaluate``: perplexity, distance from the dense model, the evaluation harness.
- ``pipeline``: the run itself: ``run``, the walk over the blocks, the journal; and plans and sweeps of runs.
- ``api``: the Python interface. Its names can also be imported from here: ``optima_tpu.prune``.
- ``launch``, ``recover``, ``plan``, ``check``, ``sweep``, ``export``, ``push``, ``unpack``, ``verify``, ``figures``: the command
  lines. ``cli``: the command ``optima``, which calls them.
"""

import importlib
import os
import sys

from optima_tpu.runtime import signals

# python -m optima_tpu.launch imports this package before any other code of the command can run, and then JAX for a second or
# more. While Python looks for the module, sys.argv begins with -m in place of its name.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").startswith(__name__ + "."):
    signals.listen()

# Otherwise transformers warns, when it is first imported, that torch is missing. This program does not need torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from typing import TYPE_CHECKING, Any  # its import takes longer than all of the above

if TYPE_CHECKING:
    from optima_tpu.api import (
        Perplexity,
        PrunedLayer,
        Result,
        evaluate_model,
        load,
        load_packed,
        prune,
        prune_layer,
        recover_model,
        to_nnx,
    )
    from optima_tpu.method.zeros import broken_zeros, keep_zeros, masks_of

_ZEROS = ("broken_zeros", "keep_zeros", "masks_of")
__all__ = [
    "Perplexity",
    "PrunedLayer",
    "Result",
    "broken_zeros",
    "evaluate_model",
    "keep_zeros",
    "load",
    "load_packed",
    "masks_of",
    "prune",
    "prune_layer",
    "recover_model",
    "to_nnx",
]


def __getattr__(name: str) -> Any:
    # Imported at the first access: a command line that only prints its help does not wait for the whole package.
    if name in __all__:
        module = importlib.import_module("optima_tpu.method.zeros" if name in _ZEROS else "optima_tpu.api")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
