"""Linear algebra that selectors and solvers share: inverses, rankings, scaling, rows with sharded features."""
