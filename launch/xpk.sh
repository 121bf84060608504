#!/usr/bin/env bash
# Starts one run on a TPU slice of a cluster that XPK made.
#
#   export OPTIMA_IMAGE=REGISTRY/optima-tpu:tpu CLUSTER=my-cluster TPU_TYPE=v5litepod-16 ZONE=us-west4-a PROJECT=my-project
#   launch/xpk.sh [--dry-run] --model meta-llama/Llama-3.1-8B --mesh 8x2 --output gs://BUCKET/llama
#
# Needs: xpk 1.16 or newer (pip install xpk), kubectl and gcloud, logged in; an image built from launch/Dockerfile with --build-arg
# EXTRA=tpu,gcs; an --output that every host can access. OPTIMA_NAME names the workload (default: optima), as a DNS label. SLICES is the
# number of slices (1). A gated model needs HF_TOKEN: XPK_ENV="--env=HF_TOKEN=..." adds options of xpk.
#
# Preemption: the pods get SIGTERM and exit with 75. XPK starts them again, as after 69 and a lost node, up to OPTIMA_RESTARTS times
# (100); the run goes on after its last finished block. Exit status 2 is an error that you must correct, and ends the workload.
set -euo pipefail

say() {
  echo "$0: $1" >&2
  exit 2
}

dry_run=
[[ ${1-} == --dry-run ]] && dry_run=yes && shift
for variable in OPTIMA_IMAGE CLUSTER TPU_TYPE ZONE PROJECT; do
  [[ ${!variable-} ]] || say "expected $variable, see the head of this script"
done
name=${OPTIMA_NAME:-optima}
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || say "expected OPTIMA_NAME with a-z, 0-9 and -, up to 40 of them, got '$name'"

# The shell of the container parses the command again.
remote="python -m optima_tpu.launch"
(($#)) && remote+=$(printf ' %q' "$@")
# shellcheck disable=SC2054,SC2206 # commas within a value; XPK_ENV holds several options
command=(
  xpk workload create "--cluster=$CLUSTER" "--workload=$name" "--docker-image=$OPTIMA_IMAGE" "--tpu-type=$TPU_TYPE"
  "--num-slices=${SLICES:-1}" "--zone=$ZONE" "--project=$PROJECT" "--max-restarts=${OPTIMA_RESTARTS:-100}"
  --restart-on-exit-codes=69,75 --termination-grace-period-seconds=60 ${XPK_ENV-} "--command=$remote"
)
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
command -v xpk >/dev/null || say "needs xpk: pip install xpk"
exec "${command[@]}"
