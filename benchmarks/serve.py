"""Requests per second, latency and losses of `irtune serve` over real HTTP on this machine.

    python benchmarks/serve.py --run RUN --input FILE.jsonl

Starts the server, asks it for rows of FILE one by one from 1, 8 and 32 clients that keep their connections, and in
requests of 32 rows, and compares every answer with that of the row asked alone. Results go to
benchmarks/results/serve-cpu.json and as a table to standard output.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOADS = ((1, 1), (8, 1), (32, 1), (4, 32))  # clients, rows in each request
NEAR = 0.005  # between probabilities in bf16 whose padding differs


class Client(threading.local):
    """A connection of each thread."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def ask(self, rows: Sequence[Any]) -> tuple[float, list[dict[str, Any]]]:
        """Seconds until the answer was read, and the predictions; none where the status is not 200."""
        start = time.perf_counter()
        self.connection.request("POST", "/predict", json.dumps({"texts": rows}))
        answer = self.connection.getresponse()
        content = json.loads(answer.read())
        return time.perf_counter() - start, content["predictions"] if answer.status == 200 else []


def load(port: int, rows: Sequence[Any], wanted: Sequence[dict[str, float]], clients: int, size: int, seconds: float):
    """What `clients` that ask for `size` rows at a time, again and again for `seconds`, see."""
    client, end = Client(port), time.perf_counter() + seconds

    def work(first: int) -> list[tuple[float, int]]:
        seen = []
        while time.perf_counter() < end:
            places = [(first + place) % len(rows) for place in range(size)]
            first += clients * size
            latency, found = client.ask([rows[place] for place in places])
            good = [max(abs(one["probabilities"][name] - value) for name, value in wanted[place].items()) <= NEAR
                    for place, one in zip(places, found)]  # fmt: skip
            seen.append((latency, size - sum(good)))
        return seen

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        seen = [one for part in threads.map(work, range(0, clients * size, size)) for one in part]
    took = time.perf_counter() - start
    cuts = statistics.quantiles([latency for latency, _ in seen], n=20)
    return {
        "clients": clients,
        "rows_per_request": size,
        "requests": len(seen),
        "requests_per_second": round(len(seen) / took, 2),
        "rows_per_second": round(len(seen) * size / took, 2),
        "p50_ms": round(1000 * cuts[9], 1),
        "p95_ms": round(1000 * cuts[18], 1),
        "lost_or_wrong": sum(lost for _, lost in seen),
    }


def measure(port: int, rows: Sequence[Any], seconds: float, loads: Sequence[tuple[int, int]] = LOADS) -> list[dict]:
    """Every load, after each row has been asked alone."""
    client = Client(port)
    wanted = [client.ask([row])[1][0]["probabilities"] for row in rows]
    return [load(port, rows, wanted, clients, size, seconds) for clients, size in loads]


def table(loads: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = ["| clients | rows per request | requests | requests/s | rows/s | p50 (ms) | p95 (ms) | lost or wrong |"]
    lines.append("|" + "---|" * 8)
    lines += ["| " + " | ".join(f"{value:,}" for value in one.values()) + " |" for one in loads]
    return "\n".join(lines)


def main() -> int:
    """Measure a run."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", required=True)
    options.add_argument("--input", required=True, type=Path, help=".jsonl with the columns --before and --after")
    options.add_argument("--before", default="before")
    options.add_argument("--after", default="after")
    options.add_argument("--seconds", type=float, default=20, help="of each load")
    options.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/serve-cpu.json")
    given = options.parse_args()
    lines = [json.loads(line) for line in given.input.read_text(encoding="utf-8").splitlines()[:50]]
    rows = [{"before": line[given.before], "after": line[given.after]} for line in lines]
    command = [sys.executable, "-m", "irtune", "serve", "--run", given.run, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().split("127.0.0.1:")[1].split()[0])
            loads = measure(port, rows, given.seconds)
        finally:
            server.terminate()
    characters = round(statistics.mean(len(row["before"]) + len(row["after"]) for row in rows))
    found = {"run": Path(given.run).name, "characters_per_row": characters, "loads": loads}
    given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(loads) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
