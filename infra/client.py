"""A small client of the REST API, for the command line and the demo. Errors are CliErrors of one line."""

import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from infra.errors import CliError

TERMINAL = frozenset({"succeeded", "failed", "canceled", "expired"})
DEFAULT_URL = "http://127.0.0.1:8080"


class NoAnswer(CliError):
    """The API could not be reached, or is restarting: worth another try."""


class ReelClient:
    """One API and one key. Use as a context manager."""

    def __init__(self, url: str, api_key: str, timeout: float = 30.0) -> None:
        self.url = url.rstrip("/")
        local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=timeout,
            trust_env=not local,  # a proxy cannot reach our loopback
        )

    @classmethod
    def from_env(cls) -> "ReelClient":
        """REEL_API_URL and REEL_API_KEY. Raises CliError without a key."""
        key = os.environ.get("REEL_API_KEY")
        if not key:
            raise CliError("no API key: set REEL_API_KEY, or start a local stack here with `reel up`")
        return cls(os.environ.get("REEL_API_URL", DEFAULT_URL), key)

    def __enter__(self) -> "ReelClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of an answer. Raises CliError for a problem, naming each wrong field, or for no answer."""
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise NoAnswer(f"the API at {self.url} did not answer: {_words(error)}") from None
        except ValueError as error:  # nan, or half a character: JSON has neither
            raise CliError(
                f"the request cannot be sent ({_words(error)}): give finite numbers and whole characters"
            ) from None
        if response.status_code == 503:
            raise NoAnswer(problem_line(503, response.content))
        if response.status_code >= 400:
            raise CliError(problem_line(response.status_code, response.content))
        try:
            return response.json() if response.content else None
        except ValueError:
            raise CliError(f"{self.url}{path} answered, but not with JSON: is this reelserve?") from None

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST a job; the job. The idempotency key makes a repeat after a lost answer harmless."""
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        why = ""
        for _ in range(3):
            try:
                job: dict[str, Any] = self.call("POST", "/v1/jobs", json=body, headers=headers)
                return job
            except NoAnswer as error:
                why = str(error)
                time.sleep(1.0)
        raise CliError(f"the API at {self.url} did not take the job in three tries; at last: {why}")

    def job(self, job_id: str) -> dict[str, Any]:
        """One job."""
        job: dict[str, Any] = self.call("GET", f"/v1/jobs/{job_id}")
        return job

    def upload(self, image: Path) -> str:
        """Upload an input image; what to put in a request's `image`."""
        try:
            content = image.read_bytes()
        except OSError as error:
            raise CliError(f"--image: {image}: {error.strerror}") from None
        answer: dict[str, Any] = self.call("POST", "/v1/uploads", files={"file": (image.name, content)})
        return str(answer["id"])

    def follow(self, job_id: str, poll_seconds: float = 0.5) -> Iterator[dict[str, Any]]:
        """The job, again and again until it has ended; a short outage of the API is sat out."""
        failures = 0
        while True:
            try:
                job = self.job(job_id)
                failures = 0
            except NoAnswer:
                failures += 1
                if failures * poll_seconds > 30:
                    raise
                time.sleep(poll_seconds)
                continue
            yield job
            if job["state"] in TERMINAL:
                return
            time.sleep(poll_seconds)

    def signed_url(self, job_id: str) -> str:
        """A presigned URL of the finished MP4."""
        answer: dict[str, Any] = self.call(
            "GET", f"/v1/jobs/{job_id}/video", headers={"Accept": "application/json"}
        )
        return str(answer["url"])

    def download(self, url: str, target: Path) -> int:
        """Fetch a presigned URL into a file, complete or not at all; the number of bytes."""
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".part")
        local = httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
        try:
            with (
                httpx.stream("GET", url, timeout=60.0, trust_env=not local) as response,
                draft.open("wb") as file,
            ):
                if response.status_code != 200:
                    raise CliError(f"download: the object store answered {response.status_code}")
                for chunk in response.iter_bytes():
                    file.write(chunk)
        except httpx.HTTPError as error:
            raise CliError(f"download: {_words(error)}") from None
        draft.replace(target)
        return target.stat().st_size


def problem_line(status: int, content: bytes) -> str:
    """An RFC 9457 problem as one line: its detail, then each wrong field."""
    try:
        problem = json.loads(content)
        text = str(problem.get("detail") or problem.get("title") or content[:200])
        errors = problem.get("errors") or []
    except (ValueError, AttributeError):
        return f"the API answered {status}: {content[:200].decode(errors='replace')}"
    fields = [
        f"{item.get('field')}: got {item.get('got')}, expected {item.get('expected')}"
        for item in errors
        if isinstance(item, dict) and "field" in item
    ]
    return "; ".join([f"{text} ({status})", *fields])


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
