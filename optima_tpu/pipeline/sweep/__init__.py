"""Sweeps: a table of masks x updates x patterns over one model, ``python -m optima_tpu.sweep FILE``."""
