"""bitsandbytes' wheel with its CPU library and one of its CUDA ones, a tenth of the size.

python -m benchmarks.gpu.slim WHEEL FOLDER cuda130
"""

import base64
import hashlib
import sys
import zipfile
from pathlib import Path


def slim(wheel: Path, folder: Path, wanted: str) -> Path:
    """Write the wheel to `folder` without libraries of other CUDA versions than `wanted`; its list of files follows."""
    lines, record, smaller = [], "", folder / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for item in old.infolist():
            name = item.filename
            if name.endswith("/RECORD"):
                record = name
            elif not name.endswith(".so") or name.endswith((f"_{wanted}.so", "_cpu.so")):
                content = old.read(name)
                new.writestr(item, content)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                lines.append(f"{name},sha256={digest},{len(content)}")
        new.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n")
    return smaller


if __name__ == "__main__":
    slim(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
