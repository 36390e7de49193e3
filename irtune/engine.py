"""The DeepSpeed engine, with optimizer state for the selected layers only. The ONLY file that imports deepspeed.

Flipping requires_grad does not freeze anything under ZeRO: its flat master is stepped as a whole. So `reselect` keeps
the engine and rebuilds its ZeRO optimizer, with one parameter group per selected layer and one for the head. A group
per layer keeps a layer's shards as they are, so that its state moves to the new optimizer without communication, and
gives each layer its own Adam step count. `_configure_optimizer` and `_backward_post_hook` are private to DeepSpeed:
`check_version` fails loudly when they are gone.
"""

import contextlib
import difflib
import gc
import logging
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from peft import PeftModel
from torch import nn

from irtune import runtime
from irtune.adapters import LayerTable, suppressed, write_adapter
from irtune.config import AdapterConfig, OptimConfig
from irtune.config.validate import OWN_WEIGHTS
from irtune.errors import DistributedError
from irtune.losses import Loss, cross_entropy
from irtune.optimizer_state import MOMENTS, Layout, StepState

HEAD = "head"
PRIVATE = ("_configure_optimizer", "_backward_post_hook")
Key = int | str
log = logging.getLogger(__name__)


def unknown_zero_keys(settings: dict[str, Any]) -> list[str]:
    """One sentence for each key of the zero_optimization section that this DeepSpeed does not know."""
    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if isinstance(field.alias, str))}
    problems = []
    for key in settings.get("zero_optimization", {}):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"deepspeed: unknown key zero_optimization.{key}{hint}")
    return problems


def check_version() -> None:
    """Raise when this DeepSpeed lacks what re-selection is built on."""
    missing = [name for name in PRIVATE if not hasattr(deepspeed.DeepSpeedEngine, name)]
    if missing:
        raise RuntimeError(f"deepspeed {deepspeed.__version__} has no {', '.join(missing)}; irtune is built on 0.19.8")


