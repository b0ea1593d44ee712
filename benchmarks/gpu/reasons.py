"""Why something was not measured, as a cell of a table."""

from __future__ import annotations


class Failed(Exception):
    """A process answered with an error, died, or took too long. The text alone is the reason."""


def reason_of(error: BaseException, most: int = 200) -> str:
    """
    >>> reason_of(ValueError("no such\\n  thing")), reason_of(Failed("it took too long"))
    ('ValueError: no such thing', 'it took too long')
    """
    text = " ".join(str(error).split())
    kind = type(error).__name__
    reason = text if isinstance(error, Failed) else f"{kind}: {text}" if text else kind
    return reason if len(reason) <= most else reason[: most - 3] + "..."
