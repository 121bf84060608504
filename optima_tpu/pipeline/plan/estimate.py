"""Counts memory and time without a compiler."""

import collections
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from optima_tpu.config.run_config import RunConfig
from optima_tpu.evaluate.predictions import stretch_of
from optima_tpu.method.patterns import Pattern
from optima_tpu.pipeline.inputs import linear_shapes
from optima_tpu.pipeline.plan.counting import Work
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.share import Planned, Share, Storage
from optima_tpu.pipeline.plan.topology import GIB, READING, TRANSFER, WRITING, Machine
from optima_tpu.pipeline.plan.walk import ForwardPasses

EVALUATION_TOKENS = 300_000
"""Tokens of the perplexity text if ``evaluation.windows`` is null and the text is not on this machine."""
_PROGRAM = GIB
"""Bytes of host memory before the first array: Python, jax, transformers, compiled programs."""
_COMPRESSED, _MASK = 0.5, 0.2
"""The share of the bytes of zeros that Orbax's compression saves at least: random weights in bfloat16, float16 and float32 lost
0.77 and more of them, from a quarter of zeros to three quarters. And bytes of a compressed entry of a mask: random masks took
0.19."""


def storage(
    model: DeclaredModel,
    config: RunConfig,
    machine: Machine,
    patterns: Mapping[str, Pattern],
    kept: float = 0.0,
    calibrates: bool = True,
) -> Storage:
    """Host memory and disk of a run.

    Args:
      patterns: the pattern of every pruned matrix, by its whole path.
      kept: the size of the inputs of layers that the passes of a block keep, in sizes of the hidden states.
      calibrates: whether the calibration text passes through the blocks; it does not where they are pruned already, or stay
        dense.
    """
    text, quantizer = config.calibration, config.recipe.quantize
    hidden = calibrates * (text.fitted + text.held_out) * text.window_length * model.state_bytes * config.recipe.target.streams
    shapes = {path: shape for path, _, shape in linear_shapes(model.decoder) if path in patterns}
    masks = sum(map(math.prod, shapes.values()))  # an entry for each of these weights
    scales = masks * model.end_itemsize // (quantizer.group or model.decoder.config.d_model) if quantizer else 0
    zeros = sum(patterns[path].pruned_count(shape) for path, shape in shapes.items())
    saved = model.all_blocks_bytes() - round(zeros * model.end_itemsize * _COMPRESSED) + round(masks * _MASK) + scales
    disk = {"journal": saved, "hidden states": 2 * hidden, "checkpoint": model.end_bytes()}
    if config.export:
        served = model.narrow(config.recipe)
        masked = sum(
            math.prod(shape)
            for path, shape in shapes.items()
            if served is model or not patterns[path].cuts  # what is cut needs no mask
        )
        disk["export for transformers"] = served.bytes + masked // 8
    left = sum(disk.values()) - disk["hidden states"]
    return Storage(hidden, _host_memory(model, machine, hidden, masks + scales, kept), disk, False, left)


def with_shares(stored: Storage, shares: Sequence[Share]) -> Storage:
    """The storage of a run with what its powers add."""
    for share in shares:
        left = stored.left + sum(share.disk.values())
        host, disk = {**stored.host, **share.host}, {**stored.disk, **share.disk, **share.removed}
        stored = stored._replace(host=host, disk=disk, left=left)
    return stored


