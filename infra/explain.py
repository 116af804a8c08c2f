"""One clear line for the errors that are the operator's to mend; None for our own mistakes.

Libraries are recognised by the name of the exception's module, so that none is imported for it.
"""

import os
import re

ROOMS = ("jobs", "api", "worker", "engine", "kernels", "infra")


def explain(error: BaseException) -> str | None:
    """What to tell the operator, or None if this is a bug whose traceback should be seen."""
    room = type(error).__module__.partition(".")[0]
    name = type(error).__name__
    text = " ".join(str(error).split())
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's usage errors
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "reel"
        return f"{error.format_message()} See `{command} --help`."
    if room == "redis":
        return f"Redis at {_masked(os.environ.get('REEL_REDIS_URL', 'redis://127.0.0.1:6379/0'))}: {text}"
    if room in ("botocore", "boto3"):
        return f"S3 at {os.environ.get('REEL_S3_ENDPOINT', 'AWS')}: {text}"
    if room in ("httpx", "httpcore"):
        return f"the API did not answer: {text}"
    if room in ("pydantic", "pydantic_core", "pydantic_settings") and name == "ValidationError":
        return "settings: " + "; ".join(_setting(item) for item in error.errors(include_url=False))  # type: ignore[attr-defined]
    if room == "jobs":
        return _with_cause(error, text)
    if room == "engine" or isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return text
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in ROOMS:
        return f"{text}: this role's dependencies are not installed; see the extras in pyproject.toml"
    return None


def _with_cause(error: BaseException, text: str) -> str:
    cause = error.__cause__
    return f"{text}: {' '.join(str(cause).split())}" if cause is not None and str(cause) not in text else text


def _setting(item: dict[str, object]) -> str:
    location = item.get("loc")
    field = ".".join(str(part) for part in location) if isinstance(location, tuple) else "?"
    return f"REEL_{field.upper()}: {item.get('msg')} (got {_short(item.get('input'))})"


def _short(value: object) -> str:
    text = repr(value)
    return _masked(text if len(text) <= 60 else text[:57] + "...")


def _masked(url: str) -> str:
    return re.sub(r"://[^@/\s]*@", "://***@", url)
