"""A cloud's word that it will soon take this machine back: polled from its metadata address.

Sources: the clouds' own pages on spot interruption notices (AWS `spot/instance-action`, IMDSv2), preemption
(GCP `instance/preempted`) and scheduled events (Azure, `Preempt`; a machine of a scale set or availability
set hears of all its machines' events, and `Resources` names theirs). Kubernetes sends SIGTERM, which needs
nothing of this. Imports neither Ray nor torch: the supervisor runs it.
"""

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Cloud = Literal["aws", "gcp", "azure"]
POLL_SECONDS = 2.0  # the shortest notice is 30 s
TIMEOUT_SECONDS = 2.0
TOKEN_SECONDS = 21_600  # of an IMDSv2 session, the longest allowed
log = logging.getLogger(__name__)

ENDPOINTS: dict[Cloud, str] = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}


@dataclass
class Notice:
    """One cloud's metadata service. endpoint: None for the cloud's own address."""

    cloud: Cloud
    endpoint: str | None = None
    _machine: str = ""  # this one's name, once it was asked for
    _token: str = ""
    _token_until: float = 0.0
    _opener: urllib.request.OpenerDirector = field(
        default_factory=lambda: urllib.request.build_opener(urllib.request.ProxyHandler({}))
    )

    def given(self) -> bool:
        """Whether the machine will be taken back. Raises OSError or ValueError when that can't be told."""
        if self.cloud == "aws":
            headers = {"X-aws-ec2-metadata-token": self._session()}
            return self._get("/latest/meta-data/spot/instance-action", headers) is not None
        if self.cloud == "gcp":
            flag = self._get("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
            return (flag or "").strip() == "TRUE"
        text = self._get("/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
        names = preempted(text or "{}")
        return bool(names) and self._azure_name() in names

    def watch(self, call: Callable[[], None]) -> None:
        """From a thread of its own: call once when the notice is given."""
        threading.Thread(target=self._watch, args=(call,), name="notice", daemon=True).start()

    def _watch(self, call: Callable[[], None]) -> None:
        silent = False
        while True:
            try:
                if self.given():
                    log.warning("%s takes this machine back soon", self.cloud)
                    call()
                    return
                silent = False
            except (OSError, ValueError) as error:
                if not silent:  # once: it may be away for long
                    log.warning("%s's metadata service does not answer: %s", self.cloud, error)
                silent = True
            time.sleep(POLL_SECONDS)

    def _session(self) -> str:
        if time.monotonic() > self._token_until:
            request = urllib.request.Request(self._url("/latest/api/token"), method="PUT")
            request.add_header("X-aws-ec2-metadata-token-ttl-seconds", str(TOKEN_SECONDS))
            self._token = self._ask(request)
            self._token_until = time.monotonic() + TOKEN_SECONDS / 2
        return self._token

    def _get(self, path: str, headers: dict[str, str]) -> str | None:
        """The body; None for 404, which is how AWS says "no notice"."""
        request = urllib.request.Request(self._url(path), headers=headers)
        try:
            return self._ask(request)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            if error.code == 401:  # AWS: the session is void before its time; the next look opens another
                self._token_until = 0.0
            raise

    def _ask(self, request: urllib.request.Request) -> str:
        """The body. Raises OSError, and ValueError for what isn't HTTP or breaks off."""
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                return str(answer.read().decode())
        except http.client.HTTPException as error:
            raise ValueError(f"got {error!r}, expected an answer by HTTP") from error

    def _azure_name(self) -> str:
        """This machine's name as events give it. It never changes. Raises OSError, ValueError."""
        if not self._machine:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._machine = (self._get(path, {"Metadata": "true"}) or "").strip().lower()
            if not self._machine:
                raise ValueError("the metadata service knows no name of this machine")
        return self._machine

    def _url(self, path: str) -> str:
        return (self.endpoint or ENDPOINTS[self.cloud]) + path


def preempted(text: str) -> set[str]:
    """The machines, in small letters, that Azure's scheduled events say are about to be taken back.

    Raises ValueError for a text of another shape.
    """
    try:
        return {
            str(name).lower()
            for event in json.loads(text).get("Events", [])
            if event.get("EventType") == "Preempt"
            for name in event["Resources"]
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"got {text[:80]!r}, expected Azure's scheduled events") from error
