#!/usr/bin/env bash
# The test suite in an environment made for it.
#   bash launch/test.sh            all tests that are not marked slow, in minutes
#   bash launch/test.sh --all      then the slow ones too: kills, nodes, a soak, a browser, full products
# Further arguments go to pytest: bash launch/test.sh --all tests/jobs, bash launch/test.sh -m quick
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

all=
if [[ ${1:-} == --all ]]; then
    all=yes
    shift
fi
fetch_model
export OMP_NUM_THREADS=1
cd "$ROOT"
# Two tests at a time: the ranks of one wait for each other, and for the disk, half of their time.
everyday=(python -m pytest -n 2 --dist worksteal -m "not slow" "$@")
[[ $all ]] || exec "${everyday[@]}"

# pytest's exit statuses; arguments may choose tests of one kind only.
INTERRUPTED=2 NOTHING_CHOSEN=5
ran= failed=
stage() { # WHAT COMMAND...
    local status=0
    say "$1"
    "${@:2}" || status=$?
    [[ $status != "$INTERRUPTED" ]] || exit "$status"
    [[ $status == "$NOTHING_CHOSEN" ]] || ran=yes
    [[ $status == 0 || $status == "$NOTHING_CHOSEN" ]] || failed=$status
}
stage "tests that are not slow" "${everyday[@]}"
stage "slow tests, two at a time" python -m pytest -n 2 --dist worksteal -m "slow and not alone" "$@"
stage "slow tests about time-outs, one at a time" python -m pytest -m "slow and alone" "$@"
[[ $ran ]] || exit "$NOTHING_CHOSEN"
exit "${failed:-0}"
