"""Run a function on several real processes over gloo. The processes are forked from a server that has already imported
torch, transformers and deepspeed, so that a start costs a fraction of a second."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

PRELOAD = ["tests.support.preload"]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOAD)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(function: Callable[..., Any], world_size: int, args: tuple) -> tuple[list[Any], Any]:
    """The processes, which have begun, and the queue that they put their results into."""
    port = free_port()
    queue = _server.Queue()
    processes = [
        _server.Process(target=_child, args=(queue, rank, world_size, port, function, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, queue


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0, only: int | None = None
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks; returns their results in rank order.

    With `only`, wait for that rank alone and kill the others: their results are None.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or when ranks do not end in time.
    """
    processes, queue = _start(function, world_size, args)
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size and only not in results:
            rank, error, value = queue.get(timeout=timeout)
            assert error is None, f"rank {rank} of {world_size} failed:\n{error}"
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == world_size else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [results.get(rank) for rank in range(world_size)]


def run_cases(
    function: Callable[..., Any], world_size: int, cases: Sequence[tuple], timeout: float = 240.0
) -> list[list[Any]]:
    """Call `function(*case)` for one case after the other on the same ranks; returns `run_ranks`' results per case."""
    results = run_ranks(_one_by_one, world_size, function, cases, timeout=timeout)
    return [list(of_case) for of_case in zip(*results)]


def _one_by_one(function: Callable[..., Any], cases: Sequence[tuple]) -> list[Any]:
    """In one process group, which only the last case leaves: DeepSpeed keeps to that of a process's first engine."""
    from irtune.distributed import runtime

    stop, runtime.stop = runtime.stop, lambda: None
    try:
        return [function(*case) for case in cases]
    finally:
        runtime.stop = stop
        stop()


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


def kill_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, victims: list[int], when: Callable[[], None]
) -> float:
    """Start `function(*args)` on `world_size` ranks, wait for `when`, and kill `victims` with SIGKILL.

    Returns:
        Seconds until the other ranks have ended by themselves.

    Raises:
        AssertionError: when one of them has not after 60 s.
    """
    processes, _ = _start(function, world_size, args)
    when()
    killed = time.monotonic()
    for rank in victims:
        processes[rank].kill()
    for process in processes:
        process.join(timeout=max(0.0, killed + 60 - time.monotonic()))
    left = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in left:
        processes[rank].kill()
    assert not left, f"ranks {left} were still there 60 s after {victims} had been killed"
    return time.monotonic() - killed
