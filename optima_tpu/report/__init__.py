"""What a run prints and writes: progress, summary, report and page."""
