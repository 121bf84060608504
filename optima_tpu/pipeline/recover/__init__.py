"""Training of a pruned model on more text, from a finished run or from any pruned checkpoint."""
