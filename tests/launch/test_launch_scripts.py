"""Scripts in launch/: what they would run, and processes on one machine."""

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optima_tpu.config import yaml12
from optima_tpu.runtime.command import LOST
from optima_tpu.runtime.signals import RESUME
from tests.support import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
COMMAND = ["-m", "optima_tpu.launch"]
ARGUMENTS = ["--model", "a folder/it's", "--layers", 'self_attn.*=dense,"x"', "--output", "/runs/a$b\\c&"]

# Stands for the interpreter. Its answer to the launch command is the shell program in $STUB, which knows its ID.
STUB = f"""#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec {shlex.quote(sys.executable)} "$@"; fi
printf '%q ' "$@" > "$RECORD/$8"
ID=$8
eval "$STUB"
"""


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python-stub"
    path.write_text(STUB)
    path.chmod(0o755)
    return {"OPTIMA_PYTHON": str(path), "RECORD": str(tmp_path), "OPTIMA_GRACE": "0.2"}


def run(script, *arguments, **environment):
    return subprocess.run(
        [LAUNCH / script, *arguments], capture_output=True, text=True, timeout=20, env={"PATH": os.environ["PATH"], **environment}
    )


def started(*arguments, **environment):
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    # A shell cannot trap what was ignored when it began: SIGINT, where the tests run in the background of another shell.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", heard, LAUNCH / "local_processes.sh", *arguments],
        **pipes,
        text=True,
        env={"PATH": os.environ["PATH"], **environment},
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name):
    assert os.access(LAUNCH / name, os.X_OK)
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    # Beside this interpreter where the extra is installed into an environment that was not activated.
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("shellcheck is not installed (extra test)")
    checked = subprocess.run([program, LAUNCH / name], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_dry_run_of_local_processes():
    result = run("local_processes.sh", "--dry-run", "3", *ARGUMENTS, OPTIMA_PYTHON="bash")
    assert [shlex.split(line) for line in result.stdout.splitlines()] == [
        ["bash", *COMMAND, "--coordinator", "127.0.0.1:PORT", "--num-processes", "3", "--process-id", str(k), *ARGUMENTS]
        for k in range(3)
    ]


def test_dry_run_of_slurm():
    command = shlex.split(run("slurm_gpu.sbatch", "--dry-run", *ARGUMENTS).stdout)
    assert command[0] == "srun" and command[-len(ARGUMENTS) - 3 :] == ["python", *COMMAND, *ARGUMENTS]


def test_dry_run_of_a_tpu_pod():
    command = shlex.split(run("tpu_pod.sh", "--dry-run", *ARGUMENTS, TPU_NAME="my-slice", ZONE="my-zone").stdout)
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-slice"]
    assert {"--zone=my-zone", "--worker=all"} < set(command)
    remote = next(part.removeprefix("--command=") for part in command if part.startswith("--command="))
    assert shlex.split(remote) == ["exec", "~/optima/bin/python", *COMMAND, *ARGUMENTS]


ON_A_CLUSTER = {
    "xpk.sh": dict(CLUSTER="c", TPU_TYPE="v5litepod-16", ZONE="z", PROJECT="p"),
    "cluster_toolkit.sh": dict(COMPUTE_TYPE="ct6e-standard-4t", TOPOLOGY="4x4"),
}


@pytest.mark.parametrize("script", ON_A_CLUSTER)
def test_dry_run_on_a_cluster(script):
    result = run(script, "--dry-run", *ARGUMENTS, OPTIMA_IMAGE="host:5/image:tpu", OPTIMA_NAME="my-run", **ON_A_CLUSTER[script])
    command = shlex.split(result.stdout)
    options = dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)
    assert shlex.split(options["command"]) == ["python", *COMMAND, *ARGUMENTS]
    assert options["restart-on-exit-codes"] == f"{LOST},{RESUME}"
    assert "my-run" in (options.get("workload"), options.get("name"))


