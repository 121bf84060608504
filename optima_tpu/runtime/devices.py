"""The settings of devices and processes, and their early checks."""

import dataclasses
from typing import Annotated, Self

from optima_tpu.runtime.bounds import Bound, Bounded
from optima_tpu.runtime.mesh import MOST_DEVICES, parse_mesh, refuse_count
from optima_tpu.runtime.processes import may_join, refuse_incomplete

_MOST_GIB = 4096.0
"""More memory than any device or host has, so a number of bytes is refused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices(Bounded):
    """The settings of a command that say where it runs.

    Attributes:
      mesh: devices as DATAxMODEL, such as 4x2 or data=4,model=2; null puts all of them on data.
      cpu_devices: simulate this many devices on the CPU, in every process.
      batch: windows in one step of the forward pass, on each device; a smaller batch needs less memory.
      device_memory: GiB of memory to use on each device; null takes 80% of what the device reports, or on CPUs half of the
        machine's memory for all of them together. It decides what is done at once, such as how many rows are solved, and what is
        sharded over the devices.
      coordinator: HOST:PORT of process 0, for several processes on a platform that does not announce them itself (TPU
        slices, Slurm and Open MPI do). Give every process the same command except for process_id.
      num_processes: number of processes.
      process_id: the number of this process, from 0.
      join_timeout: seconds to wait until all processes have joined.
    """

    mesh: str | None = None
    cpu_devices: Annotated[int | None, Bound(1, MOST_DEVICES)] = None
    batch: Annotated[int, Bound(1)] = 4
    device_memory: Annotated[float | None, Bound(above=0, most=_MOST_GIB, hint="it counts GiB, as in --device_memory 12")] = None
    coordinator: str | None = None
    num_processes: Annotated[int | None, Bound(1)] = None
    process_id: int | None = None
    join_timeout: Annotated[int, Bound(1)] = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mesh is not None:
            parse_mesh(self.mesh)

    def on(self, devices: "Devices") -> Self:
        """These settings with the devices and processes of another command."""
        return dataclasses.replace(self, **{field.name: getattr(devices, field.name) for field in dataclasses.fields(Devices)})

    def refuse_impossible(self) -> None:
        """Raises UserError for a partly named process, or an unfit mesh."""
        refuse_incomplete(self.coordinator, self.num_processes, self.process_id)
        processes = self.num_processes or (None if may_join(None) else 1)
        if self.mesh and self.cpu_devices and processes:
            refuse_count(parse_mesh(self.mesh), self.cpu_devices * processes, "cpu", processes)
