"""The DeepSpeed engine, with optimizer state for the selected layers only. Only this file and zero.py import deepspeed.

Flipping requires_grad does not freeze anything under ZeRO: its flat master is stepped as a whole. So `reselect` keeps
the engine and rebuilds its ZeRO optimizer, with one parameter group per selected layer and one for the head. A group
per layer keeps a layer's shards as they are, so that its state moves to the new optimizer without communication, and
gives each layer its own Adam step count. What is private to DeepSpeed here is listed in `zero.PRIVATE`, and
`zero.check_version` fails loudly when it is gone.
"""

import contextlib
import gc
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from torch import nn

from irtune.adapters import LORA, AdapterTraits, LayerTable, write_adapter
from irtune.adapters.idle import IdleAdapters
from irtune.adapters.schedule import Change
from irtune.config import AdapterConfig, OptimConfig
from irtune.config.declarations import adapter_kinds
from irtune.distributed import runtime
from irtune.distributed.partitioned import join_deepspeed
from irtune.engine.contrastive import Contrast
from irtune.engine.deepspeed_private import can_update_on_device, check_version, initializing, rebuilding
from irtune.engine.layer_state import HEAD, EngineState, Key
from irtune.engine.losses import Loss, cross_entropy, disagreement
from irtune.engine.recompute import Recompute
from irtune.engine.shards import Layout
from irtune.engine.update import DeviceAdamW, update_on_device
from irtune.models import RunFacts
from irtune.models.pooling import pooling_of

log = logging.getLogger(__name__)
WEIGHTS = "weights"  # of a batch: how much each example counts in the loss, fp32 [batch]
MIX_SHARE, MIX_ORDER = "mix_share", "mix_order"  # of a batch: what optim.mixup mixes, see `losses.build_loss`
PROBE_SCALE = 2.0**10  # of fp16, whose largest number is 65,504 and whose smallest normal one is 6e-5
FOR_LOSS = ("labels", WEIGHTS, MIX_SHARE, MIX_ORDER)  # of a batch: what the model does not take


