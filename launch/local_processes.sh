#!/usr/bin/env bash
# Starts one run as several processes on this host: to try multi-process runs on a laptop, or to use both sockets of a CPU server.
# On an accelerator host, do not use this script: one process drives all chips of the host.
#
#   launch/local_processes.sh [--dry-run] N [arguments of optima_tpu.launch]
#   launch/local_processes.sh 2 --cpu_devices 2 --mesh 4x1 --output runs/two
#
# Needs: bash 5.1 or newer; this package, installed for `python` or for the interpreter that OPTIMA_PYTHON names.
#
# Process 0 writes to the terminal as usual. Output of the other processes goes to stderr, with the process number as a prefix.
# The script passes Ctrl-C and SIGTERM on to all processes. If one process fails, the others get SIGTERM, and SIGKILL after
# OPTIMA_GRACE seconds (10), because a process that waits for the lost one inside a collective does not handle SIGTERM. Finished
# blocks are kept in both cases.
# Exit status: the status of the first process that failed. 75 means that SIGTERM stopped the run and the same command resumes it.
set -uo pipefail

usage() {
  echo "usage: $0 [--dry-run] N [arguments of optima_tpu.launch]; $1" >&2
  exit 2
}

dry_run=
[[ ${1-} == --dry-run ]] && dry_run=yes && shift
[[ ${1-} =~ ^[1-9][0-9]*$ ]] || usage "expected N, the number of processes, got '${1-}'"
count=$1 && shift
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || usage "needs bash 5.1 or newer, this is $BASH_VERSION"
python=${OPTIMA_PYTHON:-python}
command -v "$python" >/dev/null || usage "needs the program '$python': activate the virtual environment, or set OPTIMA_PYTHON"

port=PORT
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
[[ $dry_run ]] || port=$("$python" -c "$free_port") || exit 2

pids=()
status=0
stopping=

signal_all() {
  ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}" 2>/dev/null
}

# shellcheck disable=SC2329 # called by the traps
stop() {
  stopping=yes
  signal_all "$1"
}

# Every process gets its own process group, so that Ctrl-C reaches only this script, which passes it on once.
set -m
trap 'stop TERM' TERM
trap 'stop INT' INT
for ((id = 0; id < count; id++)); do
  command=("$python" -m optima_tpu.launch --coordinator "127.0.0.1:$port" --num-processes "$count" --process-id "$id" "$@")
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
  elif ((id == 0)); then
    "${command[@]}" </dev/null &
    pids+=($!)
  else
    "${command[@]}" </dev/null > >(sed -u "s/^/[$id] /" >&2) 2>&1 &
    pids+=($!)
  fi
done

killer=
while ((${#pids[@]})); do
  wait -n -p ended "${pids[@]}"
  code=$?
  if [[ ! ${ended-} ]]; then # a signal came and was passed on, or the process ended before `wait` was called
    for index in "${!pids[@]}"; do
      kill -0 "${pids[index]}" 2>/dev/null || ended=${pids[index]}
    done
    [[ ${ended-} ]] || continue
    wait "$ended"
    code=$?
  fi
  for index in "${!pids[@]}"; do
    [[ ${pids[index]} == "$ended" ]] && unset "pids[index]"
  done
  if ((code != 0 && status == 0)); then
    status=$code
    if [[ ! $stopping ]] && ((${#pids[@]})); then
      echo "a process ended with status $code; stopping the others" >&2
      signal_all TERM
      (sleep "${OPTIMA_GRACE:-10}" && kill -KILL -- "${pids[@]/#/-}") >/dev/null 2>&1 &
      killer=$!
    fi
  fi
done
[[ $killer ]] && kill -- "-$killer" 2>/dev/null
exit "$status"
