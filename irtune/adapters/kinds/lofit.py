"""LoFiT (Yin et al., NeurIPS 2024): attention heads are located, then offsets of their outputs are trained.

The official definition (F): head i's output before the output projection becomes (1 + A_i) (.) z_i + v_i. First A
trains in all heads, from N(0, 0.001), with 5e-4 sum |A| added to the loss; the heads with the largest norm of A are
kept, of equal ones the lower layer and head; then A is zero, and v trains in those heads only, from N(0, 0.001). The
source gives each half 5 epochs and a learning rate of its own (5e-3, 2e-2); here both follow optim.lr.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from irtune.adapters.schedule import AddGradient, Deciding, Editor, Schedule
from irtune.adapters.table import LayerTable
from irtune.adapters.trainable import freeze, layer_list, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig, Config
from irtune.distributed.partitioned import whole_shape
from irtune.distributed.runtime import derived_seed
from irtune.errors import ConfigError, ModelError, RunError
from irtune.models import Classifier
from irtune.models.anatomy import attention_linears

DEVIATION = 1e-3  # of the first values of A and v
PENALTY = 5e-4  # what the sum of |A| counts in the loss


class HeadOffsets(Deciding):
    """[..., heads * size] -> the same: (1 + gain) z until heads are located, z + offset in the chosen ones then."""

    decisions = ("chosen", "located")
    chosen: torch.Tensor
    located: torch.Tensor

    def __init__(self, heads: int, size: int):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(heads, size) * DEVIATION)
        self.offset = nn.Parameter(torch.zeros(heads, size))
        self.register_buffer("chosen", torch.zeros(heads, dtype=torch.bool))
        self.register_buffer("located", torch.zeros((), dtype=torch.bool))
        self.penalty = 0.0  # in a training pass of the first half

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """In the output's dtype."""
        gain = self.gain
        if self.penalty:
            gain = AddGradient.apply(gain, self.penalty * gain.detach().sign())
        heads = output.unflatten(-1, tuple(self.gain.shape))
        heads = heads * (1 + gain * ~self.located) + self.offset * self.chosen.unsqueeze(-1)
        return heads.flatten(-2).to(output.dtype)


def number_of_heads(wanted: int | float, heads: int) -> int:
    """How many of `heads` are chosen: `wanted`, or that share of them.

    Raises:
        ConfigError: when there are fewer.
    """
    count = wanted if isinstance(wanted, int) else max(1, round(wanted * heads))
    if count > heads:
        raise ConfigError(f"adapter.heads is {wanted}; accepted: at most {heads}, which the model has")
    return count


def best_heads(norms: torch.Tensor, count: int) -> list[tuple[int, int]]:
    """(layer, head) of the `count` largest of `norms` [layers, heads], the largest first, of equal ones the lower."""
    rows = norms.tolist()
    places = [(layer, head) for layer, row in enumerate(rows) for head in range(len(row))]
    return sorted(places, key=lambda place: -rows[place[0]][place[1]])[:count]


