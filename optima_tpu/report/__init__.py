"""What a run tells: while it goes on, at its end, and in ``report.json``."""
