"""A look at something that the API stands on, told as `/readyz` tells it."""

from collections.abc import Callable

from api.schemas import Check


class NotReadyError(Exception):
    """A dependency answers, but is not ready; the text says what is missing."""


def check(ask: Callable[[], str]) -> Check:
    """Ask; any failure is an answer here."""
    try:
        return Check(ok=True, detail=ask())
    except NotReadyError as error:
        return Check(ok=False, detail=str(error))
    except Exception as error:  # whatever a client library raises: the type tells enough, the text may not
        return Check(ok=False, detail=f"no answer ({type(error).__name__})")
