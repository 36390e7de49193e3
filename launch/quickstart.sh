#!/usr/bin/env bash
# Everything from nothing: environment, small pretrained model, a corpus, and IR-Tuning on two ranks under ZeRO 2.
#   bash launch/quickstart.sh [--section.key value ...]
# IRTUNE_DATA: folder with the real corpora; without it a SYNTHETIC corpus is made. IRTUNE_CACHE, IRTUNE_VENV: where
# the model and the environment are kept.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

fetch_model
columns=()
if [[ -n ${IRTUNE_DATA:-} ]]; then
    corpus=$IRTUNE_DATA/iterater
    columns=(--data.preset iterater-human)
    say "corpus: $corpus (IteraTeR-HUMAN)"
else
    corpus=$CACHE/synthetic
    [[ -f $corpus/train.jsonl ]] || (cd "$ROOT" && python -m irtune.data.synthetic "$corpus")
    say "corpus: $corpus (SYNTHETIC: made-up sentences, see irtune/data/synthetic.py)"
fi

# Two ranks share the machine: all GPUs if there are two, else CPU ranks with half of the cores each.
threads=$(($(getconf _NPROCESSORS_ONLN) / 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=2
[[ $gpus == 1 ]] && ranks=1
say "IR-Tuning on $ranks rank(s) under ZeRO 2"
# With padding: after 110 steps IteraTeR's dev accuracy was .568 and, in random batches without padding, .533; 140 of those
# gave .551 and took 40 s more (one seed each).
deepspeed --num_gpus "$ranks" "$ROOT/train.py" --config "$ROOT/launch/recipes/quickstart.yaml" \
    --model.name_or_path "$MODEL_FOLDER" --data.path "$corpus" "${columns[@]}" \
    --optim.loss class_balanced --data.padding_free false --optim.max_steps 110 --run.eval_every 110 \
    --run.output_dir "$ROOT/runs/quickstart-$(basename "$corpus")" "$@"

say "for comparison: what needs no language model"
(cd "$ROOT" && python -m irtune data baseline --data "$corpus" "${columns[@]}")
