"""Output of a run: progress on the terminal, the summary, ``report.json`` and the page ``report.html``."""