class Engine:
    """A model under DeepSpeed whose trained layers can be chosen again at every accumulation boundary."""

    def __init__(
        self,
        model: nn.Module,
        table: LayerTable,
        optim: OptimConfig,
        settings: dict[str, Any],
        *,
        traits: AdapterTraits = LORA,
        park: bool = True,
        loss: Loss = cross_entropy,
        contrast: Contrast | None = None,
        recompute: bool = False,
    ):
        """Wrap `model`; at first only the head is trained (call `reselect`).

        Args:
            model: the classifier with adapters; its forward pass returns an object with `logits` [batch, classes].
            table: its trainable parameters by layer.
            optim: learning rate and Adam's constants.
            settings: the completed DeepSpeed JSON.
            traits: of the adapters in it.
            park: keep the state of deselected layers in host memory (False: throw it away).
            loss: logits [batch, classes], labels [batch] and, where a batch has them, its examples' weights [batch] to
                the mean over the batch.
            contrast: a term that is added to the loss of each batch.
            recompute: compute the activations of trained layers again in the backward pass instead of storing them.
        """
        check_version()
        self.table, self.traits, self.optim, self.loss, self.contrast = table, traits, optim, loss, contrast
        self.idle = IdleAdapters(table.modules)
        self.stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        # The reentrant kind would go back through what layers share, once for each of them (ltuning-prefix).
        shared = self.stage == 3 and traits.below and any(table.layers) and not traits.pretrained
        if shared and recompute:
            log.warning("model.gradient_checkpointing is not used: under ZeRO 3 this adapter's layers share a network")
        self.recompute = Recompute(
            [] if shared else table.modules, reentrant=self.stage == 3, always=recompute, traits=traits
        )
        # Of lower-precision parameters ZeRO keeps fp32 masters, which alone remember what rounding takes away.
        keeps_master = table.head[0][1].dtype != torch.float32
        self._norm: torch.Tensor | None = None
        self._steps_adamw = self.stage == 0 and not keeps_master  # itself, without an optimizer of DeepSpeed's around
        self._max_norm = float(settings.get("gradient_clipping", 0.0))
        if self._steps_adamw:  # it would clip with host reads; `step` does without
            settings = settings | {"gradient_clipping": 0.0}
        self._set_trained([])
        join_deepspeed()
        gc.collect()
        gc.freeze()  # ZeRO 3 runs the collector at every rebuild: spare it the model's objects
        with initializing():
            self.ds, *_ = deepspeed.initialize(model=model, optimizer=self._new_adamw([]), config=settings)
        self._take_over_update()
        self.applied = torch.ones((), dtype=torch.bool, device=self.device)
        self.state = EngineState(self.ds, table, Layout(self.stage), keeps_master=keeps_master, park=park)
        self.state.put_in({})

    # ----- one step -----

    @property
    def module(self) -> nn.Module:
        """The model inside the engine."""
        return self.ds.module

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self.ds.device)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step on this rank."""
        return int(self.ds.gradient_accumulation_steps())

    @property
    def gradient_factor(self) -> float:
        """What hooks must multiply a gradient with to undo accumulation and loss scaling."""
        return self.accumulation_steps / self._loss_scale()

    @property
    def probe_scale(self) -> float:
        """What `probe` multiplies the loss with: in fp16 the steps' scale, but no more than a single pass bears."""
        return min(self._loss_scale(), PROBE_SCALE)

    def _loss_scale(self) -> float:
        return float(getattr(self.ds.optimizer, "loss_scale", 1.0)) if self.ds.fp16_enabled() else 1.0

    def forward_backward(self, batch: dict[str, torch.Tensor], weight: float = 1.0) -> torch.Tensor:
        """One micro-batch forward and backward; returns `weight` x its mean loss, detached, fp32 on the device.

        weight: examples of the micro-batch / those of the step's micro-batches on average, 1 where all have as many.
            Gradients, which are averaged over micro-batches, then are those of the mean over the step's examples.
        """
        loss = self._training_loss(batch) * weight
        # A loss that is not finite may still have finite gradients. NaN in all of them is seen by every rank and stage.
        self.ds.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
        return loss.detach().float()

    def _training_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss of a micro-batch; with R-Drop of two passes of it, side by side, and of how far they are apart."""
        if not self.optim.rdrop:
            return self._loss(self.ds, batch)
        inputs, labels, weights = split_batch({name: torch.cat([tensor] * 2) for name, tensor in batch.items()})
        logits = self.ds(**inputs).logits
        return self.loss(logits, labels, *weights) + self.optim.rdrop * disagreement(*logits.chunk(2))

    def mean_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss of a micro-batch outside of a step, with its graph; a scalar."""
        return self._loss(self.module, batch)

    def _loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs, labels, weights = split_batch(batch)
        mixed = {"mixed": (batch[MIX_SHARE], batch[MIX_ORDER])} if MIX_SHARE in batch else {}
        loss = self.loss(model(**inputs).logits, labels, *weights, **mixed)
        return loss if self.contrast is None else loss + self.contrast(batch)

    def probe(self, batch: dict[str, torch.Tensor], *, backward: bool) -> None:
        """Forward, and backward of `probe_scale` x the loss where asked, for the hooks of a score only."""
        if not backward:
            with torch.no_grad():
                self.module(**split_batch(batch)[0])
            return
        for _, parameter in self.table.head:
            parameter.requires_grad_(False)
        try:
            (self.mean_loss(batch) * self.probe_scale).backward()
        finally:
            for _, parameter in self.table.head:
                parameter.requires_grad_(True)
            if self.stage == 3:  # no step follows, after which DeepSpeed would let go of what it gathered
                self.ds.optimizer._partition_all_parameters()

    @contextlib.contextmanager
    def reaching_all_layers(self) -> Iterator[None]:
        """Inside, adapters of all layers have gradients where they require them, in no more memory than in training."""
        with self.recompute.scoring(), self.idle.awake():
            yield

    def step(self, lr: float) -> None:
        """End a micro-batch; at an accumulation boundary, clip and update the selected layers.

        Where a gradient is not finite on any rank, nothing is updated: no weight, no moment. `applied`, a 0-d bool on
        the device, tells; to read it is to wait for the device.
        """
        adamw = self.state.adamw
        for group in adamw.param_groups:
            group["lr"] = lr * self._rate(group["layer"])
        boundary = self.ds.is_gradient_accumulation_boundary()
        if boundary and self._steps_adamw:
            trained = [parameter for group in adamw.param_groups for parameter in group["params"]]
            self._norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            adamw.decide(self._norm, self._max_norm)
        self.ds.step()
        if boundary:
            left_out = adamw.found_inf
            if left_out is None:  # DeepSpeed's own update, which has read the norm on the host
                left_out = torch.tensor(bool(self.ds.optimizer.overflow), device=self.device)
            self.applied = left_out == 0

    def _rate(self, key: Key) -> float:
        """Learning rate of a layer or of the head, as a multiple of the step's."""
        if isinstance(key, int):  # layer-wise decay (Howard and Ruder, ACL 2018, section 3.2)
            return self.optim.layer_decay ** (self.table.num_layers - 1 - key)
        return self.optim.head_lr

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
        saved = self.state.take_out(keep)
        dropped = [number for number in self.selected if number not in keep]
        if self.stage == 3:
            old._partition_all_parameters()
        adamw = self._new_adamw(selected)
        with rebuilding(self.ds, [parameter for group in adamw.param_groups for parameter in group["params"]]):
            if hasattr(old, "destroy"):
                old.destroy()
            for _, parameter in self.table.all():
                parameter.grad = None
                parameter._hp_mapping = None  # type: ignore[attr-defined]
            self._set_trained(selected)
            self.ds._configure_optimizer(adamw, None)
        self._take_over_update()
        if hasattr(self.ds.optimizer, "register_grad_acc_post_hook"):
            self.ds.optimizer.register_grad_acc_post_hook(self.ds._backward_post_hook)
        for name in ("loss_scaler", "loss_scale_config"):  # fp16: the scale that was found is kept
            if hasattr(old, name):
                setattr(self.ds.optimizer, name, getattr(old, name))
        self.state.put_in(saved)
        self._release(old, dropped)

    def _set_trained(self, selected: list[int]) -> None:
        self.table.set_trainable(selected)
        self.idle.has_trained(selected)
        self.recompute.set_trained(selected)
        self.selected = list(selected)

    def _take_over_update(self) -> None:
        if can_update_on_device(self.ds.optimizer):
            update_on_device(self.ds.optimizer)

    def _new_adamw(self, selected: list[int]) -> DeviceAdamW:
        layers = [(number, self.table.layers[number]) for number in selected if self.table.layers[number]]
        groups = [
            {"params": [parameter for _, parameter in named], "layer": key}
            for key, named in [*layers, (HEAD, self.table.head)]
        ]
        first, second = self.optim.betas
        return DeviceAdamW(
            groups,
            lr=0.0,  # `step` sets it; a rebuild that steps by itself must not decay weights
            betas=(first, second),
            eps=self.optim.eps,
            weight_decay=self.optim.weight_decay,
            fused=True,
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

    def optimizer_state_bytes(self) -> int:
        """Bytes of Adam's moments and of fp32 masters that exist beside the parameters, on this rank."""
        return self.state.nbytes()

    def end_training(self) -> None:
        """Free parked state: no layer comes back any more."""
        self.state.parked.clear()

    def parked_bytes(self) -> int:
        """Bytes of parked state in this rank's host memory."""
        return self.state.parked.nbytes()

    def parked_peak(self) -> int:
        """The most bytes of parked state that this rank has had in its host memory."""
        return self.state.parked.peak

    @torch.no_grad()
    def edit(self, layer: int, change: Change) -> None:
        """Let `change` rewrite whole tensors and moments of `layer`, which trains; on all ranks alike. Collective."""
        self.state.edit(layer, change)

    # ----- whole tensors, for checkpoints -----

    def full_state(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Whole tensors `PARAMETER/exp_avg` (and so on) on the CPU, and Adam's step count per layer. Collective."""
        return self.state.whole()

    def load_full_state(self, tensors: dict[str, torch.Tensor], steps: dict[str, float]) -> None:
        """Take over a state written by `full_state`, under this run's ranks and stage. Call after `reselect`."""
        self.state.load_whole(tensors, steps)

    def _whole(self, parameters: list[nn.Parameter], *, write: bool = False) -> contextlib.AbstractContextManager:
        """A context in which parameters that ZeRO 3 keeps in pieces are whole; rank 0's values stay if `write`."""
        if self.stage != 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    @torch.no_grad()
    def trainable(self, layers: Iterable[int] | None = None) -> dict[str, torch.Tensor]:
        """Whole parameters of `layers` (None: of all) and the head, and decisions, by name, on the CPU. Collective."""
        tensors: dict[str, torch.Tensor] = {}
        for named in self.table.groups(layers):  # one by one: the layers' own weights need not fit all at once
            with self._whole([parameter for _, parameter in named]):
                tensors |= {name: parameter.detach().cpu().clone() for name, parameter in named}
        return tensors | {name: tensor.detach().cpu().clone() for name, tensor in self.table.decided()}

    @torch.no_grad()
    def load_trainable(self, tensors: dict[str, torch.Tensor]) -> None:
        """Overwrite what `tensors` holds of layers and head, for evaluation after training. Collective.

        Optimizer masters are not updated.
        """
        self.idle.has_trained(self.idle.changed_by(tensors, self.table.layers))
        for named in self.table.groups():
            present = [(name, parameter) for name, parameter in named if name in tensors]
            with self._whole([parameter for _, parameter in present], write=True):
                for name, parameter in present:
                    parameter.data.copy_(tensors[name])
        for name, tensor in self.table.decided():
            tensor.copy_(tensors[name])

    def save_adapter(
        self, folder: Path, adapter: AdapterConfig, labels: list[str], layers: list[int] | None, run: RunFacts
    ) -> None:
        """Write adapters and head to `folder`. Collective; rank 0 writes.

        In peft's format where peft has the type and the head is the model's own.

        Args:
            folder: where to.
            adapter: recorded in irtune's own format.
            labels: names of the classes, recorded in irtune's own format.
            layers: layers to write in irtune's own format; None: all.
            run: recorded in irtune's own format.
        """
        pooling = pooling_of(self.module)
        if pooling is not None or not adapter_kinds()[adapter.type].peft_format:
            tensors = self.trainable(layers)
            if runtime.rank() == 0:
                write_adapter(folder, tensors, adapter, labels, pooling, run)
            return
        assert isinstance(self.module, PeftModel), f"{adapter.type} is not a model of peft, as it declares"
        with self._whole([parameter for _, parameter in self.table.all()]):
            if runtime.rank() == 0:
                # False: no embedding is trained, and peft would ask the hub whether one was.
                self.module.save_pretrained(str(folder), save_embedding_layers=False)

    @torch.no_grad()
    def shift_logits(self, added: torch.Tensor) -> None:
        """Add a constant [classes] to all logits, in the bias of the head. Collective."""
        bias = self.table.head_bias(len(added))
        assert bias is not None, "a head without a bias is refused before the run"
        with self._whole([bias], write=True):
            bias.data.add_(added.to(bias))

    def close(self) -> None:
        """Release the engine's hooks and buffers."""
        self.state.parked.clear()
        self.ds.destroy()
        gc.unfreeze()


def split_batch(
    batch: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """What the model gets, the labels, and a list with the weights of the examples, if the batch has them."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in FOR_LOSS}
    return inputs, batch["labels"], [batch[WEIGHTS]] if WEIGHTS in batch else []
