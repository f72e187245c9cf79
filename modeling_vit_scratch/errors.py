"""The one error that is a person's to mend: a line of text, no traceback, exit code 2; and silence around it."""

import contextlib
import difflib
import logging
from collections.abc import Iterable, Iterator

NOISY = ("huggingface_hub", "transformers", "datasets", "fsspec", "httpx", "httpx2")
MOST_LISTED = 40  # names beside the one that may have been meant


class UserError(ValueError):
    """Something a person can put right. The text says what was expected, what came, and what to do.

    met_alone: one process of several met it, in its own part of the data; else all of them did, and one need say it.
    """

    met_alone = False


class PassingError(UserError):
    """What passes, as a full disk or a network that is away: the same command goes on when it has."""


def unknown(kind: str, name: object, known: Iterable[str], listing: str | None = None) -> UserError:
    """The error for a name that a table does not have: it lists the names, the closest one first.

    listing: a sentence that says where the names are listed, instead of a list that is long.
    """
    choices = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if listing is None:
        listing = "" if close and len(choices) > MOST_LISTED else f"Known: {', '.join(choices)}."
    return UserError(f"No {kind} {name!r}.{hint} {listing}".rstrip())


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps what the Hub's client and transformers log off the screen: the one line of our own error says it all."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
