"""Evaluation before and after pruning: perplexity, distance, tasks."""