@pytest.mark.parametrize("script", ON_A_CLUSTER)
@pytest.mark.parametrize("name", ["My-run", "run.1", "-run", "run-", "r" * 41])
def test_the_name_of_a_job_is_a_dns_label(script, name):
    result = run(script, "--dry-run", OPTIMA_IMAGE="i", OPTIMA_NAME=name, **ON_A_CLUSTER[script])
    assert result.returncode == 2 and f"got '{name}'" in result.stderr


def test_xpk_takes_the_command():
    parser = pytest.importorskip("xpk.parser.core")
    xpk_parser = argparse.ArgumentParser()
    parser.set_parser(xpk_parser)
    result = run("xpk.sh", "--dry-run", *ARGUMENTS, OPTIMA_IMAGE="i", XPK_ENV="--dry-run", **ON_A_CLUSTER["xpk.sh"])
    taken = xpk_parser.parse_args(shlex.split(result.stdout)[1:])
    assert taken.workload == "optima" and taken.dry_run and taken.restart_on_exit_codes == f"{LOST},{RESUME}"


def test_skypilot_starts_a_stopped_run_again():
    task = yaml12.load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [LOST, RESUME]
    assert task["run"].split()[1:4] == ["~/optima/bin/python", *COMMAND][:3] and '--output "$OUTPUT"' in task["run"]


def test_skypilot_takes_the_file():
    sky, file = pytest.importorskip("sky"), yaml12.load((LAUNCH / "sky.yaml").read_text())
    task = sky.Task.from_yaml_config(file, env_overrides=[("OUTPUT", "gs://bucket/run")])
    (resources,) = task.resources
    assert resources.job_recovery["recover_on_exit_codes"] == [LOST, RESUME] and resources.use_spot


