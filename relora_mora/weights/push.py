"""Uploads an export to the Hugging Face hub, after a check of login, name and rights that costs no time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relora_mora.data.errors import SourceError
from relora_mora.data.network import endpoint, login_headers
from relora_mora.weights.card import CARD

_STALL_SECONDS = 60.0
_OF_OLDER_EXPORTS = ["model*.safetensors", "model.safetensors.index.json"]


class PushError(ValueError):
    """The hub cannot be reached or refuses; the message says what to do."""


def open_repository(name: str, *, private: bool) -> Any:
    """The client of a hub with a model repository that this login may write, which is created if it is not there.

    ``private`` also refuses a repository that is there and public. Raises PushError, and SourceError for a login that
    cannot be read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import get_session, validate_repo_id

    try:
        validate_repo_id(name)
        owner, _ = name.split("/")
    except (HFValidationError, ValueError) as error:
        raise PushError(f"--push: got {name!r}, expected OWNER/NAME, a name for a model on the hub") from error
    remedy = f"check HF_ENDPOINT, that the token may write, and that {owner} is you or your organization"
    with _named(f"--push: {name}", remedy):
        token = login_headers(f"--push {name}").get("authorization", "").removeprefix("Bearer ")
        if not token:
            raise PushError("--push: not logged in to the hub; run `hf auth login`, or set HF_TOKEN to a token")
        get_session().timeout = _STALL_SECONDS
        hub = HfApi(endpoint=endpoint(), token=token)
        hub.create_repo(name, private=private or None, exist_ok=True)
        hub.auth_check(name, write=True)
        if private and not hub.model_info(name).private:
            raise PushError(f"--private: {name} is there and public; give another name, or change it on the hub")
    return hub


def upload(hub: Any, name: str, folder: Path, message: str) -> str:
    """Uploads a folder as one commit and returns its address. A card that is there stays, with its license.

    Weights of an older export are removed. Raises PushError; the folder is unchanged.
    """
    with _named(f"--push: {name}", f"{folder} is complete: continue with `hf upload {name} {folder}`"):
        commit = hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[CARD] if hub.file_exists(name, CARD) else None,
            delete_patterns=_OF_OLDER_EXPORTS,
        )
    return str(commit.commit_url)


@contextlib.contextmanager
def _named(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever the hub's client raises into one line; its types differ between versions."""
    try:
        yield
    except (PushError, SourceError):
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PushError(f"{what}: {first_line}; {remedy}") from error
