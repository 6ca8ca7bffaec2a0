#!/usr/bin/env bash
# tidy.sh JOBS [FILE...]: clang-tidy over the sources of src/ (tests excluded), using build/release/compile_commands.json.
# A file whose text, headers of src/ and settings are those of its last clean run is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$1
shift
cache=build/tidy
mkdir -p "$cache"
# clang-tidy reads g++'s commands: no OpenMP runtime for clang here, and g++-only flags are no finding.
args=(-p build/release --quiet --extra-arg=-fno-openmp --extra-arg=-Wno-unknown-warning-option
      --extra-arg=-Wno-unused-command-line-argument --extra-arg=-Wno-ignored-optimization-argument)
settings=$(cat .clang-tidy scripts/tidy.sh $(git ls-files -co --exclude-standard 'src/*.h') | sha256sum)
if [ $# -eq 0 ]; then
  mapfile -t files < <(git ls-files -co --exclude-standard 'src/*.cpp' | grep -vE '_test\.cpp$|^src/kernels/cuda/')
else
  files=("$@")
fi

check_one() {
  local file=$1 stamp
  stamp=$cache/$(echo "$settings$(sha256sum <"$file")$file" | sha256sum | cut -c1-32)
  [ -e "$stamp" ] && return 0
  if out=$(clang-tidy "${args[@]}" "$file" 2>/dev/null </dev/null); then
    : >"$stamp"
  else
    printf '%s\n' "$out"
    echo "tidy: $file has findings"
    return 1
  fi
}
export -f check_one
export cache settings
declare -p args >"$cache/args"
printf '%s\0' "${files[@]}" |
  xargs -0 -n 1 -P "$jobs" bash -c 'source "$cache/args"; check_one "$1"' tidy
echo "tidy: ${#files[@]} files clean"
