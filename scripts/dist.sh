#!/usr/bin/env bash
# dist.sh [BINARY]: one archive with the program and the shared objects it needs, that runs from any folder of any x86-64 or
# Arm Linux whose C library is no older than this one's. The C library itself stays the system's. A CUDA build's cuBLASLt
# (500 MB) goes in with MINIMIND_DIST_CUBLAS=1; without it the system's toolkit or LD_LIBRARY_PATH provides it.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${1:-}
for candidate in build/cuda/minimind build/release/minimind; do
  [ -n "$binary" ] || [ ! -x "$candidate" ] || binary=$candidate
done
[ -x "$binary" ] || { echo "dist.sh: no program to pack; run make build or make cuda first" >&2; exit 1; }
command -v patchelf >/dev/null || { echo "dist.sh: patchelf is missing (scripts/setup.sh installs it)" >&2; exit 1; }
version=$("$binary" --version)
kind=$(grep -q libcublasLt "$binary" && echo cuda || echo cpu)
name=minimind-$version-$kind-linux-$(uname -m)
out=build/dist/$name
rm -rf "$out"
mkdir -p "$out/lib"
cp "$binary" "$out/minimind"
strip "$out/minimind"
ldd "$binary" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | while read -r lib; do
  case $(basename "$lib") in
    libc.so.* | libm.so.* | libdl.so.* | libpthread.so.* | librt.so.* | ld-linux*) ;;  # the system's C library
    *) cp -L "$lib" "$out/lib/" ;;
  esac
done
if [ "$kind" = cuda ] && [ "${MINIMIND_DIST_CUBLAS:-0}" = 1 ]; then cp -L build/cublas/lib/libcublasLt.so.* "$out/lib/"; fi
# shellcheck disable=SC2016
patchelf --set-rpath '$ORIGIN/lib' "$out/minimind"
for lib in "$out"/lib/*; do
  # shellcheck disable=SC2016
  patchelf --set-rpath '$ORIGIN' "$lib"
done
cp README.md README.zh.md "$out/"
[ ! -f LICENSE ] || cp LICENSE "$out/"
tar -C build/dist -czf "build/dist/$name.tar.gz" "$name"
env -i "$out/minimind" --version >/dev/null || { echo "dist.sh: the packed program does not start" >&2; exit 1; }
echo "build/dist/$name.tar.gz  $(du -h "build/dist/$name.tar.gz" | cut -f1)"
