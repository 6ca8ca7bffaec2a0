#!/usr/bin/env bash
# build.sh PRESET JOBS [TARGET...]: configures and builds build/PRESET. A terminal sees ninja's one status line; elsewhere
# the output goes to build/PRESET/build.log and is shown only on failure.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1 jobs=$2
shift 2
mkdir -p "build/$preset"
log=build/$preset/build.log
targets=()
[ $# -eq 0 ] || targets=(--target "$@")
fail() { cat "$log" >&2; echo "build.sh: $1 failed for preset '$preset' (log: $log)" >&2; exit 1; }

cmake --preset "$preset" >"$log" 2>&1 </dev/null || fail configuring
if [ -t 1 ]; then
  cmake --build --preset "$preset" -j "$jobs" "${targets[@]}"
else
  echo "building build/$preset on $jobs cores"
  cmake --build --preset "$preset" -j "$jobs" "${targets[@]}" >>"$log" 2>&1 </dev/null || fail building
fi
