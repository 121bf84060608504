"""Writes the model card of an exported folder."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from optima_tpu.config.flat import flat
from optima_tpu.errors import legible
from optima_tpu.method.patterns import parse_pattern
from optima_tpu.report.licence import licence_of
from optima_tpu.report.numbers import percent
from optima_tpu.report.summary import fitted_errors, held_out_caveat, held_out_errors, of_record
from optima_tpu.report.view import without_folders

_IN_FILES = (
    "`model.safetensors` is not smaller than the dense model's in the same dtype, and inference is not faster, because zeros are "
    "stored like other numbers. `optima export --packed` stores them as a bit mask; a folder with packed.json is of this form, and "
    "`optima unpack` makes the plain folder of it. A folder with model.gguf holds the model for llama.cpp. Zeros save time only with "
    "a kernel that uses them.\n"
)
_CUT = (
    "This is an ordinary model with narrower MLPs: its files are smaller, and every program that loads the dense model loads it and "
    "computes less."
)
_IN_MAXTEXT = (
    "`0/items` holds the parameters in MaxText's layout, and maxtext.yml the settings that belong to it: "
    "`maxtext.yml load_parameters_path=FOLDER/0/items tokenizer_path=FOLDER`, with absolute paths, are arguments of MaxText's trainer. "
    "That trainer moves the zeros too, unless `optima_tpu.keep_zeros` wraps its optimizer.\n"
)
HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(@.+)?")
"""A model's id on the hub, "owner/name" or "owner/name@revision". A relative path can look the same."""


def model_card(
    folder: str, sidecar: Mapping[str, Any], assets: Mapping[str, bytes], report: Mapping[str, Any], library: str = "transformers"
) -> str:
    """The text of README.md in Markdown, with the front matter that the hub reads.

    Args:
      folder: name of the exported folder; the title if the model has no name.
      sidecar: contents of optima_tpu.json: ``model``, ``manifest``, ``layers``, and ``neurons`` if some were cut.
      assets: the source's files; config.json, the licence and the model card are read.
      report: report.json of the run. The card shows ``recipe``, the text that was read, ``perplexity`` (``dense`` and ``pruned``)
        and the evaluation text if the report has them.
      library: the library that loads the folder.
    """
    recipe = sidecar["manifest"]["recipe"]
    origin = sidecar["model"]
    layers, neurons = sidecar["layers"], sidecar.get("neurons")
    masked = [layer for layer in layers if "cut_from" not in layer]
    pruned = sum(layer["pruned"] for layer in masked)
    weights = sum(math.prod(layer["shape"]) for layer in masked)
    done = []
    if neurons:
        done.append(f"every MLP has {neurons['kept']:,} of {neurons['total']:,} neurons left, and the others are deleted")
    if masked or not neurons:
        done.append(
            f"{pruned:,} of the {weights:,} weights in its {len(masked)} pruned matrices are zero ({pruned / max(weights, 1):.2%})"
        )
    files = _IN_FILES
    if neurons:
        files = _CUT + (" Its zeros are stored like other numbers." if masked else "") + "\n"
    licence = licence_of(assets)
    front = ModelCardData(
        base_model=_base_model(origin, assets),
        library_name=library,
        tags=["pruned", *(["sparse"] if masked or not neurons else []), "optima-tpu"],
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
    ).to_yaml()
    parts = [
        f"---\n{front}\n---\n",
        f"# {_plain(_title(origin, folder))}, pruned {_plain(str(parse_pattern(recipe['pattern'])))}{' and trained' * bool(_trained(report))}\n",
        f"{_plain(origin or 'A language model')}, {_done(sidecar['manifest'], report)}: {'; '.join(done)}. "
        f"{_others(origin, recipe, report)}\n",
        *(
            [
                f"The kept weights are integers of {_plain(str(quantize['name']))} times scales, chosen by the pruning's own objective. A folder whose "
                "config.json has a quantization_config stores the integers and the scales; what follows is about the plain form.\n"
            ]
            if (quantize := recipe.get("quantize"))
            else []
        ),
        _IN_MAXTEXT if library == "maxtext" else files,
        "## Recipe\n",
        *([f"{_plain(told)}. {_read(sidecar['manifest'], report)}All settings:\n"] if (told := report.get("recipe")) else []),
        _table(
            ("setting", "value"), [(_plain(name), _plain(_typed(value))) for name, value in flat(recipe).items() if value != ""]
        ),
    ]
    if perplexity := report.get("perplexity"):
        trained = _trained(report)
        rows = [("dense", perplexity["dense"])]
        rows += [("pruned, before the training", before)] if (before := trained.get("perplexity_before")) else []
        rows += [("pruned and trained" if trained else "pruned", perplexity["pruned"])]
        rows = [(model, f"{value:.3f}") for model, value in rows]
        # Remove the folders of paths, because the card is meant to be published.
        how = without_folders(report.get("evaluation", {}).get("how", ""))
        parts += ["## Perplexity\n", *([f"On {_plain(how)}.\n"] if how else []), _table(("model", "perplexity"), rows)]
    parts += ["## Layer errors\n", *_layer_errors(layers, held_out_caveat(recipe), bool(_trained(report)))]
    if licence.id is None:
        parts += [
            "## Licence\n",
            "No file of the source names a licence. This model is a derivative of the source, whose licence holds for it.\n",
        ]
    parts += [
        "## Files\n",
        "- `optima_tpu.json`: all settings of the recipe, and the sparsity and reconstruction error of every layer.\n"
        "- `pruning_masks.npz`: the masks. For each pruned matrix, `<name>` holds one bit per weight, packed by "
        "`numpy.packbits(keep, axis=1)` (1 = kept, first input in the highest bit), and `<name>.shape` holds "
        "`[d_out, d_in]`; `optima_tpu.models.checkpoints.export.read_masks` reads them. A packed folder has them beside its weights, and "
        "`optima unpack` writes this file.\n",
        f"Made by OPTIMA-TPU {_plain(str(sidecar['manifest'].get('code', '')))}".rstrip() + ".\n",
    ]
    return "\n".join(parts)


