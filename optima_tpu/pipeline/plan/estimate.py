"""Counts memory and time without a compiler."""

import collections
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import plural
from optima_tpu.evaluate.predictions import stretch_of
from optima_tpu.method.distillation import Distillation
from optima_tpu.method.patterns import Pattern, WholeParts
from optima_tpu.method.statistics import Groups
from optima_tpu.pipeline.cut_blocks import TRIED, expected_passes
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.distill.train import SHARE
from optima_tpu.pipeline.distill.windows import TrainingParts
from optima_tpu.pipeline.inputs import linear_shapes
from optima_tpu.pipeline.memory_plan import on_model_axis
from optima_tpu.pipeline.plan.counting import Work
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.program import REMOVING
from optima_tpu.pipeline.plan.topology import GIB, Machine
from optima_tpu.pipeline.self_calibration import written_windows
from optima_tpu.runtime.mesh import MODEL

EVALUATION_TOKENS = 300_000
"""Tokens of the perplexity text if ``evaluation.windows`` is null and the text is not on this machine."""
TRANSFER, READING = 8e9, 1e9
"""Bytes/s between a host and its devices, and of weights from the disk of a host."""
WRITING = 0.5e9
"""Bytes/s of the run directory, all hosts together."""
_PROGRAM = GIB
"""Bytes of host memory before the first array: Python, jax, transformers, compiled programs."""
_COMPRESSED, _MASK = 0.5, 0.2
"""The share of the bytes of zeros that Orbax's compression saves at least: random weights in bfloat16, float16 and float32 lost 0.77 and
more of them, from a quarter of zeros to three quarters. And bytes of a compressed entry of a mask: random masks took 0.19."""


class ForwardPasses(NamedTuple):
    """The forward passes of one window: through a block on average over the blocks, and through the head.

    Attributes:
      whole: work of a device in the whole block.
      pruned: the same of the pruned block, which may know the inputs of some layers.
      head: the same of the head.
      passes: number of passes of the calibration.
      moved: the size of the kept inputs of layers, every time that they leave or enter the devices, in sizes of the hidden states.
      kept: the size of the kept inputs of layers, in sizes of the hidden states.
    """

    whole: Work
    pruned: Work
    head: Work
    passes: float
    moved: float
    kept: float


