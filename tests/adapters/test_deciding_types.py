"""Types that decide something while they train: what they decide, and that nothing is decided twice or differently."""

import json
import shutil

import pytest
import torch

from irtune.adapters import load_adapter
from irtune.commands import export
from irtune.distributed import runtime
from irtune.errors import ConfigError, DistributedError
from irtune.evaluation.saved_run import load_run
from irtune.models import load_classifier
from irtune.train import layer_selection
from irtune.train.checkpoint import OPTIMIZER, TRAINABLE, read_tensors
from tests.adapters.test_variants import assert_selection_engages, train_and_watch
from tests.support.ranks import run_cases, run_ranks
from tests.support.runs import losses, selections, train
from tests.support.tiny import LAYERS, tiny_config

COMMON = {"run__eval_every": 2, "run__keep_last": 9, "tuning__method": "topk", "tuning__budget": 2}
TYPES = {
    "lofit": {"adapter__locate_steps": 2, "adapter__heads": 4},
    "triadapt": {"adapter__r": 4},
    "sparse": {"tuning__interval": 5},  # a window in one stretch: step 4, after which a run goes on, is within it
    "sparse sm3": {"tuning__interval": 5, "adapter__regrow": "sm3"},
}
CASES = [(name, stage) for name in TYPES for stage in (2, 3) if stage == 2 or not name.startswith("sparse")]
EVERYDAY = ("lofit", "triadapt")  # under ZeRO 2
STAGES = [2, pytest.param(3, marks=pytest.mark.slow)]


def marked(case):
    """A name, or a name and a stage, as parameters of a test."""
    name, stage = (case, 2) if isinstance(case, str) else case
    values = (name,) if isinstance(case, str) else case
    return pytest.param(*values, marks=[] if name in EVERYDAY and stage == 2 else [pytest.mark.slow])