def _done(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What was done with the model, in words."""
    trained = report.get("distillation") or {}
    if not manifest["recipe"].get("distill"):
        return "pruned in one shot by OPTIMA-TPU"
    by = "pruned, and" if "start" in manifest else "pruned by OPTIMA-TPU, and"
    if trained and not trained["kept"]:
        return f"{by} left as it was pruned, because training lowered no loss on held-out text"
    on = f"{trained['tokens']:,} tokens" if trained else "text"
    return f"{by} then trained by OPTIMA-TPU on {on} with its zeros held, so that it is not a model of one-shot pruning"


def _trained(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of a training that moved the weights; empty if none did."""
    record = report.get("distillation") or {}
    return record if record.get("kept") else {}


def _read(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The text that the weights were fitted to, as a sentence with a space behind it; empty if the report does not say it."""
    how = without_folders(report.get("calibration", {}).get("how", ""))
    return f"{'Trained' if 'start' in manifest else 'Calibrated'} on {_plain(how)}. " if how else ""


def _typed(value: Any) -> str:
    """A setting as it is typed: null, true, 0.5/row."""
    return value if isinstance(value, str) else json.dumps(value)


def _others(origin: str | None, recipe: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What became of the tensors that are not pruned."""
    refused, dtype = (report.get("distillation") or {}).get("kept") == 0, recipe.get("dtype")
    same = "the same as in the source" + (f", in {dtype}" if dtype else "")
    if (origin or "").startswith("wheel:") or Path(origin or "").suffix == ".gguf":  # as a rule of quantised weights
        same = f"the same as in the source, a GGUF file whose numbers were converted to {dtype or 'float32'}"
    if not refused and (recipe.get("distill") or {}).get("train", "weights") != "weights":
        return f"Training moved the norms' gains and the biases, too. The other tensors are {same}."
    return f"All other tensors are {same}."


def _layer_errors(layers: Sequence[Mapping[str, Any]], caveat: str, trained: bool) -> list[str]:
    """Mean errors over the pruned layers, before and after the update, on calibration and on held-out text."""
    rows = []
    for text, errors in (("calibration", fitted_errors(layers, of_record)), ("held out", held_out_errors(layers, of_record))):
        rows.append((text, *("not measured" if mean is None else percent(mean) for mean in errors)))
    said = f" The held-out text {caveat}." if caveat else ""
    said += " Both are as they were before the training, which no layer error measures." if trained else ""
    return [
        "The squared change of a layer's output relative to the output's energy, mean over the pruned matrices, with the "
        f"selector's weights and with the final weights.{said}\n",
        _table(("text", "selector's", "final"), rows),
    ]


def _plain(text: str) -> str:
    """Text in one line of Markdown in which nothing is markup. A name such as org/some_model stays as it is."""
    escaped = re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[#+=-])", r"\\\1", legible(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _title(origin: str | None, folder: str) -> str:
    return Path(origin.removeprefix("wheel:")).name if origin else folder


def _base_model(origin: str | None, assets: Mapping[str, bytes]) -> str | None:
    """The hub id of the source, from the user's model or from config.json; None if it is not known."""
    for name in (origin, json.loads(assets.get("config.json", b"{}")).get("_name_or_path")):
        if name and (match := HUB_ID.fullmatch(name)) and not Path(name).exists():
            return match[1]
    return None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
