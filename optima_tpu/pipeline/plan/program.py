"""One row of a plan."""

from typing import NamedTuple

from optima_tpu.method.row_sharding import RowLayout
from optima_tpu.pipeline.plan.compile import Compiled
from optima_tpu.pipeline.plan.counting import Work
from optima_tpu.pipeline.plan.hlo import sent
from optima_tpu.pipeline.plan.topology import Machine


class Program(NamedTuple):
    """One program of a run.

    Attributes:
      name: what it does.
      stage: of the run, to which its seconds belong.
      calls: number of calls in the whole run.
      rows: number of the layers' rows on each device; None for the programs that solve no rows.
      layout: layout of the solve; None as ``rows``.
      work: of one call, on each device.
      memory: bytes on a device while it runs, including what else the run holds there.
      compiled: what the compiler reports; None if nothing was compiled.
      unknown: the loops that do not say how often they run; they count once.
    """

    name: str
    stage: str
    calls: int
    rows: int | None
    layout: RowLayout | None
    work: Work
    memory: int
    compiled: Compiled | None
    unknown: frozenset[str] = frozenset()

    @property
    def refused(self) -> str | None:
        """Why the program does not fit into the chip; None if it fits."""
        return None if self.compiled is None else self.compiled.refused

    def seconds(self, machine: Machine) -> float:
        """Seconds of all calls, without communication."""
        return self.calls * self.work.seconds(machine)

    def communication(self, machine: Machine) -> float:
        """Seconds in which the collectives of all calls move their bytes.

        0 if the collectives or the links are not known. A collective along a mesh axis passes every byte through one link of
        each chip: the axis may be a line of chips, without the link that closes a ring.
        """
        if self.compiled is None or machine.chip.link is None:
            return 0.0
        return self.calls * sent(self.compiled.moved) / machine.chip.link
