"""Prompts, prefixes and bottlenecks of the literature: hand-computed cases, their sources' rules, plain formulas."""

import math

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from irtune.adapters.decomposed_prompt import DecomposedPrompt
from irtune.adapters.kinds.bottleneck import Bottleneck, Connected
from irtune.adapters.kinds.ept import FusedPrompt
from irtune.adapters.kinds.prefix import Prefix
from irtune.adapters.ltuning import candidate_logits
from irtune.adapters.prefix_attention import AttentionPlace, with_prefix
from irtune.config import AdapterConfig, load_config
from irtune.errors import ConfigError
from tests.adapters.test_literature import BATCH, build

pytestmark = pytest.mark.quick

# ----- mam -----


def test_a_prefix_is_a_share_of_the_softmax_given_to_other_values():
    attention = nn.Module()
    attention.is_causal = False
    attention.prefix = Prefix(AttentionPlace(attention, 1, 1, 1), 1)
    attention.prefix.key.data.fill_(math.log(3))
    attention.prefix.value.data.fill_(6)
    query, key, value = (torch.full((1, 1, 1, 1), number) for number in (1.0, 0.0, 2.0))
    out, _ = with_prefix(sdpa_attention_forward)(attention, query, key, value, None, scaling=1.0)
    assert out.item() == pytest.approx(5)  # .25 * 2 + .75 * 6


def test_mam_is_prefixes_and_relu_bottlenecks_beside_the_feed_forward_block(llama):
    model, table = build(llama, type="mam", num_tokens=3, size=8, activation="relu", scale=4.0)
    assert load_config(["--adapter.type=mam", "--data.path=x"]).adapter.num_tokens == 30
    layer = table.modules[0]
    down, up = layer.bottleneck.down, layer.bottleneck.up
    bound = 1 / 32**0.5  # kaiming uniform with a = sqrt 5
    assert 0.9 * bound < down.weight.abs().max() <= bound and not down.bias.any() and not up.weight.any()
    assert [tuple(p.shape) for _, p in table.layers[0]] == [(2, 3, 8), (2, 3, 8), (8, 32), (8,), (32, 8), (32,)]
    nn.init.normal_(up.weight)
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    double = model.double().eval()
    block = layer.mlp
    bare = block.down_proj.weight @ (
        nn.functional.silu(hidden @ block.gate_proj.weight.T) * (hidden @ block.up_proj.weight.T)
    ).transpose(1, 2)
    expected = bare.transpose(1, 2) + 4 * torch.relu(hidden @ down.weight.T) @ up.weight.T
    assert torch.allclose(double.get_submodule("model.layers.0.mlp")(hidden), expected, rtol=1e-12, atol=1e-12)


# ----- connected bottlenecks -----


def test_connected_bottlenecks_hand_their_state_up():
    settings = AdapterConfig(type="bottleneck", size=1, activation="relu", placement="connected")
    first, second = (Connected(1, settings, lowest=lowest) for lowest in (True, False))
    for part in (first, second):
        for parameter in part.parameters():
            parameter.data.fill_(float(parameter.dim() == 2))
    output, state = first.eval()(torch.ones(1, 1))
    assert (output.item(), state.item()) == (2, 1)
    output, state = second.eval()(output, state)
    assert (output.item(), state.item()) == (5, 3)
    second.across.weight.data.zero_()
    assert second(torch.full((1, 1), 2.0), torch.ones(1, 1))[0].item() == 4
    alone = Bottleneck(1, 1, settings)
    assert {name for name, _ in second.named_parameters()} - {name for name, _ in alone.named_parameters()} == {
        "across.weight"
    }


def test_gradients_of_connected_bottlenecks_cross_frozen_layers(llama):
    model, table = build(llama, type="bottleneck", size=4, placement="connected")
    for _, parameter in table.all():
        nn.init.normal_(parameter, std=0.3)
    for layer in table.layers[1:4]:  # what layer 1 makes leaves it through its state only, and layers 2 and 3 pass it
        dict(layer)[next(name for name, _ in layer if name.endswith("up.weight"))].data.zero_()
    table.set_trainable([1])
    model(**BATCH).logits.sum().backward()
    moved = {number for number, layer in enumerate(table.layers) if any(p.grad is not None for _, p in layer)}
    assert moved == {1} and all(p.grad.any() for _, p in table.layers[1])
    for key in ("model.gradient_checkpointing", "model.compile"):
        with pytest.raises(ConfigError, match="a layer depends on more than its input"):
            load_config(
                ["--adapter.type=bottleneck", "--adapter.placement=connected", f"--{key}=true", "--data.path=x"]
            )


# ----- dept and ept -----


