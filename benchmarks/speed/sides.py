"""irtune's sides of benchmarks/speed (a, b, h), and the bare loop over the same batches (e)."""

import random
import time
import types
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.turns import Batches, ChosenSteps, Clock, Turn, counted, watch_batches
from irtune.config import Config
from irtune.distributed import runtime
from irtune.distributed.runtime import World
from irtune.engine.losses import build_loss
from irtune.train import run as app
from irtune.train.setup import RunSetup, engine_settings, prepare


def setup_for(config: Config, world: World, evaluated: int) -> RunSetup:
    """irtune's reading of model and corpus; the dev split is cut to a random `evaluated` examples."""
    settings = engine_settings(config, world)
    runtime.seed_everything(config.run.seed, deterministic=False)
    setup = prepare(config, settings, world, Path(config.run.output_dir))
    data = setup.data
    data.sampler = ChosenSteps(data.sampler)  # type: ignore[assignment]
    count = len(data.encoded["dev"])
    kept = sorted(random.Random(0).sample(range(count), min(evaluated, count)))
    data.corpus.splits["dev"] = [data.corpus.splits["dev"][i] for i in kept]
    data.encoded["dev"] = [data.encoded["dev"][i] for i in kept]
    return setup


class Irtune:
    """Sides a, b and h: irtune's own trainer, whose last step is put off from turn to turn."""

    def __init__(self, config: Config, world: World, evaluated: int):
        self.setup = setup_for(config, world, evaluated)
        self.clock, self.turns = Clock(world.device), 0
        self.trainer = app.build(self.setup, world, Path(config.run.output_dir))
        # Between turns nothing is evaluated or saved.
        assert hasattr(self.trainer, "_evaluate_and_save")
        self.trainer._evaluate_and_save = types.MethodType(lambda trainer: None, self.trainer)  # type: ignore
        self.records: list[dict[str, Any]] = []
        self.selections: list[dict[str, Any]] = []
        self._trained: set[int] = set()
        self._selected: list[list[int]] = []
        self._adapted: list[list[int]] = []
        tracker = self.trainer.tracker
        advance, train, selection = tracker.advance, tracker.train, tracker.selection
        tracker.advance = lambda step: (advance(step), self._end_of_step())  # type: ignore
        tracker.train = lambda record: (train(record), self.records.append(record))  # type: ignore
        tracker.selection = lambda record: (selection(record), self.selections.append(record))  # type: ignore

    @property
    def model(self) -> torch.nn.Module:
        """The model that trains."""
        return self.trainer.engine.module

    def _end_of_step(self) -> None:
        self.clock.tick()
        self._trained.update(self.trainer.engine.selected)
        self._selected.append(list(self.trainer.engine.selected))
        self._adapted.append(sorted(self._trained))

    def turn(self, warm_up: int, steps: int, *, digests: bool = False) -> Turn:
        """Go on training for `warm_up` + `steps` steps."""
        taken = self.setup.data.sampler.add_turn(warm_up, steps, self.turns)  # type: ignore[attr-defined]
        self.turns += 1
        self.trainer.data.max_steps = len(self.setup.data.sampler.taken)  # type: ignore[attr-defined]
        seen, known = ([] if digests else None), len(self.records)
        self._selected, self._adapted = [], []
        unwatch = watch_batches(self.trainer.engine.module, seen)
        self.clock.begin(warm_up, steps)
        self.trainer.run()
        unwatch()
        losses = [record["loss"] for record in self.records[known:]]
        turn = self.clock.turn()
        turn.losses, turn.digests = losses, seen or []
        turn.selected, turn.adapted = self._selected[warm_up:], self._adapted[warm_up:]
        lengths, timed = self.setup.data.sampler.lengths, taken[warm_up:]
        mine = [batches[runtime.rank() :: runtime.launched_world_size()] for batches in timed]
        turn.shapes = [[(len(batch), max(lengths[i] for i in batch)) for batch in batches] for batches in mine]
        return counted(turn, timed, lengths, packed=self.setup.data.packed)

    def evaluate(self) -> tuple[int, int, float]:
        """Predict the dev split: examples, batch size, seconds."""
        runtime.barrier()
        started = time.perf_counter()
        examples = len(self.trainer.predict("dev").labels)
        return examples, self.trainer.data.evaluation_batch, time.perf_counter() - started

    def close(self) -> None:
        """Free the model."""
        self.trainer.tracker.close()
        self.trainer.engine.close()
        del self.trainer, self.setup


class Bare:
    """Side e: a plain loop over irtune's batches with its model, LoRA in all layers training."""

    def __init__(self, setup: RunSetup, world: World):
        self.setup, self.world, self.clock, self.turns = setup, world, Clock(world.device), 0
        self.model, table, optim = setup.model.module.to(world.device), setup.model.table, setup.config.optim
        table.set_trainable(list(range(table.num_layers)))
        self.parameters = [parameter for _, parameter in table.all()]
        self.loss = build_loss(optim, setup.data.label_counts(), world.device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def turn(self, warm_up: int, steps: int, *, digests: bool = False) -> Turn:
        """Go on training for `warm_up` + `steps` steps."""
        taken = self.setup.data.sampler.add_turn(warm_up, steps, self.turns)  # type: ignore[attr-defined]
        self.turns += 1
        seen: list[int] | None = [] if digests else None
        unwatch = watch_batches(self.model, seen)
        losses = []
        self.model.train()
        self.clock.begin(warm_up, steps)
        for batches in taken:
            losses.append(self._step(batches[self.world.rank :: self.world.size]))
            self.clock.tick()
        unwatch()
        means = runtime.all_reduce(torch.stack(losses)) / self.world.size
        turn = self.clock.turn()
        turn.losses, turn.digests = means.tolist(), seen or []
        return counted(turn, taken[warm_up:], self.setup.data.sampler.lengths)

    def _step(self, mine: Batches) -> torch.Tensor:
        total = 0.0
        for positions in mine:
            batch = self.setup.data.batch(positions)
            labels = batch.pop("labels")
            loss = self.loss(self.model(**batch).logits, labels) / len(mine)
            loss.backward()
            total += loss.detach()
        if self.world.size > 1:
            self._average()
        if self.setup.config.optim.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.setup.config.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total  # type: ignore[return-value]

    def _average(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = runtime.all_reduce(torch.cat([gradient.flatten() for gradient in gradients])) / self.world.size
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))

    def close(self) -> None:
        """Free the model."""
        del self.model, self.optimizer, self.parameters, self.setup
