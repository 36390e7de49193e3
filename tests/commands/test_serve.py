"""python -m irtune serve: what it answers, what it refuses, and that nothing is lost under load."""

import contextlib
import http.client
import json
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import serve as benchmark
from irtune import __version__, cli
from irtune.data.synthetic import synthetic_pairs
from irtune.errors import DataError, ModelError
from irtune.tasks import SINGLE_LABEL
from tests.support.finished import finished_run

pytest.importorskip("fastapi", reason="fastapi is not installed: irtune[serve] has it")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: irtune[serve] has it")
from irtune.commands.serve.app import Limits, build_app  # noqa: E402

LABELS = ["short", "long"]


def stand_in(*, pairs: bool = True, sizes: list[int] | None = None):
    """A run whose probability of `long` is the number of letters after the revision, in hundreds."""

    def predict(examples, batch_size):
        if any(example.before == "fail" for example in examples):
            raise ModelError("this text is too much")
        if any(example.before == "blank" for example in examples):
            raise DataError("example '0' has no text")
        if sizes is not None:
            sizes.append(len(examples))
        texts = [example.before if example.after is None else example.after for example in examples]
        part = torch.tensor([len(text) / 100 for text in texts])
        return SimpleNamespace(probabilities=torch.stack([1 - part, part], 1))

    data = SimpleNamespace(after="after" if pairs else None, context=None, max_length=64)
    config = SimpleNamespace(
        data=data, model=SimpleNamespace(name_or_path="base"), adapter=SimpleNamespace(type="lora")
    )
    results = {
        "dev": {"accuracy": 0.5, "macro_f1": 0.25, "auprc": 0.75, "examples": 4},
        "versions": {"irtune": "0.0.9"},
    }
    return SimpleNamespace(
        folder=Path("runs/mine"), config=config, results=results, labels=LABELS, predict=predict, task=SINGLE_LABEL
    )


@contextlib.contextmanager
def served(run):
    """The port of a server in a thread."""
    limits = Limits(texts=3, size=2000, batch=4)
    server = uvicorn.Server(uvicorn.Config(build_app(run, limits), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)


def ask(port: int, path: str, content=None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
    connection.request("GET" if content is None else "POST", path, body)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def pair(letters: int) -> dict:
    return {"before": "x", "after": "a" * letters}


@pytest.mark.quick
def test_answers_and_refusals():
    with served(stand_in()) as port:
        status, found = ask(port, "/predict", {"texts": [pair(20), pair(90)]})
        assert status == 200
        assert found["predictions"] == [
            {"predicted": "short", "probability": 0.8, "probabilities": {"short": 0.8, "long": 0.2}},
            {"predicted": "long", "probability": 0.9, "probabilities": {"short": 0.1, "long": 0.9}},
        ]
        assert ask(port, "/health") == (200, {"status": "ok", "waiting": 0})
        status, card = ask(port, "/")
        assert (card["run"], card["labels"], card["dev"]["macro_f1"]) == ("mine", LABELS, 0.25)
        assert card["versions"]["irtune"] == "0.0.9" and card["limits"] == {"texts": 3, "bytes": 2000, "tokens": 64}
        refused = {
            "the request is not JSON": (422, b"{"),
            'the request must be {"texts": [...]} with at least one text': (422, {"texts": []}),
            'texts[1] is \'x\'; accepted: an object such as {"before": "...", "after": "..."}': (
                422,
                {"texts": [pair(1), "x"]},
            ),
            "the request has 4 texts; accepted: up to 3": (413, {"texts": [pair(1)] * 4}),
            "the request has more than 2,000 bytes; accepted: up to 2,000": (413, {"texts": [pair(3000)]}),
            "this text is too much": (500, {"texts": [{"before": "fail", "after": ""}]}),
            "example '0' has no text": (422, {"texts": [{"before": "blank", "after": ""}]}),
            "texts[0] has half a character (a surrogate of UTF-16 without the other)": (
                422,
                {"texts": [{"before": "a", "after": "\ud83d"}]},
            ),
        }
        for sentence, (status, content) in refused.items():
            assert ask(port, "/predict", content) == (status, {"error": sentence})
        assert ask(port, "/predict", {"texts": [pair(20)]})[0] == 200  # and it goes on
    with served(stand_in(pairs=False)) as port:
        assert ask(port, "/predict", {"texts": ["a" * 90]})[1]["predictions"][0]["predicted"] == "long"
        assert (
            "texts[0] is {'before': 'x'}; accepted: a text"
            in ask(port, "/predict", {"texts": [{"before": "x"}]})[1]["error"]
        )


@pytest.mark.quick
def test_requests_that_wait_are_computed_together_and_none_is_lost():
    sizes: list[int] = []
    draw = random.Random(0)
    asked = [[draw.randrange(100) for _ in range(draw.randint(1, 3))] for _ in range(300)]
    with served(stand_in(sizes=sizes)) as port, ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda sent: ask(port, "/predict", {"texts": list(map(pair, sent))}), asked))
    for sent, (status, answer) in zip(asked, found):
        assert status == 200
        assert [row["probabilities"]["long"] for row in answer["predictions"]] == pytest.approx([n / 100 for n in sent])
    assert sum(sizes) == sum(map(len, asked)) and max(sizes) > 3 and len(sizes) < len(asked)


