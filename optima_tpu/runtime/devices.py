"""Refuses devices and processes that the arguments of a command show to be impossible, before any is taken."""

from typing import Protocol

from optima_tpu.runtime.command import OnDevices
from optima_tpu.runtime.mesh import parse_mesh, refuse_count
from optima_tpu.runtime.processes import may_join, refuse_incomplete


class Placed(OnDevices, Protocol):
    """The settings of a command that also say how its devices are arranged; see ``config.RunConfig``."""

    @property
    def mesh(self) -> str | None: ...


def refuse_devices(config: Placed) -> None:
    """Raises UserError for a process that is not named as a whole, or a mesh of another number of devices than are simulated."""
    refuse_incomplete(config.coordinator, config.num_processes, config.process_id)
    processes = config.num_processes or (None if may_join(None) else 1)
    if config.mesh and config.cpu_devices and processes:
        refuse_count(parse_mesh(config.mesh), config.cpu_devices * processes, "cpu", processes)
