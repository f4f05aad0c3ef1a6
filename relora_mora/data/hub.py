"""The datasets hub: its address, its login, commits and lists of files, by huggingface_hub with our retries."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from relora_mora.data.errors import SourceError
from relora_mora.data.network import TransientError, check_status, retrying, stall_seconds

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")


def endpoint() -> str:
    """The address of the hub, or of the mirror in HF_ENDPOINT, which may be set after the imports."""
    address = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    if not address.startswith(("http://", "https://")):
        raise SourceError(f"HF_ENDPOINT: got {address!r}, expected the address of a hub such as https://huggingface.co")
    return address


def remedy() -> str:
    """What to do if the hub does not answer."""
    return f"check the network to {endpoint()}, name a mirror with HF_ENDPOINT, give local files by path"


def login_headers(what: str) -> dict[str, str]:
    """The headers that huggingface_hub sends with a request for ``what``, with the token if there is one.

    This may read files, and may ask the hub if the login has to be renewed. Raises TransientError, and SourceError if
    the token cannot be read or sent or if the hub is switched off.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise SourceError(
            f"{what} needs the hub, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it or give files by path"
        )
    try:
        headers = build_hf_headers()
    except Exception as error:  # the library's transport raises its own types, which differ between versions
        if isinstance(error, UnicodeError) or (isinstance(error, OSError) and error.errno is not None):
            raise SourceError(
                f"the hub's login cannot be read ({error}); log in again (hf auth login) or set HF_TOKEN"
            ) from error
        raise TransientError(f"no login to the hub ({type(error).__name__})") from error
    if not headers.get("authorization", "").isascii():
        raise SourceError(
            "the hub's token contains characters that no token has; log in again (hf auth login) or fix HF_TOKEN"
        )
    return dict(headers)


def ask_for_commit(repo: str, revision: str, timeout_seconds: float) -> str:
    """The current commit of ``revision`` of a dataset. Raises SourceError."""

    def commit(api: "HfApi") -> str | None:
        return api.dataset_info(repo, revision=revision, expand=["sha"]).sha

    sha = _ask(repo, revision, commit, timeout_seconds)
    if not sha:
        raise SourceError(f"hub:{repo}: {endpoint()} names no commit for {revision!r}; set data.revision to a commit")
    return sha


def list_files(repo: str, commit: str, timeout_seconds: float) -> list[str]:
    """The paths of all files of a dataset at a commit. Raises SourceError."""

    def paths(api: "HfApi") -> list[str]:
        entries = api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
        return [entry.path for entry in entries if hasattr(entry, "size")]  # the others are folders

    return _ask(repo, commit, paths, timeout_seconds)


def _ask(repo: str, revision: str, request: Callable[["HfApi"], T], timeout_seconds: float) -> T:
    """The answer to a request about a dataset."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
    from huggingface_hub.utils import get_session

    what = f"hub:{repo}"
    address = endpoint()

    def ask() -> T:
        get_session().timeout = stall_seconds(timeout_seconds)  # without it a request may wait for an answer forever
        login = login_headers(what).get("authorization", "")
        try:
            return request(HfApi(endpoint=address, token=login.removeprefix("Bearer ") or False))
        except RevisionNotFoundError as error:
            raise SourceError(
                f"data.revision: {what} has no revision {revision!r}; use main, a tag or a commit"
            ) from error
        except HfHubHTTPError as error:
            response: Any = error.response
            if response.status_code in (401, 403, 404):
                raise SourceError(
                    f"{what} is not a dataset on {address}, or your token has no access to it; "
                    "check the name or path, or log in (hf auth login, or HF_TOKEN)"
                ) from error
            check_status(response.status_code, response.headers, f"{what}: {address}", hub=True)
            raise
        except Exception as error:  # as in login_headers
            raise TransientError(f"no answer ({type(error).__name__})") from error

    return retrying(ask, f"{what} (revision {revision})", timeout_seconds, remedy())


def file_url(repo: str, commit: str, path: str) -> str:
    """The address of a file of a dataset."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, path, repo_type="dataset", revision=commit, endpoint=endpoint())
