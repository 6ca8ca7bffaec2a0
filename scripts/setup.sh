#!/usr/bin/env bash
# Installs what is missing of scripts/packages.txt; --dev adds the tools of CI (clang, clang-format, clang-tidy).
# Says nothing and takes no time when everything is there.
set -euo pipefail
cd "$(dirname "$0")"

case "${1:-}" in
  "") packages=$(awk '!/^#/ && NF == 1 {print $1}' packages.txt) ;;
  --dev) packages=$(awk '!/^#/ && NF {print $NF}' packages.txt) ;;
  *) echo "setup.sh: unknown argument '$1'; usage: setup.sh [--dev]" >&2; exit 2 ;;
esac

if ! command -v dpkg-query >/dev/null; then
  echo "setup.sh: this is not Debian; install the equivalents of these packages: "$packages >&2
  exit 0
fi
installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p')
missing=$(comm -23 <(sort -u <<<"$packages") <(sort -u <<<"$installed"))
[ -n "$missing" ] || exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "setup.sh: these packages are missing and you are neither root nor have sudo. As root: apt-get install "$missing >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "installing: "$missing
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >>"$log" 2>&1 </dev/null; }
# shellcheck disable=SC2086
if ! { apt update && apt install --no-install-recommends $missing; }; then
  cat "$log" >&2
  echo "setup.sh: apt-get failed (see above); wanted: "$missing >&2
  exit 1
fi
