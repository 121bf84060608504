#!/usr/bin/env bash
# Starts the JobSet of gke_jobset.yaml with these arguments; see gke_jobset.yaml for requirements and preemption.
#
#   OPTIMA_IMAGE=REGISTRY/optima-tpu:tpu launch/gke.sh [--dry-run] --model meta-llama/Llama-3.1-8B --output /runs/llama
#
# Needs: kubectl, logged in to the cluster. --dry-run prints the manifest and starts nothing. OPTIMA_NAME names the JobSet (default:
# optima). Delete a JobSet of the same name first (kubectl delete jobset optima). A stopped run resumes from its --output.
set -euo pipefail

say() {
  echo "$0: $1" >&2
  exit 2
}

dry_run=
[[ ${1-} == --dry-run ]] && dry_run=yes && shift
image=${OPTIMA_IMAGE-}
[[ $image ]] || say "expected an image in OPTIMA_IMAGE: build one from launch/Dockerfile with --build-arg EXTRA=tpu and push it"

# Every JSON string is a valid YAML string.
quoted() {
  [[ $1 != *[[:cntrl:]]* ]] || say "expected arguments without control characters"
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

args=
for argument in "$@"; do
  args+=${args:+, }$(quoted "$argument")
done
manifest=$(<"$(dirname "$0")/gke_jobset.yaml")
replace() {
  manifest=${manifest%%"$1"*}$2${manifest#*"$1"}
}

replace $'\n  name: optima\n' $'\n'"  name: ${OPTIMA_NAME:-optima}"$'\n'
replace "image: IMAGE" "image: $(quoted "$image")"
replace "args: []" "args: [$args]"
if [[ $dry_run ]]; then
  echo "$manifest"
  exit
fi
command -v kubectl >/dev/null || say "needs kubectl: https://kubernetes.io/docs/tasks/tools"
kubectl apply -f - <<<"$manifest"
