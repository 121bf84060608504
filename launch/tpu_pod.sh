#!/usr/bin/env bash
# Starts one run on all workers of a TPU VM slice: the same command on each worker. JAX finds the other workers itself.
#
#   export TPU_NAME=my-slice ZONE=us-west4-a
#   launch/tpu_pod.sh [--dry-run] --model meta-llama/Llama-3.1-8B --mesh 4x2 --output /mnt/runs/llama
#
# Needs: gcloud, logged in; a slice, one host or many (gcloud compute tpus tpu-vm create ... --version=v2-alpha-tpuv5-lite);
# this package on its workers, once:
#
#   gcloud compute tpus tpu-vm scp --recurse . "$TPU_NAME:optima-tpu" --zone="$ZONE" --worker=all
#   gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command='
#     curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv -q --python 3.12 ~/optima &&
#     ~/.local/bin/uv pip install -q --python ~/optima "./optima-tpu[tpu,gcs]"'
#
# (uv installs Python, because the package needs Python 3.11 or newer and the images of TPU VMs have had 3.10.)
# Also needed: a run directory (--output) that every worker can access: gs://BUCKET/FOLDER, or an NFS mount such as Filestore. A
# gated model needs a token on every worker (~/optima/bin/hf auth login). OPTIMA_PYTHON names another interpreter on the workers.
#
# Preemption: Google stops the workers (SIGTERM, power off soon after) and deletes the slice. Create it again with the same name and
# start the same command: the run resumes after the last finished block, also on a slice of another size.
# The run ends if this connection ends, so start it inside tmux on a machine that stays on. Exit status: the status of gcloud.
set -euo pipefail

say() {
  echo "$0: $1" >&2
  exit 2
}

dry_run=
[[ ${1-} == --dry-run ]] && dry_run=yes && shift
[[ ${TPU_NAME-} ]] || say "expected the name of the slice in TPU_NAME (gcloud compute tpus tpu-vm list --zone=ZONE)"
[[ ${ZONE-} ]] || say "expected the zone of the slice in ZONE, such as us-west4-a"

# The worker expands the unquoted ~. Arguments are quoted with %q because the worker's shell parses the command again.
remote="exec ${OPTIMA_PYTHON:-~/optima/bin/python} -m optima_tpu.launch"
(($#)) && remote+=$(printf ' %q' "$@")
command=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--zone=$ZONE" --worker=all "--command=$remote")
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
command -v gcloud >/dev/null || say "needs gcloud: https://cloud.google.com/sdk/docs/install"
exec "${command[@]}"
