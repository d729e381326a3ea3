#!/usr/bin/env bash
# Run tools/test.py in several processes on one or several machines.
#   bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [more arguments of tools/test.py]
# For several machines, set NNODES, NODE_RANK, MASTER_ADDR and PORT in the environment.
# Example:
#   bash tools/dist_test.sh configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py work_dirs/demo/epoch_8.pth 2
set -euo pipefail
usage() { sed -n '2,6s/^# //p' "$0"; }
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
[ $# -ge 3 ] || { usage >&2; exit 2; }
[[ "$3" =~ ^([1-9][0-9]*|auto|gpu|cpu)$ ]] ||
  { echo "error: PROCESSES='$3': must be a number, auto, gpu or cpu" >&2; exit 2; }
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$3" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
  "$here/test.py" "$1" "$2" --launcher pytorch "${@:4}"
