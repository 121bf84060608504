"""Tables of masks x updates x patterns, by ``python -m optima_tpu.sweep``."""