class Engine:
    """A model under DeepSpeed whose trained layers can be chosen anew at every accumulation boundary."""

    def __init__(
        self,
        model: nn.Module,
        table: LayerTable,
        optim: OptimConfig,
        settings: dict[str, Any],
        *,
        park: bool = True,
        loss: Loss = cross_entropy,
    ):
        """Wrap `model`; at first only the head is trained (call `reselect`).

        Args:
            model: the classifier with adapters; its forward pass returns an object with `logits` [batch, classes].
            table: its trainable parameters by layer.
            optim: learning rate and Adam's constants.
            settings: the completed DeepSpeed JSON.
            park: keep the state of deselected layers in host memory (False: throw it away).
            loss: logits [batch, classes] and labels [batch] to the mean over the batch.
        """
        check_version()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On CPUs init compiles a shared-memory all-reduce behind a lock that a killed build never releases.
        __compatible_ops__["deepspeed_shm_comm"] = False
        self.table, self.optim, self.park, self.loss = table, optim, park, loss
        self.selected: list[int] = []
        self._norm: torch.Tensor | None = None
        self.parked: dict[Key, list[StepState]] = {}
        self.stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        self.layout = Layout(self.stage)
        self.offloaded = "offload_optimizer" in settings.get("zero_optimization", {})
        # Of lower-precision parameters ZeRO keeps fp32 masters, which alone remember what rounding takes away.
        self.keeps_master = table.head[0][1].dtype != torch.float32
        table.set_trainable([])
        deepspeed.init_distributed(verbose=False)
        gc.collect()
        gc.freeze()  # ZeRO 3 runs the collector at every rebuild: spare it the model's objects
        self.ds, *_ = deepspeed.initialize(model=model, optimizer=self._new_adamw([]), config=settings)
        self._import_state({})

    # ----- one step -----

    @property
    def module(self) -> nn.Module:
        """The model inside the engine."""
        return self.ds.module

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step on this rank."""
        return int(self.ds.gradient_accumulation_steps())

    @property
    def gradient_factor(self) -> float:
        """What hooks must multiply a gradient with to undo accumulation and loss scaling."""
        return self.accumulation_steps / self._loss_scale()

    def _loss_scale(self) -> float:
        return float(getattr(self.ds.optimizer, "loss_scale", 1.0)) if self.ds.fp16_enabled() else 1.0

    def forward_backward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One micro-batch forward and backward; returns its mean loss, detached, fp32 on the device."""
        loss = self._loss(self.ds, batch)
        self.ds.backward(loss)
        return loss.detach().float()

    def _loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.loss(model(**inputs).logits, batch["labels"])

    def probe(self, batch: dict[str, torch.Tensor], *, backward: bool) -> None:
        """Forward, and backward where asked, for the hooks of a score only: no gradient reaches the optimizer."""
        if not backward:
            with torch.no_grad():
                self.module(**batch)
            return
        for _, parameter in self.table.head:
            parameter.requires_grad_(False)
        try:
            self._loss(self.module, batch).backward()
        finally:
            for _, parameter in self.table.head:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def trial(self, batch: dict[str, torch.Tensor], layers: list[int]) -> torch.Tensor:
        """Mean loss of `batch` on this rank with the adapters of `layers` suppressed; nothing is kept. Collective."""
        with suppressed(self.table, layers, gathered=lambda parameters: self._whole(parameters, write=True)):
            return self._loss(self.module, batch).detach().float()

    def step(self, lr: float) -> None:
        """End a micro-batch; at an accumulation boundary, clip and update the selected layers."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if self.ds.is_gradient_accumulation_boundary() and self.stage == 0 and not self.keeps_master:
            # Here the engine clips without keeping the norm.
            gradients = [p.grad for group in self._adamw.param_groups for p in group["params"] if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
        self.ds.step()

    def grad_norm(self) -> float:
        """Global norm of the averaged gradient before clipping, at the last update."""
        return float(self._norm if self._norm is not None else self.ds.get_global_grad_norm() or 0.0)

    # ----- selection -----

    @torch.no_grad()
    def reselect(self, selected: list[int]) -> None:
        """Train exactly the layers `selected` from now on. Only at an accumulation boundary; the same on all ranks."""
        if selected == self.selected:
            return
        old = self.ds.optimizer
        keep: set[Key] = {HEAD, *selected}
        saved = self._export_state(keep)
        dropped = [number for number in self.selected if number not in keep]
        if self.stage == 3:
            old._partition_all_parameters()
        if hasattr(old, "destroy"):
            old.destroy()
        for _, parameter in self.table.all():
            parameter.grad = None
            parameter._hp_mapping = None  # type: ignore[attr-defined]
        self.table.set_trainable(selected)
        self.selected = list(selected)
        with _no_collection():
            self.ds._configure_optimizer(self._new_adamw(selected), None)
        if hasattr(self.ds.optimizer, "register_grad_acc_post_hook"):
            self.ds.optimizer.register_grad_acc_post_hook(self.ds._backward_post_hook)
        for name in ("loss_scaler", "loss_scale_config"):  # fp16: the scale that was found goes on
            if hasattr(old, name):
                setattr(self.ds.optimizer, name, getattr(old, name))
        self._import_state(saved)
        self._release(old, dropped)

    def _new_adamw(self, selected: list[int]) -> torch.optim.AdamW:
        layers = [(number, self.table.layers[number]) for number in selected if self.table.layers[number]]
        groups = [
            {"params": [parameter for _, parameter in named], "layer": key}
            for key, named in [*layers, (HEAD, self.table.head)]
        ]
        on_gpu = self.table.head[0][1].is_cuda and not self.offloaded
        first, second = self.optim.betas
        return torch.optim.AdamW(
            groups,
            lr=0.0,  # `step` sets it; a rebuild that steps by itself must not decay weights
            betas=(first, second),
            eps=self.optim.eps,
            weight_decay=self.optim.weight_decay,
            fused=on_gpu or None,
        )

    def _release(self, old: Any, dropped: list[int]) -> None:
        """Let go of the old optimizer's buffers: frozen parameters must not keep its flat memory alive."""
        for number in dropped:
            for _, parameter in self.table.layers[number]:
                if self.stage == 3:
                    shard = parameter.ds_tensor  # type: ignore[attr-defined]
                    shard.data = shard.data.clone()
                else:
                    parameter.data = parameter.data.clone()
        inner = getattr(old, "optimizer", old)
        inner.state.clear()
        if old is not inner:
            old.__dict__.clear()  # ZeRO's optimizer is part of reference cycles that a later collection would break

    # ----- optimizer state -----

    @property
    def _adamw(self) -> torch.optim.AdamW:
        return getattr(self.ds.optimizer, "optimizer", self.ds.optimizer)

    def _groups(self) -> Iterator[tuple[Key, list[torch.Tensor]]]:
        """Layer (or head) and the fp32 tensors that Adam steps for it on this rank."""
        for index, group in enumerate(self._adamw.param_groups):
            if self.stage == 3:
                wrapper = self.ds.optimizer
                owner = wrapper.sub_group_to_group_id
                flats = enumerate(wrapper.fp32_partitioned_groups_flat)
                yield group["layer"], [flat for number, flat in flats if owner[number] == index]
            else:
                yield group["layer"], list(group["params"])

    def _set_state(self, tensor: torch.Tensor, state: StepState) -> None:
        fused = self._adamw.defaults["fused"]
        step = torch.tensor(state.step, dtype=torch.float32, device=tensor.device if fused else "cpu")
        moments = {name: state.tensors[name].to(tensor.device) for name in MOMENTS}
        self._adamw.state[tensor] = {"step": step} | moments
        if "master" in state.tensors:
            tensor.data.copy_(state.tensors["master"])

    def _get_state(self, tensor: torch.Tensor) -> StepState:
        held = self._adamw.state[tensor]
        tensors = {name: held[name] for name in MOMENTS}
        if self.keeps_master:
            tensors["master"] = tensor.detach()
        return StepState(tensors, float(held["step"]))

    def _export_state(self, keep: set[Key]) -> dict[Key, list[StepState]]:
        """State of the groups in `keep`, which stay where they are; others are parked in host memory or dropped."""
        saved: dict[Key, list[StepState]] = {}
        for key, tensors in self._groups():
            states = [self._get_state(tensor) for tensor in tensors]
            if key in keep:
                saved[key] = states
            elif self.park:
                pin = bool(tensors) and tensors[0].is_cuda
                self.parked[key] = [state.to("cpu", pin=pin) for state in states]
        return saved

    def _import_state(self, saved: dict[Key, list[StepState]]) -> None:
        for key, tensors in self._groups():
            states = saved.get(key) or self.parked.pop(key, None) or []
            if states and len(states) != len(tensors):  # ZeRO 3 cut a loaded or very large layer differently
                states = _recut(states, [tensor.numel() for tensor in tensors])
            # Zero moments at once, not at the first step: memory is known, and its lack noticed, right away. And
            # FP16_UnfusedOptimizer (stage 0 with masters) has already made one empty step, which must not count.
            states = states or [StepState({name: torch.zeros_like(tensor) for name in MOMENTS}) for tensor in tensors]
            for tensor, state in zip(tensors, states):
                self._set_state(tensor, state)

    def optimizer_state_bytes(self) -> int:
        """Bytes of Adam's moments and of fp32 masters that exist beside the parameters, on this rank."""
        total = 0
        for _, tensors in self._groups():
            for tensor in tensors:
                held = self._adamw.state[tensor]
                total += sum(held[name].numel() * held[name].element_size() for name in MOMENTS)
                if self.keeps_master or self.stage in (1, 2):
                    total += tensor.numel() * tensor.element_size()
        return total

    def parked_bytes(self) -> int:
        """Bytes of parked state in this rank's host memory."""
        return sum(state.nbytes() for states in self.parked.values() for state in states)

    # ----- whole tensors, for checkpoints -----

    def _named(self, key: Key) -> list[tuple[str, nn.Parameter]]:
        return self.table.head if isinstance(key, str) else self.table.layers[key]

    @torch.no_grad()
    def full_state(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Whole tensors `PARAMETER/exp_avg` (and so on) on the CPU, and Adam's step count per layer. Collective."""
        held = {key: [self._get_state(tensor) for tensor in tensors] for key, tensors in self._groups()} | self.parked
        tensors: dict[str, torch.Tensor] = {}
        steps: dict[str, float] = {}
        for key in sorted(held, key=str):
            named, states = self._named(key), held[key]
            if not states[0].step:
                continue  # chosen, but not yet trained: nothing to remember
            steps[str(key)] = states[0].step
            for kind in sorted(states[0].tensors):
                parts = [state.tensors[kind].to(self.ds.device) for state in states]
                whole = self.layout.join(parts, [parameter for _, parameter in named])
                tensors |= {f"{name}/{kind}": tensor.cpu().clone() for (name, _), tensor in zip(named, whole)}
        return tensors, steps

    @torch.no_grad()
    def load_full_state(self, tensors: dict[str, torch.Tensor], steps: dict[str, float]) -> None:
        """Take over a state written by `full_state`, under this run's ranks and stage. Call after `reselect`."""
        for text, step in steps.items():
            key: Key = text if text == HEAD else int(text)
            names = [name for name, _ in self._named(key)]
            parameters = [parameter for _, parameter in self._named(key)]
            kinds = [kind for kind in (*MOMENTS, "master") if f"{names[0]}/{kind}" in tensors]
            split = {k: self.layout.split([tensors[f"{name}/{k}"] for name in names], parameters) for k in kinds}
            if not self.keeps_master:
                split.pop("master", None)
            states = [StepState(dict(zip(split, piece)), step) for piece in zip(*split.values())]
            if self.stage == 3:  # a rank's shares of the layer's parameters lie end to end
                states = _recut(states, [sum(self.layout.pieces(parameters))])
            self.parked[key] = states
        self._import_state({})

    def _whole(self, parameters: list[nn.Parameter], *, write: bool = False) -> contextlib.AbstractContextManager:
        """A context in which parameters that ZeRO 3 keeps in pieces are whole; rank 0's values stay if `write`."""
        if self.stage != 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    @torch.no_grad()
    def trainable(self, layers: Iterable[int] | None = None) -> dict[str, torch.Tensor]:
        """Whole parameters of `layers` (None: of all) and the head by name, copied to the CPU. Collective."""
        tensors: dict[str, torch.Tensor] = {}
        for named in self.table.groups(layers):  # one by one: the layers' own weights need not fit all at once
            with self._whole([parameter for _, parameter in named]):
                tensors |= {name: parameter.detach().cpu().clone() for name, parameter in named}
        return tensors

    @torch.no_grad()
    def load_trainable(self, tensors: dict[str, torch.Tensor]) -> None:
        """Overwrite what `tensors` holds of layers and head, for evaluation after training. Collective.

        Optimizer masters are not updated.
        """
        for named in self.table.groups():
            present = [(name, parameter) for name, parameter in named if name in tensors]
            with self._whole([parameter for _, parameter in present], write=True):
                for name, parameter in present:
                    parameter.data.copy_(tensors[name])

    def save_adapter(self, folder: Path, adapter: AdapterConfig, labels: list[str], layers: list[int] | None) -> None:
        """Write adapters and head to `folder`, in peft's format where peft has the type. Collective; rank 0 writes.

        Args:
            folder: where to.
            adapter: recorded in irtune's own format.
            labels: names of the classes, recorded in irtune's own format.
            layers: layers to write in irtune's own format; None: all.
        """
        if not isinstance(self.module, PeftModel) or adapter.type in OWN_WEIGHTS:
            tensors = self.trainable(layers)
            if runtime.rank() == 0:
                write_adapter(folder, tensors, adapter, labels)
            return
        with self._whole([parameter for _, parameter in self.table.all()]):
            if runtime.rank() == 0:
                # False: no embedding is trained, and peft would ask the hub whether one was.
                self.module.save_pretrained(str(folder), save_embedding_layers=False)

    def close(self) -> None:
        """Release the engine's hooks and buffers."""
        self.parked.clear()
        self.ds.destroy()
        gc.unfreeze()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep ZeRO 3 from running the garbage collector while it lays out its buffer.

    It would scan every object of the process at every selection, for about half of a rebuild's time. Nothing waits
    to be collected here: `_release` frees the old optimizer by cutting its references.
    """
    original = zero_utils.gc
    zero_utils.gc = types.SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        zero_utils.gc = original


def _recut(states: list[StepState], sizes: list[int]) -> list[StepState]:
    """Pieces of parameters laid end to end and cut into flat tensors of `sizes` elements."""
    cut = {
        name: torch.cat([state.tensors[name].flatten() for state in states]).split(sizes) for name in states[0].tensors
    }
    return [StepState(dict(zip(cut, piece)), states[0].step) for piece in zip(*cut.values())]


def verify_selection(selected: list[int], num_layers: int, device: torch.device) -> None:
    """Compare a selection across ranks.

    Raises:
        DistributedError: naming the ranks and the layers, when they differ.
    """
    mask = torch.zeros(num_layers, dtype=torch.uint8, device=device)
    mask[selected] = 1
    all_masks = [other.nonzero().flatten().tolist() for other in runtime.all_gather(mask)]
    if any(other != all_masks[0] for other in all_masks):
        chosen = "; ".join(f"rank {rank}: {layers}" for rank, layers in enumerate(all_masks))
        raise DistributedError(f"ranks chose different layers: {chosen}")
