"""One-shot pruning of language models with certified row solves, on a mesh of devices.

The rooms, each of which imports only those before it:

- ``errors``: the exception that is meant for the person at the terminal.
- ``runtime``: where a program runs: mesh, processes, device memory, files, signals.
- ``method``: the mathematics. ``problem`` states the quadratic program of a row; ``patterns``, ``selectors``, ``solvers``,
  ``mask_swaps``, ``acceptance`` and ``tuning`` are what is done to the rows of one Hessian; ``recipe`` names all of it.
- ``config``: from a command line or a YAML file to the ``RunConfig`` of a run.
- ``report``: what is printed and written of a run.
- ``models``: families, the decoder, activations, checkpoints, masks from elsewhere.
- ``data``: where tokens come from.
- ``evaluate``: perplexity, distance from the dense model, the evaluation harness.
- ``pipeline``: the run itself: ``run``, the walk over the blocks, the journal; and plans and sweeps of runs.
- ``api``: the Python interface, whose names are also here: ``optima_tpu.prune``.
- ``launch``, ``plan``, ``sweep``, ``export``, ``figures``, and ``cli`` for all of them: the command lines.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optima_tpu.api import Perplexity, PrunedLayer, Result, evaluate_model, load, prune, prune_layer

__all__ = ["Perplexity", "PrunedLayer", "Result", "evaluate_model", "load", "prune", "prune_layer"]


def __getattr__(name: str) -> Any:
    # Imported when it is first asked for: a command line that only prints its help does not wait for the whole package.
    if name in __all__:
        import optima_tpu.api

        return getattr(optima_tpu.api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
