"""What a run writes is loaded after its first evaluation, and a run whose adapter would be lost ends there."""

import pytest
import torch

from irtune.engine import engine as engine_module
from irtune.memory import measure
from irtune.train import first_adapter
from irtune.train.trainer import Trainer
from tests.support.ranks import run_cases
from tests.support.runs import train
from tests.support.tiny import tiny_config


def _with_another_adapter(config, other):
    """How the run ends where the adapter that is written has `other` weights, its peaks of memory, and what it said."""
    said, memory = [], []
    compare, write, finish = first_adapter.compare_loaded, engine_module.write_adapter, Trainer.finish

    def watched(*given):
        compare(*given)
        spent = bytearray(2**28)  # touched pages, as a second base is
        memory.append(measure.peak_host_memory_bytes())
        del spent

    def finished(self, folder):
        memory.append(measure.peak_host_memory_bytes())
        return finish(self, folder)

    def written(folder, tensors, *rest):
        write(folder, {name: tensor + 0.5 * other for name, tensor in tensors.items()}, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_adapter.log, "info", said.append)
        patch.setattr(engine_module, "write_adapter", written)
        patch.setattr(first_adapter, "compare_loaded", watched)
        patch.setattr(Trainer, "finish", finished)
        end = train(config, whole=True)
    return end, memory, said


@pytest.mark.slow
def test_a_run_whose_adapter_does_not_come_back_ends_at_its_first_evaluation(bpe, corpus, tmp_path):
    options = {"model__pooling": "mean+edit", "data__prompt": "diff", "run__eval_every": 2}
    cases = [
        (tiny_config(bpe, corpus, tmp_path / f"{stage}-{other}", stage, **options), other)
        for stage, other in ((2, 0.0), (3, 0.0), (2, 1.0))
    ]
    good, shared, bad = run_cases(_with_another_adapter, 2, cases)
    assert [end for end, _, _ in good] == [None, None]
    checked, finished = good[0][1]
    assert finished < checked - 2**27, "memory of the check counts as the run's"
    for end, _, _ in bad:
        assert "an adapter of type lora is not what it was when it is loaded again: logits of 2 texts" in end
    assert not (tmp_path / "2-1.0" / "results.json").exists()
    assert "step_2" in [path.name for path in (tmp_path / "2-1.0" / "checkpoints").iterdir()]
    # Under ZeRO 3 no rank has the whole model: said, and left to `validate`.
    assert len(shared[0][1]) == 1 and any("validate` tries that" in line for line in shared[0][2])


@pytest.mark.quick
def test_large_and_quantised_bases_are_left_to_validate(bpe, corpus, tmp_path):
    from irtune.evaluation.round_trip import QUICKLY_LOADED, is_quickly_loaded

    config = tiny_config(bpe, corpus, tmp_path, 0)
    assert is_quickly_loaded(config, torch.nn.Linear(4, 4))
    assert not is_quickly_loaded(config, torch.nn.Linear(2**14, int(QUICKLY_LOADED) // 2**14 + 1, device="meta"))
    config.model.quantization = "nf4"
    assert not is_quickly_loaded(config, torch.nn.Linear(4, 4))
