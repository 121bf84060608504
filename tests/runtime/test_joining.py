"""Processes join by arguments, by what a platform announces, or not at all."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from optima_tpu.errors import UserError
from optima_tpu.runtime import processes
from optima_tpu.runtime.mesh import has_devices, simulate_devices
from tests.support.processes import free_port, process_environment, without_gloo


def test_a_process_that_does_not_come_is_named(capsys):
    with pytest.raises(UserError, match=r"process 1, 2 of 3 did not join within 1 s"):
        processes.start(f"localhost:{free_port()}", 3, 0, timeout=1)
    with pytest.raises(UserError, match=r"process 0 was not found at localhost:\d+ within 1 s"):
        processes.start(f"localhost:{free_port()}", 3, 1, timeout=1)


def test_half_an_address_is_refused():
    for given in ((None, 2, 0), ("localhost:1", None, 0), ("localhost:1", 2, None), ("localhost:1", 2, 2), ("localhost", 2, 0)):
        with pytest.raises(UserError, match="--coordinator HOST:PORT, --num_processes N and --process_id K"):
            processes.start(*given, timeout=1)


def test_processes_that_have_joined_before_need_no_address(monkeypatch):
    monkeypatch.setattr(processes, "joined", lambda: True)
    monkeypatch.setattr(processes, "_initialize", lambda *_, **__: pytest.fail("joins again"))
    processes.start(None, None, None, timeout=1)
    with pytest.raises(UserError, match=r"joined before this command, got host:12: leave out\s+--coordinator"):
        processes.start("host:12", 2, 0, timeout=1)


def test_more_processes_than_any_run_has_are_refused():
    with pytest.raises(UserError, match="expected num_processes of at most 65536, got 1000000000"):
        processes.start("localhost:1", 10**9, 0, timeout=1)


# jax takes this host for one with TPU chips. What is not in the environment it asks the metadata server of TPU VMs for.
TPU_HOST = {"JAX_FORCE_TPU_INIT": "1"} | dict.fromkeys(
    ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"), ""
)
CLUSTERS = {
    "TPU slice": lambda index: TPU_HOST | {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": index},
    "several TPU slices of one host": lambda index: (
        TPU_HOST
        | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_COORDINATOR_ADDRESS": "localhost"}
        | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": index}
    ),
    "Slurm": lambda index: {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": index,
        "SLURM_LOCALID": index,
    },
    "Open MPI": lambda index: {
        "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": index,
        "OMPI_COMM_WORLD_LOCAL_RANK": index,
    },
}
ALONE = {
    "plain host": {},
    "script of a Slurm job": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "one process of Open MPI": {"OMPI_COMM_WORLD_SIZE": "1"},
    "one TPU host": TPU_HOST | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    "one task of Slurm": {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    "notebook with TPUs": TPU_HOST | {"TPU_PROCESS_ADDRESSES": "local"},
    "TPU host that has no metadata": TPU_HOST | {"TPU_SKIP_MDS_QUERY": "1"},
}
JOINING = """
import jax
from optima_tpu.runtime import processes
from optima_tpu.runtime.mesh import has_devices, simulate_devices

processes.start(None, None, None, 60)
jax.config.update("jax_platforms", "cpu")
print(jax.process_index(), "of", jax.process_count())
"""


def joined(*environments: dict[str, str]) -> list[str]:
    """Starts one process in each environment, all at once.

    Returns what each process prints: its index, and the number of processes.
    """
    here = process_environment() | {"JAX_COORDINATOR_PORT": str(free_port())}
    here.pop("JAX_PLATFORMS", None)  # with it jax would not look for TPUs
    command = [sys.executable, "-c", JOINING]
    started = [subprocess.Popen(command, env=here | own, text=True, stdout=subprocess.PIPE) for own in environments]
    return [without_gloo(process.communicate(timeout=120)[0])[-1] for process in started]


@pytest.mark.parametrize("platform", CLUSTERS)
def test_a_cluster_that_the_platform_announces_is_joined(platform):
    assert joined(CLUSTERS[platform]("0"), CLUSTERS[platform]("1")) == ["0 of 2", "1 of 2"]


@pytest.mark.parametrize(
    "among", [slice(4), pytest.param(slice(4, None), marks=pytest.mark.slow)], ids=["one of each kind", "others"]
)
def test_a_single_host_joins_nothing(among):
    hosts = list(ALONE.values())[among]
    assert joined(*hosts) == ["0 of 1"] * len(hosts)


def test_open_mpi_5_without_mpi4py_is_refused(monkeypatch):
    """Its processes would each be alone: jax 0.10 does not see them."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mpi4py, or give every process --coordinator"):
        processes.start(None, None, None, timeout=1)


def test_a_second_run_on_a_tpu_host_goes_on_without_joining(monkeypatch):
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    jax.devices()  # the first run
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        processes.start(None, None, None, timeout=1)
    finally:
        jax.config.update("jax_platforms", before)
    assert processes.alone()


def test_another_number_of_devices_is_refused_once_jax_has_its_own():
    count = jax.device_count()
    given = jax.config.jax_num_cpu_devices
    assert has_devices() and jax.config.jax_num_cpu_devices == given
    with pytest.raises(UserError, match=f"has {count} devices now: restart Python, or leave cpu_devices out"):
        simulate_devices(given + 1)


def test_whether_jax_has_its_devices_is_known_without_taking_them():
    code = "from optima_tpu.runtime.mesh import has_devices, simulate_devices; import jax; "
    code += "print(has_devices()); simulate_devices(3); print(has_devices(), jax.device_count(), has_devices())"
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "3", "True"]
