"""A server of files on this machine, which can be told to misbehave."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Server:
    """What is served, and how; `asked` are the paths with the first byte asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, Callable[[str], bytes]] = field(default_factory=dict)
    """By path: what answers a query."""
    knows_parts: bool = True
    cuts: list[int] = field(default_factory=list)
    """Bytes after which each of the next answers breaks off."""
    refusals: list[int] = field(default_factory=list)
    """Codes of the next answers."""
    asked: list[tuple[str, int]] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path, first = urlsplit(self.path), int(self.headers.get("Range", "bytes=0-")[6:-1])
            server.asked.append((path.path, first))
            if server.refusals:
                self.send_error(server.refusals.pop(0))
                return
            answer = server.answers.get(path.path)
            content = answer(path.query) if answer else server.files.get(path.path)
            if content is None:
                self.send_error(404)
                return
            if first and first >= len(content) and server.knows_parts:
                self.send_error(416)
                return
            part = first > 0 and server.knows_parts
            self.send_response(206 if part else 200)
            body = content[first:] if part else content
            self.send_header("Content-Length", str(len(body)))
            if part:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
