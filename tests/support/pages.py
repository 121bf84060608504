"""Pages without drawings, which matplotlib takes a second for."""

import pytest
from markupsafe import Markup


def leave_plots_empty(patch: pytest.MonkeyPatch) -> None:
    """Leaves plots empty until the patch is undone."""
    patch.setattr("optima_tpu.report.plots.lines", lambda panels, prefix, **options: [Markup("<svg></svg>") for _ in panels])
    patch.setattr("optima_tpu.report.plots.cells", lambda *arguments, **options: Markup("<svg></svg>"))