def _host_memory(model: DeclaredModel, machine: Machine, hidden: int, beside: int, kept: float) -> dict[str, int]:
    """Bytes of the memory of one host, by use.

    Args:
      hidden, kept: as in :func:`storage`; the hosts share the hidden states.
      beside: of masks and scales that are saved with all blocks.
    """
    decoder, hosts, on_cpu = model.decoder, machine.hosts, machine.platform == "cpu"
    block = max(model.at(kind).block_bytes() for kind in decoder.config.kinds)
    table = max(math.prod(shape) * model.itemsize(name) for name, shape in decoder.end_shapes.items())
    share = -(-hidden // hosts)
    # Devices that use the memory of the host hold the head three times, in a file, as read and on a device, and the logits at
    # once.
    logits = decoder.batch * stretch_of(decoder.batch, decoder.config.vocab) * decoder.config.vocab
    head = on_cpu * (3 * table + 4 * logits)
    # A save to the journal makes one more copy; embedding the tokens needs the whole table.
    host = {
        "the program": _PROGRAM,
        "hidden states": share,
        f"being saved, or the embedding{' or the head' * on_cpu}": max(
            share + block + beside * block // model.all_blocks_bytes(),
            table + table // model.end_itemsize,
            model.end_bytes() // hosts,
            head,
        ),
    }
    if kept:
        host["inputs of layers"] = round(share * kept)
    return host


def evaluation_tokens(config: RunConfig) -> int:
    """Tokens of the perplexity text."""
    length = config.evaluation.length or config.calibration.window_length
    return config.evaluation.windows * length if config.evaluation.windows else EVALUATION_TOKENS


class RunTime(NamedTuple):
    """What the time of a run depends on.

    Attributes:
      forward: the forward passes.
      shares: of the powers and of the walk over the blocks, in the order of the run.
    """

    run: Planned
    forward: ForwardPasses
    shares: Sequence[Share]

    def stages(self, compiling: float | None) -> dict[str, float]:
        """Seconds of a run, by stage.

        Args:
          compiling: seconds that compiling all programs took on this machine; None if nothing was compiled.
        """
        run, machine = self.run, self.run.machine
        stages, moved, written = {"compiling (as here)": compiling or 0.0}, 0.0, float(run.stored.left)
        # The pruned model is read for its perplexity, the walk, the checkpoint.
        read = (3.0 if run.calibrated else 2.0) * run.model.bytes
        for share in self.shares:
            seconds = self._seconds_of(share)
            stages |= seconds
            written += share.rewritten(sum(seconds.values()))
            read += sum(each.dense for each in share.passes) * run.dense.bytes
            through = sum(each.tokens for each in share.passes if each.moves)
            moved += share.moved + 2 * run.blocks * run.model.state_bytes * through
        programs = itertools.chain.from_iterable(share.programs for share in self.shares)
        stages |= {
            "hidden states to and from the devices": machine.moving(moved),
            "communication of these programs": sum(program.communication(machine) for program in programs),
            "reading weights": read / (READING * machine.hosts),
            "writing": written / WRITING,
        }
        return {name: seconds for name, seconds in stages.items() if seconds}

    def _seconds_of(self, share: Share) -> dict[str, float]:
        """Seconds of a share, by stage."""
        seconds = collections.defaultdict[str, float](float)
        for program in share.programs:
            seconds[program.stage] += program.seconds(self.run.machine)
        for stage, beside in share.seconds.items():
            seconds[stage] += beside
        for each in share.passes:
            seconds[each.stage] += self.run.blocks * self._seconds(self.forward.whole, each.tokens)
            seconds[each.stage] += self._seconds(self.forward.head, each.scored)
        return seconds

    def _seconds(self, window: Work, tokens: float) -> float:
        """Seconds of so many tokens, by the work of a window."""
        return window.seconds(self.run.machine) * tokens / self.run.config.calibration.window_length


def assumptions(config: RunConfig, machine: Machine, shares: Iterable[Share], unknown: Collection[str]) -> list[str]:
    """The assumptions behind the time, in words.

    Args:
      unknown: the loops that do not say how often they run.
    """
    chip, share = machine.chip, f"{100 * machine.utilisation:.0f}%"
    words = [
        f"products run at {share} of {chip.narrow / 1e12:,.4g} TFLOP/s in the model's dtype, of {chip.wide / 1e12:,.4g} in "
        f"float32, and of {chip.rough / 1e12:,.4g} where they only choose, memory traffic at {share} of "
        f"{chip.bandwidth / 1e9:,.4g} GB/s ({chip.source})",
        f"factorisations run at {chip.factor / 1e12:,.3g} TFLOP/s",
    ]
    words.append(
        "FLOPs and bytes are counted in the run's own programs, without overlap; a loop that ends when rows have converged "
        "counts as often as it usually runs, and what is computed element by element between two products as one pass over memory"
    )
    words += [f"the loop at {loop} does not say how often it usually runs, and counts once" for loop in sorted(unknown)]
    unknown_text = "" if config.evaluation.windows else " (evaluation.windows is null, and the text is not on this machine)"
    words.append(f"a perplexity text of {evaluation_tokens(config):,} tokens{unknown_text}")
    words += itertools.chain.from_iterable(share.assumptions for share in shares)
    words.append(
        f"a host moves {TRANSFER / 1e9:g} GB/s to its devices and reads {READING / 1e9:g} GB/s of "
        f"weights; all hosts together write {WRITING / 1e9:g} GB/s to the run directory; nothing overlaps"
    )
    if machine.compiles:
        words.append("the programs that choose masks and solve are compiled side by side, each in the seconds that it took here")
    else:
        words.append("starting and compiling, which take minutes at the first run of a model of this shape, are not counted")
    if machine.compiles and machine.chip.link and machine.mesh.size > 1:
        words.append(
            f"a chip sends {machine.chip.link / 1e9:g} GB/s to a neighbour, and a collective uses one link of each; those inside "
            "loops count once, and those of forward passes beside the programs of the table do not"
        )
    elif machine.mesh.size > 1:
        words.append("communication is not counted")
    return words
