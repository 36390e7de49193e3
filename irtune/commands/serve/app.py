"""The web application: what a request may hold, and one worker that computes those that wait together."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from irtune import __version__
from irtune.data import Example
from irtune.errors import DataError, IrtuneError, brief, one_line
from irtune.evaluation.saved_run import LoadedRun
from irtune.tasks.base import Label

log = logging.getLogger("irtune")
CHARACTERS = 1_000_000  # of a text, as in a corpus
WAITING = 20_000  # texts that may wait; beyond that, clients are told to come later


@dataclass(frozen=True, kw_only=True)
class Limits:
    """texts: in a request. size: bytes of a request. batch: examples per forward pass."""

    texts: int
    size: int
    batch: int


class RequestError(Exception):
    """A request that is not answered: HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass
class Batcher:
    """Computes requests in their order, all that wait at a time, in one thread beside the one that answers."""

    run: LoadedRun
    batch: int
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    waiting: int = 0  # texts, with those that are being computed

    async def predict(self, examples: list[Example]) -> list[torch.Tensor]:
        """Scores [classes] of each example."""
        if self.waiting + len(examples) > WAITING:
            raise RequestError(503, f"{self.waiting} texts are waiting already; try again later")
        answer = asyncio.get_running_loop().create_future()
        self.waiting += len(examples)
        await self.queue.put((examples, answer))
        return await answer

    async def work(self) -> None:
        """Answer for ever."""
        while True:
            together = [await self.queue.get()]
            while not self.queue.empty() and sum(len(examples) for examples, _ in together) < 4 * self.batch:
                together.append(self.queue.get_nowait())
            try:
                await self._answer(together)
            finally:
                self.waiting -= sum(len(examples) for examples, _ in together)

    async def _answer(self, together: list[tuple[list[Example], asyncio.Future]]) -> None:
        every = [example for examples, _ in together for example in examples]
        try:
            found = await asyncio.to_thread(self.run.predict, every, self.batch)
        except Exception as error:  # one that fails must not end the worker, nor leave clients waiting
            if len(together) > 1:  # whose fault it is shows when each is computed alone
                for one in together:
                    await self._answer([one])
                return
            ((_, answer),) = together
            failure = RequestError(422, one_line(error)) if isinstance(error, DataError) else None
            if failure is None:
                log.exception("a batch of %d texts failed", len(every))
                known = isinstance(error, IrtuneError)
                failure = RequestError(500, one_line(error) if known else "an error in the model; see the server")
            if not answer.done():  # done: its client has gone
                answer.set_exception(failure)
            return
        rows = list(found.probabilities)
        for examples, answer in together:
            mine, rows = rows[: len(examples)], rows[len(examples) :]
            if not answer.done():
                answer.set_result(mine)


def build_app(run: LoadedRun, limits: Limits) -> FastAPI:
    """The application of a loaded run."""
    batcher = Batcher(run, limits.batch)

    @contextlib.asynccontextmanager
    async def working(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        yield
        worker.cancel()

    # Its pages of documentation load scripts from elsewhere.
    app = FastAPI(title="irtune", version=__version__, lifespan=working, docs_url=None, redoc_url=None)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batcher.waiting}

    @app.get("/")
    async def card() -> dict[str, Any]:
        return model_facts(run, limits)

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        content = await _body(request, limits.size)
        examples = read_examples(content, names=text_names(run), limits=limits, blank=run.task.blank)
        return {"predictions": [run.task.written(row, run.labels) for row in await batcher.predict(examples)]}

    return app


def model_facts(run: LoadedRun, limits: Limits) -> dict[str, Any]:
    """What the model is, how good it was, and what a request may hold."""
    config = run.config
    pair = config.data.after is not None
    shown = {"before": "I has a cat.", "after": "I have a cat.", "context": "I live alone."}
    example: Any = {name: shown[name] for name in text_names(run)}
    return {
        "run": run.folder.resolve().name,
        "base_model": config.model.name_or_path,
        "adapter": config.adapter.type,
        "task": "pairs of texts" if pair else "single texts",
        "labels": run.labels,
        "dev": {name: run.results["dev"].get(name) for name in (*run.task.headline, "examples")},
        "example": {"texts": [example or "I have a cat."]},
        "limits": {"texts": limits.texts, "bytes": limits.size, "tokens": config.data.max_length},
        "versions": run.results.get("versions", {}) | {"irtune_here": __version__},
    }


async def _body(request: Request, most: int) -> bytes:
    """The request's content, of which no more than `most` bytes are read."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise RequestError(413, f"the request has more than {most:,} bytes; accepted: up to {most:,}")
    return content


def text_names(run: LoadedRun) -> list[str]:
    """The keys of a request's texts; none where a text is all there is."""
    data = run.config.data
    names = [name for name in ("after", "context") if getattr(data, name) is not None]
    return ["before", *names] if names else []


def read_examples(content: bytes, *, names: Sequence[str], limits: Limits, blank: Label) -> list[Example]:
    """The examples of a request, with the label `blank`. names: as `text_names` gives them.

    Raises:
        RequestError: 413 for too many texts or one that is too long, 422 for anything else that is not as it should be.
    """
    form = f"an object such as {json.dumps(dict.fromkeys(names, '...'))}" if names else "a text"
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError(422, "the request is not JSON") from None
    texts = found.get("texts") if isinstance(found, dict) else None
    if not isinstance(texts, list) or not texts:
        raise RequestError(422, 'the request must be {"texts": [...]} with at least one text')
    if len(texts) > limits.texts:
        raise RequestError(413, f"the request has {len(texts):,} texts; accepted: up to {limits.texts:,}")
    examples = []
    for number, item in enumerate(texts):
        parts = {"before": item}
        if names:
            parts = {name: item.get(name) for name in names} if isinstance(item, dict) else {"before": None}
        written = {name: part for name, part in parts.items() if isinstance(part, str)}
        if len(written) < len(parts):
            raise RequestError(422, f"texts[{number}] is {brief(item)}; accepted: {form}")
        if any("\ud800" <= character <= "\udfff" for text in written.values() for character in text):
            raise RequestError(422, f"texts[{number}] has half a character (a surrogate of UTF-16 without the other)")
        longest = max(map(len, written.values()))
        if longest > CHARACTERS:
            raise RequestError(413, f"texts[{number}] has {longest:,} characters; accepted: up to {CHARACTERS:,}")
        before, after, context = (written.get(name) for name in ("before", "after", "context"))
        examples.append(Example(str(number), before or "", after, blank, context=context))
    return examples
