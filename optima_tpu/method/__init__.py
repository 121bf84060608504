"""The mathematics of pruning: problems, masks, solvers.

Nothing here knows a model, a file or a report.
"""
