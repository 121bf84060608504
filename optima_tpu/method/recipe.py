"""What is done to each linear layer, and which are pruned together."""

import dataclasses
from typing import Annotated

from optima_tpu.method.acceptance import Acceptance, PerRow
from optima_tpu.method.choice import Method
from optima_tpu.method.layer_rules import LayerRule, pattern_of
from optima_tpu.method.mask_swaps import Exchanging, Swaps
from optima_tpu.method.patterns import Pattern, Unstructured
from optima_tpu.method.quantization import Quantizer
from optima_tpu.method.resources import Footprint
from optima_tpu.method.selectors import Selector, Wanda
from optima_tpu.method.solvers import CG, Solver, Unchanged
from optima_tpu.method.statistics import Groups
from optima_tpu.method.targets import SelfTarget, Target
from optima_tpu.runtime.bounds import Bound, Bounded


@dataclasses.dataclass(frozen=True)
class Recipe(Bounded):
    """What is done to every linear layer.

    Attributes:
      pattern: which weights are pruned: 0.5/row prunes half of every row, 0.5/layer half of every matrix, 0.5 half of every group
        that the published selector compares, 2:4 keeps 2 of every 4, 2:4@128 keeps 2 of every 4 inputs that lie 128 apart.
        0.25/neuron cuts a quarter of the neurons of every MLP and leaves the other layers dense, so that the exported model is
        smaller; 0.25/input prunes whole inputs of every layer. Both keep a multiple of 128, or with @64 behind, of 64. 0.33/head
        cuts a third of the heads of attention, each key-value head with its queries. dense prunes nothing, for a model that loses
        whole blocks alone.
        A pattern of your own is named by its import path and options: my_lab.patterns:Comb?every=3.
      layers: rules for layers with another pattern: PATH=PATTERN or PATH=dense, separated by commas; the last rule that matches
        holds. "self_attn.*=dense" leaves attention dense, "model.layers.0.*=0.3" prunes the first block less.
      selector: how the weights that stay are chosen.
      solver: how the weights that stay are moved; None keeps the selector's own weights, the baseline of the paper's tables.
      accept: when the solver's weights replace the selector's.
      target: what a layer must reproduce.
      recapture: take a layer's inputs from the block as pruned so far (q, k, v, then o, then gate and up, then down); false, as
        in the paper, takes all of them from the block before pruning.
      borrow: in a mixture of experts, layers that read the input of the mixture also count the mean over all tokens, as this many
        tokens for each input of the layer. It helps experts that few tokens reach; 0 gives every expert its own tokens alone.
      refine: whether the mask changes once its weights are solved; None keeps the selector's mask.
      quantize: whether the kept weights become integers once they are solved; None leaves them.

    Raises:
      UserError: a number is out of its bounds, or one method does not go with another.
    """

    pattern: Pattern = Unstructured()
    layers: tuple[LayerRule, ...] = dataclasses.field(default=(), kw_only=True)  # in the order of the settings in files
    selector: Selector = Wanda()
    solver: Solver | None = CG()
    accept: Acceptance = PerRow()
    target: Target = SelfTarget()
    recapture: bool = False
    borrow: Annotated[float, Bound(0)] = 0.0
    refine: Swaps | None = None
    quantize: Quantizer | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in filter(None, self.methods.values()):
            method.needs(self)

    @property
    def methods(self) -> dict[str, Method | None]:
        """The methods by the settings that choose them; None does nothing."""
        return {name: getattr(self, name) for name in ("selector", "solver", "accept", "target", "refine", "quantize")}

    @property
    def patterns(self) -> list[Pattern]:
        """The recipe's pattern and the patterns of its rules for layers."""
        return [self.pattern, *(rule.pattern for rule in self.layers if rule.pattern)]

    @property
    def damping(self) -> float:
        """The damping of the objective."""
        return self.solver.damping if self.solver else 0.0

    def update(self, pattern: Pattern) -> Solver:
        """The solver for a pattern; with ``refine`` it also changes masks."""
        if self.solver is None:
            return Unchanged()
        return Exchanging(self.solver, self.refine, pattern) if self.refine else self.solver

    def footprint(self) -> Footprint:
        """The device memory of the methods, beyond arrays common to all."""
        update = self.update(self.pattern).footprint()
        rounder = self.quantize.footprint() if self.quantize else Footprint(0, 0, split=True)
        return Footprint(
            max(update.hessians, self.selector.hessians, rounder.hessians),
            max(update.vectors, rounder.vectors),
            update.split and not self.selector.hessians and rounder.split,
        )

    def pattern_of(self, path: str, name: str) -> Pattern | None:
        """The pattern of a layer; None if the layer stays dense.

        ``path`` is the layer's whole path, ``name`` its path inside the block.
        """
        return pattern_of(self.layers, self.pattern, path, name)

    def pruned_groups(self, groups: Groups, prefix: str) -> Groups:
        """The groups without dense layers; groups left empty are dropped."""
        left = (tuple(name for name in names if self.pattern_of(prefix + name, name)) for names in groups)
        return tuple(filter(None, left))

    def solved_together(self, names: tuple[str, ...], prefix: str) -> Groups:
        """The layers of a group, divided into the calls of ``prune_group``.

        One call takes all layers; with mask exchange each pattern has its own call.
        """
        if self.refine is None:
            return (names,)
        calls: dict[Pattern | None, tuple[str, ...]] = {}
        for name in names:
            pattern = self.pattern_of(prefix + name, name)
            calls[pattern] = *calls.get(pattern, ()), name
        return tuple(calls.values())
