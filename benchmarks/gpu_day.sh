#!/usr/bin/env bash
# All that one call on a bare machine with one GPU (80 GB) can tell about irtune, in at most ten minutes, the most
# valuable first. benchmarks/README.md says how to use it.
#   with a package index:  bash benchmarks/gpu_pack.sh              fills .gpu with wheels, some 30 MB
#   on the machine:        OUT=FOLDER bash benchmarks/gpu_day.sh    from a copy of the checkout, .gpu in it
# Everything goes to OUT as it is found: summary.txt, and results.tgz with JSON files and the logs of all phases.
# PY: a Python that has the packages; then nothing is installed. SHAPE, LITTLE: the two models. TOKENS, ROWS: texts of a
# micro-batch. SECONDS_IN_ALL: for the whole; PATIENCE: multiplies the time that each part may take. A rehearsal is in
# tests/jobs/test_gpu_day.py.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${OUT:?the folder for results}
SHAPE=${SHAPE:-llama3.1-8b} LITTLE=${LITTLE:-llama3.2-1b} TOKENS=${TOKENS:-256} ROWS=${ROWS:-16}
BEGAN=$(date +%s) SECONDS_IN_ALL=${SECONDS_IN_ALL:-575}
WORK=$(mktemp -d)
# A file system in memory, where the large model (16 GB) is written and read fastest.
SCRATCH=$([[ -w /dev/shm ]] && mktemp -d -p /dev/shm || mktemp -d)
trap 'rm -rf "$SCRATCH" "$WORK"' EXIT
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 DS_BUILD_OPS=0 HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 IRTUNE_CACHE=$WORK/cache TRANSFORMERS_VERBOSITY=error \
    PYTHONWARNINGS=ignore DS_ACCELERATOR=cuda

left() { echo $((SECONDS_IN_ALL - $(date +%s) + BEGAN)); }
say() { printf '%4d s  %s\n' "$(($(date +%s) - BEGAN))" "$*" | tee -a "$OUT/summary.txt"; }
keep() {
    tar -czf "$OUT/results.tgz" -C "$WORK" --exclude=runs --exclude=inputs --exclude=cache --exclude=venv \
        --exclude='*.safetensors' . 2>/dev/null
}
# phase NAME SECONDS LINES COMMAND...: at most so long, and never beyond the end; its last lines go into the summary.
phase() {
    local name=$1 most=$(($2 * ${PATIENCE:-1})) lines=$3 log=$WORK/$1.log time session status
    shift 3
    time=$(($(left) < most ? $(left) : most))
    ((time < 15)) && say "$name: no time left" && return 1
    # A session of its own, ended as a whole: a trainer that is told to end goes on to the end of its step.
    setsid timeout -s KILL "$time" "$@" >"$log" 2>&1 &
    session=$!
    wait $session
    status=$?
    kill -KILL -- -$session 2>/dev/null
    say "$name: exit $status"
    local noise='compatibility check|Writing model|it/s]|kernels-community|Warning|warnings.warn'
    grep -vE "$noise" "$log" | tail -"$lines" | cut -c1-220 | tee -a "$OUT/summary.txt"
    keep
    return $status
}

# ----- 1. software: the pinned packages over those of the image -----
if [[ -z ${PY:-} ]]; then
    base=$(command -v python3)
    "$base" -m venv --without-pip "$WORK/venv" || exit 1
    PY=$WORK/venv/bin/python
    site=$("$PY" -c 'import site; print(site.getsitepackages()[0])')
    "$base" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' >"$site/image.pth"
    "$base" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$ROOT"/.gpu/*.whl || exit 1
fi
cd "$ROOT" || exit 1
# shellcheck disable=SC2086  # several words
phase environment 90 30 "$PY" -m benchmarks.gpu.facts ${FACTS:-} || { say "the environment does not work"; exit 1; }

# ----- 2. does it work: small runs side by side, against the CPU and against each other -----
# Meanwhile both models are written.
(timeout 150 "$PY" -c "
from pathlib import Path
from benchmarks.speed.inputs import write_inputs
for shape in ('$SHAPE', '$LITTLE'):
    write_inputs(Path('$SCRATCH'), shape, $TOKENS, 'cuda')
" >"$WORK/models.log" 2>&1) &
models=$!
check=("$PY" -m benchmarks.gpu.check "$WORK/check" --workers "${WORKERS:-8}" --seconds "${CHECK_SECONDS:-135}")
IFS=, read -ra only <<<"${CHECK_ONLY:-}"
((${#only[@]})) && check+=(--only "${only[@]}")
phase correctness "$((${CHECK_SECONDS:-135} + 15))" 45 "${check[@]}"
wait $models
say "models written: exit $?"

# ----- 3. speed of the large model beside Trainer + peft, share of the matrix rate, host waits -----
speed() {
    local shape=$1 most=$2
    shift 2
    phase "speed-$shape" "$most" 26 "$PY" -m benchmarks.speed --scratch "$SCRATCH" --tokens "$TOKENS" --evaluated 0 \
        --starts 0 --shape "$shape" --output "$WORK/speed-$shape.json" "$@" --optim.micro_batch_size "$ROWS" \
        --tuning.interval 10
}
speed "$SHAPE" 170 --one-at-a-time --sides "${SIDES:-acfb}" --rounds 1 --steps "${STEPS:-12}" --warm-up 3

# ----- 4. memory: IR-Tuning and Trainer + peft, in 16 bits and in nf4 -----
IFS=';' read -ra cases <<<"${MEMORY-ir, none;trainer, none;ir, nf4;lean, nf4}"
for only in "${cases[@]}"; do
    phase "memory-${only//, /-}" 75 5 "$PY" -m benchmarks.memory --only "$only" --exact --scratch "$SCRATCH" \
        --shape "$SHAPE" --rows "$ROWS" --tokens "$TOKENS" --device cuda --output "$WORK/memory.json"
done

# ----- 5. a quantised run from start to result -----
phase nf4-run 60 10 "$PY" train.py --config launch/recipes/quickstart.yaml --model.name_or_path "$SCRATCH/$SHAPE" \
    --data.path "$SCRATCH/corpus-$TOKENS" --data.max_length "$TOKENS" --model.quantization nf4 --optim.max_steps 12 \
    --optim.micro_batch_size "$ROWS" --run.log_every 2 --run.eval_every 12 --run.output_dir "$WORK/runs/nf4"

# ----- 6. the smaller model with all sides at once, three rounds -----
speed "$LITTLE" 90 --sides "${ALL_SIDES:-abcef}" --rounds "${ROUNDS:-3}" --steps "${STEPS:-10}"

nvidia-smi --query-gpu=name,clocks.sm,temperature.gpu,power.draw --format=csv,noheader 2>/dev/null |
    tee -a "$OUT/summary.txt"
keep
say "end"
