"""One-shot pruning of language models with certified row solves, on a mesh of devices.

Where to begin, in the order in which a run uses them:

- ``problem``: the quadratic program of a row, and its arrays. ``patterns``: which weights may stay.
- ``selectors``, ``solvers``, ``refine``, ``accept``: what is done to the rows of one Hessian: a mask, its weights, a better
  mask, the last word.
- ``calibrate``, ``target``: Hessians from activations, and what a layer is to reproduce.
- ``prune``: the walk through the blocks. ``prune_group`` prunes the matrices that read one input, ``judge`` compares what came
  out, ``tuning`` and ``allocation`` choose what is left open.
- ``sharding``, ``features``, ``memory``, ``activations``: where it lies on the mesh, and whether it fits.
- ``run``: ``inputs``, the walk, ``journal`` (every finished block, to go on from), ``checkpoint``, ``export``.
- ``launch``, ``command``, ``cli``, ``options``, ``presets``, ``config``: from a command line to the ``RunConfig`` of a run.
  ``processes``, ``collective_timeouts``: several of them, several devices in one.
- ``models``, ``weights``, ``masks``, ``data``, ``generate``: what is read. ``report``, ``evaluate``, ``sweep``, ``plan``: what
  is told.
"""
