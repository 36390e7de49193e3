"""The LoRA module whose training step adds the update in the product with B."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from irtune.adapters.linear import LoraLinear, add_in_product

pytestmark = pytest.mark.quick


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.config = {}
        self.first = kind(6, 10)
        self.second = kind(10, 6)

    def forward(self, x):
        return self.second(self.first(x))


def conv(inputs, outputs):
    return Conv1D(outputs, inputs)


def adapted(kind, dtype, **options):
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"], **options)
    model = get_peft_model(Net(kind).to(dtype), settings, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return model


def results(model, x):
    """Output, and gradients of the input and of every factor."""
    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view(output.shape))
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def changed(model):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            add_in_product(module)
    return model


@pytest.mark.parametrize("kind", [nn.Linear, conv])
def test_it_computes_what_peft_computes(kind):
    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    theirs = results(adapted(kind, torch.float64), x)
    model = changed(adapted(kind, torch.float64))
    assert {type(part) for part in model.modules() if isinstance(part, LoraLayer)} == {LoraLinear}
    ours = results(model, x)
    assert len(ours) == 6
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_evaluation_and_switched_off_updates_are_pefts_bit_for_bit():
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    theirs, ours = adapted(nn.Linear, torch.bfloat16), changed(adapted(nn.Linear, torch.bfloat16))
    assert torch.equal(theirs.eval()(x), ours.eval()(x))
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(theirs.train()(x), ours.train()(x))


def test_bf16_updates_are_rounded_once():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    exact = adapted(nn.Linear, torch.float64)
    errors = []
    for model in (adapted(nn.Linear, torch.bfloat16), changed(adapted(nn.Linear, torch.bfloat16))):
        rounded = {name: value.double() for name, value in model.state_dict().items()}
        first = model.get_submodule("base_model.model.first")
        exact.load_state_dict(rounded, strict=True)
        wanted = exact.get_submodule("base_model.model.first")(x.bfloat16().double())
        errors.append((first(x.bfloat16()).double() - wanted).norm() / wanted.norm())
    assert errors[1] < errors[0] < 0.01


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_relatives_stay_pefts_own(options):
    model = changed(adapted(nn.Linear, torch.float32, **options))
    assert {type(part) for part in model.modules() if isinstance(part, LoraLayer)} == {PeftLinear}
