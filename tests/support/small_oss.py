"""A small stand-in for the cloud's object storage. It keeps objects as they arrive, and needs the standard library only."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class SmallOss(ThreadingHTTPServer):
    """Stores objects in memory. `stored` has the metadata and the content of each, by its path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stored: dict[str, tuple[dict[str, str], bytes]] = {}

    @property
    def endpoint(self) -> str:
        """The endpoint for clients."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    """PUT stores an object with its metadata. GET and HEAD return both, and GET also a part."""

    protocol_version = "HTTP/1.1"
    server: SmallOss

    def do_PUT(self) -> None:
        metadata = {
            name.lower(): value for name, value in self.headers.items() if name.lower().startswith("x-oss-meta-")
        }
        self.server.stored[self.path] = (metadata, self._body())
        self._answer(HTTPStatus.OK, {"ETag": '"1"'}, b"")

    def do_GET(self) -> None:
        metadata, content = self.server.stored[self.path]
        wanted = self.headers.get("range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            extent = {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}
            self._answer(HTTPStatus.PARTIAL_CONTENT, {**metadata, **extent}, part)
        else:
            self._answer(HTTPStatus.OK, metadata, content)

    do_HEAD = do_GET  # noqa: N815 - the name is of the standard library

    def _body(self) -> bytes:
        if "content-length" in self.headers:
            return self.rfile.read(int(self.headers["content-length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: HTTPStatus, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "x-oss-request-id": "1", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write nothing to standard error."""


@contextmanager
def small_oss() -> Iterator[SmallOss]:
    """Serve in a thread."""
    with SmallOss() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
