"""A CUDA device on a machine without one: import this before torch. See device.cpp.

Tensors say "cuda:0", operations run on the CPU. Operands on two devices are refused; `waits` lists what would have made
the host wait for a GPU, each with the place in irtune or DeepSpeed that asked; copies to pinned memory arrive only when
somebody waits for them.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).resolve().parent / "device.cpp"
assert "torch" not in sys.modules, "import fake_device before torch"


def _library() -> Path:
    """device.cpp, compiled once for this torch."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    version = (torch_folder / "version.py").read_text()
    key = hashlib.sha256((SOURCE.read_text() + version).encode()).hexdigest()[:16]
    file = Path(os.environ.get("FAKE_CUDA_CACHE", tempfile.gettempdir())) / f"fake-cuda-{key}.so"
    if not file.exists():
        include = torch_folder / "include"
        scratch = file.with_suffix(f".{os.getpid()}")
        standard = "-std=c++20" if "2.13" in version else "-std=c++17"
        subprocess.run(
            [
                "g++",
                standard,
                "-O0",
                "-w",
                "-shared",
                "-fPIC",
                f"-I{include}",
                f"-I{include}/torch/csrc/api/include",
                str(SOURCE),
                "-o",
                str(scratch),
                f"-L{torch_folder}/lib",
                f"-Wl,-rpath,{torch_folder}/lib",
                "-lc10",
                "-ltorch_cpu",
            ],
            check=True,
        )
        scratch.replace(file)
    return file


_lib = ctypes.CDLL(str(_library()), mode=ctypes.RTLD_GLOBAL)
for _name in ("fake_live", "fake_peak", "fake_kernels"):
    getattr(_lib, _name).restype = ctypes.c_long

import torch  # noqa: E402

with contextlib.suppress(ImportError):  # while there is no GPU: it would load its CUDA library
    import bitsandbytes  # noqa: E402, F401

waits: list[tuple[str, str]] = []  # what would have waited, and where
listening = True
raising = False  # as torch.cuda.set_sync_debug_mode("error")
ROOTS = ("/irtune/", "/deepspeed/", "/transformers/", "/peft/", "/bitsandbytes/", "/torch/optim/", "/benchmarks/")


def _place() -> str:
    last = mine = None
    frame = sys._getframe(1)
    while frame is not None and (mine is None or last is None):  # traceback would read the sources
        code, at = frame.f_code, None
        if any(root in code.co_filename for root in ROOTS):
            at = (code.co_filename.split("/"), frame.f_lineno, code.co_name)
            last = last or at
        if at and "/irtune/" in code.co_filename:
            mine = at
        frame = frame.f_back
    if last is None:
        return "elsewhere"
    text = f"{'/'.join(last[0][-3:])}:{last[1]} {last[2]}"
    if mine is not None and mine is not last:
        text += f" < {'/'.join(mine[0][-2:])}:{mine[1]} {mine[2]}"
    return text


def _note(what: str) -> None:
    if listening:
        waits.append((what, _place()))
    _lib.fake_synchronize()  # who waits for the stream sees all that was copied


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _report(what):
    _note(what.decode())


_lib.fake_start(_report)


class Stream:
    """A stream of the device; there is one order of things only."""

    cuda_stream, device_index, priority = 0, 0, 0
    device = torch.device("cuda", 0)

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, device=None, **_):
        pass

    def synchronize(self):
        _note("stream.synchronize")

    def query(self):
        return True

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()


class Event:
    """An event of the device."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def record(self, stream=None):
        pass

    def synchronize(self):
        _note("event.synchronize")

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


_main = Stream()
cuda = torch.cuda
_state = torch.get_rng_state
_properties = SimpleNamespace(name="Fake GPU", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132)


def _set(**values):
    for name, value in values.items():
        setattr(cuda, name, value)


_set(
    is_available=lambda: True,
    is_initialized=lambda: True,
    init=lambda: None,
    _lazy_init=lambda: None,
    _lazy_call=lambda call, **_: None,
    device_count=lambda: int(os.environ.get("FAKE_CUDA_DEVICES", "1")),
    current_device=lambda: 0,
    set_device=lambda device: None,
    synchronize=lambda device=None: _note("torch.cuda.synchronize"),
    Stream=Stream,
    Event=Event,
    current_stream=lambda device=None: _main,
    default_stream=lambda device=None: _main,
    stream=lambda stream: contextlib.nullcontext(),
    set_stream=lambda stream: None,
    empty_cache=lambda: waits.append(("torch.cuda.empty_cache", _place())) if listening else None,
    ipc_collect=lambda: None,
    memory_allocated=lambda device=None: _lib.fake_live(),
    max_memory_allocated=lambda device=None: _lib.fake_peak(),
    memory_reserved=lambda device=None: _lib.fake_live(),
    max_memory_reserved=lambda device=None: _lib.fake_peak(),
    memory_stats=lambda device=None: {"num_alloc_retries": 0},
    reset_peak_memory_stats=lambda device=None: _lib.fake_reset_peak(),
    reset_max_memory_allocated=lambda device=None: _lib.fake_reset_peak(),
    mem_get_info=lambda device=None: (70 * 2**30, 80 * 2**30),
    get_device_properties=lambda device=None: _properties,
    get_device_name=lambda device=None: "Fake GPU",
    get_device_capability=lambda device=None: (9, 0),
    get_arch_list=lambda: ["sm_90"],
    is_bf16_supported=lambda *_, **__: True,
    is_current_stream_capturing=lambda: False,
    manual_seed=lambda seed: None,
    manual_seed_all=lambda seed: None,
    get_rng_state=lambda device="cuda": _state(),
    set_rng_state=lambda state, device="cuda": torch.set_rng_state(state),
    set_sync_debug_mode=lambda mode: None,
)
torch.version.cuda = "13.0"
torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
torch._C._ensureCUDADeviceGuardSet = lambda: None
_deepcopy = torch.Tensor.__deepcopy__


def _copied(tensor, memo):
    if not tensor.is_cuda or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return _deepcopy(tensor, memo)
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        memo[id(tensor)] = (
            torch.nn.Parameter(copy, tensor.requires_grad)
            if isinstance(tensor, torch.nn.Parameter)
            else copy.requires_grad_(tensor.requires_grad)
        )
    return memo[id(tensor)]


torch.Tensor.__deepcopy__ = _copied  # type: ignore[method-assign]  # storages of this device cannot be made in Python

_sparse = torch.sparse_coo_tensor


def _filled(indices, values, size=None, **options):
    """A matrix with `values` at `indices`: this device has no sparse tensors, and a dense one adds up alike."""
    if not getattr(values, "is_cuda", False):
        return _sparse(indices, values, size, **options)
    return values.new_zeros(size).index_put(tuple(indices.long()), values, accumulate=True)


torch.sparse_coo_tensor = _filled


@contextlib.contextmanager
def quietly():
    """Inside, nothing is noted."""
    global listening
    before, listening = listening, False
    try:
        yield
    finally:
        listening = before


def kernels() -> int:
    """Operations of the device so far."""
    return _lib.fake_kernels()
