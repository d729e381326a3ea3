#!/usr/bin/env bash
# Run tools/train.py with Slurm.
#   GPUS=16 GPUS_PER_NODE=8 CPUS_PER_TASK=5 bash tools/slurm_train.sh PARTITION JOB CONFIG [more arguments of tools/train.py]
# SRUN_ARGS in the environment are passed to srun, e.g. --gres=none without GPUs.
# Example:
#   GPUS=4 GPUS_PER_NODE=4 bash tools/slurm_train.sh gpu demo configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py
set -euo pipefail
usage() { sed -n '2,6s/^# //p' "$0"; }
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
[ $# -ge 3 ] || { usage >&2; exit 2; }
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
gpus="${GPUS:-8}"
for number in GPUS GPUS_PER_NODE CPUS_PER_TASK; do
  [[ "${!number:-1}" =~ ^[1-9][0-9]*$ ]] ||
    { echo "error: $number='${!number}': must be an integer of at least 1" >&2; exit 2; }
done
per_node="${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}"
# shellcheck disable=SC2086  # SRUN_ARGS is a list of words
exec srun --partition "$1" --job-name "$2" --ntasks "$gpus" --ntasks-per-node "$per_node" \
  --gres "gpu:$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  "${PYTHON:-python}" -u "$here/train.py" "$3" --launcher slurm "${@:4}"
