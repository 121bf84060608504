"""Where a program runs: mesh, processes, device memory, files, signals."""
