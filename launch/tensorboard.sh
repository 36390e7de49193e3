#!/usr/bin/env bash
# The pictures of a run, on this machine only (TensorBoard has no password).
#   bash launch/tensorboard.sh RUN_DIR
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run=${1:?usage: bash launch/tensorboard.sh RUN_DIR}
[[ -d $run/tensorboard ]] || { echo "error: $run is no run folder: it has no tensorboard/ inside" >&2; exit 2; }
exec tensorboard --host localhost --logdir "$run/tensorboard"
