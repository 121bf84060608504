"""Averages over the seeds of a sweep, which its tables and its figure show."""

import statistics
from collections.abc import Iterable
from typing import Any

from optima_tpu.report.contents import CellResult

_MEASURED = ("perplexity", "dense", "error_before", "error_after", "held_out_before", "held_out_after", "seconds", "sparsity")


def averages(results: Iterable[CellResult]) -> list[dict[str, Any]]:
    """Averages over seeds for each mask, update, pattern and window count.

    ``seeds`` and ``failed`` count the finished and the failed seeds. The name of each number of :class:`CellResult` has its mean
    over the finished seeds; the name with ``_spread`` has the sample standard deviation, None for fewer than two seeds.
    """
    groups: dict[tuple, list[CellResult]] = {}
    for result in results:
        groups.setdefault((result.mask, result.update, result.pattern, result.windows), []).append(result)
    fields = []
    for key, group in groups.items():
        states = [result.state for result in group]
        field = dict(zip(("mask", "update", "pattern", "windows"), key))
        field |= {"seeds": states.count("finished"), "failed": states.count("failed")}
        for name in _MEASURED:
            values = [value for result in group if (value := getattr(result, name)) is not None]
            field |= {
                name: statistics.fmean(values) if values else None,
                f"{name}_spread": statistics.stdev(values) if len(values) > 1 else None,
            }
        fields.append(field)
    return fields