def writing_seconds(model: DeclaredModel, config: RunConfig, machine: Machine, at_once: int) -> float:
    """Seconds in which the dense model writes its windows, ``at_once`` of them together: every token of them reads all weights."""
    windows, stored = written_windows(config), model.bytes
    flops = 2.0 * stored / model.dtype.itemsize * at_once / machine.mesh.size
    token = Work(**{"wide" if model.dtype.itemsize == 4 else "narrow": flops}, traffic=stored / machine.mesh.shape[MODEL])
    return -(-windows // at_once) * (config.calibration.window_length - 1) * token.seconds(machine)


def calibration_memory(model: DeclaredModel, groups: Groups, length: int, batch: int, streams: int = 1) -> int:
    """Bytes of a step of ``calibrate.accumulate`` on a device: a forward pass, and the sums twice."""
    sizes = [model.decoder.input_width(name) for name, *_ in groups]
    sums = sum(4 * size * on_model_axis(model.decoder.mesh, size) for size in sizes)
    return forward_memory(model, groups, length, batch, streams) + streams * 2 * sums


def forward_memory(model: DeclaredModel, groups: Groups, length: int, batch: int, streams: int = 1) -> int:
    """Bytes of a forward pass on a device: the block, the inputs of all layers and two arrays of attention scores."""
    decoder, axis, tokens = model.decoder, model.decoder.mesh.shape[MODEL], batch * length
    inputs = sum(decoder.input_width(name) * decoder.config.reach(name) for name, *_ in groups)
    read = round(tokens * model.dtype.itemsize * (4 * decoder.config.d_model + 2 * inputs))
    scores = 2 * tokens * length * getattr(decoder.config, "heads", 0) * 4
    return streams * (model.block_bytes() // axis + read) + scores // axis


_STATES = "states of the training"


class Storage(NamedTuple):
    """Upper bounds in bytes: Orbax compresses what it writes.

    Attributes:
      hidden: hidden states of all calibration windows.
      host: memory of one host, by use.
      disk: size of the run directory, by use; hidden states and states of the training are removed.
      resident: whether hidden states stay on the devices while the model is pruned.
    """

    hidden: int
    host: dict[str, int]
    disk: dict[str, int]
    resident: bool = False

    @property
    def left(self) -> int:
        """Bytes on the disk at the end."""
        return sum(size for use, size in self.disk.items() if use not in ("hidden states", _STATES))


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
      calibrates: whether the calibration text passes through the blocks; it does not where they are pruned already, or stay dense.
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
            if served is model or not isinstance(patterns[path], WholeParts)  # what is cut needs no mask
        )
        disk["export for transformers"] = served.bytes + masked // 8
    if config.distill:
        one = _saved_bytes(model, config.distill)
        # While a state is written, the one before is there; at the end one state and all trained blocks.
        disk |= {"trained blocks": saved, _STATES: max(2 * one - saved, one)}
    return Storage(hidden, _host_memory(model, config, machine, hidden, masks + scales, kept), disk)


def _host_memory(
    model: DeclaredModel, config: RunConfig, machine: Machine, hidden: int, beside: int, kept: float
) -> dict[str, int]:
    """Bytes of the memory of one host, by use.

    Args:
      hidden, kept: as in :func:`storage`; the hosts share the hidden states.
      beside: of masks and scales that are saved with all blocks.
    """
    decoder, text, hosts, on_cpu = model.decoder, config.calibration, machine.hosts, machine.platform == "cpu"
    block = max(model.at(kind).block_bytes() for kind in decoder.config.kinds)
    table = max(math.prod(shape) * model.itemsize(name) for name, shape in decoder.end_shapes.items())
    share, state = -(-hidden // hosts), text.window_length * model.state_bytes
    # Devices that use the memory of the host hold the head three times, in a file, as read and on a device, and the logits at once.
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
    chosen = config.cut.blocks
    # The held-out windows before every block, behind all blocks, and of the tries. The walk has no hidden states yet.
    entering = (chosen > 0) * text.held_out * state * (decoder.config.blocks + chosen + 1 + TRIED) // hosts
    if entering > share:
        host["choosing blocks"] = entering - share
    if config.distill:
        batch, _, at_once = TrainingParts.of(config.distill, config.distill.pass_windows, state)
        waiting = 2 * (at_once * batch + text.held_out) * state
        host["text of the training"] = -(-waiting // hosts)
        host["weights of the best check"] = -(-_moving(model, config.distill) * model.end_itemsize // hosts)
    return host


def _moving(model: DeclaredModel, method: Distillation) -> int:
    """How many numbers a training moves."""
    return sum(
        len(indices) * math.prod(alike.block_shapes[name])
        for alike, indices in model.decoder.stretches
        for name in Trainer(alike, method).factors
    )


def _saved_bytes(model: DeclaredModel, method: Distillation) -> int:
    """Bytes of a saved state of a training: of what moves, weights and two moments in float32, and the best weights."""
    return (12 + model.end_itemsize) * _moving(model, method)


def evaluation_tokens(config: RunConfig) -> int:
    """Tokens of the perplexity text."""
    length = config.evaluation.length or config.calibration.window_length
    return config.evaluation.windows * length if config.evaluation.windows else EVALUATION_TOKENS


class TextPass(NamedTuple):
    """Text that passes through a whole model, beside the walk over the blocks.

    Attributes:
      tokens: how many pass through all blocks of the model that is pruned, or would in the same time.
      scored: how many the head computes logits of.
      moves: whether hidden states leave and enter the devices at every block.
      dense: how often the weights of the dense model are read for it.
    """

    stage: str
    tokens: float
    scored: float = 0.0
    moves: bool = True
    dense: float = 0.0


_CHOOSING, _BESIDE = "blocks that are left out", "dense model and checks of the training"


class RunTime(NamedTuple):
    """What the time of a run depends on.

    Attributes:
      model: the one whose blocks it prunes.
      stored: what it keeps, and where.
      forward: the forward passes.
      dense: the model that it begins with, which may have more blocks.
    """

    model: DeclaredModel
    config: RunConfig
    machine: Machine
    stored: Storage
    forward: ForwardPasses
    dense: DeclaredModel

    def stages(self, running: Mapping[str, float], compiling: float | None) -> dict[str, float]:
        """Seconds of a run, by stage.

        Args:
          running: seconds of all calls of the programs of each stage, the calibration, the pruning, the steps of a training; of
            their communication; and of the "text" that the model writes.
          compiling: seconds that compiling all programs took on this machine; None if nothing was compiled.
        """
        moved, read = self._transfers()
        walk = {
            "calibration": running["calibration"],
            "pruning": running["pruning"],
            "pruned blocks forward": self._blocks * self._seconds(self.forward.pruned, self._calibrated),
            "hidden states to and from the devices": moved / (TRANSFER * self.machine.hosts),
        }
        text = collections.defaultdict[str, float](float)
        for each in self._passes:
            text[each.stage] += self._blocks * self._seconds(self.forward.whole, each.tokens)
            text[each.stage] += self._seconds(self.forward.head, each.scored)
        stages = {
            "compiling (as here)": compiling,
            "text that the model writes": running["text"],
            "perplexity, dense and pruned": text["perplexity, dense and pruned"],
            _CHOOSING: text[_CHOOSING],
            REMOVING: running[REMOVING],
            **walk,
            "training": running["training"],
            _BESIDE: text[_BESIDE],
            "communication of these programs": running["communication"],
            "reading weights": read / (READING * self.machine.hosts),
            "writing": self._written(walk, running["training"] + text[_BESIDE]) / WRITING,
        }
        return {name: seconds for name, seconds in stages.items() if seconds}

    @property
    def _passes(self) -> list[TextPass]:
        """All text that passes through whole models."""
        config, text, method = self.config, self.config.calibration, self.config.distill
        choices, streams, evaluated = config.cut.blocks, config.recipe.target.streams, evaluation_tokens(config)
        held_out, blocks = text.held_out * text.window_length, self.dense.decoder.config.blocks
        deeper = blocks / self._blocks
        passes = [TextPass("perplexity, dense and pruned", (1 + deeper) * evaluated, 2 * evaluated, dense=1)]
        if choices:
            tried = sum(expected_passes(blocks, choices))
            scored = choices * (1 + TRIED) * held_out
            # It reads the dense model for all choices, and half of it for each twice, but for the first once.
            passes.append(TextPass(_CHOOSING, tried / self._blocks * held_out, scored, dense=choices + 1 / 2))
            passes.append(TextPass(_CHOOSING, (streams - 1) * choices * self._calibrated / self._blocks, moves=False))
        if method and method.reads_dense:  # the dense model's states are computed before the steps that read them
            parts, windows = _dense_passes(method, self.model.state_bytes * text.window_length)
            passes.append(TextPass(_BESIDE, deeper * (windows + text.held_out) * text.window_length, dense=parts))
        if method:  # the perplexity text measures the pruned model before it is trained, too
            checked = (len(method.check_steps()) + 1 + method.trials) * held_out
            scored = (1 + method.reads_dense) * checked + evaluated
            passes.append(TextPass(_BESIDE, checked + evaluated, scored, moves=False))
        return passes

    @property
    def _blocks(self) -> int:
        return self.model.decoder.config.blocks

    @property
    def _calibrated(self) -> float:
        """Tokens that pass through the blocks to calibrate them."""
        return self.stored.hidden / self.config.recipe.target.streams / self.model.state_bytes

    def _seconds(self, window: Work, tokens: float) -> float:
        """Seconds of so many tokens, by the work of a window."""
        return window.seconds(self.machine) * tokens / self.config.calibration.window_length

    def _transfers(self) -> tuple[float, float]:
        """The bytes of hidden states that enter and leave the devices, and the bytes of weights that are read."""
        forward, passes = self.forward, self._passes
        # Both streams into every pass of the calibration, the dense one out of its last pass, the pruned one into and out of the
        # pruned block. Kept inputs leave one pass, and enter the later ones and the pruned block.
        states = 0 if self.stored.resident else forward.passes + 1 + 1 / self.config.recipe.target.streams + forward.moved
        moved = states * self.stored.hidden + 2 * self.model.state_bytes * sum(each.tokens for each in passes if each.moves)
        # The pruned model is read for its perplexity, the walk, the checkpoint.
        own = (3 if self._calibrated else 2) * self.model.bytes
        return self._blocks * moved, own + sum(each.dense for each in passes) * self.dense.bytes

    def _written(self, walk: Mapping[str, float], training: float) -> float:
        """Bytes that are written: what is left at the end, hidden states that a resume would need, and states of the training.

        Args:
          walk: seconds of the walk's stages.
          training: seconds of the training and of what runs beside it.
        """
        config, stored, blocks = self.config, self.stored, self._blocks
        # What the walk counts against ``recompute``: with two streams also the calibration's passes, which a resume makes again.
        streams = config.recipe.target.streams
        moved = 0 if stored.resident else streams * blocks * 2 * self._calibrated * self.model.state_bytes
        passes = moved / (TRANSFER * self.machine.hosts) + walk["pruned blocks forward"]
        passes += walk["calibration"] if streams > 1 else 0
        saves = int(min(blocks - 1, passes / (60 * config.recompute))) if config.recompute else blocks - 1
        written = stored.left + saves * stored.hidden
        if config.distill:  # a state every now and then; what is left at the end has the trained blocks
            one = _saved_bytes(self.model, config.distill)
            written += one * int(training / ((SHARE + 1) * one / WRITING))
        return written


def _dense_passes(method: Distillation, state: int) -> tuple[int, int]:
    """How often training reads the dense model, and how many windows pass through it.

    Args:
      state: bytes of the hidden states of a window.
    """
    batch, steps, at_once = TrainingParts.of(method, method.pass_windows, state)
    parts = -(-steps // at_once)
    times = method.passes if parts > 1 else 1  # what was the only part is still there in the next pass
    return parts * times, steps * batch * times


def assumptions(config: RunConfig, machine: Machine, unknown: Collection[str] = ()) -> list[str]:
    """The assumptions behind the time, in words.

    Args:
      unknown: the loops that do not say how often they run.
    """
    chip, share = machine.chip, f"{100 * machine.utilisation:.0f}%"
    words = [
        f"products run at {share} of {chip.narrow / 1e12:,.4g} TFLOP/s in the model's dtype, of {chip.wide / 1e12:,.4g} in float32, "
        f"and of {chip.rough / 1e12:,.4g} where they only choose, memory traffic at {share} of {chip.bandwidth / 1e9:,.4g} GB/s ({chip.source})",
        f"factorisations run at {chip.factor / 1e12:,.3g} TFLOP/s",
    ]
    words.append(
        "FLOPs and bytes are counted in the run's own programs, without overlap; a loop that ends when rows have converged counts as "
        "often as it usually runs, and what is computed element by element between two products as one pass over memory"
    )
    words += [f"the loop at {loop} does not say how often it usually runs, and counts once" for loop in sorted(unknown)]
    unknown_text = "" if config.evaluation.windows else " (evaluation.windows is null, and the text is not on this machine)"
    words.append(f"a perplexity text of {evaluation_tokens(config):,} tokens{unknown_text}")
    if written_windows(config):
        words.append(
            "for each token of the windows that the model writes at once a device reads its weights; attention is not counted"
        )
    if config.cut.blocks:
        words.append(
            f"each choice of --cut.blocks tries {plural(TRIED, 'block')}, and each try passes half of those that are left"
        )
    if config.allocation.measures:
        words.append("measuring the blocks for --allocation is not counted; every block is planned with the pattern's sparsity")
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
            f"a chip sends {machine.chip.link / 1e9:g} GB/s to a neighbour, and a collective uses one link of each; those inside loops "
            "count once, and those of forward passes beside the programs of the table do not"
        )
    elif machine.mesh.size > 1:
        words.append("communication is not counted")
    return words
