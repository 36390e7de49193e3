"""Every architecture of the zoo: what irtune trains, plain transformers and peft compute."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from irtune.adapters.build import add_adapters
from irtune.adapters.guard import watch
from irtune.commands import export
from irtune.config import AdapterConfig, ModelConfig, load_config
from irtune.data import Encoder, collate, read_corpus
from irtune.errors import ConfigError, ModelError
from irtune.evaluation.saved_run import load_run
from irtune.models import load_classifier
from tests.support import ROOT, tiny, zoo
from tests.support.ranks import run_cases
from tests.support.runs import launch, train

REFUSED = {("t5", "float32"), ("t5", "bfloat16"), ("xlnet", "bfloat16")}
QUICK = [("bloom", "bfloat16"), ("mpnet", "bfloat16"), ("xlnet", "float32")]
ALL = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else pytest.mark.slow, id=f"{name}-{dtype}")
    for name in zoo.ZOO
    for dtype in ("float32", "bfloat16")
    if (name, dtype) not in REFUSED
]
SETTINGS = [
    {},
    {"type": "dora"},
    {"type": "rslora"},
    {"type": "pissa"},
    {"type": "bottleneck", "size": 8},
    {"type": "bottleneck", "size": 8, "placement": "parallel"},
    {"type": "bitfit"},
    {"type": "prefix", "num_tokens": 3},
    {"type": "prompt", "num_tokens": 3},
    {"type": "none"},
    {"type": "ltuning-prompt", "size": 8},
    {"type": "ltuning-prefix", "num_tokens": 3},
    {"type": "spafit"},
]


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    zoo.corpus(folder / "corpus")
    return folder


def trained(box, name, dtype, stage=0, world=1):
    out = box / f"{name}-{dtype}-{stage}" / "run"
    out.parent.mkdir()
    config = tiny.tiny_config(zoo.build(name, box), box / "corpus", out, stage, model__dtype=dtype, optim__max_steps=3,
                              optim__lr=0.05, tuning__method="full")  # fmt: skip
    return launch(config, world)


def in_plain_libraries(model, run: Path) -> torch.Tensor:
    """Probabilities of the dev split, in the run's batches, padded as the base's kind of model needs it."""
    config = load_config(["--config", str(run / "config.yaml")])
    corpus = read_corpus(config.data)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name_or_path)
    encoder = Encoder(tokenizer, config.data, corpus.labels)
    found = []
    for example in corpus.splits["dev"]:  # one by one: there is no padding, on whatever side
        batch = collate([encoder.encode(example)], zoo.PAD)
        with torch.no_grad():
            found.append(model.eval()(**batch).logits.float().softmax(-1))
    return torch.cat(found)


def own(run: Path) -> torch.Tensor:
    labels = list(json.loads((run / "results.json").read_text())["dev"]["per_class"])
    lines = (run / "predictions.jsonl").read_text().splitlines()
    return torch.tensor([[json.loads(line)["probabilities"][label] for label in labels] for line in lines])


def same(found: torch.Tensor, wanted: torch.Tensor, dtype: str, *, routed: bool = False) -> None:
    """Equal to rounding. In bf16, a model `routed` to experts may send a token of one text to another expert."""
    tolerance = 1e-4 if dtype == "float32" else 0.05
    far = ((found - wanted).abs() > tolerance).any(1)
    assert int(far.sum()) <= (1 if routed and dtype != "float32" else 0), (found - wanted).abs().amax(1)
    top = wanted.topk(2).values
    clear = (top[:, 0] - top[:, 1] > (0 if dtype == "float32" else 0.05)) & ~far
    assert torch.equal(found.argmax(1)[clear], wanted.argmax(1)[clear])


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_runs_are_the_same_in_plain_transformers_and_peft(box, name, dtype, tmp_path):
    run = trained(box, name, dtype)
    wanted = own(run)
    assert export.main(["--run", str(run), "--to", str(tmp_path / "adapter")]) == 0
    base = AutoModelForSequenceClassification.from_pretrained(box / name, num_labels=3, dtype=getattr(torch, dtype))
    for part in (base.config, base.config.get_text_config()):
        part.pad_token_id = zoo.PAD
    routed = hasattr(base.config, "num_experts_per_tok")
    plain = in_plain_libraries(PeftModel.from_pretrained(base, tmp_path / "adapter"), run)
    same(plain, wanted, dtype, routed=routed)
    assert export.main(["--run", str(run), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.problem_type == "single_label_classification"
    same(in_plain_libraries(merged, run), wanted, dtype, routed=routed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_input_that_pairs_have_by_default_comes_back_from_exports(box, tmp_path, dtype):
    """diff and mean+edit, whose head plain peft does not have: read by irtune, from the adapter and merged."""
    names = [name for name in zoo.ZOO if (name, dtype) not in REFUSED]
    if dtype == "bfloat16":  # what rounds differently is the base, whatever reads it
        names = ["gemma2", "mpnet", "qwen2"]
    for name in names:
        (tmp_path / name).mkdir()
    configs = [
        tiny.tiny_config(zoo.build(name, box), box / "corpus", tmp_path / name / "run", model__dtype=dtype,
                         data__prompt="diff", model__pooling="mean+edit", optim__max_steps=3, optim__lr=0.05,
                         tuning__method="full")
        for name in names
    ]  # fmt: skip
    assert run_cases(train, 1, [(config,) for config in configs]) == [[None]] * len(configs)
    examples = read_corpus(configs[0].data).splits["dev"]
    for name in names:
        run = tmp_path / name / "run"
        for options in ([], ["--merge"]):
            folder = tmp_path / name / f"exported{len(options)}"
            assert export.main(["--run", str(run), "--to", str(folder), *options]) == 0
            loaded = load_run(folder, torch.device("cpu"))
            found = loaded.predict(examples, 1).probabilities
            wanted = own(run)
            assert wanted.std() > 0.05, f"{name} has learned nothing"
            same(found, wanted, dtype, routed=hasattr(loaded.classifier.model.config, "num_experts_per_tok"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["qwen2", "bloom", "roberta", "deberta2"])
def test_two_ranks_give_what_one_gives(box, name, stage, tmp_path):
    run = trained(box, name, "float32", stage, 2)
    base = AutoModelForSequenceClassification.from_pretrained(box / name, num_labels=3)
    base.config.pad_token_id = zoo.PAD
    same(in_plain_libraries(PeftModel.from_pretrained(base, run / "adapter"), run), own(run), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ZOO)
def test_settings_keep_padding_from_counting_or_are_refused(box, name):
    """What is not refused is looked at by other means than the guard's: batches in two orders."""
    texts = [{"input_ids": list(range(4, 4 + length))} for length in (5, 9, 17, 30)]
    outcomes = []
    for settings in SETTINGS:
        adapter = AdapterConfig(**{"r": 4} | settings)
        try:
            classifier = load_classifier(ModelConfig(name_or_path=str(zoo.build(name, box)), dtype="float32"),
                                         list(zoo.LABELS))  # fmt: skip
            guard = watch(classifier, texts, patient=True)
            model, table = add_adapters(classifier, adapter)
            guard.check(model, table, adapter)
        except (ConfigError, ModelError):
            outcomes.append(False)
            continue
        torch.manual_seed(1)
        for _, parameter in table.all():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        model.eval()
        with torch.no_grad():
            alone = torch.cat([model(**collate([text], zoo.PAD)).logits for text in texts])
            together = model(**collate(texts, zoo.PAD)).logits
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
        outcomes.append(True)
    assert any(outcomes) == (name != "t5")


def test_what_the_zoo_cannot_do_is_refused_before_anything_is_written(box, caplog):
    from irtune.commands import validate

    for name, dtype in sorted(REFUSED):
        options = [f"--model.name_or_path={zoo.build(name, box)}", f"--model.dtype={dtype}",
                   f"--data.path={box / 'corpus'}", f"--run.output_dir={box / 'never'}"]  # fmt: skip
        with caplog.at_level(logging.WARNING), pytest.raises(ConfigError, match=r"two lists of layers|model\.dtype"):
            validate.main(options)
    assert not (box / "never").exists()


@pytest.mark.slow
def test_the_page_of_architectures_is_current():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    made = subprocess.run([sys.executable, "docs/make_models.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout.endswith(page), "out of date; run: python docs/make_models.py > docs/models.md"


def test_the_page_of_architectures_has_them_all():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(config.__name__.removesuffix("Config") in page for _, config, _ in zoo.ZOO.values())
