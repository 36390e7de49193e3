"""A process group for fake_device that takes the place of NCCL: collectives of "cuda" tensors through gloo.

As with NCCL: tensors of the CPU are refused, and so are those that do not lie contiguously in memory.
"""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group  # noqa: F401
from torch.futures import Future

from tests.support.simulated import device

counts: dict[str, int] = {}


class _Done(dist._Work):
    def __init__(self, result):
        super().__init__()
        self._result, self._future = result, Future()
        self._future.set_result(result)

    def wait(self, timeout=None):
        return True

    def is_completed(self):
        return True

    def synchronize(self):
        pass

    def get_future(self):
        return self._future

    def result(self):
        return self._result


def _checked(tensors):
    for tensor in tensors:
        if tensor.device.type != "cuda":
            raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
        if not tensor.is_contiguous():
            raise ValueError("Tensors must be contiguous")
    return tensors


class Relay(dist.ProcessGroup):
    """NCCL's collectives, by gloo, on copies."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self):
        return "fake-nccl"

    def _set_default_timeout(self, timeout):
        self._gloo._set_default_timeout(timeout)

    @property
    def _device_types(self):
        return [torch.device("cuda")]

    def _get_backend(self, _device):
        return self

    def _get_backend_name(self):
        return "nccl"

    def _start_coalescing(self, _device):
        pass

    def _end_coalescing(self, _device):
        return _Done(None)

    def _run(self, what, outputs, inputs, call, result):
        counts[what] = counts.get(what, 0) + 1
        with device.quietly(), torch.no_grad():
            _checked([*outputs, *inputs])
            down_in = [tensor.detach().cpu() for tensor in inputs]
            down_out = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in outputs]
            call(down_out, down_in).wait()
            for tensor, values in zip(outputs, down_out):
                tensor.detach().copy_(values)
        return _Done(result)

    def _inplace(self, what, tensors, call):
        counts[what] = counts.get(what, 0) + 1
        with device.quietly(), torch.no_grad():
            _checked(tensors)
            down = [tensor.detach().cpu() for tensor in tensors]
            call(down).wait()
            for tensor, values in zip(tensors, down):
                tensor.detach().copy_(values)
        return _Done(tensors)

    def allreduce(self, tensors, opts=None):
        options = dist.AllreduceOptions()
        average = opts is not None and opts.reduceOp == dist.ReduceOp.AVG
        options.reduceOp = dist.ReduceOp.SUM if average or opts is None else opts.reduceOp

        def call(down):
            work = self._gloo.allreduce(down, options)
            work.wait()
            for tensor in down if average else ():
                tensor.div_(self.size())
            return work

        return self._inplace("all_reduce", tensors, call)

    def allreduce_coalesced(self, tensors, opts=None):
        for tensor in tensors:
            self.allreduce([tensor], opts)
        return _Done(tensors)

    def broadcast(self, tensors, opts):
        return self._inplace("broadcast", tensors, lambda down: self._gloo.broadcast(down, opts))

    def reduce(self, tensors, opts):
        return self._inplace("reduce", tensors, lambda down: self._gloo.reduce(down, opts))

    def allgather(self, outputs, inputs, opts=None):
        for into, tensor in zip(outputs, inputs):
            self._run("all_gather", into, [tensor], lambda out, down: self._gloo.allgather([out], down), None)
        return _Done(outputs)

    def _allgather_base(self, output, tensor, opts=None):
        parts = list(output.view(-1).chunk(self.size()))
        self._run("all_gather", parts, [tensor.view(-1)], lambda out, down: self._gloo.allgather([out], down), None)
        return _Done(output)

    def allgather_into_tensor_coalesced(self, outputs, inputs, opts=None):
        for output, tensor in zip(outputs, inputs):
            self._allgather_base(output, tensor)
        return _Done(outputs)

    def _reduce_scatter_base(self, output, tensor, opts=None):
        counts["reduce_scatter"] = counts.get("reduce_scatter", 0) + 1
        with device.quietly(), torch.no_grad():
            _checked([output, tensor])
            down = tensor.detach().cpu()
            self._gloo.allreduce([down], dist.AllreduceOptions()).wait()
            mine = down.view(-1).chunk(self.size())[self.rank()]
            if opts is not None and opts.reduceOp == dist.ReduceOp.AVG:
                mine = mine / self.size()
            output.detach().view(-1).copy_(mine)
        return _Done(output)

    def reduce_scatter_tensor_coalesced(self, outputs, inputs, opts=None):
        for output, tensor in zip(outputs, inputs):
            self._reduce_scatter_base(output, tensor, opts)
        return _Done(outputs)

    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base
    allgather_single_coalesced = all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def barrier(self, opts=None):
        self._gloo.barrier().wait()
        return _Done(None)


def _create(store, rank, size, timeout):
    return Relay(store, rank, size, timeout)


dist.Backend.register_backend("relay", _create, devices=["cuda"])
_init, _new = dist.init_process_group, dist.new_group


def init_process_group(backend=None, **options):
    """As torch's, with another NCCL."""
    options.pop("device_id", None)
    return _init("relay" if backend == "nccl" else backend, **options)


def new_group(ranks=None, timeout=None, backend=None, **options):
    """As torch's, with another NCCL."""
    return _new(ranks, timeout, "relay" if backend == "nccl" else backend, **options)


dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group
dist.new_group = dist.distributed_c10d.new_group = new_group
_timeouts = dist.distributed_c10d._set_pg_timeout


def _set_pg_timeout(timeout, group=None):
    with contextlib.suppress(Exception):
        _timeouts(timeout, group)


dist.distributed_c10d._set_pg_timeout = _set_pg_timeout
