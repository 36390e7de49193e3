"""The measurements of benchmarks/speed, on every rank."""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import report as speed_report
from benchmarks.speed.matrix_products import Matrices, ModelShape, Step, flops, shape_of
from benchmarks.speed.peers import Peft, fastest_format
from benchmarks.speed.profiling import host_waits, profile_of, selection_cost
from benchmarks.speed.sides import Bare, Irtune, setup_for
from benchmarks.speed.turns import Meter, Turn
from irtune import console
from irtune.config import Config, load_config
from irtune.distributed import runtime
from irtune.distributed.runtime import World
from irtune.models import DTYPES


def work(options: argparse.Namespace) -> int:
    """Measure what the job file asks for; rank 0 writes the results."""
    job = json.loads(Path(options.worker).read_text(encoding="utf-8"))
    console.quiet_libraries()
    torch.set_num_threads(job["threads"])
    world = runtime.read_world()
    runtime.start(world, 600)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    bench = Bench(job, world)
    result = bench.run()
    if world.is_main:
        speed_report.write(result, job["output"])
    runtime.barrier()
    runtime.stop()
    return 0


class Bench:
    """All sides, and what is measured of them."""

    def __init__(self, job: dict[str, Any], world: World):
        self.job, self.world, self.meter = job, world, Meter(world.device)
        self.sides: dict[str, Any] = {}
        self.builders: dict[str, Callable[[], Any]] = {}
        self.turns: dict[str, list[Turn]] = {letter: [] for letter in job["sides"]}
        self.shape: ModelShape | None = None
        self.flops: list[float] = []

    def config(self, letter: str) -> Config:
        """irtune's configuration of a side."""
        given = list(self.job["arguments"])
        while letter not in "ah" and "--tuning.cost_weight" in given:  # it says how ir chooses layers
            place = given.index("--tuning.cost_weight")
            del given[place : place + 2]
        method = ["--tuning.method", "ir" if letter in "ah" else "full"]
        method += ["--data.padding_free", "true" if letter == "h" else "false"]
        folder = Path(self.job["folder"]) / f"side-{letter}"
        return load_config([*given, *method, "--run.output_dir", str(folder)])

    def run(self) -> dict[str, Any]:
        """Everything; the content of the JSON file."""
        config, base = self.config("e"), setup_for(self.config("e"), self.world, self.job["evaluated"])
        self.shape = shape_of(base.model.module, base.model.table)
        formats = self._prepare(config, base)
        for number in range(self.job["rounds"]):
            for letter in self.job["sides"]:
                turn = self._turn(letter)
                self._say(f"round {number + 1}, {letter}: {turn.examples / sum(turn.seconds):.2f} examples/s")
        evaluation = self._evaluate() if self.job["evaluated"] else {}
        selection = selection_cost(self._side("a"), self.turns["a"], self.world) if "a" in self.job["sides"] else None
        profile = {letter: profile_of(self._side(letter), self.world) for letter in self.job["profile"]}
        waits = host_waits(self._side("a")) if "a" in self.job["sides"] and self.world.device.type == "cuda" else None
        return {
            **speed_report.setting(self.job, config, self.world, base),
            "trainer_formats": {"seconds_per_step": formats, "chosen": next(iter(formats), None)},
            "sides": self._summary(),
            "matrix": self._matrix(),
            "selection": selection,
            "evaluation": evaluation,
            "start_seconds": self.job["start"],
            "host_waits_between_log_lines": waits,
            "profile": profile,
        }

    def _prepare(self, config: Config, base: Any) -> dict[str, float]:
        """The builders of all sides; returns seconds per step of the Trainer's number formats."""
        sides, folder, world = self.job["sides"], Path(self.job["folder"]), self.world
        formats: dict[str, float] = {}
        if set("cdg") & set(sides):
            formats = fastest_format(base, world, folder / "formats", 2 if self.job["quick"] else 4)
            for form, seconds in formats.items():
                self._say(f"Trainer + peft, {form}: {seconds:.3f} s per step")
        form, evaluated, dtype = next(iter(formats), ""), self.job["evaluated"], DTYPES[config.model.dtype]
        own = config.model.quantization == "none"
        self.builders = {
            "a": lambda: Irtune(self.config("a"), world, evaluated),
            "b": lambda: Irtune(self.config("b"), world, evaluated),
            "c": lambda: Peft(base, world, folder / "c", form),
            "d": lambda: Peft(base, world, folder / "d", form, padded=True),
            "e": lambda: Bare(setup_for(self.config("e"), world, evaluated), world),
            "g": lambda: Peft(base, world, folder / "g", form, attention="eager"),
            "h": lambda: Irtune(self.config("h"), world, evaluated),
            "f": lambda: Matrices(self.shape, dtype, world.device, own),
        }
        base.model = base.method = None  # tokens and labels are all that the Trainer needs
        return formats

    def _side(self, letter: str) -> Any:
        others = [other for other in self.sides if other != letter] if self.job["one_at_a_time"] else []
        for other in others:
            self._close(other)
        if letter not in self.sides:
            self.meter.begin(letter)
            side = self.sides[letter] = self.builders[letter]()
            self.meter.end()
            if letter != "f":
                self.meter.first_turn(letter, side)
            side.turns = len(self.turns[letter])
        return self.sides[letter]

    def _close(self, letter: str) -> None:
        self.sides.pop(letter).close()
        self.meter.held.pop(letter, None)
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _turn(self, letter: str) -> Turn:
        """One turn of a side; steps of side d all cost the same, so fewer will do."""
        steps, warm_up = self.job["steps"], self.job["warm_up"]
        side = self._side(letter)
        self.meter.begin(letter)
        if letter == "f":
            turn = self._replay(side, self.turns["a"][-1])
        else:
            turn = side.turn(warm_up, max(2, steps // 3) if letter == "d" else steps, digests=self.job["quick"])
        self.meter.end()
        self.turns[letter].append(turn)
        return turn

    def _replay(self, side: Matrices, played: Turn) -> Turn:
        """The products of the timed steps of a turn of side a."""
        steps = [
            Step(rows, length, tuple(selected), tuple(adapted))
            for shapes, selected, adapted in zip(played.shapes, played.selected, played.adapted)
            for rows, length in shapes
        ]
        assert self.shape is not None
        self.flops.append(sum(flops(self.shape, step) for step in steps))
        seconds = side.turn(steps, 1)
        each = len(steps) // len(played.shapes)
        per_step = [sum(seconds[i : i + each]) for i in range(0, len(seconds), each)]
        return Turn(per_step, played.examples, played.tokens, played.padded_tokens)

    def _summary(self) -> dict[str, Any]:
        peaks = runtime.all_gather_object(self.meter.peaks)
        highest = {letter: max(rank[letter] for rank in peaks) for letter in peaks[0] if letter != "f"}
        return {
            letter: speed_report.summary(letter, turns, highest.get(letter)) for letter, turns in self.turns.items()
        }

    def _matrix(self) -> dict[str, Any] | None:
        """What side f did, and how fast one large product is in the same run."""
        if not self.flops:
            return None
        side = self._side("f")
        rate, turns = side.rate(), self.turns
        return {
            "flops_per_step_and_rank": [count / len(turn.seconds) for count, turn in zip(self.flops, turns["a"])],
            "flops_per_second": [count / sum(turn.seconds) for count, turn in zip(self.flops, turns["f"])],
            "flops_per_second_of_a": [count / sum(turn.seconds) for count, turn in zip(self.flops, turns["a"])],
            "large_product_flops_per_second": rate,
            "layers": self.shape.layers if self.shape else None,
        }

    def _evaluate(self) -> dict[str, Any]:
        """Examples per second of a prediction of the dev split; the second of two."""
        found = {}
        for letter in (letter for letter in "abc" if letter in self.job["sides"]):
            side = self._side(letter)
            measured = [side.evaluate() for _ in range(2)]
            examples, batch, _ = measured[0]
            rates = [examples / seconds for _, _, seconds in measured]
            found[letter] = {"examples": examples, "batch_size": batch, "examples_per_second": max(rates)}
        return found

    def _say(self, line: str) -> None:
        if self.world.is_main:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
