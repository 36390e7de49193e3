"""What goes wrong outside the code, as one sentence: memory that is short, ranks that do not answer."""

import sys
import threading

import torch
import torch.distributed as dist

from irtune.config import Config
from irtune.distributed import environment, runtime
from irtune.errors import DistributedError, IrtuneError, TrainingError

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "Cannot allocate memory")
NO_ANSWER = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe")


def as_user_error(error: Exception, config: Config, stage: int) -> IrtuneError | None:
    """The sentence for a fault of the machine; None for anything else, which is then a bug.

    Args:
        error: what was raised in training or evaluation.
        config: for the values to change.
        stage: of ZeRO.
    """
    if isinstance(error, IrtuneError):
        return error
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in text for part in OUT_OF_MEMORY):
        return TrainingError(_out_of_memory(config, stage, text))
    if isinstance(error, dist.DistError) or any(part in text for part in NO_ANSWER):
        return DistributedError(f"{_here()}: {runtime.watch().explain()} ({_first_line(text)})")
    return None


def _out_of_memory(config: Config, stage: int, text: str) -> str:
    model = config.model
    advice = [
        _smaller_batch(config),
        "" if model.gradient_checkpointing else "model.gradient_checkpointing true",
        "model.quantization nf4" if model.quantization == "none" and stage < 3 else "",
        f"a higher ZeRO stage than {stage} (deepspeed)" if stage < 3 else "a DeepSpeed file with offload",
        "a smaller tuning.max_fraction or tuning.budget",
    ]
    return (
        f"{_here()}: out of memory under ZeRO {stage}. Try {', or '.join(filter(None, advice))}; "
        f"python -m irtune plan shows what fits ({_first_line(text)})"
    )


def _smaller_batch(config: Config) -> str:
    """Advice for half of the micro-batch and as large a global batch."""
    optim, longest = config.optim, config.data.max_length
    tokens, steps = optim.micro_batch_tokens, optim.gradient_accumulation_steps
    if tokens is not None and tokens >= 2 * longest:
        return f"optim.micro_batch_tokens {tokens // 2} with optim.gradient_accumulation_steps {2 * steps}"
    if tokens is None and optim.micro_batch_size > 1:
        smaller = optim.micro_batch_size // 2
        steps = steps * optim.micro_batch_size // smaller
        return f"optim.micro_batch_size {smaller} with optim.gradient_accumulation_steps {steps}"
    return f"data.max_length below {longest}"


def _here() -> str:
    return f"{runtime.watch().name(runtime.rank())}, at: {runtime.watch().doing}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]


def tell_the_others(error: BaseException) -> None:
    """Let the other ranks say why this one failed."""
    runtime.watch().report(
        f"{runtime.watch().name(runtime.rank())}: {error if isinstance(error, IrtuneError) else repr(error)}"
    )


def stop_within(seconds: float, error: BaseException | None = None) -> None:
    """Leave the process group; where that hangs, since ranks are gone, say `error` and end this process."""

    def leave() -> None:
        if error is not None:
            sys.stderr.write(f"error on {environment.here()}: {error}\n")
            sys.stderr.flush()
        environment.leave()

    killer = threading.Timer(seconds, leave)
    killer.daemon = True
    killer.start()
    try:
        runtime.stop()
    finally:
        killer.cancel()
