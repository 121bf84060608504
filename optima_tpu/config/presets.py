"""Presets: named settings, which a file and the command line override."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from optima_tpu.errors import UserError, did_you_mean


class Preset(NamedTuple):
    """Named settings.

    Attributes:
      text: what the preset is, for --help.
      settings: the settings, with every method in its long form.
    """

    text: str
    settings: Mapping[str, Any]


_BEST: Mapping[str, Any] = {
    # Twice as many levels, and an inverse for each, give the same held-out errors (benchmarks/README.md).
    "selector": {"name": "admm", "damping": 0.3, "levels": 6, "iterations": 4, "inverses": 2},
    "solver": {"name": "cg", "damping": 0.3},
    "accept": {"name": "per_row"},
    "refine": {"name": "swaps"},
    "recapture": True,
    "borrow": 0.125,
    "target": {"name": "dense", "alpha": 0.5, "gamma": 0.5, "weigh_tokens": True},
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "paper": Preset(
            "OPTIMA as published",
            {
                "selector": {"name": "wanda", "shift_zero": True},
                "solver": {"name": "mpax", "eps_abs": 1e-2, "eps_rel": 1e-2, "iteration_limit": 100_000},
                "accept": {"name": "per_layer", "min_converged": 0.95},
            },
        ),
        "fast": Preset(
            "certified weights for Wanda's masks",
            {"selector": {"name": "wanda"}, "solver": {"name": "cg"}, "accept": {"name": "per_row"}},
        ),
        "best": Preset("the settings that measured best", _BEST),
        "distilled": Preset(
            "best, and then training on more text with every zero held; no longer one-shot pruning",
            {**_BEST, "distill": {"name": "kl"}},
        ),
    }
)

DEFAULT = "best"
"""The preset of a command that names none: it prunes in one shot, as the methods that it is compared with, and on devices that
hold the model once. ``distilled`` gives the better model, and holds 13 bytes for each weight of the blocks."""
PLAIN = "fast"
"""The preset of a command that names a selector, or the solver "null"; its settings are the defaults of ``RunConfig``."""


def default_preset(selector: str | None, solver: str | None) -> str:
    """The preset for settings that name none.

    Settings with a named selector, or with the solver "null", ask for one cell of a table of results: this mask and this update,
    without further methods. Any other setting changes one part of the best preset.

    Args:
      selector: the selector that the settings name; None if they name none.
      solver: the solver that the settings name; None if they name none.
    """
    return DEFAULT if selector is None and solver != "null" else PLAIN


def with_preset(name: str | None, document: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset, overridden by ``document``.

    If ``document`` chooses another method than the preset, the preset's options for its method are dropped.

    Raises:
      UserError: there is no such preset.
    """
    if name is None:
        return dict(document)
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"expected preset to be one of {', '.join(PRESETS)}, got {name!r}{did_you_mean(name, PRESETS)}")
    settings = {setting: dict(value) if isinstance(value, dict) else value for setting, value in PRESETS[name].settings.items()}
    for setting, value in document.items():
        own = settings.get(setting)
        inherits = isinstance(own, dict) and value.get("name", own["name"]) == own["name"]
        settings[setting] = own | value if inherits else value
    return settings