def test_dept_adds_a_row_to_each_token():
    settings = AdapterConfig(type="dept", r=1, alpha=8.0, prompt_lr=4.0)
    module = DecomposedPrompt(torch.tensor([[2.0, 6.0]]), 2, settings)
    module.a.data.copy_(torch.tensor([[1.0], [2.0]]))
    module.b.data.copy_(torch.tensor([[3.0, 0.0]]))
    prompt, shift = module(2)
    assert shift.tolist() == [[24, 0], [48, 0]] and module(1)[1].tolist() == [[24, 0]]
    assert module.prompt.tolist() == [[0.5, 1.5]] and prompt.tolist() == [[2, 6]]
    official = DecomposedPrompt(torch.zeros(40, 768), 256, AdapterConfig(type="dept", r=45))
    assert sum(p.numel() for p in official.parameters()) == 100 * 768 == 76_800


def test_a_prompts_own_learning_rate_scales_adams_steps():
    moved = []
    for factor in (1.0, 5.0):
        module = DecomposedPrompt(torch.ones(1, 2), 2, AdapterConfig(type="dept", r=1, prompt_lr=factor))
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (module(2)[0] * torch.tensor([3.0, -1.0])).sum().backward()
            optimizer.step()
        moved.append(module(2)[0] - 1)
    assert torch.allclose(moved[1], 5 * moved[0], rtol=1e-4)


@pytest.mark.parametrize("kind", ["dept", "ept"])
def test_dept_and_ept_start_as_prompt_and_count_tokens_from_the_left(llama, bert, kind):
    for folder in (llama, bert):
        plain, _ = build(folder, type="prompt", num_tokens=3)
        model, _ = build(folder, type=kind, num_tokens=3, r=4, size=8)
        with torch.no_grad():
            assert torch.equal(model.eval()(**BATCH).logits, plain.eval()(**BATCH).logits)
            nn.init.normal_(model.decomposed.b)
            text = model.base.get_input_embeddings()(BATCH["input_ids"])
            prompt, shift = model.decomposed(6)
            seen = []
            model.base.get_input_embeddings().register_forward_hook(
                lambda _m, _i, output, seen=seen: seen.append(output)
            )
            model(**BATCH)
        start = model.start
        expected = text + shift
        expected = torch.cat([expected[:, :start], prompt.expand(2, -1, -1), expected[:, start:]], dim=1)
        assert torch.equal(seen[0], expected)
        with pytest.raises(ConfigError, match="up to 16 tokens, and one has 17; set data"):
            model(input_ids=torch.ones(1, 17, dtype=torch.long), attention_mask=torch.ones(1, 17))
        with pytest.raises(ConfigError, match="pad texts on the right"):
            model(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1]]))


def test_ept_weighs_its_spaces():
    settings = AdapterConfig(type="ept", r=1, size=1, activation="relu")
    module = FusedPrompt(torch.ones(1, 1), 2, settings)
    for parameter in module.parameters():
        parameter.data.zero_()
    module.prompt.data.fill_(1.0)
    module.gate.data.copy_(torch.tensor([[0.0], [math.log(3)], [-1e9], [-1e9]]))
    module.down.data.fill_(1.0)
    module.up.data[:2] = torch.tensor([[[4.0]], [[8.0]]])
    assert module(1)[0].item() == pytest.approx(1 + 7)  # P' and .25 * 4 + .75 * 8


def test_ept_is_its_formula_in_fp64():
    torch.manual_seed(1)
    module = FusedPrompt(torch.randn(3, 8).double(), 5, AdapterConfig(type="ept", r=2, size=4, alpha=3.0))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    p, m = module.prompt, module.a @ module.b
    fused = p + torch.softmax(p @ m.T / 8**0.5, dim=1) @ m
    gates = torch.softmax(module.gate @ fused.mean(0), dim=0)
    expected = fused + sum(g * torch.tanh(fused @ d) @ u for g, d, u in zip(gates, module.down, module.up))
    prompt, shift = module(4)
    assert torch.allclose(prompt, expected, rtol=1e-12) and torch.allclose(shift, 3 / 2**0.5 * m[:4], rtol=1e-12)


# ----- l-tuning -----


def test_pairs_of_text_and_label_are_judged_by_the_log_odds_of_entailment(llama, bert):
    pairs = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 5.0], [1.0, -1.0], [0.0, 0.5], [2.0, 2.0]])
    assert candidate_logits(pairs, 3, "entailment").logits.tolist() == [[1, -3, 0], [2, -0.5, 0]]
    square = torch.arange(9.0).view(3, 3)
    assert candidate_logits(square, 3, "diagonal").logits.tolist() == [[0, 4, 8]]
    for folder, kind in ((llama, "ltuning-prompt"), (bert, "ltuning-prefix")):
        model, table = build(folder, type=kind, size=8, r=4, num_tokens=2, label_head="entailment")
        rows = {
            tuple(parameter.shape) for name, parameter in table.head if name.split(".")[-2] in ("score", "classifier")
        }
        assert (2, 32) in rows and all(shape[0] == 2 for shape in rows)
        assert model(**BATCH).logits.shape == (2, 3)
