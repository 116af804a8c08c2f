"""The page ``/``, its files, the API's description ``/docs``, and ``/problems/{type}``: what people open."""

import hashlib
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response

from api import problem as p
from api.auth import ServicesDep
from api.problem import TYPES, ProblemError
from api.services import Services
from api.views import matches

router = APIRouter(include_in_schema=False)
WEB = Path(__file__).resolve().parent.parent / "web"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    """The page's files by name: a name from outside is looked up here and never made into a path."""
    return {path.name: path for path in WEB.iterdir() if path.suffix in KINDS and path.is_file()}


@lru_cache(maxsize=32)
def _file(name: str) -> tuple[bytes, str, str] | None:
    """Bytes, content type and ETag of a file of the page; None when there is none of that name."""
    path = _files().get(name)
    if path is None:
        return None
    content = path.read_bytes()
    return content, KINDS[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def page_policy(svc: Services) -> str:
    """The page's Content-Security-Policy: its own files, and media from the storage's public address only."""
    settings = svc.settings
    endpoint = settings.s3_public_endpoint or settings.s3_endpoint
    if endpoint:
        parts = urlsplit(endpoint)
        media = f"{parts.scheme}://{parts.netloc}"
    else:  # AWS: the bucket's own host name, or the region's with the bucket in the path
        media = f"https://{settings.s3_bucket}.s3.amazonaws.com https://*.{settings.s3_region}.amazonaws.com"
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            f"img-src 'self' blob: {media}",
            f"media-src {media}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _answer(request: Request, svc: Services, name: str) -> Response:
    found = _file(name)
    if found is None:
        raise ProblemError(p.NOT_FOUND, "No such file.")
    content, kind, etag = found
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": page_policy(svc)}
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return Response(content, headers={**headers, "Content-Type": kind})


@router.get("/")
def index(request: Request, svc: ServicesDep) -> Response:
    """The page."""
    return _answer(request, svc, "index.html")


@router.get("/docs")
def docs(request: Request, svc: ServicesDep) -> Response:
    """The OpenAPI document, readable: drawn by our own script, as the usual viewers need other hosts."""
    return _answer(request, svc, "docs.html")


@router.get("/web/{name}")
def web(request: Request, svc: ServicesDep, name: str) -> Response:
    """A file of the page."""
    return _answer(request, svc, name)


@router.get("/problems/{slug}")
def problem_page(slug: str) -> Response:
    """What a problem type means and what to do: the target of `type` in every error."""
    kind = TYPES.get(slug)
    if kind is None:
        raise ProblemError(p.NOT_FOUND, f"No problem type {p.shorten(slug)}.")
    text = f"{kind.slug} (HTTP {kind.status})\n\n{kind.title}.\n{kind.advice}\n"
    return Response(text, media_type="text/plain; charset=utf-8")
