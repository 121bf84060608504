"""How to write and read a small file of every kind that the program reads."""

import contextlib
import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.numpy
from rich.console import Console

from optima_tpu import data
from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import to_dict
from optima_tpu.data.cache import TokenCache
from optima_tpu.data.source import Tokens
from optima_tpu.errors import UserError
from optima_tpu.evaluate.earlier_results import read_known
from optima_tpu.models.checkpoints import load_tokenizer, open_model
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.masks import open_masks
from optima_tpu.pipeline.allocate import KEPT, read_allocation
from optima_tpu.pipeline.continuations import CONTINUED
from optima_tpu.pipeline.distill.outcome import keep_outcome, read_outcome
from optima_tpu.pipeline.speed import MEASURED
from optima_tpu.pipeline.sweep.grid import read_grid
from optima_tpu.report.contents import Allocated, CellResult, Check, Outcome
from optima_tpu.report.curves import windows
from optima_tpu.report.page import render
from optima_tpu.report.run_record import read_run, write_run
from optima_tpu.report.runs import read_runs
from optima_tpu.report.summary import print_summary
from optima_tpu.runtime.checksums import ALL, damage, keep, known
from optima_tpu.runtime.records import encoded, json_values
from tests.support import fake_reports
from tests.support.fake_run import MANIFEST, SMALL
from tests.support.gguf_files import add_bpe, gguf_name, writing
from tests.support.meshes import mesh
from tests.support.tiny_models import tiny_folder, tiny_llama

