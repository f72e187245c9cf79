"""The Hugging Face Hub as a place to write to: who writes, whether that is allowed, and a folder as one commit.

The token is the Hub client's own affair (HF_TOKEN, or what `hf auth login` stored): nothing here takes or says it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ..errors import UserError, quiet_hub


def open_repository(name: str, private: bool | None = None, revision: str | None = None) -> str:
    """The full name, owner/name, of the model repository, which exists afterwards and may be written to.

    A name without owner is the account's own. What does not exist is made: the repository, private as asked (None: as
    its owner's settings say), and the branch `revision`. Raises UserError where nobody is logged in, where the token is
    unknown or may not write there, where the name cannot be one, where a repository exists that is private or public
    against what was asked, and where the Hub cannot be reached.
    """
    hub = HfApi()
    with _errors_in_one_line(name), quiet_hub():
        account = hub.whoami()["name"]
        full_name = name if "/" in name else f"{account}/{name}"
        repository = hub.create_repo(full_name, private=private, exist_ok=True).repo_id
        hub.auth_check(repository, write=True)  # create_repo is content with a stranger's repository that exists
        is_private = hub.model_info(repository).private
        if private is not None and is_private is not private:
            found, asked = ("private", "public") if is_private else ("public", "private")
            page = f"{huggingface_hub.constants.ENDPOINT}/{repository}/settings"
            raise UserError(
                f"{repository} exists and is {found}, not {asked} as asked: change it at {page}, or do not ask for it."
            )
        if revision is not None:
            hub.create_branch(repository, branch=revision, exist_ok=True)
    return repository


def push_folder(
    folder: Path, repository: str, message: str, changed: dict[str, bytes], revision: str | None = None
) -> str:
    """The address of the commit with which the branch (main, or `revision`) holds the files of the folder.

    changed: contents, by path, that take the place of the folder's own. Files of the repository that the folder does
    not have stay. Where nothing differs there is no new commit, and the address is that of the newest one. Raises
    UserError; the repository then shows all of the push or nothing of it, for it is one commit.
    """
    with _errors_in_one_line(repository), quiet_hub():
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        files = [CommitOperationAdd(name, changed.get(name, path)) for name, path in paths.items()]
        # not upload_folder, which cuts an upload that takes long into several commits (huggingface_hub 2.4)
        return HfApi().create_commit(repository, files, commit_message=message, revision=revision).commit_url


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the Hub client, of its transport, of Xet: an upload must not end in a traceback
        raise UserError(_explanation(name, error)) from error


def _explanation(name: str, error: Exception) -> str:
    endpoint = huggingface_hub.constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = getattr(error, "server_message", None) or str(error)
    if isinstance(error, LocalTokenNotFoundError):
        return f"A push to {name} needs a token with the right to write: log in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, HFValidationError):
        return f"{name!r} names no repository: expected owner/name, in letters, digits, '-', '_' and '.': {text}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"Nothing can be pushed to {name} while HF_HUB_OFFLINE is set: unset it."
    if status == 401:
        return (
            f"The Hub refuses this token for {name}: it is mistyped, expired or revoked. Log in again with "
            "`hf auth login`, or correct or unset HF_TOKEN."
        )
    if status in (403, 404):
        return (
            f"This token may not write to {name}: name a repository of your own or of an organization that lets you "
            f"write, or give the token the right to write at {endpoint}/settings/tokens."
        )
    if status is not None:
        return f"The Hub answered {status} for {name}: {text.rstrip('.')}. Mend what it names, or try again later."
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # which upload broke: how
    reason = f"{type(cause).__name__}: {str(cause).rstrip('.')}"
    return (
        f"The exchange with the Hub at {endpoint} about {name} failed ({reason}). Try again when the network is back."
    )
