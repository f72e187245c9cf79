"""The one error that is a person's to mend: a line of text, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable


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
    return UserError(f"No {kind} {name!r}.{hint} {listing or 'Known: ' + ', '.join(choices) + '.'}")
