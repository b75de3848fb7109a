"""A local Hugging Face Hub with as much HTTP as huggingface_hub needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 1 << 20  # larger files are LFS files, whose ETag is their SHA-256


def digest(data: bytes) -> str:
    """The Hub's ETag: SHA-256 for large files, the SHA-1 of a git blob for small ones."""
    if len(data) >= LFS_BYTES:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """repositories: id -> revision -> files. The other fields are set or examined by tests."""

    address: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    downloads: dict[str, int] = field(default_factory=dict)  # repository -> how often it was downloaded
    broken: bool = False  # answer 500 to every request
    cut_at: dict[str, int] = field(default_factory=dict)  # file -> byte at which every connection ends
    stall_at: dict[str, int] = field(default_factory=dict)  # file -> byte after which nothing more is sent
    stalled: threading.Event = field(default_factory=threading.Event)
    whole: bool = False  # send whole files, whatever range is asked for
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # (method, path, Range)

    def commit(self, repository: str, revision: str) -> str:
        return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()

    def add(self, repository: str, folder: Path, revision: str = "main", **more: bytes) -> None:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories.setdefault(repository, {})[revision] = files | more

    def fetched(self) -> dict[str, list[str | None]]:
        """File -> the Range of each of its GET requests."""
        result: dict[str, list[str | None]] = {}
        for method, what, span in self.requests:
            if method == "GET" and not what.startswith("/api/"):
                result.setdefault(what, []).append(span)
        return result

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that uses this Hub."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return kept | {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MLX_FLASH_CACHE": str(home / "stores"),
            "NO_PROXY": "127.0.0.1",
        }

    def run(self, home: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs Python with these arguments and a Hugging Face cache in `home`."""
        return subprocess.run(
            [sys.executable, *map(str, command)],
            env=self.environment(home) | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.hub
        if hub.broken:
            return self.send(500, b"out of order")
        if path == "/api/models":
            hub.requests.append((self.command, self.path, None))
            return self.answer_search(parse_qs(urlsplit(self.path).query))
        if path.startswith("/api/models/"):
            hub.requests.append((self.command, path, None))
            owner, name, *rest = path.removeprefix("/api/models/").split("/", 3)
            return self.answer_api(f"{owner}/{name}", *rest)
        owner, name, _, revision, file = path.removeprefix("/").split("/", 4)
        hub.requests.append((self.command, file, self.headers.get("Range")))
        return self.answer_file(f"{owner}/{name}", revision, file)

    def answer_search(self, asked: dict[str, list[str]]) -> None:
        """Repositories whose id contains the text, those that were downloaded most often first."""
        hub, text = self.hub, asked.get("search", [""])[0].lower()
        names = [name for name in hub.repositories if text in name.lower() and name not in hub.private]
        names.sort(key=lambda name: -hub.downloads.get(name, 0))
        found = [self.described(name) for name in names[: int(asked.get("limit", ["1000"])[0])]]
        self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def described(self, repository: str) -> dict[str, Any]:
        files = self.hub.repositories[repository]["main"]
        told: dict[str, Any] = {"id": repository, "downloads": self.hub.downloads.get(repository, 0), "tags": []}
        with contextlib.suppress(KeyError, ValueError):
            told["config"] = {"model_type": json.loads(files["config.json"])["model_type"]}
        counts: dict[str, int] = {}
        for data in (data for name, data in files.items() if name.endswith(".safetensors")):
            for name, entry in header_of(data).items():
                if name != "__metadata__":
                    counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + math.prod(entry["shape"])
        if counts:
            told["safetensors"] = {"parameters": counts, "total": sum(counts.values())}
        return told

    def answer_api(self, repository: str, kind: str = "revision", revision: str = "main") -> None:
        if repository in self.hub.private:
            return self.refuse(401, "RepoNotFound")
        if repository not in self.hub.repositories:
            return self.refuse(404, "RepoNotFound")
        files = self.files_of(repository, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if kind == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)} | large(data)
                for name, data in files.items()
            ]
            return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": digest(data)} | large(data) for name, data in files.items()
        ]
        sha = revision if len(revision) == 40 else self.hub.commit(repository, revision)
        info = {"id": repository, "sha": sha, "siblings": siblings, "tags": [], "private": False}
        self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def answer_file(self, repository: str, revision: str, file: str) -> None:
        hub = self.hub
        if repository in hub.gated:
            return self.refuse(401, "GatedRepo")
        files = self.files_of(repository, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[file]
        begin, status, headers = 0, 200, {"ETag": f'"{digest(data)}"', "X-Repo-Commit": revision}
        if (span := self.headers.get("Range")) and not hub.whole:
            first, _, last = span.removeprefix("bytes=").partition("-")
            begin, status = int(first), 206
            end = min(len(data), int(last) + 1) if last else len(data)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            data = data[:end]
        if self.command == "GET" and file in hub.cut_at:
            self.send(status, data[begin:], headers, only=max(0, hub.cut_at[file] - begin))
            self.close_connection = True
        elif self.command == "GET" and file in hub.stall_at:
            self.send(status, data[begin:], headers, only=max(0, hub.stall_at[file] - begin))
            self.wfile.flush()
            hub.stalled.set()
            with contextlib.suppress(OSError):
                self.connection.recv(1)  # waits until the other side has disconnected
            self.close_connection = True
        else:
            self.send(status, data[begin:], headers)

    def files_of(self, repository: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.hub.repositories[repository]
        return next((f for r, f in revisions.items() if revision in (r, self.hub.commit(repository, r))), None)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None, only: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # the client was killed
                self.wfile.write(data if only is None else data[:only])


def header_of(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file; empty if there is none."""
    try:
        return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))
    except ValueError:
        return {}


def large(data: bytes) -> dict[str, Any]:
    if len(data) < LFS_BYTES:
        return {}
    oid = hashlib.sha256(data).hexdigest()
    return {"lfs": {"oid": oid, "sha256": oid, "size": len(data), "pointerSize": 134}}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leaves out what a client that has gone causes."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Runs a Hub on 127.0.0.1 in threads of this process."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
