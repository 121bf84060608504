"""What a method needs: device memory and operations. Every method states its needs beside its ``__call__``."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Footprint:
    """The device memory of a solver.

    Attributes:
      hessians: float32 matrices of the Hessian's size, itself included.
      vectors: float32 vectors of a row's size, for each row that is solved at once.
      split: whether ``Solver.prepare`` takes the Hessian by columns.
    """

    hessians: float
    vectors: float
    split: bool = False


@dataclasses.dataclass(frozen=True)
class Cost:
    """The operations of a method on the rows of a layer. A plan turns them into seconds.

    Attributes:
      products: products of all rows with a [d_in, d_in] matrix.
      passes: number of [rows, d_in] arrays that are read or written.
      inverses: inverses of one [d_in, d_in] matrix, which serve all rows.
      factorisations: factorisations of one [d_in, d_in] matrix for each row.
      rough: how many of the products only choose; see ``linalg.features.rough_matmul``.
    """

    products: float = 0.0
    passes: float = 0.0
    inverses: int = 0
    factorisations: int = 0
    rough: float = 0.0
