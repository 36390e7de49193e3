#!/usr/bin/env bash
# The test suite in an environment made for it.
#   bash launch/test.sh            all tests that are not marked slow: minutes on two cores
#   bash launch/test.sh --all      the slow ones too: kills, nodes, soak, a browser, full products
# Further arguments go to pytest: bash launch/test.sh --all tests/jobs, bash launch/test.sh -m quick
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

chosen=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    chosen=()
    shift
fi
fetch_model
export OMP_NUM_THREADS=1
cd "$ROOT"
exec python -m pytest "${chosen[@]}" "$@"
