#!/usr/bin/env bash
# Build the C++ kernels with AddressSanitizer and run them once over odd shapes.
#
# tests/ops/sanitize_kernels.sh [PYTHON]     takes some minutes; g++ on Linux; exits 0 if clean
#
# Every read or write beyond a tensor or a buffer ends the run with a report of where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export RFA_MMDET_CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer -O1 -g1"
RFA_MMDET_BUILD=1 "$python" setup.py -q build_ext --build-lib "$work" --build-temp "$work/temp"

asan=$(g++ -print-file-name=libasan.so)
capabilities="default"
grep -qw avx2 /proc/cpuinfo && capabilities+=" avx2"
grep -qw avx512bw /proc/cpuinfo && capabilities+=" avx512"
for capability in $capabilities; do
  # Python itself leaks by design, and its own allocator would hide what lies next to what.
  LD_PRELOAD="$asan $(g++ -print-file-name=libstdc++.so)" PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 OMP_NUM_THREADS=2 PYTHONPATH=. \
    "$python" tests/ops/sanitize_kernels.py "$work"/rfa_mmdet/ops/rfa_conv/_cpu_"$capability".*so
done
