"""What is done to every linear layer, and which of them are pruned together."""

import dataclasses

from optima_tpu.method.acceptance import Acceptance, PerRow
from optima_tpu.method.layer_rules import LayerRule, pattern_of
from optima_tpu.method.mask_swaps import Refining, Swaps
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.selectors import MaskSelector
from optima_tpu.method.solvers import Solver
from optima_tpu.method.statistics import Groups
from optima_tpu.method.targets import SelfTarget, Target
from optima_tpu.method.tuning import Fixed, Grid, Tuning


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to every linear layer.

    Attributes:
      pattern: how many weights go, and inside which groups.
      selector: which ones stay; None where masks from elsewhere say so.
      solver: where those that stay go; None keeps the selector's own weights, the baseline of the paper's tables.
      accept: when the solver's weights replace the selector's.
      layers: layers with another pattern, or none.
      target: what the layers are to reproduce.
      recapture: whether a layer's inputs come from the block as pruned so far, not from the block as it was.
      tuning: what is chosen for each matrix on held-out tokens.
      refine: how the mask changes once its weights are solved; None leaves it as it is.
    """

    pattern: Pattern
    selector: MaskSelector | None
    solver: Solver | None
    accept: Acceptance = PerRow()
    layers: tuple[LayerRule, ...] = ()
    target: Target = SelfTarget()
    recapture: bool = False
    tuning: Tuning = Fixed()
    refine: Swaps | None = None

    def update(self, pattern: Pattern) -> Solver | Refining | None:
        """What moves the weights of a pattern, and maybe its mask; None where nothing does."""
        return Refining(self.solver, self.refine, pattern) if self.solver and self.refine else self.solver


def pruned_groups(groups: Groups, recipe: Recipe, prefix: str) -> Groups:
    """The groups without the layers that stay dense, and without those groups of which nothing is left."""
    left = (tuple(name for name in names if pattern_of(recipe.layers, recipe.pattern, prefix + name, name)) for names in groups)
    return tuple(filter(None, left))


def solved_together(names: tuple[str, ...], recipe: Recipe, prefix: str) -> Groups:
    """The layers of a group as ``prune.prune_group`` gets them: all at once, but each alone where it is tuned, and where masks
    are refined those of one pattern."""
    if isinstance(recipe.tuning, Grid):
        return tuple((name,) for name in names)
    if recipe.refine is None:
        return (names,)
    found: dict[Pattern | None, tuple[str, ...]] = {}
    for name in names:
        pattern = pattern_of(recipe.layers, recipe.pattern, prefix + name, name)
        found[pattern] = *found.get(pattern, ()), name
    return tuple(found.values())
