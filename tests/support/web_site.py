"""A web server for files, on an address that a box can only reach through its proxy."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESS = "127.0.0.2"
"""Of the loopback, and not among those that the variables of a box keep from the proxy."""


@contextmanager
def site(directory: Path) -> Iterator[int]:
    """A web server for the files of a directory; its port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            return

    with http.server.ThreadingHTTPServer((ADDRESS, 0), functools.partial(Quiet, directory=str(directory))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
