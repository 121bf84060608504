"""The table of the parts of the record, the most valuable first.

Imports no JAX: each part takes the devices in its own process.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "a tiny Llama": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=258
    ),
    "SmolLM2-135M": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    ),
    "Llama-3.2-1B": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "Llama-3.1-8B": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
"""Sizes of models, as ``transformers.LlamaConfig`` takes them. Their weights are drawn."""


class Sizes(NamedTuple):
    """How large the problems of all parts are.

    Attributes:
      problem: (rows, inputs) of the layer that every method prunes.
      layer: (tokens, rows, inputs) of the products that are timed.
      run: the shape of the model of the whole run; another one if the wheel of SmolLM2 is there.
      blocks: the shapes of which a block is pruned, smallest first.
      windows: settings of the text of these blocks, in the place of a run's defaults.
      dtype: of the blocks.
      written: the shapes of models that write, and how many windows at once.
      moved: bytes that go to the devices and back.
    """

    problem: tuple[int, int]
    layer: tuple[int, int, int]
    run: str
    blocks: tuple[str, ...]
    windows: tuple[str, ...]
    dtype: str
    written: tuple[tuple[str, int], ...]
    moved: int


FULL = Sizes(
    (256, 1024),
    (16384, 4096, 4096),
    "SmolLM2-135M",
    ("SmolLM2-135M", "Llama-3.2-1B", "Llama-3.1-8B"),
    (),
    "bfloat16",
    (("SmolLM2-135M", 1), ("SmolLM2-135M", 32), ("Llama-3.2-1B", 1), ("Llama-3.2-1B", 32)),
    1 << 28,
)
SMALL = Sizes(
    (16, 32),
    (512, 256, 256),
    "a tiny Llama",
    ("a tiny Llama",),
    ("--calibration.windows", "8", "--calibration.length", "32", "--calibration.held_out", "2"),
    "float32",
    (("a tiny Llama", 2),),
    1 << 22,
)
"""For CPUs, on which the full sizes take hours, and for trials."""


class Part(NamedTuple):
    """One table of the record.

    Attributes:
      name: in messages and in the record.
      title: of the table.
      shows: what a row shows, and what its numbers are compared with.
      columns: of the table, in the form of ``docs/results/records``.
      rows: "module:name" of the function that yields the rows, from the sizes and a case.
      case: the field of :class:`Sizes` that lists the cases: each is measured in a process of its own, so that its peak of memory
        is its own; empty for a part without cases.
      variants: further values of a case, each with each.
      alone: whether its process leaves the devices to the processes that it starts.
    """

    name: str
    title: str
    shows: str
    columns: tuple[Mapping[str, str], ...]
    rows: str
    case: str = ""
    variants: tuple[str, ...] = ()
    alone: bool = False

    def cases(self, sizes: Sizes) -> list[tuple[Any, ...]]:
        """The arguments of ``rows`` behind the sizes, for each process."""
        listed = [(each,) for each in getattr(sizes, self.case)] if self.case else [()]
        return [(*case, *variant) for case in listed for variant in ([(each,) for each in self.variants] or [()])]


def _columns(*names: str, **units: str) -> tuple[Mapping[str, str], ...]:
    """Makes columns from names and units.

    A keyword of ``units`` is a column's name with an underscore for each space.
    """
    return tuple({"name": name} | ({"unit": unit} if (unit := units.get(name.replace(" ", "_"))) else {}) for name in names)


PARTS: tuple[Part, ...] = (
    Part(
        "devices",
        "Devices and versions",
        "What the other parts were measured on.",
        _columns("what", "value"),
        "benchmarks.accelerator.devices:devices",
    ),
    Part(
        "results",
        "Every selector and solver against float64",
        "Differences of float32 results from float64 on the host, and from the CPU backend's. For selectors float64 is the same "
        "method; for solvers it is the optimum of each row's own mask. Lower is better.",
        _columns(
            "method",
            "masks other than float64's",
            "weights from float64's, relative",
            "objective above the optimum, relative",
            "masks other than the CPU's",
            "weights from the CPU's, relative",
            **{"masks_other_than_float64's": "%", "masks_other_than_the_CPU's": "%"},
        ),
        "benchmarks.accelerator.results:results",
    ),
    Part(
        "run",
        "A whole run, killed and resumed",
        "`--preset fast` from start to end, and the same run killed (SIGKILL) behind its first block and started again: whether "
        "both wrote the same bits.",
        _columns("run", "seconds", "same bits"),
        "benchmarks.accelerator.run:runs",
        alone=True,
    ),
    Part(
        "rates",
        "Shares of the peak",
        "Operations a second of the parts of a run, beside a large product here in the same precision and the chip's published "
        "peak.",
        _columns(
            "part",
            "precision",
            "rate",
            "of a large product here",
            "of the published peak",
            rate="TFLOP/s",
            of_a_large_product_here="%",
            of_the_published_peak="%",
        ),
        "benchmarks.accelerator.rates:rates",
    ),
    Part(
        "blocks",
        "A block beside its plan",
        "One block with random weights, pruned a second time so that nothing is compiled: time and peak of device memory beside "
        "what `optima plan --no-compile` says for these devices.",
        _columns(
            "shape",
            "preset",
            "first time",
            "time",
            "planned time",
            "peak",
            "planned peak",
            first_time="s",
            time="s",
            planned_time="s",
            peak="GiB",
            planned_peak="GiB",
        ),
        "benchmarks.accelerator.blocks:block",
        "blocks",
        ("fast", "best"),
    ),
    Part(
        "generation",
        "Tokens that a model writes",
        "Random weights, greedy. The limit is the memory's bandwidth: each token of all windows reads every weight once.",
        _columns("shape", "windows at once", "rate", "limit", "share", rate="tokens/s", limit="tokens/s", share="%"),
        "benchmarks.accelerator.host:generation",
        "written",
    ),
    Part(
        "host",
        "What waits for the host",
        "Transfers and calls, beside what the plan assumes.",
        _columns("what", "value", "unit", "the plan assumes"),
        "benchmarks.accelerator.host:host",
    ),
    Part(
        "plans",
        "The compiled plans of these blocks",
        "What `optima plan` says where it compiles the programs, of whole runs.",
        _columns("shape", "preset", "planned time of a block", "planned peak", planned_time_of_a_block="s", planned_peak="GiB"),
        "benchmarks.accelerator.blocks:plan",
        "blocks",
        ("fast", "best"),
    ),
)
"""The most valuable first: the machine may be taken away."""
