#!/usr/bin/env bash
# Starts one run on a TPU slice of a cluster that Google's Cluster Toolkit made.
#
#   export OPTIMA_IMAGE=REGISTRY/optima-tpu:tpu COMPUTE_TYPE=ct6e-standard-4t TOPOLOGY=4x4
#   launch/cluster_toolkit.sh [--dry-run] --model meta-llama/Llama-3.1-8B --mesh 8x2 --output gs://BUCKET/llama
#
# Needs: gcluster, told which cluster (gcluster job config set cluster NAME, and project and location); an image built from
# launch/Dockerfile with --build-arg EXTRA=tpu,gcs; an --output that every host can access. OPTIMA_NAME names the job (default: optima),
# as a DNS label. GCLUSTER_ENV="--env=HF_TOKEN=..." adds options of gcluster, such as --dry-run-out=job.yaml for the manifest alone.
#
# Preemption: the pods get SIGTERM and exit with 75. Kubernetes starts them again, and after a lost node up to OPTIMA_RESTARTS times
# (100); the run goes on after its last finished block.
set -euo pipefail

say() {
  echo "$0: $1" >&2
  exit 2
}

dry_run=
[[ ${1-} == --dry-run ]] && dry_run=yes && shift
for variable in OPTIMA_IMAGE COMPUTE_TYPE TOPOLOGY; do
  [[ ${!variable-} ]] || say "expected $variable, see the head of this script"
done
name=${OPTIMA_NAME:-optima}
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || say "expected OPTIMA_NAME with a-z, 0-9 and -, up to 40 of them, got '$name'"

# The shell of the container parses the command again.
remote="python -m optima_tpu.launch"
(($#)) && remote+=$(printf ' %q' "$@")
# shellcheck disable=SC2054,SC2206 # commas within a value; GCLUSTER_ENV holds several options
command=(
  gcluster job submit "--name=$name" "--image=$OPTIMA_IMAGE" "--compute-type=$COMPUTE_TYPE" "--topology=$TOPOLOGY"
  "--restarts=${OPTIMA_RESTARTS:-100}" --restart-on-exit-codes=69,75 --grace-period=60s ${GCLUSTER_ENV-} "--command=$remote"
)
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
command -v gcluster >/dev/null || say "needs gcluster: https://docs.cloud.google.com/cluster-toolkit/docs"
exec "${command[@]}"
