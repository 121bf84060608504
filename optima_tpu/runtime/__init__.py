"""Where a program runs: mesh, processes, device memory, files, signals. Nothing here knows of models or of pruning."""
