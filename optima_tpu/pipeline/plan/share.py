"""What each power of a run adds to the plan of the walk over the blocks.

A power is a function from :class:`Planned` to its :class:`Share`, in one of the tables of :mod:`optima_tpu.pipeline.plan.plan`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from optima_tpu.config.run_config import RunConfig
from optima_tpu.pipeline.plan.compile import Compile
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.program import Program
from optima_tpu.pipeline.plan.topology import Machine


class Storage(NamedTuple):
    """Upper bounds in bytes: Orbax compresses what it writes.

    Attributes:
      hidden: hidden states of all calibration windows.
      host: memory of one host, by use.
      disk: size of the run directory, by use.
      resident: whether hidden states stay on the devices while the model is pruned.
      left: what is on the disk at the end.
    """

    hidden: int
    host: Mapping[str, int]
    disk: Mapping[str, int]
    resident: bool
    left: int


class Planned(NamedTuple):
    """A run, as it is passed to every power that adds a share to its plan.

    Attributes:
      dense: the model that the run begins with.
      model: the model whose blocks the run prunes, without what is cut before.
      budget: bytes of a device, from ``device_memory.device_budget``.
      compile_call: takes every program.
      stored: what the walk over the blocks keeps, and where.
      recovering: whether the blocks are pruned already, as for `optima recover`.
    """

    config: RunConfig
    dense: DeclaredModel
    model: DeclaredModel
    machine: Machine
    budget: float
    compile_call: Compile
    stored: Storage
    recovering: bool

    @property
    def blocks(self) -> int:
        """The number of blocks that are pruned."""
        return self.model.decoder.config.blocks

    @property
    def dense_blocks(self) -> int:
        """The number of blocks of the dense model."""
        return self.dense.decoder.config.blocks

    @property
    def held_out(self) -> int:
        """Tokens of the held-out windows."""
        return self.config.calibration.held_out * self.config.calibration.window_length

    @property
    def calibrated(self) -> float:
        """Tokens that pass through the blocks to calibrate them."""
        return self.stored.hidden / self.config.recipe.target.streams / self.model.state_bytes


class TextPass(NamedTuple):
    """Text that passes through a whole model, beside the walk over the blocks.

    Attributes:
      stage: of the run, to which its seconds belong.
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


class Share(NamedTuple):
    """What a power adds to a plan.

    Attributes:
      programs: its own, whose seconds belong to their stage.
      passes: of text, through programs of the walk.
      seconds: of what else it does, by stage.
      moved: bytes of hidden states to and from the devices, beside those of ``passes``.
      host: bytes of the memory of one host, by use.
      disk: bytes that stay in the run directory, by use.
      removed: bytes that are on the disk for a while, by use.
      rewritten: the bytes that it replaces, as a function of the seconds of its stages.
      assumptions: the assumptions behind its seconds, in words.
      refused: why a run would refuse it; empty if it would not.
    """

    programs: tuple[Program, ...] = ()
    passes: tuple[TextPass, ...] = ()
    seconds: Mapping[str, float] = {}
    moved: float = 0.0
    host: Mapping[str, int] = {}
    disk: Mapping[str, int] = {}
    removed: Mapping[str, int] = {}
    rewritten: Callable[[float], float] = lambda seconds: 0.0
    assumptions: tuple[str, ...] = ()
    refused: str = ""