LAYER = "model.layers.0.self_attn.q_proj.weight"
SHAPE = (6, 12)


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
      file: its name in the folder.
      write: writes the file, and whatever else its reader needs, into an empty folder.
      read: reads the folder as the program does.
      checked: the program compares a checksum: what reads the file without an error reads what was written.
    """

    file: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    checked: bool = False


def _open(folder: Path) -> Any:
    """Reads all of a model: configuration, every tensor, tokenizer."""
    pretrained = open_model(str(folder))
    decoder = Decoder.open(pretrained.config, pretrained.tensors, mesh(1, 1), 4)
    names, stored = decoder.tensor_names(), set(pretrained.tensors.names())
    decoder.config.positions(0, 8)
    for name in names:
        if name in stored:
            pretrained.tensors.read(name)
    return load_tokenizer(pretrained)("a text")["input_ids"]


def tiny_gguf(path: Path) -> None:
    """Writes a Llama with the words of byte-level BPE."""
    from tokenizers import pre_tokenizers

    words = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "th"]
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
    config, tensors = tiny_llama(vocab_size=len(words), num_hidden_layers=1, **sizes)
    with writing(path, "llama", config) as writer:
        writer.add_rope_freq_base(1e4)
        add_bpe(writer, "llama-bpe", words, ["Ġ t", "t h"])
        writer.add_add_bos_token(False)
        writer.add_eos_token_id(0)
        for name, array in tensors.arrays.items():
            writer.add_tensor(gguf_name(name), array)


def _masks(folder: Path) -> Any:
    source = open_masks(str(next(path for path in folder.iterdir() if path.stem == "masks")))
    return [source.read(name, SHAPE) for name in source.names()]


def _mask() -> np.ndarray:
    return np.indices(SHAPE).sum(axis=0) % 2 == 0


def _torch_masks(folder: Path) -> None:
    import torch

    torch.save({LAYER: torch.from_numpy(_mask())}, folder / "masks.pt")


def _documents(name: str) -> Callable[[Path], Any]:
    return lambda folder: sum(len(text) for text in data.parse_source(f"file:{folder / name}").documents("calibration"))


def _token_ids(folder: Path) -> Any:
    source = data.parse_source(f"npy:{folder / 'ids.npy'}")
    return source.tokens("calibration", vocabulary=50, windows=3, length=8, seed=0).ids


def _cached(folder: Path) -> Any:
    tokens = TokenCache(folder).load("key")
    return None if tokens is None else (tokens.ids.tolist(), tokens.how, tokens.available)


def _report(folder: Path) -> None:
    run = fake_reports.write_run(folder / "run")
    (run / "report.json").rename(folder / "report.json")
    shutil.rmtree(run)


def _read_report(folder: Path) -> None:
    _title, runs = read_runs([folder / "report.json"])
    with open("/dev/null", "w") as nowhere:
        print_summary(Console(file=nowhere), runs[0].report, folder)


EVALUATION = {
    "model": "run", "against": "dense", "average": 0.5,
    "configuration": {"fewshot": 5, "limit": 200, "apply_chat_template": False},
    "evaluated": {"model": {"fingerprint": "a", "manifest": fake_reports.MANIFEST}, "against": None}, "environment": json_values(fake_reports.ENVIRONMENT),
    "perplexity": {"wikitext2": {"perplexity": 3.0, "against": 2.0, "tokens": 8, "how": "two windows", "unigram_perplexity": 9.0}},
    "distance": {"wikitext2": {"kl": 0.1, "kl_stderr": None, "agreement": 0.9, "agreement_stderr": 0.1, "tokens": 8,
                               "hidden_errors": [0.1, 0.2, 0.3], "kls": None, "agreements": None}},
    "tasks": {"piqa": {"documents": 5, "metrics": {"acc": 0.5, "acc_stderr": 0.1}, "against": {"acc": 0.4}}},
}  # fmt: skip


SPEED = {"how": "2 × cpu", "dense": {"reading": 9.0, "writing": 4.0}, "cut": {"reading": 12.0, "writing": 5.0}}


def _evaluation(folder: Path) -> None:
    _report(folder)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))


def _whole_report(folder: Path) -> None:
    """A report with every part that a page can show, beside the evaluation."""
    _evaluation(folder)
    report = json.loads((folder / "report.json").read_text())
    token = {"window": 0, "position": 1, "before": "a", "token": "b", "after": "c", "dense": 0.5, "pruned": 0.1}
    report |= {
        "tokens": {"tokens": 8, "mean": 0.1, "mean_stderr": 0.01, "median": 0.1, "edges": [-2.0, -0.5, -0.1, 0.1, 0.5, 2.0],
                   "shares": [0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1], "rise_share": 0.5, "worst": [token]},
        "continuations": {"texts": [{"prompt": "a", "dense": ["b", "c", "d"], "pruned": ["b", "", ""]}]},
        "distillation": json_values(Outcome((Check(0, 1.0), Check(2, 0.5, 0.4)), 2, 64, 12.0)),
        "weighed_layers": ["mlp.down_proj"], "files": {"transformers": "elsewhere/hf"}, 
        "cuts": {"neurons": {"left": [48, 64], "total": 64}}, "speed": SPEED,
        "sizes": {"source": 90, "dense": 100, "transformers": 90, "left": {"hf": 90, "run.lock": 0}},
        "allocation": {"sparsity": [0.5, None, 0.4], "scores": [[0.1], None, [0.2]]},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))


def _page(folder: Path) -> None:
    render(*read_runs([folder / "report.json"]))


def _cells(folder: Path) -> None:
    fake_reports.write_run(folder / "cell")
    shutil.rmtree(folder / "cell/none", ignore_errors=True)
    common = {"state": "finished", "perplexity": 3.0, "dense": 2.0, "report": "cell/report.json"}
    (folder / "results.json").write_bytes(encoded([CellResult("wanda", "cg", "0.5", count, 0, **common) for count in (8, 16)]))


KNOWN = {
    "config": {"model_args": {"pretrained": "a", "fingerprint": "b"}, "limit": None}, "results": {"piqa": {"acc": 0.5}},
    "configs": {"piqa": {}}, "n-samples": {"piqa": {"original": 5}}, "max_length": 64, "lm_eval_version": "0.4",
    "chat_template": None, "system_instruction": None, "fewshot_as_multiturn": False,
}  # fmt: skip

SETTINGS = (
    "model: a\nselector: wanda\nsolver: {name: cg, damping: 0.1}\ncalibration: &text {source: pydoc, windows: 8}\npattern: 2:4\n"
)
SWEEP = """run: {model: a, calibration: {source: pydoc, length: 64}}
masks: {wanda: {selector: wanda}}
updates: {none: {solver: null}, cg: {solver: {name: cg, damping: 0.01}}}
patterns: {"50%": {pattern: 0.5}, "2:4": {pattern: 2:4, layers: "self_attn.*=dense"}}
windows: [16, 64]
seeds: [0, 1]
output: runs/tables/x
"""


def _jsonl() -> bytes:
    return b"".join(json.dumps({"text": f"document {i} \u00e9"}).encode() + b"\n" for i in range(5))


def _table(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"]}), folder / "a.parquet")


def _allocation(folder: Path) -> None:
    KEPT.write(folder, Allocated((0.5, None), ((0.1,), None)))


def _outcome(folder: Path) -> None:
    keep_outcome(folder, Outcome((Check(0, 1.0), Check(2, 0.5, 0.4)), 0, 64, 12.0))


def _without(sums: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Removes the checksums, so that the file's own reader is tried."""

    def write(folder: Path) -> None:
        sums(folder)
        (folder / ALL).unlink()

    return write


PAGES = {
    "page of a report": Kind("report.json", _whole_report, _page),
    "page of an evaluation": Kind("evaluation.json", _whole_report, _page),
}
"""Kinds whose reader draws."""

