"""Trains a pruned model on more text: a run, or any pruned checkpoint."""
