#!/usr/bin/env bash
# The pictures of a run, or of all runs in a folder side by side, on this machine only (TensorBoard has no password).
#   bash launch/tensorboard.sh RUN_DIR [--port N ...]
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run=${1:?usage: bash launch/tensorboard.sh RUN_DIR [OPTION OF TENSORBOARD...]}
logdir=$run/tensorboard
if [[ ! -d $logdir ]]; then
    logdir=$run # a folder of runs, as compare writes it
    [[ -n $(find "$run" -type d -name tensorboard -print -quit 2>/dev/null) ]] || {
        echo "error: $run is not a run folder: there is no tensorboard/ in it" >&2
        exit 2
    }
fi
exec tensorboard --host localhost --logdir "$logdir" "${@:2}"
