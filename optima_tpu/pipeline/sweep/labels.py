"""Settings under a sweep's labels, which the command line may not change."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.flat import options, typed
from optima_tpu.config.parse import configure
from optima_tpu.config.presets import PRESETS
from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.config.words import spelled
from optima_tpu.errors import UserError


def labelled_settings(axes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The command-line names of all settings under labels.

    An option also adds the name of its method.
    """
    labels = [settings for axis in axes.values() for settings in axis.values()]
    if any("preset" in settings for settings in labels):
        labels += [preset.settings for preset in PRESETS.values()]
    names = {name for settings in labels for name in options(settings)}
    return sorted(names | {name.partition(".")[0] for name in names if name.partition(".")[0] in CHOICES})


def refuse_relabelled(config: RunConfig, document: Mapping[str, Any], argv: Sequence[str], names: Collection[str]) -> None:
    """Refuses a command line that changes a labelled setting.

    The table would show other numbers than the label says.

    Args:
      config: the cell's configuration from file and command line.
      document: the cell's settings in the file.
      names: :func:`labelled_settings`.

    Raises:
      UserError: the command line changes one, whether by the setting, by a preset, or by another method.
    """
    spellings = {spelled(f"--{name}"): f"--{name}" for name in (*names, "preset")}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in spellings:
        parser.add_argument(option)
    words = [spelled(word) for word in argv]
    _, others = parser.parse_known_args(words)
    if len(others) == len(words):
        return
    given = [spellings[option] for word in words if (option := word.partition("=")[0]) in spellings]
    try:
        labelled = options(to_dict(configure(document, others)))
    except UserError as error:
        raise UserError(
            f"{', '.join(given)} would change settings that labels of the file set; change the file instead "
            f"(error without it: {error})"
        ) from None
    configured = options(to_dict(config))
    for name in names:
        if configured.get(name) != labelled.get(name):
            option = f"--{name}" if f"--{name}" in given else "--preset"
            raise UserError(
                f"expected {name} {typed(labelled.get(name))}, as the labels of the file say, got "
                f"{typed(configured.get(name))}; leave {option} out, or change the file"
            )