KINDS = {
    "config.json": Kind("config.json", tiny_folder, _open),
    "index": Kind("model.safetensors.index.json", tiny_folder, _open),
    "shard": Kind("model-00001-of-00002.safetensors", tiny_folder, _open),
    "tokenizer": Kind("tokenizer.json", tiny_folder, _open),
    "tokenizer settings": Kind("tokenizer_config.json", tiny_folder, _open),
    "gguf": Kind("m.gguf", lambda folder: tiny_gguf(folder / "m.gguf"), lambda folder: _open(folder / "m.gguf")),
    "npz": Kind("masks.npz", lambda folder: np.savez_compressed(folder / "masks.npz", **{LAYER: _mask()}), _masks),
    "packed npz": Kind(
        "masks.npz",
        lambda folder: np.savez(folder / "masks.npz", **{LAYER: np.packbits(_mask(), axis=1), LAYER + ".shape": np.asarray(SHAPE)}),
        _masks,
    ),
    "MaskLLM": Kind("masks.npz", lambda folder: np.savez(folder / "masks.npz", **{LAYER: np.packbits(_mask())}), _masks),
    "safetensors masks": Kind(
        "masks.safetensors", lambda folder: safetensors.numpy.save_file({LAYER: _mask()}, folder / "masks.safetensors"), _masks
    ),
    "torch masks": Kind("masks.pt", _torch_masks, _masks),
    "text": Kind("a.txt", lambda folder: (folder / "a.txt").write_text("caf\u00e9 " * 9), _documents("a.txt")),
    "packed text": Kind("a.txt.gz", lambda folder: (folder / "a.txt.gz").write_bytes(gzip.compress(b"text " * 99)), _documents("a.txt.gz")),
    "lines": Kind("a.jsonl", lambda folder: (folder / "a.jsonl").write_bytes(_jsonl()), _documents("a.jsonl")),
    "packed lines": Kind("a.jsonl.gz", lambda folder: (folder / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl())), _documents("a.jsonl.gz")),
    "parquet": Kind("a.parquet", _table, _documents("a.parquet")),
    "ids": Kind("ids.npy", lambda folder: np.save(folder / "ids.npy", np.arange(24, dtype=np.int32).reshape(3, 8)), _token_ids),
    "token cache": Kind(
        "key.safetensors",
        lambda folder: TokenCache(folder).save("key", Tokens(np.arange(24, dtype=np.int32).reshape(3, 8), "so", 24)),
        _cached,
    ),
    "settings": Kind(
        "run.yaml", lambda folder: (folder / "run.yaml").write_text(SETTINGS), lambda folder: parse(["--config", str(folder / "run.yaml")])
    ),
    "sweep": Kind("sweep.yaml", lambda folder: (folder / "sweep.yaml").write_text(SWEEP), lambda folder: read_grid(folder / "sweep.yaml")),
    "run.json": Kind("run.json", _without(lambda folder: write_run(folder, MANIFEST, to_dict(SMALL))), read_run),
    "run.json with its checksum": Kind("run.json", lambda folder: write_run(folder, MANIFEST, to_dict(SMALL)), read_run, checked=True),
    "report.json": Kind("report.json", _report, _read_report),
    "evaluation.json": Kind("evaluation.json", _evaluation, _read_report),
    "allocation.json": Kind("allocation.json", _allocation, read_allocation),
    "distillation.json": Kind("distillation.json", _outcome, read_outcome),
    "continuations.json": Kind(
        "continuations.json",
        lambda folder: keep(folder, {"continuations.json": json.dumps(
            {"texts": [{"prompt": "a", "dense": ["b", "c", "d"], "pruned": ["b", "", ""]}]}).encode()}),
        CONTINUED.read,
    ),
    "speed.json": Kind(
        "speed.json", lambda folder: keep(folder, {"speed.json": json.dumps(SPEED).encode()}), MEASURED.read
    ),
    "results.json": Kind("results.json", _cells, windows),
    "lm_eval.json": Kind(
        "lm_eval.json", lambda folder: (folder / "lm_eval.json").write_text(json.dumps(KNOWN)), lambda folder: read_known(str(folder), ["lm_eval.json"], "b")
    ),
    "checksums": Kind(ALL, lambda folder: keep(folder, {"a": b"1", "b/c": b"22"}), lambda folder: (damage(folder), known(folder))),
}  # fmt: skip
"""Name -> kind of file."""

REPLACEMENTS = (
    *(None, True, -1, 0, 1, 3, 2**31, 10**18, -(10**30), 0.5, -2.5, 1e308, float("nan")),
    *("", "x", "0.5", [], {}, [[]], [1], {"a": 1}),
)
"""What a value in a file of JSON is replaced with."""


def bits_flipped(content: bytes, bits: list[tuple[int, int]]) -> bytes:
    """Returns ``content`` with the bits (byte, bit) flipped.

    A byte beyond the end is counted from the beginning again.
    """
    changed = bytearray(content)
    for byte, bit in bits:
        changed[byte % len(changed)] ^= 1 << bit
    return bytes(changed)


def value_replaced(content: bytes, index: int, value: Any) -> bytes:
    """Replaces one value of a JSON document, counted depth first.

    Removes the value if the replacement is equal to it.
    """
    document = json.loads(content)
    slots: list[tuple[Any, Any]] = []

    def look(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            slots.append((value, key))
            look(value[key])

    look(document)
    if not slots:
        return json.dumps(value).encode()
    owner, key = slots[index % len(slots)]
    if owner[key] == value:
        del owner[key]
    else:
        owner[key] = value
    return json.dumps(document).encode()


def outcome(kind: Kind, folder: Path, content: bytes) -> str:
    """Reads a file with this content. Returns "read" or "refused".

    A refusal is a UserError of one line. Any other exception passes.
    """
    (folder / kind.file).write_bytes(content)
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            kind.read(folder)
    except UserError as error:
        assert str(error) and "\n" not in str(error), error
        return "refused"
    return "read"
