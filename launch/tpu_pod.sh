#!/usr/bin/env bash
# One run on every worker of a TPU VM slice: the same command on each, JAX finds the others by itself.
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
# (uv, since this needs Python 3.11 or newer and the images of TPU VMs have had 3.10)
# and a run directory (--output) that every worker sees: gs://BUCKET/FOLDER, or an NFS mount such as Filestore. A gated model
# needs a token on every worker (~/optima/bin/hf auth login). OPTIMA_PYTHON names another interpreter on the workers.
#
# Preemption: Google stops the workers (SIGTERM, soon after power off) and the slice is gone. Make it again under the same name
# and start the same command: it goes on after the last finished block, also on a slice of another size.
# The run ends with this connection, so start it inside tmux on a machine that stays up. Exit status: that of gcloud.
set -euo pipefail

say() {
  echo "$0: $1" >&2
  exit 2
}

dry_run=
[[ ${1-} == --dry-run ]] && dry_run=yes && shift
[[ ${TPU_NAME-} ]] || say "expected the name of the slice in TPU_NAME (gcloud compute tpus tpu-vm list --zone=ZONE)"
[[ ${ZONE-} ]] || say "expected the zone of the slice in ZONE, such as us-west4-a"

# An unquoted ~ is expanded on the worker. What is quoted here is read once more by the shell there.
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
