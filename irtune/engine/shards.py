"""Adam's state of one layer: as a rank holds it (shards), and as a checkpoint holds it (whole tensors by name).

Three layouts of the fp32 tensors that the optimizer steps, by ZeRO stage:
    replicated (0): one tensor per parameter, whole, on every rank;
    flat (1, 2): one tensor per layer, a rank's share of all parameters laid end to end;
    sharded (3): flat tensors of a rank's share of each parameter, laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from irtune.distributed import runtime

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class StepState:
    """State of one fp32 tensor: Adam's moments (fp32, its shape), its step count, and its own value if it must be kept.

    master is None where the fp32 tensor equals the model's parameter bit for bit.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    step: float = 0.0

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Layout:
    """How a layer's parameters are spread over ranks under a ZeRO stage."""

    stage: int

    def pieces(self, parameters: Sequence[nn.Parameter]) -> list[int]:
        """Elements of each piece that one rank holds of `parameters`, in order, padding included."""
        world = runtime.launched_world_size()
        if self.stage == 0:
            return [parameter.numel() for parameter in parameters]
        if self.stage == 3:
            return [int(parameter.ds_tensor.ds_numel) for parameter in parameters]  # type: ignore[attr-defined]
        aligned = 2 * world  # DeepSpeed aligns a group to 2 elements per rank
        total = sum(parameter.numel() for parameter in parameters)
        return [-(-total // aligned) * aligned // world]

    def join(self, parts: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Whole tensors of `parameters` from the shards of all ranks. Collective for stages 1 to 3."""
        shapes = [torch.Size(getattr(parameter, "ds_shape", parameter.shape)) for parameter in parameters]
        if self.stage == 0:
            return [part.reshape(shape) for part, shape in zip(parts, shapes)]
        mine = torch.cat([part.flatten() for part in parts])
        pieces = self.pieces(parameters)
        assert mine.numel() == sum(pieces), f"shard of {mine.numel()} elements, expected {pieces}"
        columns = [list(shard.split(pieces)) for shard in runtime.all_gather(mine)]
        whole = [torch.cat(column) for column in zip(*columns)]
        if self.stage != 3:
            whole = list(whole[0][: sum(shape.numel() for shape in shapes)].split([s.numel() for s in shapes]))
        return [tensor[: shape.numel()].reshape(shape) for tensor, shape in zip(whole, shapes)]

    def split(self, whole: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """This rank's pieces of the whole tensors: the inverse of `join`, without communication."""
        if self.stage == 0:
            return list(whole)
        rank, world = runtime.rank(), runtime.launched_world_size()
        flats = [t.flatten() for t in whole] if self.stage == 3 else [torch.cat([t.flatten() for t in whole])]
        return [
            nn.functional.pad(flat, (0, piece * world - flat.numel()))[rank * piece : (rank + 1) * piece]
            for flat, piece in zip(flats, self.pieces(parameters))
        ]


def recut(states: list[StepState], sizes: list[int]) -> list[StepState]:
    """Pieces of parameters laid end to end and cut into flat tensors of `sizes` elements."""
    cut = {
        name: torch.cat([state.tensors[name].flatten() for state in states]).split(sizes) for name in states[0].tensors
    }
    return [StepState(dict(zip(cut, piece)), states[0].step) for piece in zip(*cut.values())]
