"""What tests share: problems, oracles, tiny models, runs and processes."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
