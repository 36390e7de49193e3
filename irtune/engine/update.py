"""Clipping and Adam's update, and leaving them out, without a host that waits for the device.

DeepSpeed reads the norm on the host before the update and again for each parameter group, of which irtune has one
per layer. Here the norm stays a tensor: torch's fused AdamW takes how far to scale gradients down, and whether to
leave the step out, from the device, as it does for torch.amp.GradScaler.
"""

import functools
from typing import Any

import torch


class DeviceAdamW(torch.optim.AdamW):
    """torch's fused AdamW; what `decide` decides is in force until it is called again."""

    # torch's names; its fused kernels read both. grad_scale divides gradients; 1 in found_inf leaves the step out.
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    def decide(self, norm: torch.Tensor, max_norm: float) -> None:
        """Clip to `max_norm` (0: do not), and leave the step out unless the norm is finite.

        Args:
            norm: L2 norm of all gradients, fp32 scalar on the parameters' device.
            max_norm: as torch.nn.utils.clip_grad_norm_ takes it.
        """
        self.found_inf = (~norm.isfinite()).float()
        self.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else None


def update_on_device(optimizer: Any) -> None:
    """Give an optimizer of ZeRO 1 or 2, one that zero.can_update_on_device accepts, an update without host reads."""
    optimizer.step = functools.partial(_update, optimizer)


@torch.no_grad()
def _update(zero: Any, closure: Any = None) -> None:
    """DeepSpeedZeroOptimizer.step: this rank's shares of the averaged gradients, clipped, update its shares of weights.

    One all-reduce finds the norm, and what is gathered is gathered at once.
    """
    masters, gradients = zero.single_partition_of_fp32_groups, []
    for number, master in enumerate(masters):
        flat = zero._get_preflattened_grad_partition(number)
        master.grad = (zero.flatten(zero.averaged_gradients[number]) if flat is None else flat).to(master.dtype)
        gradients.append(master.grad)
        zero._release_preflattened_grad_buffers(number)
        zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        zero.free_grad_in_param_list(zero.params_in_partition[number])
        zero.free_grad_in_param_list(zero.params_not_in_partition[number])
    zero._global_grad_norm = _norm(zero, gradients)
    del gradients
    zero.optimizer.decide(zero._global_grad_norm, zero.clip_grad)
    zero.optimizer.step()
    rank = torch.distributed.get_rank(zero.dp_process_group)
    shares = [parts[rank] for parts in zero.parallel_partitioned_bit16_groups]
    for share, master in zip(shares, masters):
        share.copy_(master)
        master.grad = None
    _gather(zero.bit16_groups_flat, shares, zero.dp_process_group)
    zero.overflow = False  # to the engine's knowledge; `found_inf` knows better
    zero.micro_step_id = -1  # as before the first micro-batch


def _gather(wholes: list[torch.Tensor], shares: list[torch.Tensor], group: Any) -> None:
    """Fill flat tensors of all ranks' shares with this rank's and the others', in one message."""
    if torch.distributed.get_world_size(group) == 1:
        return
    all_gather = getattr(torch.distributed, "all_gather_single", None)  # its name since torch 2.13
    all_gather = all_gather or torch.distributed.all_gather_into_tensor
    with torch.distributed._coalescing_manager(group=group, async_ops=True) as message:
        for whole, share in zip(wholes, shares):
            all_gather(whole, share, group=group)
    message.wait()


def _norm(zero: Any, gradients: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm of the gradients of all ranks' shares, fp32 scalar; padding is zero."""
    total = torch.stack(torch._foreach_norm(gradients)).float().square().sum()
    torch.distributed.all_reduce(total, group=zero.dp_process_group)
    return total.sqrt()
