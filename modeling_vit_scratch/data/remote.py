"""What lies on the Hugging Face Hub: reads that are tried again, and the Hub's errors in one line.

A read of a stream fails now and then in a run of days. What time can mend (a timeout, a broken connection, a busy or
broken server) is tried again, each time said on stderr; everything else is an error at once.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import datasets
import fsspec
import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_file_system import HfFileSystem, HfFileSystemFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ..errors import PassingError, UserError, quiet_hub

Result = TypeVar("Result")

WAITS = (1, 2, 4, 8, 16)  # seconds before the second to the sixth try
LONGEST_WAIT = 300  # seconds, where the Hub says when to come back: its limits are counted in five minutes
# Bytes read beyond a column, which fetches the short columns after it (labels, file names) in the same request.
READ_AHEAD_BYTES = 2**20


def note(text: str):
    """Says on stderr what a person should know; the first process of a run says it for all."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- reading


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


class _HubFile(HfFileSystemFile):
    """A file on the Hub that asks once for each range: the client's own five tries are silent and would come on top."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        headers = {"range": f"bytes={start}-{end - 1}", **build_hf_headers(token=self.fs.token)}
        timeout = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        response = get_session().get(self.url(), headers=headers, timeout=timeout)
        hf_raise_for_status(response)
        if len(response.content) != end - start:
            raise ConnectionError(f"{len(response.content)} bytes came of {end - start}")
        return response.content


def open_shard(url: str) -> BinaryIO:
    """A shard open for reading at any place, here or on the Hub."""
    filesystem, path = fsspec.url_to_fs(url)
    if isinstance(filesystem, HfFileSystem):
        return _HubFile(filesystem, path, mode="rb", cache_type="readahead", block_size=READ_AHEAD_BYTES)
    return filesystem.open(path, "rb")


def can_be_mended(error: BaseException) -> bool:
    """Whether trying again may help: timeouts, connection errors, 429 and the server's own errors (5xx)."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # httpx's TransportError by its name: the Hub client's versions import it from different packages
    return isinstance(error, (TimeoutError, ConnectionError)) or "TransportError" in _names(error)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)  # the Hub client's; aiohttp's errors have it as their own field
    return getattr(response, "status_code", None) or getattr(error, "status", None)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def retried(read: Callable[[], Result], url: str, sleep: Callable[[float], None] | None = None) -> Result:
    """What `read` gives, tried again after 1, 2, 4, 8 and 16 seconds where the shard is remote and time may mend it.

    Raises PassingError, naming the shard and how to go on, when the last try has failed too; any other error as it is.
    """
    for attempt, wait in enumerate((*WAITS, None), start=1):
        try:
            return read()
        except Exception as error:
            if not is_remote(url) or not can_be_mended(error):
                raise
            reason = _one_line(error)
            if wait is None:
                raise PassingError(
                    f"Shard {url} could not be read in {attempt} tries: {reason}. Start the same command again when "
                    "the network is back: a run goes on from its last checkpoint."
                ) from error
            wait = max(wait, min(_asked_to_wait(error), LONGEST_WAIT))
            # every process says its own: each has its own connections
            text = f"Shard {url}: {reason}; trying again in {wait} s ({attempt + 1} of {len(WAITS) + 1})"
            print(text, file=sys.stderr, flush=True)
            (sleep or time.sleep)(wait)
    raise AssertionError("the last try returns or raises")


def _asked_to_wait(error: BaseException) -> int:
    """Seconds after which a server that counts requests (429) wants to be asked again; 0 where it does not say."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    found = re.fullmatch(r"\d+", headers.get("retry-after", "")) or re.search(r"t=(\d+)", headers.get("ratelimit", ""))
    return int(found.group().removeprefix("t=")) if found and _status(error) == 429 else 0


def _one_line(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"the server answered {status}"
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- finding a dataset


def load_builder(location: str, config_name: str | None) -> datasets.DatasetBuilder:
    """What `datasets` knows of a folder or Hub repository. Raises UserError where it is not there or not allowed."""
    with hub_errors(location), quiet_hub():
        if not os.path.isdir(location) and not _offline():
            hub = huggingface_hub.HfApi()
            # a gated repository shows its name to everybody; `datasets` would forget why its files are refused
            if hub.dataset_info(location, timeout=30).gated:
                hub.auth_check(location, repo_type="dataset")
        return datasets.load_dataset_builder(location, config_name)


def _offline() -> bool:
    return bool(datasets.config.HF_HUB_OFFLINE or huggingface_hub.constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what `datasets` and the Hub client raise into one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explanation(name, error)) from error


def _explanation(name: str, error: Exception) -> str:
    status = _status(error)
    page = f"{huggingface_hub.constants.ENDPOINT}/datasets/{name}"
    if isinstance(error, GatedRepoError) and status == 403:
        return (
            f"{name} is gated and the account of this token may not read it: accept its terms at {page}, logged in as "
            "that account (some are granted by hand, after days); a fine-grained token also needs the right to read "
            "gated repositories."
        )
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN."
    if isinstance(error, RepositoryNotFoundError):
        if huggingface_hub.get_token() is None:
            return f"No dataset {name!r} on the Hub (or it is private: `hf auth login`)."
        return f"No dataset {name!r} on the Hub (or it is private, and this token's account may not read it)."
    if status == 401:
        return (
            f"The Hub refuses this token for {name}: it is mistyped, expired or revoked. Log in again with "
            "`hf auth login`, or correct or unset HF_TOKEN; public datasets need none."
        )
    if status == 403:
        return (
            f"The Hub forbids this token to read {name}: give the token the right to read it at "
            f"{huggingface_hub.constants.ENDPOINT}/settings/tokens, or use another."
        )
    text = " ".join(str(error).split())
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"No dataset {name!r} on the Hub, or no access to it: {text}"
    if script := re.search(r"scripts are no longer supported, but found (\S+)", text):
        return (
            f"{name} has a loading script, {script[1]}, and scripts are never run: remove it from a local copy whose "
            "images lie in parquet or tar files, or use a dataset without one."
        )
    network = isinstance(error, (ConnectionError, HfHubHTTPError)) or type(error).__module__.startswith("http")
    if network or isinstance(error, TimeoutError):
        return (
            f"{name} is not on this machine and the Hub cannot be reached. Connect, or give a local copy with "
            "--dataset_name FOLDER, or set HF_HUB_OFFLINE=1 to use what `datasets` has cached."
        )
    return f"{name} cannot be loaded: {text}"
