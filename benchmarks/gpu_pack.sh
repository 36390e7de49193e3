#!/usr/bin/env bash
# Fills .gpu at the root of the checkout, which git ignores, with the wheels that gpu_day.sh installs on a machine whose
# image has torch for CUDA, numpy, pandas, pyarrow, scikit-learn and matplotlib. To be called in irtune's environment.
#   bash benchmarks/gpu_pack.sh
# EXTRA: names of more packages that the image lacks. PYTHON_VERSION: of the other machine (3.12). CUDA: of its torch, as bitsandbytes names its library (cuda130).
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON_VERSION=${PYTHON_VERSION:-3.12} CUDA=${CUDA:-cuda130}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
rm -rf "$ROOT/.gpu"
mkdir -p "$ROOT/.gpu"
cd "$ROOT"
# What images with torch often lack, in the versions of this environment; liger-kernel, if it is not here, the newest.
names=(transformers tokenizers regex tqdm pyyaml psutil safetensors huggingface_hub peft datasets accelerate tensorboard torchmetrics
    lightning-utilities jsonargparse docstring-parser typeshed-client rapidfuzz gguf hjson msgpack py-cpuinfo pydantic
    pydantic-core annotated-types typing-inspection typing-extensions dill multiprocess xxhash liger-kernel)
wanted() {
    python3 - "$@" <<'END'
import sys
from importlib import metadata
for name in sys.argv[1:]:
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(name)
END
}
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
download() {
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$PYTHON_VERSION" --implementation cp \
        "${platforms[@]}" -d "$@"
}
# shellcheck disable=SC2046,SC2086  # a word for each package
download .gpu $(wanted "${names[@]}" ${EXTRA:-})
download "$SCRATCH" "$(wanted bitsandbytes)"
python3 -m benchmarks.gpu.slim "$SCRATCH"/bitsandbytes-*.whl .gpu "$CUDA"
DS_BUILD_OPS=0 python3 -m pip wheel -q --no-deps --no-build-isolation -w .gpu "$(wanted deepspeed)"
du -sh .gpu
