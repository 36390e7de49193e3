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
# Two files at a time: the ranks of one test wait for each other, and for the disk, half of their time.
everyday=(python -m pytest -n 2 --dist loadfile -m "not slow" "$@")
[[ $all ]] || exec "${everyday[@]}"

INTERRUPTED=2 NOTHING_CHOSEN=5 # pytest's exit statuses; arguments may choose tests of one kind only
first=0 second=0
"${everyday[@]}" || first=$?
[[ $first != "$INTERRUPTED" ]] || exit "$first"
say "slow tests, one at a time: many are about time-outs"
python -m pytest -m slow "$@" || second=$?
if [[ ($first == 0 || $first == "$NOTHING_CHOSEN") && $second != "$NOTHING_CHOSEN" ]]; then
    exit "$second"
fi
exit "$first"
