"""Bytes and time of a step on paper, for Llama 3.1 8B and 70B on 8 to 512 GPUs: the table of benchmarks/README.md.

    python benchmarks/scaling.py

Bytes are those of irtune's planner, rates are assumptions (`Machine`). Nothing here is measured.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECIPE = ROOT / "launch/recipes/llama3.1-8b-iterater.yaml"
LABELS = 5
RANKS = (8, 64, 512)


@dataclass(frozen=True)
class Machine:
    """What is assumed: GPUs of a node; FLOP/s of one in bf16 (H100 SXM, dense), and the share of them that is reached;
    bytes/s in a node (NVLink 4, one direction) and of a network adapter (400 Gb/s), adapters of a node; seconds of a
    message to the next GPU of a ring, in the node and beyond it."""

    gpus: int = 8
    flops: float = 989e12
    used: float = 0.45
    inside: float = 450e9
    adapter: float = 50e9
    adapters: int = 8
    hop: float = 2e-6
    far_hop: float = 10e-6

    def seconds(self, sent: float, collectives: int, ranks: int) -> float:
        """Of ring collectives in which each rank sends `sent` bytes in all. A node's rings share its adapters."""
        far = -(-ranks // self.gpus) if ranks > self.gpus else 0  # hops between nodes
        rate = min(self.inside, self.adapters * self.adapter) if far else self.inside
        return sent / rate + collectives * (far * self.far_hop + (ranks - far) * self.hop)


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, hidden size, size of the feed-forward part, and of keys and values."""

    name: str
    layers: int
    hidden: int
    inner: int
    keys: int
    vocabulary: int = 128_256

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear modules."""
        h, i, k = self.hidden, self.inner, self.keys
        return {"q_proj": (h, h), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (h, h), "gate_proj": (h, i),
                "up_proj": (h, i), "down_proj": (i, h)}  # fmt: skip


SHAPES = (Shape("8B", 32, 4096, 14336, 1024), Shape("70B", 80, 8192, 28672, 1024))


def parts(shape: Shape, config, own: bool, share: float):
    """Counts for the planner; in `share` of the layers LoRA as in `config` is trained, or their own weights in bf16."""
    from irtune.memory.count import Parts

    sizes = [inputs * outputs for inputs, outputs in shape.linear.values()]
    pairs = [shape.linear[name] for name in config.adapter.target_modules]
    lora = [config.adapter.r * size for pair in pairs for size in pair]
    norms, head = [shape.hidden, shape.hidden], LABELS * shape.hidden
    outside = (shape.vocabulary + 1) * shape.hidden  # embeddings and the last norm
    return Parts(
        linear=[] if own else sizes * shape.layers,
        outputs=0,
        rest=outside + (0 if own else shape.layers * sum(norms) + head),  # peft keeps the head's first values
        layers=[[*sizes, *norms] if own else lora] * shape.layers,
        head=[head],
        selected=list(range(int(share * shape.layers + 1e-9))),
        rows=config.optim.micro_batch_size,
        kept=0, peak=0, scoring=0, evaluation=0, per_row=0.0,
        weight_bytes=2,
        trained_bytes=2 if own else 4,
        device="cuda",
    )  # fmt: skip


def compute_seconds(counts, tokens: int, machine: Machine) -> float:
    """2 FLOPs per weight and token: forward, again in recomputation, backward to layer 0, gradients of what is trained
    (Kaplan et al. 2020, section 2.1; attention's own products are left out)."""
    passes = 3 * (sum(counts.linear) + sum(map(sum, counts.layers)))
    passes += sum(sum(counts.layers[layer]) for layer in counts.selected)
    return 2 * tokens * passes / (machine.flops * machine.used)


def rows() -> Iterator[str]:
    """The table, line by line."""
    from irtune.config import load_config
    from irtune.memory import estimate

    config = load_config(["--config", str(RECIPE), "--data.path=corpus"])
    share, tokens = config.tuning.max_fraction, config.optim.micro_batch_size * config.data.max_length
    yield "| model | trained | ZeRO | GB held, 8 GPUs | 512 | GB sent | compute | sending, 8 | 64 | 512 | 512, slow |"
    yield "|" + "---|" * 11
    for shape, own, part in itertools.product(SHAPES, (False, True), (1.0, share)):
        counts = parts(shape, config, own, part)
        trained = f"{'own weights' if own else 'LoRA'}, {len(counts.selected)} layers"
        for stage in (0, 1, 2, 3):
            plans = [estimate(counts, config, stage=stage, quantization="none", world=ranks) for ranks in RANKS]
            # A reduction and a gathering of what is trained, and norms; ZeRO 3: two or three for each layer.
            messages = 2 * shape.layers + len(counts.selected) if stage == 3 else 4
            times = [Machine().seconds(plan.sent_per_step, messages, n) for plan, n in zip(plans, RANKS)]
            times.append(Machine(adapters=1).seconds(plans[-1].sent_per_step, messages, RANKS[-1]))
            held = [plan.base + plan.adapters + plan.gradients + plan.optimizer for plan in (plans[0], plans[-1])]
            giga = [f"{value / 1e9:,.1f}" for value in (*held, plans[-1].sent_per_step)]
            milli = [f"{1000 * value:,.0f} ms" for value in (compute_seconds(counts, tokens, Machine()), *times)]
            yield f"| {' | '.join([shape.name, trained, str(stage), *giga, *milli])} |"


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}\n" for line in rows()))
