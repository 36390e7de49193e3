"""Run a function on several real processes over gloo. The processes are forked from a server that has already imported
torch, transformers and deepspeed, so that a start costs a fraction of a second."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

PRELOAD = ["tests.preload"]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOAD)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks; returns their results in rank order.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or when ranks do not end in time.
    """
    port = free_port()
    queue = _server.Queue()
    processes = [
        _server.Process(target=_child, args=(queue, rank, world_size, port, function, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            rank, error, value = queue.get(timeout=timeout)
            assert error is None, f"rank {rank} of {world_size} failed:\n{error}"
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == world_size else 0.5)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _child(queue: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    try:
        queue.put((rank, None, function(*args)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