@pytest.mark.quick
def test_a_request_that_fails_does_not_take_along_those_that_wait_with_it():
    sizes: list[int] = []
    bad = {"before": "fail", "after": ""}, {"before": "blank", "after": ""}
    asked = [[pair(number)] if number % 3 else [bad[number % 2]] for number in range(60)]
    with served(stand_in(sizes=sizes)) as port, ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda rows: ask(port, "/predict", {"texts": rows}), asked))
        assert ask(port, "/health") == (200, {"status": "ok", "waiting": 0})
    for number, (status, answer) in enumerate(found):
        if number % 3:
            assert status == 200 and answer["predictions"][0]["probabilities"]["long"] == number / 100
        else:
            assert status == (422 if number % 2 else 500)


@pytest.mark.quick
def test_a_run_of_another_version_and_an_open_address_are_named(llama, corpus, tmp_path, capsys, monkeypatch):
    run = finished_run(tmp_path / "run", llama, corpus)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"versions": {"irtune": "0.0.9"}}))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    assert cli.main(["serve", "--run", str(run), "--port", "0", "--host", "0.0.0.0"]) == 0
    said = capsys.readouterr()
    assert f"the run is of irtune 0.0.9, and this is {__version__}" in said.err
    assert "listening on 0.0.0.0: whoever reaches this machine can use it, without a login" in said.err
    assert f"serving {run} on http://0.0.0.0:" in said.out


@pytest.mark.quick
def test_the_benchmark_counts_what_is_lost_or_wrong():
    rows = [pair(number) for number in range(1, 8)]
    with served(stand_in()) as port:
        one, three = benchmark.measure(port, rows, seconds=0.2, loads=((2, 1), (2, 3)))
        wanted = [{"long": row["after"].count("a") / 100} for row in rows]
        refused = benchmark.load(port, rows, wanted, 1, 4, seconds=0.1)  # more texts than the server takes
        wanted[3]["long"] = 0.99
        wrong = benchmark.load(port, rows, wanted, 1, 1, seconds=0.2)
    assert one["lost_or_wrong"] == three["lost_or_wrong"] == 0 < wrong["lost_or_wrong"] < wrong["requests"]
    assert refused["lost_or_wrong"] == 4 * refused["requests"] > 0
    assert one["rows_per_request"] == 1 and three["rows_per_second"] >= 2.9 * three["requests_per_second"]
    assert 0 < one["p50_ms"] <= one["p95_ms"]


@pytest.mark.quick
def test_a_port_that_is_taken_and_packages_that_are_missing_are_said(tmp_path, capsys, monkeypatch):
    with served(stand_in()) as port:
        assert cli.main(["serve", "--run", str(tmp_path), "--port", str(port)]) == 2
        assert f"--host 127.0.0.1 --port {port}: Address already in use" in capsys.readouterr().err
    monkeypatch.setattr("irtune.commands.serve.command.importlib.util.find_spec", lambda name: None)
    assert cli.main(["serve", "--run", str(tmp_path)]) == 2
    assert "serve needs fastapi and uvicorn: pip install 'irtune[serve]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_run_is_served_as_predict_would_label(base, tmp_path, ending):
    # A shell in the background makes its children ignore SIGINT; then nothing would be seen of what a terminal does.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom irtune.cli import main\n"
    code += "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", "--run", str(base), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stdout.readline().split("127.0.0.1:")[1].split()[0])
            rows = [{"before": row["before"], "after": row["after"]} for row in synthetic_pairs(40)]
            with ThreadPoolExecutor(4) as clients:
                found = list(clients.map(lambda row: ask(port, "/predict", {"texts": [row]}), rows))
            together = ask(port, "/predict", {"texts": rows})[1]["predictions"]
        finally:
            process.send_signal(ending)
        assert process.wait(60) == 0
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["predict", "--run", str(base), "--input", str(source), "--output", str(target)]) == 0
    for line, row, (status, alone) in zip(target.read_text().splitlines(), together, found, strict=True):
        wanted = json.loads(line)["probabilities"]
        assert status == 200
        assert row["probabilities"] == pytest.approx(wanted, abs=2e-6)
        assert alone["predictions"][0]["probabilities"] == pytest.approx(wanted, abs=2e-6)
