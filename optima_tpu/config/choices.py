"""Settings that choose a method: ours by name, others by their import path.

    --solver cg                                 a method of this package
    --selector my_lab.masks:MyMask              a class of the user's own, derived from ``Selector``

The options of a method are the fields of its dataclass.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from optima_tpu.config.names import REPLACED
from optima_tpu.errors import UserError, did_you_mean
from optima_tpu.method.acceptance import PerLayer, PerRow
from optima_tpu.method.allocation import OWL, Measured, Uniform
from optima_tpu.method.choice import Method
from optima_tpu.method.distillation import KL, CrossEntropy
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.mask_swaps import Swaps
from optima_tpu.method.patterns import parse_pattern
from optima_tpu.method.quantization import Int4, Int8
from optima_tpu.method.selectors import SELECTORS, Selector
from optima_tpu.method.solvers import SOLVERS, Solver
from optima_tpu.method.targets import DenseTarget, SelfTarget, Target
from optima_tpu.runtime.own_classes import import_class, import_path, imported_class, is_import_path, only_named

CHOICES: Mapping[str, Mapping[str, type | None]] = MappingProxyType(
    {
        "selector": SELECTORS,
        "solver": SOLVERS,
        "accept": MappingProxyType({"per_row": PerRow, "per_layer": PerLayer}),
        "target": MappingProxyType({"self": SelfTarget, "dense": DenseTarget}),
        "refine": MappingProxyType({"null": None, "swaps": Swaps}),
        "quantize": MappingProxyType({"null": None, "int8": Int8, "int4": Int4}),
        "allocation": MappingProxyType({"uniform": Uniform, "owl": OWL, "measured": Measured}),
        "distill": MappingProxyType({"null": None, "kl": KL, "cross_entropy": CrossEntropy}),
    }
)
"""For each setting that chooses a method: the methods by their names in YAML files and on the command line."""

OPEN: Mapping[str, type] = MappingProxyType({"selector": Selector, "solver": Solver, "target": Target})
"""The settings that take classes from outside the package, and the base class of these classes."""


@dataclasses.dataclass(frozen=True)
class Named:
    """A user's own method by its recorded text; nothing is imported.

    Attributes:
      path: the import path of its class.
      options: as they are recorded, in JSON types.
    """

    path: str
    options: Mapping[str, Any]

    def __call__(self, *_: Any) -> Any:
        raise only_named(self.path)


class NamedSelector(Named, Selector):
    """A selector that only a record names."""


class NamedSolver(Named, Solver):
    """A solver that only a record names."""

    @property
    def damping(self) -> float:
        """The damping of the objective, an option of every solver."""
        return self.options["damping"]


class NamedTarget(Named, Target):
    """A target that only a record names."""

    dense_stream = False


NAMED: Mapping[str, type[Named]] = MappingProxyType({"selector": NamedSelector, "solver": NamedSolver, "target": NamedTarget})
"""For each setting of :data:`OPEN`: what stands for a class that a record names."""


def method_class(setting: str, name: str) -> type | None:
    """The class of a method; None for "null".

    Imports nothing: :func:`canonical_name` has imported the user's own class before.

    Raises:
      UserError: the import path names no class that was imported.
    """
    return imported_class(name, OPEN[setting]) if setting in OPEN and is_import_path(name) else CHOICES[setting][name]


def canonical_name(setting: str, text: str) -> str:
    """The method's name from any spelling: per_layer, per-layer, PerLayer.

    An import path stays as it is, and its class is imported.

    Args:
      text: as the person typed it, or wrote it in a file for ``--config``. Never from a record, see :class:`Named`.

    Raises:
      UserError: there is no such method.
    """
    if setting in OPEN and is_import_path(str(text)):
        import_class(str(text), OPEN[setting])
        return str(text)
    for name in CHOICES[setting]:
        if plain_name(text) == plain_name(name):
            return name
    for former, instead in REPLACED.get(setting, {}).items():
        if plain_name(text) == plain_name(former):
            raise UserError(f"there is no {setting} {former} any more, since it earned next to nothing: take {instead}")
    own = f", or the import path of your own, such as my_lab.masks:{OPEN[setting].__name__}" if setting in OPEN else ""
    near = _as_option(setting, text) or did_you_mean(text, CHOICES[setting])
    raise UserError(f"expected {setting} to be one of {', '.join(CHOICES[setting])}{own}, got {text!r}{near}")


def _as_option(setting: str, text: str) -> str:
    """A hint that a text such as "norms" is a value of an option instead."""
    for cls in filter(None, CHOICES[setting].values()):
        for name, kind in typing.get_type_hints(cls).items():
            if text in typing.get_args(kind):
                return f"; {text} is a value of {setting}.{name}"
    return ""


def plain_name(name: Any) -> str:
    """One text for all spellings of a method's name."""
    return re.sub("[-_ ]", "", str(name)).lower()


def method_name(setting: str, method: object) -> str:
    """The name by which a method is chosen."""
    if isinstance(method, Named):
        return method.path
    return next((name for name, cls in CHOICES[setting].items() if cls is type(method)), import_path(type(method)))


def default_options(setting: str, name: str) -> dict[str, Any]:
    """The default options of a method, in JSON types."""
    cls = method_class(setting, name)
    return options_of(cls()) if cls else {}


def options_of(method: Method) -> dict[str, Any]:
    """A method's options in JSON types."""
    if isinstance(method, Named):
        return dict(method.options)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(method).items()}


def with_pattern_damping(options: Any, texts: Mapping[str, Any]) -> Any:
    """A solver's default options, with at least the damping of the patterns.

    If the solver has no damping, the options stay as they are.

    Args:
      texts: the settings ``pattern`` and ``layers`` as texts, if they are given.
    """
    if not isinstance(options, dict) or not options.get("damping"):
        return options
    try:
        rules = parse_layers(str(texts.get("layers") or ""))
        patterns = [parse_pattern(str(texts.get("pattern", "0.5"))), *(rule.pattern for rule in rules if rule.pattern)]
    except UserError:  # it is raised again where the settings are read
        return options
    return options | {"damping": max(options["damping"], *(pattern.damping for pattern in patterns))}
