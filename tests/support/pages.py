"""Pages without drawings, which matplotlib takes a second for."""

import pytest


def leave_plots_empty(patch: pytest.MonkeyPatch) -> None:
    """Plots have nothing in them until the patch is undone."""
    patch.setattr("optima_tpu.report.plots.lines", lambda panels, prefix, **options: ["<svg></svg>" for _ in panels])
    patch.setattr("optima_tpu.report.plots.cells", lambda *arguments, **options: "<svg></svg>")
