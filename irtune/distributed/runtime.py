"""Processes: who am I, how many are we, what do the others say. Every helper also works with one process.

Rank and addresses come from the variables of the launcher (deepspeed, torchrun) and from nowhere else.
"""

import contextlib
import datetime
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from irtune.distributed import environment
from irtune.distributed.heartbeat import Patience, Watch
from irtune.distributed.network import interface_towards
from irtune.errors import ConfigError, DistributedError, IrtuneError

_watch = Watch(None, 0, 1)  # that of the running process group
_jobs = itertools.count()  # numbers of those that ranks share, of which each has a counter in their store


@dataclass(frozen=True)
class World:
    """Rank of this process, rank on its node, number of processes, and the device it computes on."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and talks to the user."""
        return self.rank == 0


def read_world() -> World:
    """Read the launcher's variables.

    Raises:
        ConfigError: when there are more ranks on this node than GPUs, or a variable is not a number.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    try:
        rank, local_rank, size = (int(environment.variable(name, default)) for name, default in zip(names, "001"))
        # torchrun and deepspeed each have a name for the number of ranks on this node.
        here = int(environment.variable("LOCAL_WORLD_SIZE", environment.variable("LOCAL_SIZE", str(local_rank + 1))))
    except ValueError:
        values = {name: environment.variable(name, "") for name in names}
        raise ConfigError(f"the launcher's variables must be whole numbers, not {values}") from None
    if not torch.cuda.is_available():
        return World(rank, local_rank, size, torch.device("cpu"))
    if here > torch.cuda.device_count():  # every rank raises it, so that none waits for one that cannot start
        raise ConfigError(
            f"{here} ranks on a node with {torch.cuda.device_count()} GPU(s); accepted: at most one rank for each GPU"
        )
    return World(rank, local_rank, size, torch.device("cuda", local_rank))


def start(world: World, timeout_seconds: int) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs. One process needs no address and no port.

    Raises:
        DistributedError: when the ranks do not meet in time.
    """
    global _watch
    if dist.is_initialized():
        return
    _watch = Watch(None, 0, 1)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # DeepSpeed asks for the launcher's variables even when one process was started by hand.
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank), ("WORLD_SIZE", world.size)):
        environment.set_default(name, str(value))
    if world.size == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=_bound(world)
        )
        return
    if backend == "gloo" and environment.variable("LOCAL_WORLD_SIZE", environment.variable("LOCAL_SIZE", "")) != str(
        world.size
    ):
        # Several nodes: gloo would take the address behind the host's name, which is often a loopback.
        interface = interface_towards(environment.variable("MASTER_ADDR", "localhost"))
        if interface is not None:
            environment.set_default("GLOO_SOCKET_IFNAME", interface)
    try:
        store = _meeting_point(world, timeout)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=_of_collectives(timeout_seconds, backend),
            device_id=_bound(world),
        )
        _watch = Watch(store, world.rank, world.size, timeout=timeout_seconds, busy=_busy(world.device))
    except Exception as error:  # torch raises several kinds, each meaning that the ranks did not meet
        raise DistributedError(_not_met(world, timeout_seconds, error)) from error


def _bound(world: World) -> torch.device | None:
    """The device that a process group is bound to, so that NCCL guesses none; gloo takes none."""
    return world.device if world.device.type == "cuda" else None


def _not_met(world: World, timeout_seconds: int, error: Exception) -> str:
    host, port = environment.variable("MASTER_ADDR", "?"), environment.variable("MASTER_PORT", "?")
    text = (str(error).strip().splitlines() or [""])[0]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return f"port {port} (MASTER_PORT) of {host} is in use by another program; give the launcher another one"
    return (
        f"{environment.here()} could not join the other {world.size - 1} ranks within {timeout_seconds} s, meeting at "
        f"{host}:{port}: {text}"
    )


