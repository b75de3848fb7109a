"""Images over HTTP, in every API, by a model of mlx-vlm."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, serving  # type: ignore[import-not-found]
from vlm_mixtures import make_seeing_mixture  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.server import prompts
from mlx_flash.text import images
from mlx_flash.text.image_prompts import processor_of, see
from mlx_flash.text.images import decode

pytestmark = [pytest.mark.vlm, pytest.mark.filterwarnings("ignore")]  # other people's
pytest.importorskip("mlx_vlm")
Image = pytest.importorskip("PIL.Image")

TOKENS = 6
GREEDY = {"temperature": 0, "max_tokens": TOKENS}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = make_seeing_mixture(tmp_path_factory.mktemp("seeing"))
    with serving(lambda: mlx_flash.load(folder, images=True, context=400, prompt_cache="20MB")) as running:
        yield running


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def url(content: bytes) -> str:
    return f"data:image/png;base64,{in_base64(content)}"


def part(address: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def asked(*addresses: str, text: str = "what") -> dict[str, Any]:
    return {"role": "user", "content": [*(part(address) for address in addresses), {"type": "text", "text": text}]}


def chat(server: Server, *messages: dict[str, Any], **more: Any) -> Any:
    return server.post("/v1/chat/completions", {"messages": list(messages), **GREEDY, **more})


def answer(server: Server, *messages: dict[str, Any]) -> str:
    found = chat(server, *messages)
    assert found.status_code == 200, found.text
    text: str = found.json()["choices"][0]["message"]["content"]
    return text


def test_the_answer_is_the_model_s(server: Server) -> None:
    model, tokenizer = server.engine.model, server.engine.tokenizer
    expected = []
    for seed in (0, 1):
        text = "<|vision_start|><|image_pad|><|vision_end|>what"
        prompt = processor_of(model).prompt(text, [decode(png(seed))])
        made = mlx_flash.stream_generate(model, tokenizer, prompt.ids, TOKENS, prompt_cache=see(model, prompt))
        expected.append("".join(one.text for one in made))
    assert expected[0] != expected[1]
    for _ in range(2):  # the second time beside what is kept of the first
        assert [answer(server, asked(url(png(seed)))) for seed in (0, 1)] == expected


def test_a_conversation(server: Server) -> None:
    """An image in an earlier turn is seen again, and a text is not mixed up with it."""
    first = asked(url(png()))
    turns = [first, {"role": "assistant", "content": "so"}, {"role": "user", "content": "and now"}]
    usage = chat(server, *turns).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert answer(server, *turns) == answer(server, *turns)
    assert answer(server, *turns) != answer(server, asked(url(png(1))), *turns[1:])
    text = answer(server, {"role": "user", "content": "what is there"})
    answer(server, first)
    assert answer(server, {"role": "user", "content": "what is there"}) == text


def test_every_api_gives_the_same_answer(server: Server) -> None:
    expected = answer(server, asked(url(png())))
    source = {"type": "base64", "media_type": "image/png", "data": in_base64(png())}
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": "what"}]
    message = {"messages": [{"role": "user", "content": blocks}], **GREEDY}
    found = server.post("/v1/messages", message)
    assert found.status_code == 200 and found.json()["content"][0]["text"] == expected, found.text
    counted = server.post("/v1/messages/count_tokens", {"messages": message["messages"]}).json()["input_tokens"]
    assert counted == found.json()["usage"]["input_tokens"] > 4
    options = {"stream": False, "options": {"temperature": 0, "num_predict": TOKENS}}
    told = {"messages": [{"role": "user", "content": "what", "images": [in_base64(png())]}], **options}
    assert server.post("/api/chat", told).json()["message"]["content"] == expected
    told = {"prompt": "what", "images": [in_base64(png())], **options}
    assert server.post("/api/generate", told).json()["response"] == expected
    parts = [{"type": "input_image", "image_url": url(png())}, {"type": "input_text", "text": "what"}]
    body = {"input": [{"role": "user", "content": parts}], "temperature": 0, "max_output_tokens": TOKENS}
    found = server.post("/v1/responses", body).json()
    assert found["output"][0]["content"][0]["text"] == expected


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:9/a.png", "nothing is fetched"),
        ("https://example.org/a.png", "nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("/etc/passwd", "nothing is fetched"),
        ("data:image/png;base64,aGk=", "begins with b'hi', which is not a known image; expected PNG"),
        ("data:image/png;base64,?", "not valid base64"),
        (url(png()[:200]), "is damaged"),
    ],
)
def test_what_is_not_an_image(server: Server, address: str, said: str) -> None:
    found = chat(server, asked(address))
    assert found.status_code == 400 and said in found.json()["error"]["message"], found.text


def test_images_beyond_the_most_are_not_decoded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body holds thousands of small files that are large once they are decoded."""
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("an image is decoded"))
    found = chat(server, asked(*[url(png())] * 17))
    assert found.status_code == 400 and "17 images; the most is 16" in found.text


def test_the_memory_of_decoding_is_given_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine, which also does so, never sees a request whose client has left, or whose images are refused."""
    inside: list[str] = []

    @contextmanager
    def given_back() -> Iterator[None]:
        inside.append("begin")
        yield
        inside.append("end")

    def decoding(content: bytes, name: str) -> images.Picture:
        inside.append("decode")
        return decode(content, name)

    monkeypatch.setattr(prompts, "large_memory_given_back", given_back)
    monkeypatch.setattr(images, "decode", decoding)
    assert chat(server, asked(url(png()))).status_code == 200
    assert inside == ["begin", "decode", "end"]


def test_limits(server: Server) -> None:
    found = chat(server, asked(*[url(png())] * 17))
    assert found.status_code == 400 and "17 images; the most is 16" in found.text
    found = chat(server, asked(url(bytes(13 << 20))))
    assert found.status_code == 413
    found = chat(server, asked(url(bytes(8 << 20) + b"0")))
    assert found.status_code == 400 and "more than 8 MiB" in found.text
    found = chat(server, asked(url(png()), text="a" * 500))
    assert found.status_code == 400 and "tokens" in found.text
    found = chat(server, {"role": "system", "content": [part(url(png()))]})
    assert found.status_code == 400 and "only messages of the role 'user' may have images" in found.text


def test_a_server_that_reads_text_only(tmp_path: Path) -> None:
    folder = make_seeing_mixture(tmp_path / "seeing")
    with serving(lambda: mlx_flash.load(folder, context=100)) as running:
        found = chat(running, asked(url(png())))
        assert found.status_code == 400 and "start the server with --images" in found.text