def test_ray_starts_a_stopped_run_again_and_not_what_needs_mending(monkeypatch):
    spec = importlib.util.spec_from_file_location("ray_train", LAUNCH / "ray_train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = script.parser().parse_args(["--workers", "2", "--", *ARGUMENTS])
    assert options.arguments == ARGUMENTS
    for status, again in ((0, False), (2, False), (1, True), (LOST, True), (RESUME, True)):
        monkeypatch.setattr("optima_tpu.launch.main", lambda arguments, status=status: status)
        if again:
            with pytest.raises(RuntimeError, match=f"status {status}"):
                script.prune({"arguments": []})
        else:
            assert script.prune({"arguments": []}) == status


def test_dry_run_of_the_jobset():
    before = yaml12.load((LAUNCH / "gke_jobset.yaml").read_text())
    after = yaml12.load(run("gke.sh", "--dry-run", *ARGUMENTS, OPTIMA_IMAGE="host:5/image:tpu", OPTIMA_NAME="mine").stdout)
    container(before).update(image="host:5/image:tpu", args=ARGUMENTS)
    before["metadata"]["name"] = "mine"
    assert after == before  # nothing else changes
    assert container(after)["command"] == ["python", *COMMAND]


def container(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def test_jobset_resumes_what_was_stopped_and_not_what_needs_mending():
    spec = yaml12.load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    codes = job["podFailurePolicy"]["rules"][0]
    assert codes["action"] == "FailJob" and codes["onExitCodes"]["values"] == [2, RESUME]
    assert codes["onExitCodes"]["containerName"] == container({"spec": spec})["name"]
    mend, resume = spec["failurePolicy"]["rules"]
    assert mend["action"] == "FailJobSet" and resume["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    # The words of Kubernetes: "Container optima for pod default/x failed with exit code 2 matching FailJob rule at index 0".
    assert mend["onJobFailureMessagePatterns"] == ["exit code 2 "]
    assert job["parallelism"] == job["completions"] and job["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    "script, arguments, environment, needed",
    [
        ("tpu_pod.sh", ["--model", "x"], {}, "TPU_NAME"),
        ("tpu_pod.sh", ["--model", "x"], {"TPU_NAME": "x"}, "ZONE"),
        ("tpu_pod.sh", ["--model", "x"], {"TPU_NAME": "x", "ZONE": "z"}, "needs gcloud"),
        ("gke.sh", ["--model", "x"], {}, "OPTIMA_IMAGE"),
        ("gke.sh", ["--model", "x"], {"OPTIMA_IMAGE": "x"}, "needs kubectl"),
        ("gke.sh", ["--model", "x\ny"], {"OPTIMA_IMAGE": "x"}, "control characters"),
        ("slurm_gpu.sbatch", ["--model", "x"], {}, "submit it with sbatch"),
        ("slurm_gpu.sbatch", ["--model", "x"], {"SLURM_JOB_ID": "1"}, "needs srun"),
        ("local_processes.sh", ["--model", "x"], {}, "expected N"),
        ("local_processes.sh", ["2"], {"OPTIMA_PYTHON": "/no/python"}, "needs the program '/no/python'"),
    ],
)
def test_what_is_missing_is_said(tmp_path, script, arguments, environment, needed):
    for name in ("bash", "env", "dirname"):  # and nothing else, whatever this host has installed
        (tmp_path / name).symlink_to(shutil.which(name))
    result = run(script, *arguments, **{"PATH": str(tmp_path), **environment})
    assert result.returncode == 2 and needed in result.stderr


def test_slurm_requeues_what_is_to_be_resumed(tmp_path):
    for name, text in (("srun", 'exit "$CODE"'), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text("#!/usr/bin/env bash\n" + text + "\n")
        (tmp_path / name).chmod(0o755)
    for code in (0, 1, 2, LOST, RESUME):
        result = run("slurm_gpu.sbatch", PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7", CODE=str(code))
        assert result.returncode == code
        assert result.stdout == ("scontrol requeue 7\n" if code == RESUME else "")


def test_of_several_statuses_srun_has_that_which_decides():
    # It has the highest: of a failure and those that lost the failed one not that of resuming, of a stop that of resuming.
    assert 2 < LOST < RESUME


def test_local_processes_share_a_coordinator_and_only_the_first_writes_to_stdout(stub, tmp_path):
    result = run("local_processes.sh", "3", *ARGUMENTS, STUB='echo "this is $ID"', **stub)
    assert result.returncode == 0, result.stderr
    commands = [shlex.split((tmp_path / str(k)).read_text()) for k in range(3)]
    address = commands[0][3]
    assert address.startswith("127.0.0.1:") and 0 < int(address.partition(":")[2]) < 2**16
    assert commands == [
        [*COMMAND, "--coordinator", address, "--num-processes", "3", "--process-id", str(k), *ARGUMENTS] for k in range(3)
    ]
    assert result.stdout == "this is 0\n"
    assert sorted(result.stderr.splitlines()) == ["[1] this is 1", "[2] this is 2"]


@pytest.mark.parametrize("others", ["exec sleep 60", "trap '' TERM; sleep 60"], ids=["heed SIGTERM", "hang"])
def test_local_processes_stop_when_one_fails_and_return_its_status(stub, others):
    result = run("local_processes.sh", "3", STUB=f"if ((ID == 1)); then exit 7; fi; {others}", **stub)
    assert result.returncode == 7
    assert "a process ended with status 7" in result.stderr


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, RESUME), (signal.SIGINT, 130)])
def test_local_processes_pass_signals_on(stub, sent, status):
    program = "trap 'echo TERM; exit 75' TERM; trap 'echo INT; exit 130' INT; echo ready; for ((;;)); do sleep 0.05; done"
    process = started("2", STUB=program, **stub)
    assert process.stdout.readline() == "ready\n"
    assert process.stderr.readline() == "[1] ready\n"
    process.send_signal(sent)
    output, errors = process.communicate(timeout=20)
    name = sent.name.removeprefix("SIG")
    assert (process.returncode, output, errors) == (status, f"{name}\n", f"[1] {name}\n")
