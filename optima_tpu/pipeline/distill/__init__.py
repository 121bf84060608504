"""The stage that trains the pruned model as a whole toward the dense one."""
