"""Adam's state inside a DeepSpeed engine, by layer: what a change of layers keeps, parks and brings back.

The engine's optimizer is another one after every change of layers; the code here looks it up each time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from irtune.adapters import LayerTable
from irtune.adapters.schedule import Change
from irtune.distributed.partitioned import write_whole
from irtune.engine.parking import Parking
from irtune.engine.shards import MOMENTS, Layout, StepState, recut
from irtune.engine.update import DeviceAdamW

HEAD = "head"
Key = int | str  # a layer's number, or HEAD


class EngineState:
    """Moments, step counts and fp32 masters of the layers that train, and the parked ones of those that did."""

    def __init__(self, ds: Any, table: LayerTable, layout: Layout, *, keeps_master: bool, park: bool):
        """Look after the state inside `ds`.

        Args:
            ds: DeepSpeed's engine, whose AdamW has one parameter group per layer, marked by the group's key "layer".
            table: the trainable parameters by layer.
            layout: how the ZeRO stage spreads them over ranks.
            keeps_master: fp32 masters remember what lower-precision parameters round away.
            park: keep the state of deselected layers in host memory (False: throw it away).
        """
        self.ds, self.table, self.layout = ds, table, layout
        self.keeps_master, self.park = keeps_master, park
        self.parked: Parking[Key] = Parking(torch.device(ds.device))

    @property
    def adamw(self) -> DeviceAdamW:
        """The optimizer inside ZeRO's, or the engine's own under ZeRO 0."""
        return getattr(self.ds.optimizer, "optimizer", self.ds.optimizer)

    def groups(self) -> Iterator[tuple[Key, list[torch.Tensor]]]:
        """Layer (or head) and the fp32 tensors that Adam steps for it on this rank."""
        for index, group in enumerate(self.adamw.param_groups):
            if self.layout.stage == 3:
                wrapper = self.ds.optimizer
                owner = wrapper.sub_group_to_group_id
                flats = enumerate(wrapper.fp32_partitioned_groups_flat)
                yield group["layer"], [flat for number, flat in flats if owner[number] == index]
            else:
                yield group["layer"], list(group["params"])

    def _set(self, tensor: torch.Tensor, state: StepState) -> None:
        step = torch.tensor(state.step, dtype=torch.float32, device=tensor.device)
        moments = {name: state.tensors[name].to(tensor.device) for name in MOMENTS}
        self.adamw.state[tensor] = {"step": step} | moments
        if "master" in state.tensors:
            tensor.data.copy_(state.tensors["master"])

    def _get(self, tensor: torch.Tensor) -> StepState:
        held = self.adamw.state[tensor]
        tensors = {name: held[name] for name in MOMENTS}
        if self.keeps_master:
            tensors["master"] = tensor.detach()
        return StepState(tensors, float(held["step"]))

    def take_out(self, keep: set[Key]) -> dict[Key, list[StepState]]:
        """State of the layers in `keep`, whose tensors stay where they are; that of others is parked or dropped."""
        saved: dict[Key, list[StepState]] = {}
        for key, tensors in self.groups():
            states = [self._get(tensor) for tensor in tensors]
            if key in keep:
                saved[key] = states
            elif self.park:
                self.parked.put(key, states)
        return saved

    def put_in(self, saved: dict[Key, list[StepState]]) -> None:
        """Give every group of the optimizer its state: from `saved`, from the parked ones, or zero."""
        for key, tensors in self.groups():
            states = saved.get(key) or self.parked.take(key)
            if states and len(states) != len(tensors):  # ZeRO 3 cut a loaded or very large layer differently
                states = recut(states, [tensor.numel() for tensor in tensors])
            # Zero moments at once, not at the first step: memory is known, and its lack noticed, right away. And
            # FP16_UnfusedOptimizer (stage 0 with masters) has already made one empty step, which must not count.
            states = states or [StepState({name: torch.zeros_like(tensor) for name in MOMENTS}) for tensor in tensors]
            for tensor, state in zip(tensors, states):
                self._set(tensor, state)

    def nbytes(self) -> int:
        """Bytes of Adam's moments and of fp32 masters that exist beside the parameters, on this rank."""
        total = 0
        for _, tensors in self.groups():
            for tensor in tensors:
                held = self.adamw.state[tensor]
                total += sum(held[name].numel() * held[name].element_size() for name in MOMENTS)
                if self.keeps_master or self.layout.stage in (1, 2):
                    total += tensor.numel() * tensor.element_size()
        return total

    def edit(self, key: Key, change: Change) -> None:
        """Let `change` rewrite the fp32 tensors of a group, whole ones; parameters follow. Collective."""
        held, named = dict(self.groups())[key], self._named(key)
        parameters = [parameter for _, parameter in named]
        states = [self.adamw.state[tensor] for tensor in held]
        places = {"": [tensor.data for tensor in held]}
        places |= {f"/{moment}": [state[moment] for state in states] for moment in MOMENTS}
        whole = {
            f"{name}{kind}": tensor.clone()
            for kind, parts in places.items()
            for (name, _), tensor in zip(named, self.layout.join(parts, parameters))
        }
        step = change(whole, float(states[0]["step"]))
        for kind, parts in places.items():
            pieces = self.layout.split([whole[f"{name}{kind}"] for name, _ in named], parameters)
            flat = torch.cat([piece.flatten() for piece in pieces])
            for part, piece in zip(parts, flat.split([part.numel() for part in parts])):
                part.copy_(piece.view_as(part))
        for state in states:
            state["step"].fill_(step)
        for name, parameter in named:
            write_whole(parameter, whole[name])

    # ----- whole tensors, for checkpoints -----

    def _named(self, key: Key) -> list[tuple[str, nn.Parameter]]:
        return self.table.head if isinstance(key, str) else self.table.layers[key]

    @torch.no_grad()
    def whole(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Whole tensors `PARAMETER/exp_avg` (and so on) on the CPU, and Adam's step count per layer. Collective."""
        held = {key: [self._get(tensor) for tensor in tensors] for key, tensors in self.groups()}
        tensors: dict[str, torch.Tensor] = {}
        steps: dict[str, float] = {}
        for key in sorted({*held, *self.parked.keys()}, key=str):
            named, states = self._named(key), held[key] if key in held else self.parked.on_host(key)
            if not states[0].step:
                continue  # chosen, but not yet trained: nothing to remember
            steps[str(key)] = states[0].step
            for kind in sorted(states[0].tensors):
                parts = [state.tensors[kind].to(self.ds.device) for state in states]
                whole = self.layout.join(parts, [parameter for _, parameter in named])
                tensors |= {f"{name}/{kind}": tensor.cpu().clone() for (name, _), tensor in zip(named, whole)}
        return tensors, steps

    @torch.no_grad()
    def load_whole(self, tensors: dict[str, torch.Tensor], steps: dict[str, float]) -> None:
        """Take over what `whole` returned, under this run's ranks and stage."""
        for text, step in steps.items():
            key: Key = text if text == HEAD else int(text)
            names = [name for name, _ in self._named(key)]
            parameters = [parameter for _, parameter in self._named(key)]
            kinds = [kind for kind in (*MOMENTS, "master") if f"{names[0]}/{kind}" in tensors]
            split = {k: self.layout.split([tensors[f"{name}/{k}"] for name in names], parameters) for k in kinds}
            if not self.keeps_master:
                split.pop("master", None)
            states = [StepState(dict(zip(split, piece)), step) for piece in zip(*split.values())]
            if self.layout.stage == 3:  # a rank's shares of the layer's parameters lie end to end
                states = recut(states, [sum(self.layout.pieces(parameters))])
            self.parked.put(key, states)
        self.put_in({})
