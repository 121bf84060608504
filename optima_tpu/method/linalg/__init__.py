"""Linear algebra that selectors and solvers share: inverses, rankings, scaling, rows whose features are split."""
