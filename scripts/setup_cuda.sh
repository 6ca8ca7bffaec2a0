#!/usr/bin/env bash
# What `make cuda` needs beside nvcc: cublasLt.h, from the CUDA toolkit if it has it, else from NVIDIA's package on PyPI
# (unpacked to build/cublas; its library is what `make dist` packs). Prints nothing and takes no time when it is there.
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=$(command -v nvcc || true)
[ -n "$nvcc" ] || nvcc=$(ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
if [ -z "$nvcc" ]; then
  echo "setup_cuda.sh: nvcc is missing; install the CUDA toolkit, 12.4 or newer (https://developer.nvidia.com/cuda-downloads)" >&2
  exit 1
fi
release=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1.\2/p')
root=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
for dir in "$root/include" "$root/targets/x86_64-linux/include" build/cublas/include; do
  [ -f "$dir/cublasLt.h" ] && exit 0
done
major=${release%%.*} minor=${release##*.}
case $major in
  12) package="nvidia-cublas-cu12~=12.$minor.0" ;;
  *) package="nvidia-cublas~=$major.$minor.0" ;;
esac
echo "downloading $package for its header and library (once, about 400 MB)"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" download -qq --disable-pip-version-check --no-deps --only-binary=:all: -d "$tmp" "$package" </dev/null
python3 - "$tmp" <<'PY'
import pathlib, sys, zipfile
out = pathlib.Path("build/cublas")
for wheel in pathlib.Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(wheel) as z:
        for name in z.namelist():
            file = pathlib.PurePosixPath(name)
            kind = "include" if file.suffix == ".h" else "lib" if file.name.startswith("libcublasLt.so") else None
            if kind:
                (out / kind).mkdir(parents=True, exist_ok=True)
                (out / kind / file.name).write_bytes(z.read(name))
PY
[ -f build/cublas/include/cublasLt.h ] || { echo "setup_cuda.sh: $package holds no cublasLt.h" >&2; exit 1; }
