"""The device memory that a method needs, as each method states it."""

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
