"""The model card of an exported folder."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from optima_tpu.config.flat import flat
from optima_tpu.method.patterns import parse_pattern
from optima_tpu.report.numbers import percent
from optima_tpu.report.summary import fitted_errors, held_out_caveat, held_out_errors, of_record
from optima_tpu.report.view import without_folders

_LICENCES = {"Apache License": "apache-2.0", "MIT License": "mit"}
HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(@.+)?")
"""What a model is called on the hub, "owner/name" or "owner/name@revision". A relative path can look the same."""


def model_card(folder: str, sidecar: Mapping[str, Any], assets: Mapping[str, bytes], report: Mapping[str, Any]) -> str:
    """README.md in Markdown, with the front matter that the hub reads.

    Args:
      folder: name of the exported folder, the title where the model has no name.
      sidecar: optima_tpu.json: ``model``, ``manifest``, ``layers``.
      assets: the source's files; config.json and the licence are looked into.
      report: report.json of the run; ``recipe`` and ``perplexity``, with ``dense`` and ``pruned``, are shown if they are there,
        and the text that it was measured on.
    """
    recipe = sidecar["manifest"]["recipe"]
    origin = sidecar["model"]
    layers = sidecar["layers"]
    pruned = sum(layer["pruned"] for layer in layers)
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    licence, licence_name, licence_link = _licence(assets)
    front = ModelCardData(
        base_model=_base_model(origin, assets),
        library_name="transformers",
        tags=["pruned", "sparse", "optima-tpu"],
        license=licence,
        license_name=licence_name,
        license_link=licence_link,
    ).to_yaml()
    parts = [
        f"---\n{front}\n---\n",
        f"# {_title(origin, folder)}, pruned {parse_pattern(recipe['pattern'])}\n",
        f"{origin or 'A language model'}, pruned in one shot by OPTIMA-TPU: {pruned:,} of the {weights:,} weights in "
        f"its {len(layers)} pruned matrices are zero ({pruned / max(weights, 1):.2%}). All other tensors are as in the "
        "source.\n",
        "The file is not smaller than the source's and inference is not faster: zeros are stored like any other "
        "number. They help only together with a kernel or a compressor that uses them.\n",
        "## Recipe\n",
        *([f"{done}. The settings in full:\n"] if (done := report.get("recipe")) else []),
        _table(("setting", "value"), [(name, str(value)) for name, value in flat(recipe).items()]),
    ]
    if perplexity := report.get("perplexity"):
        rows = [(model, f"{perplexity[model]:.3f}") for model in ("dense", "pruned")]
        # Of a file only its name: the card is made to be published.
        how = without_folders(report.get("evaluation", {}).get("how", ""))
        parts += ["## Perplexity\n", *([f"On {how}.\n"] if how else []), _table(("model", "perplexity"), rows)]
    parts += ["## Layer errors\n", *_layer_errors(layers, held_out_caveat(recipe))]
    parts += [
        "## Files\n",
        "- `optima_tpu.json`: the recipe in full, and sparsity and reconstruction error of every layer.\n"
        "- `pruning_masks.npz`: which weights were kept. For each pruned weight, `<name>` holds one bit per entry as "
        "`numpy.packbits(keep, axis=1)` makes them (1 = kept, first input in the highest bit) and `<name>.shape` its "
        "`[d_out, d_in]`; `optima_tpu.models.checkpoints.export.read_masks` reads them.\n",
        f"Made by OPTIMA-TPU {sidecar['manifest'].get('code', '')}".rstrip() + ".\n",
    ]
    return "\n".join(parts)


def _layer_errors(layers: Sequence[Mapping[str, Any]], caveat: str) -> list[str]:
    """Means over the pruned layers, before and after the update, on the text that weights were fitted to and on other text."""
    rows = []
    for text, errors in (("calibration", fitted_errors(layers, of_record)), ("held out", held_out_errors(layers, of_record))):
        rows.append((text, *("not measured" if mean is None else percent(mean) for mean in errors)))
    said = f" The held-out text {caveat}." if caveat else ""
    return [
        "The change of a layer's output as a share of the output's energy, mean over the pruned matrices: with the "
        f"selector's weights, and with the final ones.{said}\n",
        _table(("text", "selector's", "final"), rows),
    ]


def _title(origin: str | None, folder: str) -> str:
    return Path(origin.removeprefix("wheel:")).name if origin else folder


def _base_model(origin: str | None, assets: Mapping[str, bytes]) -> str | None:
    """The hub id of the source, if it is known: what the user named, or what its config.json says."""
    for name in (origin, json.loads(assets.get("config.json", b"{}")).get("_name_or_path")):
        if name and (match := HUB_ID.fullmatch(name)) and not Path(name).exists():
            return match[1]
    return None


def _licence(assets: Mapping[str, bytes]) -> tuple[str | None, str | None, str | None]:
    """The id of the licence in a file of the source; of an unknown one also its name and the file."""
    file = next((name for name in sorted(assets) if name.upper().startswith(("LICENSE", "LICENCE"))), None)
    if file is None:
        return None, None, None
    head = assets[file][:400].decode("utf-8", "replace")
    known = next((id_ for title, id_ in _LICENCES.items() if title in head), None)
    return (known, None, None) if known else ("other", "source-licence", file)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
