"""One run, from a dense checkpoint to a pruned one; and plans and sweeps of runs."""
