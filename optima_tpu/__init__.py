"""One-shot pruning of language models with certified row solves, on a mesh of devices.

The rooms, each of which imports only those before it:

- ``errors``: the exception that is meant for the person at the terminal.
- ``runtime``: where a program runs: mesh, processes, device memory, files, signals.
- ``method``: the mathematics. ``problem`` states the quadratic program of a row; ``patterns``, ``selectors``, ``solvers``,
  ``mask_swaps``, ``acceptance`` and ``tuning`` are what is done to the rows of one Hessian; ``recipe`` names all of it.
- ``config``: from a command line or a YAML file to the ``RunConfig`` of a run.
- ``report``: what is printed and written of a run.
- ``models``: families, the decoder, activations, checkpoints, masks from elsewhere.
- ``data``: where tokens come from.
- ``evaluate``: perplexity, distance from the dense model, the evaluation harness.
- ``pipeline``: the run itself: ``run``, the walk over the blocks, the journal; and plans and sweeps of runs.
- ``launch``, ``plan``, ``sweep``, ``export``, ``figures``: the command lines.
"""
