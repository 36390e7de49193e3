"""With this folder in PYTHONPATH, each Python that DS_ACCELERATOR tells to use CUDA has the simulated device."""

import os

if os.environ.get("DS_ACCELERATOR") == "cuda":
    import tests.support.simulated.device
    import tests.support.simulated.nccl  # noqa: F401
