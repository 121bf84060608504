"""The run: from a checkpoint to a pruned one, and what is planned and swept around it."""
