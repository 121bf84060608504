"""Evaluation of models before and after pruning: perplexity, distance to the dense model, tasks."""
