#!/usr/bin/env bash
# The test suite in an environment made for it. Arguments go to pytest:
#   bash launch/test.sh            everything
#   bash launch/test.sh -m quick   the part without processes
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

fetch_model
export OMP_NUM_THREADS=1
cd "$ROOT"
exec python -m pytest "$@"
