"""A server's control socket, spoken to by the standard library alone."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0


class Control(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path | str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = str(path)

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)

    def call(self, method: str, path: str, **body: object) -> Any:
        """The answer to a call below /v1, which must succeed."""
        self.request(method, f"/v1/{path}", json.dumps(body) if body else None)
        answer = self.getresponse()
        content = answer.read()
        self.close()  # the server ends a connection that is idle for long
        assert answer.status in (200, 201), content
        return json.loads(content)
