"""What is done to every linear layer, and which of them are pruned together."""

import dataclasses

from optima_tpu.method.acceptance import Acceptance, PerRow
from optima_tpu.method.layer_rules import LayerRule, pattern_of
from optima_tpu.method.mask_swaps import Exchanging, Swaps
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.quantization import Quantizer
from optima_tpu.method.resources import Footprint
from optima_tpu.method.selectors import Selector
from optima_tpu.method.solvers import Solver, Unchanged
from optima_tpu.method.statistics import Groups
from optima_tpu.method.targets import SelfTarget, Target
from optima_tpu.method.tuning import Fixed, Tuning


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to every linear layer.

    Attributes:
      pattern: how many weights go, and inside which groups.
      selector: chooses the weights that stay; None if the masks are imported.
      solver: moves the weights that stay; None keeps the selector's own weights, the baseline of the paper's tables.
      accept: when the solver's weights replace the selector's.
      layers: rules for layers with another pattern, or that stay dense.
      target: what the layers must reproduce.
      recapture: whether a layer's inputs come from the block as pruned so far, not from the block before pruning.
      tuning: what is chosen for each matrix on held-out tokens.
      refine: how the mask changes once its weights are solved; None keeps the selector's mask.
      own_damping: the pull of the objective toward the dense weights, as a share of the Hessian's diagonal; None stands for the
        solver's default.
      borrow: how many tokens of the mean over all tokens count beside an expert's own, for each input of its layers.
      quantize: puts the kept weights on an integer grid once they are solved; None leaves them.
    """

    pattern: Pattern
    selector: Selector | None
    solver: Solver | None
    accept: Acceptance = PerRow()
    layers: tuple[LayerRule, ...] = ()
    target: Target = SelfTarget()
    recapture: bool = False
    tuning: Tuning = Fixed()
    refine: Swaps | None = None
    own_damping: float | None = None
    borrow: float = 0.0
    quantize: Quantizer | None = None

    @property
    def damping(self) -> float:
        """The damping of the objective."""
        if self.solver is None:
            return 0.0
        return self.solver.default_damping if self.own_damping is None else self.own_damping

    def update(self, pattern: Pattern) -> Solver:
        """The solver for the layers of a pattern; it also changes masks if the recipe refines them."""
        if self.solver is None:
            return Unchanged()
        return Exchanging(self.solver, self.refine, pattern) if self.refine else self.solver

    def footprint(self) -> Footprint:
        """The device memory of pruning a group of matrices, without the arrays that every method holds."""
        update = self.update(self.pattern).footprint(self.damping)
        chooser = self.selector.hessians if self.selector else 0
        rounder = self.quantize.footprint() if self.quantize else Footprint(0, 0, split=True)
        return Footprint(
            max(update.hessians, chooser, rounder.hessians),
            max(update.vectors, rounder.vectors),
            update.split and not chooser and rounder.split,
        )

    def pattern_of(self, path: str, name: str) -> Pattern | None:
        """The pattern of a layer, from its whole path and its path inside the block; None if it stays dense."""
        return pattern_of(self.layers, self.pattern, path, name)

    def pruned_groups(self, groups: Groups, prefix: str) -> Groups:
        """The groups without the layers that stay dense; groups that become empty are left out."""
        left = (tuple(name for name in names if self.pattern_of(prefix + name, name)) for names in groups)
        return tuple(filter(None, left))

    def solved_together(self, names: tuple[str, ...], prefix: str) -> Groups:
        """The layers of a group, divided into the calls of ``prune_group``.

        One call takes all layers. With tuning each layer has its own call; with mask exchange each pattern has its own call.
        """
        if self.tuning.by_held_out:
            return tuple((name,) for name in names)
        if self.refine is None:
            return (names,)
        found: dict[Pattern | None, tuple[str, ...]] = {}
        for name in names:
            pattern = self.pattern_of(prefix + name, name)
            found[pattern] = *found.get(pattern, ()), name
        return tuple(found.values())
