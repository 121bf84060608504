"""Rules for layers, such as "self_attn.*=dense, mlp.down_proj=0.6"."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from optima_tpu.errors import UserError, naming
from optima_tpu.method.patterns import DENSE, NM, NamedPattern, Pattern, parse_pattern


def kind_name(name: str) -> str:
    """A layer's name without its expert's number: "mlp.experts.*.up_proj"."""
    return re.sub(r"(^|\.)experts\.\d+(?=\.)", r"\1experts.*", name)


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """Sets the pattern of the layers whose path matches.

    Attributes:
      path: a shell pattern (``*``, ``?``, ``[...]``) for the path inside the block, "self_attn.*", or for the whole path,
        "model.layers.0.*". Upper and lower case differ.
      pattern: the pattern of these layers; None leaves them dense.
    """

    path: str
    pattern: Pattern | None

    def matches(self, path: str, name: str) -> bool:
        """Whether the rule matches the layer, and its pattern is for it."""
        named = fnmatchcase(path, self.path) or fnmatchcase(name, self.path)
        return named and (self.pattern is None or self.pattern.of(name) is not None)


def parse_layers(text: str, group: str = "row", own: Callable[[str], Pattern] = NamedPattern) -> tuple[LayerRule, ...]:
    """Reads rules such as "PATH=PATTERN, PATH=dense".

    If several rules match a layer, the last one holds.

    Args:
      group, own: as in ``parse_pattern``.

    Raises:
      UserError: the text is not a list of such rules.
    """
    if text.strip() and not text.strip(", "):
        raise UserError(f"expected layers as PATH=PATTERN or PATH=dense, got {text!r} without a rule; leave it out for none")
    rules = []
    for part in filter(None, map(str.strip, text.split(","))):
        path, equals, value = (piece.strip() for piece in part.partition("="))
        if not (path and equals and value):
            raise UserError(
                "expected layers as PATH=PATTERN or PATH=dense with commas between, such as "
                f"self_attn.*=dense,mlp.down_proj=0.6, got {part!r}"
            )
        rules.append(LayerRule(path, None if value == DENSE else parse_pattern(value, group, own)))
    return tuple(rules)


def layers_text(rules: Sequence[LayerRule], group: str | None = None) -> str:
    """The text that :func:`parse_layers` reads back."""
    return ",".join(f"{rule.path}={rule.pattern.text(group) if rule.pattern else DENSE}" for rule in rules)


def with_patterns(rules: Iterable[LayerRule], change: Callable[[Pattern], Pattern]) -> tuple[LayerRule, ...]:
    """The rules with each of their patterns changed."""
    return tuple(dataclasses.replace(rule, pattern=rule.pattern and change(rule.pattern)) for rule in rules)


def pattern_of(rules: Sequence[LayerRule], default: Pattern, path: str, name: str) -> Pattern | None:
    """The pattern of one layer; None where it stays dense.

    Args:
      path: the whole path, "model.layers.0.mlp.up_proj".
      name: the path inside the block, "mlp.up_proj".
    """
    for rule in reversed(rules):
        if rule.matches(path, name):
            return rule.pattern and rule.pattern.of(name)
    return default.of(name)


def check_layers(
    rules: Sequence[LayerRule], default: Pattern, shapes: Iterable[tuple[str, str, tuple[int, int]]], cut: bool = False
) -> dict[str, Pattern]:
    """The pattern of every layer that is pruned, by its whole path.

    Args:
      shapes: (whole path, path inside the block, [d_out, d_in]) of every linear layer of the model.
      cut: whether the model loses whole structures beside, so that every layer may stay dense.

    Raises:
      UserError: a rule matches no layer, no layer is left to prune, or an N:M does not divide a layer's inputs.
    """
    layers = list(shapes)
    for rule in rules:
        if not any(rule.matches(path, name) for path, name, _ in layers):
            kinds = dict.fromkeys(kind_name(name) for _, name, _ in layers)
            names = [name for name in kinds if rule.pattern is None or rule.pattern.of(name)]
            such = f" that {rule.pattern.text()} is for" if rule.pattern and len(names) < len(kinds) else ""
            raise UserError(
                f"no layer{such} matches {rule.path!r} of --layers; the layers of a block{such} are {', '.join(names)}, "
                f"and the whole path of the first layer is {layers[0][0]}"
            )
    patterns: dict[str, Pattern] = {}
    inputs: dict[NM, list[tuple[str, int]]] = {}
    for path, name, shape in layers:
        pattern = pattern_of(rules, default, path, name)
        if pattern is None:
            continue
        patterns[path] = pattern
        if isinstance(pattern, NM):
            inputs.setdefault(pattern, []).append((name, shape[1]))
            continue
        with naming(path):
            pattern.pruned_count(shape)
    for nm, named_inputs in inputs.items():
        _check_inputs(rules, default, nm, named_inputs)
    if not patterns and not cut:
        by = f"--layers {layers_text(rules)}" if rules else f"the pattern {default.text()}"
        raise UserError(f"expected a layer to prune, but {by} leaves all of them dense")
    return patterns


def _check_inputs(rules: Sequence[LayerRule], default: Pattern, pattern: NM, layers: Sequence[tuple[str, int]]) -> None:
    """Raises UserError if N:M does not divide the inputs of some layers.

    The message names their kinds, and what to type for all of them.

    Args:
      layers: (path inside the block, d_in) of the layers with this pattern.
    """
    wrong: dict[int, dict[str, None]] = {}
    for name, d_in in layers:
        if not pattern.fits(d_in):
            wrong.setdefault(d_in, {})[kind_name(name)] = None
    if not wrong:
        return
    other = pattern.fitting(d_in for _, d_in in layers)
    choose = f"take {other}" if other else "choose an M that divides them"
    if pattern == default:
        choose = f"take --pattern {other}" if other else choose
        kinds = dict.fromkeys(kind for names in wrong.values() for kind in names)
        if any(pattern.fits(d_in) for _, d_in in layers):
            # In front: the rules that were given go over these.
            all_rules = (*(LayerRule(kind, other) for kind in kinds), *rules)
            way = "give these layers another pattern" if other else "leave these layers dense"
            choose += f', or {way}: --layers "{layers_text(all_rules)}"'
    else:
        choose += " in --layers"
    raise pattern.refusal(", and ".join(f"{d_in} in {', '.join(kinds)}" for d_in, kinds in wrong.items()), choose)
