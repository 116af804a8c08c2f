"""Logging of every role: JSON lines on stderr, with the ids that are bound. Never prompts or secrets."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

# Whatever a caller passes under these names is dropped, so that no slip puts them into a log.
PRIVATE = frozenset(
    {
        "prompt",
        "negative_prompt",
        "api_key",
        "authorization",
        "secret",
        "secret_key",
        "webhook_secret",
        "password",
    }
)

IDS = {
    "job_id": re.compile(r"\bjob_[0-9a-z]{25}\b"),
    "delivery_id": re.compile(r"\bmsg_[0-9a-z]{25}(?:_(?:\d+|[0-9a-z]{25}))?\b"),
}


def setup_logging(role: str, level: str = "INFO") -> None:
    """Send structlog and the standard library's loggers to stderr as JSON lines. Call once per process."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = [_name_ids, _drop_private]
    structlog.configure(
        processors=[*shared, *last, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, *last],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(role=role)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger; give facts as keyword arguments: ``log.info("claimed", job_id=...)``."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger


def bind(**ids: str) -> None:
    """Attach ids (request_id, job_id, node_id) to every line of this thread or task."""
    structlog.contextvars.bind_contextvars(**ids)


def unbind(*names: str) -> None:
    """Detach them again."""
    structlog.contextvars.unbind_contextvars(*names)


def _name_ids(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Ids that a line's text names become fields, so that all lines of a job can be found by one search."""
    for field, pattern in IDS.items():
        if field not in event and (found := pattern.search(str(event.get("event", "")))):
            event[field] = found[0]
    return event


def _drop_private(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in PRIVATE & event.keys():
        event[name] = "(not logged)"
    return event