class Locating(Schedule):
    """Half-way, keeps the best heads."""

    def __init__(self, table: LayerTable, config: Config, max_steps: int):
        """Prepare for a run of `max_steps`.

        Raises:
            ConfigError: for more heads than there are, or a second half without a step.
        """
        self.table, self.seed, self.wanted = table, config.run.seed, config.adapter.heads
        self.modules: list[Any] = [module.head_offsets for module in table.modules]
        number_of_heads(self.wanted, sum(module.chosen.numel() for module in self.modules))
        given = config.adapter.locate_steps
        self.until = max_steps // 2 if given is None else given
        if not 1 <= self.until < max_steps:
            raise ConfigError(
                f"adapter.locate_steps is {given}; accepted: at least 1 and fewer than the run's {max_steps} steps"
            )
        self.trains_all = not bool(self.modules[0].located)

    def layers(self) -> list[int] | None:
        """Those with a chosen head."""
        return [number for number, module in enumerate(self.modules) if bool(module.chosen.any())]

    @contextlib.contextmanager
    def watching(self, step: int, engine: Editor) -> Iterator[None]:
        """Adds the penalty to the loss, with the weight that the loss has in the step's gradient."""
        for module in self.modules if self.trains_all else ():
            module.penalty = PENALTY / engine.gradient_factor
        try:
            yield
        finally:
            for module in self.modules:
                module.penalty = 0.0

    def is_due(self, step: int) -> bool:
        """Once."""
        return step == self.until

    def decide(self, step: int, engine: Editor) -> None:
        """Choose heads by the norms of A, and begin the second half."""
        norms: list[torch.Tensor] = []

        def read(tensors: dict[str, torch.Tensor], steps: float) -> float:
            norms.append(next(value for name, value in tensors.items() if name.endswith(".gain")).norm(dim=1))
            return steps

        for layer in range(self.table.num_layers):
            engine.edit(layer, read)
        every = torch.stack(norms)
        chosen = best_heads(every, number_of_heads(self.wanted, every.numel()))
        for layer, module in enumerate(self.modules):
            module.chosen[[head for owner, head in chosen if owner == layer]] = True
            module.located.fill_(True)
            generator = torch.Generator().manual_seed(derived_seed("lofit", self.seed, step, layer))
            first = torch.randn(whole_shape(module.offset), generator=generator) * DEVIATION

            def begin(tensors: dict[str, torch.Tensor], _: float, module=module, first=first) -> float:
                for name, value in tensors.items():
                    value.zero_()
                    if name.endswith(".offset"):
                        value.copy_(first.to(value.device) * module.chosen.unsqueeze(-1))
                return 0.0

            engine.edit(layer, begin)
        self.trains_all = False


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Give every layer gains and offsets of its attention's heads.

    Raises:
        ModelError: where what the attention's last linear module reads is not made of heads of one size.
    """
    freeze(classifier.model)
    settings: Any = classifier.model.config
    heads = getattr(settings.get_text_config(), "num_attention_heads", None)  # type: ignore[operator]
    added: list[nn.Parameter] = []
    for number, layer in enumerate(layer_list(classifier)):
        last: Any = next(reversed(attention_linears(layer)), None)
        width = 0 if last is None else last.in_features if isinstance(last, nn.Linear) else last.nx
        if not width or not isinstance(heads, int) or width % heads:
            raise ModelError(
                f"adapter.type lofit: what the attention of layer {number} gives to its last linear module ({width} "
                f"numbers) is not made of {heads} heads; set adapter.type to bitfit or lora"
            )
        layer.head_offsets = offsets = HeadOffsets(heads, width // heads)
        offsets.handle = last.register_forward_pre_hook(
            lambda _module, inputs, offsets=offsets: (offsets(inputs[0]), *inputs[1:])
        )
        added += offsets.parameters()
    train_with_head(classifier, adapter, added)
    return classifier.model


def merge(classifier: Classifier) -> None:
    """Add W_o v to the bias of every output projection.

    A model without such biases whose configuration can ask for them, as Llama's can, gets them, zero elsewhere.

    Raises:
        RunError: before heads are located, when what is added depends on the text.
    """
    settings: Any = classifier.model.config
    for layer in layer_list(classifier):
        offsets: Any = layer.head_offsets
        if not bool(offsets.located):
            raise RunError("adapter.type lofit cannot be merged: its best weights are from before it chose heads")
        offsets.handle.remove()
        del layer.head_offsets
        linears: list[Any] = attention_linears(layer)
        if linears[-1].bias is None and hasattr(settings, "attention_bias"):
            settings.attention_bias = True
            for module in linears:
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
        shift = (offsets.offset * offsets.chosen.unsqueeze(-1)).flatten()
        weight = linears[-1].weight
        added = shift @ (weight.T if isinstance(linears[-1], nn.Linear) else weight)
        linears[-1].bias = nn.Parameter(added if linears[-1].bias is None else linears[-1].bias + added)


KIND = AdapterKind(
    name="lofit",
    family="vectors",
    summary="offsets of a few attention heads, which are located first",
    source="Yin et al., NeurIPS 2024",
    licence="irtune's own code",
    build=build,
    schedule=Locating,
    merge=merge,
    trains_all=True,
    keys=("adapter.heads", "adapter.locate_steps"),
    refuses=(
        (
            {"run.average": ...},
            "run.average does not go with adapter.type lofit, whose heads may differ between checkpoints; set it to 0",
        ),
    ),
)
