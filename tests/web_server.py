"""A web server on the loopback interface for tests."""

import sys
import threading
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class WebServer(ThreadingHTTPServer):
    """A server that answers at `url`: `with WebServer(handler) as server:`.

    It prints nothing about clients that hang up: a client that refuses an answer, or is killed, does so. Everything
    else that a handler raises is printed.

    Args:
        handler: A subclass of `http.server.BaseHTTPRequestHandler`, or what makes one.
    """

    daemon_threads = True

    def __init__(self, handler: Any) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
