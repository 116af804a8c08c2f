"""JSON bodies: parsed only after the key is checked, strictly, with every wrong field named at once."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from fastapi import Request
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from api.problem import MALFORMED_JSON, UNSUPPORTED_MEDIA_TYPE, ProblemError, shorten
from jobs.errors import FieldProblem

MAX_DEPTH = 8  # no request nests deeper than a few levels


async def read_object(request: Request) -> dict[str, Any]:
    """The request's body as one JSON object. Raises ProblemError: wrong media type, malformed JSON."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ProblemError(
            UNSUPPORTED_MEDIA_TYPE,
            "This route takes a JSON body.",
            [FieldProblem("Content-Type", shorten(content_type) or "none", "application/json")],
            {"Accept": "application/json"},
        )
    return load_object(await request.body())


def load_object(body: bytes) -> dict[str, Any]:
    """`body` as one JSON object in UTF-8, without repeated names, NaN or deep nesting."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ProblemError(MALFORMED_JSON, f"The body is not UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise ProblemError(
            MALFORMED_JSON, f"{error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise ProblemError(MALFORMED_JSON, "The body is nested too deeply.") from None
    except ValueError as error:  # our own two hooks, and integers of thousands of digits
        raise ProblemError(MALFORMED_JSON, f"{shorten(str(error), 200)}.") from None
    if not isinstance(value, dict):
        raise ProblemError(
            MALFORMED_JSON,
            "The body must be a JSON object.",
            [FieldProblem("body", type(value).__name__, 'an object such as {"prompt": "..."}')],
        )
    _check(value)
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that names a field twice: which of the two counts differs between parsers."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"The field {twice!r} comes twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; send a finite number")


def _check(value: Any, depth: int = 0) -> None:
    """Refuse what JSON allows but neither Redis nor UTF-8 carries well: lone surrogates, deep nesting."""
    if depth > MAX_DEPTH:
        raise ProblemError(MALFORMED_JSON, f"The body is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise ProblemError(MALFORMED_JSON, "A string holds half of a surrogate pair.")
    children: Iterable[Any] = ()
    if isinstance(value, dict):
        children = [*value.keys(), *value.values()]
    elif isinstance(value, list):
        children = value
    for child in children:
        _check(child, depth + 1)


def field_problems(
    errors: Iterable[ErrorDetails],
    value: Mapping[str, Any],
    model: type[BaseModel],
    expected: Mapping[str, str],
) -> list[FieldProblem]:
    """pydantic's errors as one entry a field.

    expected: for each field (`loras.*.name`: in each item of a list) the words that tell what is allowed,
    instead of pydantic's own.
    """
    found: dict[str, FieldProblem] = {}
    for error in errors:
        loc = error["loc"] or ("body",)
        top, name = str(loc[0]), ".".join(str(part) for part in loc)
        general = ".".join("*" if isinstance(part, int) else str(part) for part in loc)
        words, came = expected.get(general), error["input"]
        if error["type"] == "extra_forbidden":
            words = f"no such field; known are {', '.join(_siblings(general, model, expected))}"
        elif words is None and top in expected:
            # With words of our own a field is one entry, whichever branch of a union refused it.
            name, words, came = top, expected[top], value.get(top)
        got = "nothing" if error["type"] == "missing" else shorten(came)
        found.setdefault(name, FieldProblem(shorten(name), got, words or str(error["msg"])))
    return list(found.values())


def _siblings(name: str, model: type[BaseModel], expected: Mapping[str, str]) -> list[str]:
    """The fields that are known beside an unknown one."""
    around = name.rpartition(".")[0]
    if not around:
        return sorted(model.model_fields)
    return sorted(other.removeprefix(f"{around}.") for other in expected if other.startswith(f"{around}."))