def _meeting_point(world: World, timeout: datetime.timedelta) -> dist.Store:
    """The store behind the launcher's address.

    torchrun's static rendezvous keeps one store over restarts, with the addresses of ranks that are dead. On one node
    every rank knows the number of the restart; on several, torchrun opens another store each time if
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE is set, as the launch scripts do.
    """
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    here = environment.variable("LOCAL_WORLD_SIZE", "") == str(world.size)
    attempt = environment.variable("TORCHELASTIC_RESTART_COUNT", "0") if here else "0"
    return dist.PrefixStore(f"irtune/{attempt}", store)


def stop() -> None:
    """Leave the process group, if there is one."""
    _watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def limit_waiting(timeout_seconds: int) -> None:
    """Give every process group the time-out of the first one: those that DeepSpeed opens wait for 30 minutes."""
    timeout = _of_collectives(timeout_seconds, dist.get_backend())
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _of_collectives(timeout_seconds: int, backend: str) -> datetime.timedelta:
    """NCCL's end the process without a word: irtune's watch comes before them, after as long as gloo's wait."""
    return datetime.timedelta(
        seconds=timeout_seconds if backend == "nccl" else Patience.within(timeout_seconds).collective
    )


def _busy(device: torch.device) -> Callable[[], bool]:
    """Whether a device has work that it has not done; a CPU, whose calls come back when it is done, has none."""
    if device.type != "cuda":
        return lambda: False
    stream = torch.cuda.default_stream(device)

    def busy() -> bool:
        try:
            return not stream.query()
        except RuntimeError:  # the device failed, of which the main thread will hear
            return False

    return busy


def watch() -> Watch:
    """What this rank knows of the others."""
    return _watch


def doing(what: str) -> None:
    """Name what this rank is at, for the message of a time-out."""
    _watch.at(what)


def moving() -> None:
    """Tell that this rank gets on with what it is at, where that takes long: it is not hanging."""
    _watch.at(_watch.doing)


def launched_world_size() -> int:
    """Number of ranks of the running process group (1 without one)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank (0 without a process group)."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over ranks in place and return it."""
    if launched_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The `tensor` of every rank, in rank order; shapes must be equal."""
    if launched_world_size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(launched_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered


def all_gather_object(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order. For small things outside the training loop."""
    if launched_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * launched_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def new_job() -> str:
    """A name for work that ranks share, the same on all of them if they ask equally often."""
    return f"job/{next(_jobs)}"


def made_together(job: str, make: Callable[[Any], Any], items: Sequence[Any], size: int) -> dict[int, Any]:
    """What `make` makes of those `items` that fall to this rank, by place: the next `size` to whom comes first.

    No rank waits for another here, so one that has something else to do leaves its share to the others; `joined` puts
    their parts together.
    """
    if launched_world_size() == 1:
        return dict(enumerate(map(make, items)))
    store = dist.distributed_c10d._get_default_store()
    mine: dict[int, Any] = {}
    while (first := size * (store.add(job, 1) - 1)) < len(items):
        mine |= {place: make(items[place]) for place in range(first, min(first + size, len(items)))}
    return mine


def joined(mine: dict[int, Any]) -> list[Any]:
    """The parts of all ranks that `made_together` made, in the order of the items. Collective."""
    parts = {place: made for part in all_gather_object(mine) for place, made in part.items()}
    return [parts[place] for place in sorted(parts)]


def barrier() -> None:
    """Wait for all ranks."""
    if launched_world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """Raise a user's error on all ranks when it happens on some, so that none waits for the others for ever.

    The ranks meet at the end of the block, so it must hold no collective that a failing rank would skip.
    """
    mine: IrtuneError | None = None
    try:
        yield
    except IrtuneError as error:
        mine = error
    texts = all_gather_object(None if mine is None else str(mine))
    if mine is not None:
        raise mine
    failed = {number: text for number, text in enumerate(texts) if text is not None}
    if failed:
        number, text = next(iter(failed.items()))
        raise DistributedError(f"{_watch.name(number)}: {text}")


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from `parts`, the same in every process and on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and torch; with `deterministic`, refuse kernels whose result depends on timing."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        environment.set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by torch for deterministic cuBLAS
        torch.use_deterministic_algorithms(True)
