"""A run's configuration as YAML, as a command line, and as a preset."""

from collections.abc import Mapping
from typing import Any

from optima_tpu.config import yaml12
from optima_tpu.config.choices import CHOICES, default_options, with_pattern_damping
from optima_tpu.config.document import method_settings
from optima_tpu.config.flat import flat
from optima_tpu.config.presets import PLAIN, PRESETS, default_preset
from optima_tpu.config.run_config import RunConfig, default_run, to_dict
from optima_tpu.config.words import words_of


def dump(config: RunConfig) -> str:
    """The configuration as a YAML file that reads back to it."""
    return yaml12.dump(to_dict(config))


def flags(config: RunConfig) -> list[str]:
    """The command line of a configuration: the model and changed defaults.

    :func:`parse` reads it back to the configuration.
    """
    changes = {"model": config.model} | _changed(to_dict(config), to_dict(default_run(config.model)))
    if default_preset(changes.get("selector.name"), changes.get("solver.name")) != PLAIN:
        changes["preset"] = PLAIN
    return words_of(changes)


def on_preset(config: RunConfig) -> str:
    """The nearest preset and the differences, as in ``best --solver mpax``."""
    acting = (*CHOICES, "recapture", "borrow")
    values, plain = to_dict(config), to_dict(default_run(config.model))
    changes = {}
    for name, preset in PRESETS.items():
        base = plain | {setting: _with_defaults(setting, value) for setting, value in preset.settings.items()}
        changes[name] = _changed(*({setting: each[setting] for setting in acting} for each in (values, base)))
    nearest = min(changes, key=lambda name: len(changes[name]))
    return " ".join([nearest, *words_of(changes[nearest])])


def _with_defaults(setting: str, value: Any) -> Any:
    """A preset's setting, with all options of its method if it is one."""
    if setting not in CHOICES:
        return value
    method = method_settings(value)
    return default_options(setting, method["name"]) | method


def _changed(values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from ``base``, by their dotted names.

    The options of another method are compared with its own defaults. A class of the user's own has all its options here.
    """
    settings, defaults = dict(values), dict(base)
    for setting in CHOICES:
        settings[setting], defaults[setting] = method_settings(settings[setting]), method_settings(defaults[setting])
        if settings[setting]["name"] != defaults[setting]["name"]:
            name = settings[setting]["name"]
            # The defaults of the user's own class are in its code, which is not imported where only a record names it.
            defaults[setting] = default_options(setting, name) if name in CHOICES[setting] else {}
    defaults["solver"] = with_pattern_damping(defaults["solver"], settings)
    default = flat(defaults)
    return {key: value for key, value in flat(settings).items() if value != default.get(key)}
