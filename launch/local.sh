#!/usr/bin/env bash
# One node with torchrun: RANKS processes (default: all GPUs, or 2 CPU ranks).
#   RANKS=4 bash launch/local.sh --config launch/recipes/iterater-smollm2.yaml --data.path FOLDER [--section.key value ...]
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
threads=$(($(getconf _NPROCESSORS_ONLN) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
exec python "$ROOT/launch/lib/start.py" torchrun --standalone --nproc_per_node "$ranks" "$ROOT/train.py" "$@"