def asks(item, name, stage):
    """Whether a test is of the case: by its parameters, or by its name where it has none."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    named = given.get("name", name) == name and name.split()[0] in item.name
    return named and given.get("stage", 2) == stage


def whole_and_resumed(whole, cut, folders):
    """A run that is watched, and the same one cut after step 4 and continued."""
    seen = train_and_watch(whole)
    if runtime.rank() == 0:
        first, second = folders
        shutil.copytree(first, second)
        shutil.rmtree(second / "checkpoints/step_6")
        shutil.rmtree(second / "adapter")
        (second / "results.json").unlink()
        (second / "checkpoints/latest").write_text("step_4")
        best = json.loads((second / "checkpoints/step_4/state.json").read_text())["progress"]["best_step"]
        (second / "checkpoints/best").write_text(f"step_{best}")
    runtime.barrier()
    return seen, train(cut)


@pytest.fixture(scope="module")
def ran(request, llama, corpus, tmp_path_factory):
    """For each case the folder of the whole run, that of the continued one, and what both ranks saw.

    All cases that tests were asked for run one after the other in the same processes.
    """
    box = tmp_path_factory.mktemp("deciding")
    here = [item for item in request.session.items if item.path == request.path]
    wanted = [case for case in CASES if any(asks(item, *case) for item in here)]
    cases = []
    for name, stage in wanted:
        folders = [box / f"{name.replace(' ', '-')}-{stage}-{which}" / "run" for which in ("whole", "cut")]
        for folder in folders:
            folder.parent.mkdir()
        options = {"adapter__type": name.split()[0]} | COMMON | TYPES[name]
        configs = [tiny_config(llama, corpus, folder, stage, **options) for folder in folders]
        cases.append((*configs, folders))
    reports = run_cases(whole_and_resumed, 2, cases)
    return {case: (*settings[2], report) for case, settings, report in zip(wanted, cases, reports)}


@pytest.mark.parametrize(("name", "stage"), map(marked, CASES))
def test_to_go_on_is_no_interruption_and_frozen_layers_keep_their_bits(ran, name, stage):
    whole, cut, ((seen, error), (others, _)) = ran[name, stage]
    assert error is None
    assert [stretch["moved"] for stretch in seen] == [stretch["moved"] for stretch in others]
    # Of values that move, a layer's may all be new, and zero as they were at first.
    assert_selection_engages(seen, stage, "float32", may_stand_still=name == "sparse")
    assert losses(cut) == losses(whole) and selections(cut) == selections(whole)
    for file in (TRAINABLE, OPTIMIZER):
        assert (cut / "checkpoints/step_6" / file).read_bytes() == (whole / "checkpoints/step_6" / file).read_bytes()
    assert (cut / "adapter/adapter_model.safetensors").read_bytes() == (
        whole / "adapter/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", map(marked, TYPES))
def test_a_decision_comes_back_with_the_adapter(ran, name):
    whole = ran[name, 2][0]
    run = load_run(whole, torch.device("cpu"))
    fresh = load_adapter(load_classifier(run.config.model, run.labels), whole / "adapter")
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, run.model(**batch).logits)


@pytest.mark.parametrize("name", map(marked, TYPES))
def test_ranks_and_accumulation_decide_alike(ran, llama, corpus, tmp_path, name):
    options = {"adapter__type": name.split()[0]} | COMMON | TYPES[name] | {"optim__gradient_accumulation_steps": 2}
    run_ranks(train, 1, tiny_config(llama, corpus, tmp_path / "run", 0, **options))
    one, two = (
        read_tensors(folder / "checkpoints/step_6", TRAINABLE) for folder in (tmp_path / "run", ran[name, 2][0])
    )
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        same = (
            torch.allclose(tensor, two[key], atol=1e-4) if tensor.is_floating_point() else torch.equal(tensor, two[key])
        )
        assert same, key


def test_ranks_that_differ_are_told(monkeypatch):
    decided = [("a.chosen", torch.tensor([True])), ("b.chosen", torch.tensor([True, False]))]
    layer_selection.verify_decisions(decided, 3, torch.device("cpu"))
    monkeypatch.setattr(runtime, "all_gather", lambda mine: [mine, mine + torch.tensor([0, 1])])
    with pytest.raises(DistributedError, match=r"step 3: ranks decided differently about b\.chosen"):
        layer_selection.verify_decisions(decided, 3, torch.device("cpu"))


# ----- what each decides -----


@pytest.mark.parametrize("stage", STAGES)
def test_lofit_locates_heads_and_trains_those_alone(ran, stage):
    whole, _, ((seen, _), _) = ran["lofit", stage]
    before, after = (read_tensors(whole / f"checkpoints/step_{step}", TRAINABLE) for step in (2, 6))
    places = [name.removesuffix(".chosen") for name in after if name.endswith(".chosen")]
    assert len(places) == LAYERS and sum(int(after[f"{place}.chosen"].sum()) for place in places) == 4
    with_heads = {int(place.split(".layers.")[1].split(".")[0]) for place in places if after[f"{place}.chosen"].any()}
    assert seen[0]["selected"] == list(range(LAYERS))
    for stretch in seen[1:]:
        assert set(stretch["selected"]) <= with_heads and len(stretch["selected"]) == min(2, len(with_heads))
    for place in places:
        assert not after[f"{place}.gain"].any() and bool(after[f"{place}.located"])
        outside = after[f"{place}.offset"][~after[f"{place}.chosen"]]
        assert not outside.any()
        if before[f"{place}.located"]:  # decided after step 2, and saved with it
            assert torch.equal(before[f"{place}.chosen"], after[f"{place}.chosen"])


def test_lofit_exports_its_offsets_in_a_bias(ran, tmp_path):
    whole = ran["lofit", 2][0]
    assert export.main(["--run", str(whole), "--to", str(tmp_path / "merged"), "--merge"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse", "sparse sm3"])
def test_values_move_in_the_layers_that_train_and_nowhere_else(ran, name):
    whole, _, ((seen, _), _) = ran[name, 2]
    before, after = (read_tensors(whole / f"checkpoints/step_{step}", TRAINABLE) for step in (4, 6))
    moved = {
        int(key.split(".layers.")[1].split(".")[0])
        for key, tensor in after.items()
        if key.endswith(".indices") and not torch.equal(before[key], tensor)
    }
    assert moved == set(seen[0]["selected"]) and len(moved) == 2
    for key, tensor in after.items():
        assert not key.endswith(".indices") or (tensor.diff() > 0).all()  # ascending, so that none is there twice


@pytest.mark.slow
def test_sparse_values_export_into_the_weights(ran, tmp_path):
    assert export.main(["--run", str(ran["sparse", 2][0]), "--to", str(tmp_path / "merged"), "--merge"]) == 0


def test_sparse_is_refused_under_zero_3(llama, corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"needs whole weights.*set --deepspeed to a file with stage 0, 1 or 2"):
        tiny_config(llama, corpus, tmp_path / "run", 3, adapter__type="sparse")


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_of_triadapt_grow_in_the_layers_that_train(ran, stage):
    whole, _, ((seen, _), _) = ran["triadapt", stage]
    ranks = {}
    for step in (2, 4, 6):
        tensors = read_tensors(whole / f"checkpoints/step_{step}", TRAINABLE)
        ranks[step] = {key: int(tensor) for key, tensor in tensors.items() if key.endswith(".rank")}
    assert set(ranks[2].values()) == {1, 3} and ranks[4] == ranks[6]  # nothing is decided after the last step
    for before, after, stretch in ((dict.fromkeys(ranks[2], 1), ranks[2], 0), (ranks[2], ranks[4], 1)):
        grown = {int(key.split(".layers.")[1].split(".")[0]) for key in after if after[key] > before[key]}
        assert grown and grown <= set(seen[stretch]["selected"])
        assert all(after[key] - before[key] in (0, 2) for key in after)
