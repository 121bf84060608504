"""The mathematics of pruning: problems, masks, solvers.

Nothing here knows a model, a file or a report. :func:`prune_layer`, which can be imported from here, prunes one array.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optima_tpu.method.layer import prune_layer

__all__ = ["prune_layer"]


def __getattr__(name: str) -> Any:
    # Imported at the first access: ``layer`` uses most of this package, and a module of the package does not need it.
    if name in __all__:
        from optima_tpu.method import layer

        return getattr(layer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
