"""A webhook receiver: checks Standard Webhooks signatures and prints each delivery as a JSON line.

Written to be read by people who write their own: verify the raw body before parsing it, answer quickly,
and expect a delivery more than once (the same ``webhook-id``).
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TextIO

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

MAX_BODY = 64 << 10  # bytes; events stay under 20 kB


class Receiver(ThreadingHTTPServer):
    """Listens at once; call `serve_forever`."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, secret: str, out: TextIO | None = None) -> None:
        self.webhook = Webhook(secret)
        self.seen: set[str] = set()
        self.out = out if out is not None else sys.stdout
        super().__init__((host, port), _Handler)

    def take(self, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Judge one delivery: the HTTP status to answer, and the line to print."""
        message_id = headers.get("webhook-id", "")
        line: dict[str, Any] = {"webhook-id": message_id, "verified": False}
        try:
            event = self.webhook.verify(body.decode(), headers)
        except (WebhookVerificationError, UnicodeDecodeError, ValueError) as error:
            return 401, line | {"reason": str(error) or type(error).__name__}
        line |= {"verified": True, "duplicate": message_id in self.seen}
        self.seen.add(message_id)
        return 204, line | (event if isinstance(event, dict) else {"event": event})


class _Handler(BaseHTTPRequestHandler):
    server: Receiver
    timeout = 15  # seconds without a byte

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            return self._answer(413 if length.isdigit() else 411)
        body = self.rfile.read(int(length))
        status, line = self.server.take(body, {name.lower(): value for name, value in self.headers.items()})
        print(json.dumps(line), file=self.server.out, flush=True)
        return self._answer(status)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the JSON lines are the log."""
