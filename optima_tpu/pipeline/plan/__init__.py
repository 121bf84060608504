"""Plans what a run needs before it starts, from config.json alone.

The devices need not be attached: ``python -m optima_tpu.plan --config FILE --topology v5e:4x2``.
"""
