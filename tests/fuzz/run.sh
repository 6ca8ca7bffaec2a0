#!/usr/bin/env bash
# run.sh [SECONDS]: runs every fuzz target for some seconds from its seeds (tests/fuzz/corpus/<target>/). New inputs are
# kept in build/fuzz/corpus/; a crashing one is left there as crash-* and named. Ends with "N passed, N failed, N skipped".
set -uo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-10}
passed=0 failed=0
for source in tests/fuzz/fuzz_*.cpp; do
  name=$(basename "$source" .cpp)
  work=build/fuzz/corpus/$name
  seeds=tests/fuzz/corpus/$name
  mkdir -p "$work"
  log=$work.log
  if [ ! -d "$seeds" ] || [ -z "$(ls -A "$seeds")" ]; then
    echo "FAILED $name: no seeds in $seeds"
    failed=$((failed + 1))
  elif "build/fuzz/tests/fuzz/$name" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 \
      -print_final_stats=1 -artifact_prefix="$work/" "$work" "$seeds" >"$log" 2>&1 </dev/null; then
    echo "ok $name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs in $seconds s"
    passed=$((passed + 1))
  else
    tail -n 60 "$log"
    echo "FAILED $name (log: $log)"
    failed=$((failed + 1))
  fi
done
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
