"""A server in this process for tests: its model in one thread, HTTP in another."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest

from mlx_flash.loading import load as loading
from mlx_flash.server import app
from mlx_flash.server.access import Access
from mlx_flash.server.bodies import Bodies
from mlx_flash.server.engine import LOADING, QUEUE_LIMIT, Engine
from mlx_flash.server.library import Library
from mlx_flash.server.serving import HttpThread, bind, url_of
from mlx_flash.text import prompt_cache

PATIENCE_S = 600  # limit of every wait; no test needs it


def until(condition: Callable[[], Any]) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


class Server:
    def __init__(self, engine: Engine, http: HttpThread, url: str, held: Bodies) -> None:
        self.engine, self.http, self.url, self.held = engine, http, url, held
        self.port = int(url.rsplit(":", 1)[1])

    def client(self, **options: Any) -> httpx.Client:
        """A client without certificate authorities. Reading them takes longer than a request, and no test uses TLS."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, verify=False, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def idle(self) -> None:
        """Waits until the server is idle."""
        until(lambda: not self.engine.running and not self.engine.waiting)

    @property
    def totals(self) -> dict[str, float]:
        assert self.engine.switch.totals is not None
        return self.engine.switch.totals


@contextlib.contextmanager
def serving(
    load: Callable[[], tuple[Any, Any]] = loading.load,
    name: str = "demo",
    limit: int = QUEUE_LIMIT,
    key: str | None = None,
    wait: bool = True,
    access: Access | None = None,
    library: Callable[[Engine], Library] | None = None,
) -> Iterator[Server]:
    """Runs a server. wait: until the model is loaded. access: None for one that accepts only `key`.

    library: makes the one of this engine; the server's own model is still loaded by `load`.
    """
    engine = Engine(name, "somewhere", limit)
    models = None if library is None else library(engine)
    bound = bind("127.0.0.1", 0)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            engine.run(lambda _: load())
        except BaseException as error:  # reported below
            raised.append(error)

    thread = threading.Thread(target=run)
    held = Bodies()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "Bodies", lambda: held)
        made = app.make_app(engine, access or Access(key=key), models)
    with HttpThread(made, bound) as http:
        thread.start()
        try:
            if wait:
                until(lambda: engine.state != LOADING)
            yield Server(engine, http, url_of(bound), held)
        finally:
            engine.stop()
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    if models is not None:
        models.close()
    if wait and raised:
        raise raised[0]


class Gate:
    """Stops every generation at each piece (16 tokens) of its prompt and at each token until the test continues it."""

    def __init__(self) -> None:
        self.reached: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()  # ("prompt", done) or ("token", number)
        self._steps = threading.Semaphore(0)
        self._opened = False
        self._real = prompt_cache.stream_generate

    def stream_generate(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        told = options.pop("prompt_progress_callback")

        def progress(done: int, total: int) -> None:
            self._stop("prompt", done)
            told(done, total)

        for response in self._real(*arguments, prompt_progress_callback=progress, **options):
            self._stop("token", response.generation_tokens)
            yield response

    def _stop(self, kind: str, number: int) -> None:
        self.reached.put((kind, number))
        if not self._opened:
            assert self._steps.acquire(timeout=PATIENCE_S)

    def go_on_to(self, kind: str, number: int) -> None:
        """Lets the generation continue until it stops there."""
        while self.reached.get(timeout=PATIENCE_S) != (kind, number):
            self._steps.release()

    def open(self) -> None:
        self._opened = True
        self._steps.release()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(prompt_cache, "stream_generate", gate.stream_generate)
    monkeypatch.setattr(prompt_cache, "chunk_of", lambda _: 16)
    yield gate
    gate.open()
