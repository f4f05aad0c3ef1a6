"""The datasets hub: its address, its login, commits, lists of files and small files.

Requests use the same transport and retries as all others.
"""

import functools
import os
from urllib.parse import parse_qs, quote, urlsplit

from relora_mora.data.bytes.retry import TransientError, retrying
from relora_mora.data.bytes.transport import BROKEN, check_status, send
from relora_mora.data.errors import SourceError


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
    what = f"hub:{repo}"
    url = f"{endpoint()}/api/datasets/{repo}/revision/{quote(revision, safe='')}?expand=sha"

    def ask() -> str:
        with send("GET", url, what, headers=login_headers(what), timeout_seconds=timeout_seconds) as response:
            if response.headers.get("X-Error-Code") == "RevisionNotFound":
                raise SourceError(
                    f"data.revision: hub:{repo} has no revision {revision!r}; use main, a tag or a commit"
                )
            if response.status_code in (401, 403, 404):
                raise SourceError(
                    f"hub:{repo} is not a dataset on {endpoint()}, or your token has no access to it; "
                    "check the name or path, or log in (hf auth login, or HF_TOKEN)"
                )
            check_status(response, f"hub:{repo}: {endpoint()}", hub=True)
            try:
                info = response.json()
            except (*BROKEN, ValueError) as error:
                raise TransientError(f"an answer that is not JSON ({type(error).__name__})") from error
        sha = info.get("sha") if isinstance(info, dict) else None
        if not sha:
            raise SourceError(
                f"hub:{repo}: {endpoint()} names no commit for {revision!r}; set data.revision to a commit"
            )
        return str(sha)

    return retrying(ask, f"hub:{repo} (revision {revision})", timeout_seconds, remedy())


def list_files(repo: str, commit: str, timeout_seconds: float) -> dict[str, int]:
    """The size in bytes of every file of a dataset at a commit, by path. Raises SourceError."""
    sizes: dict[str, int] = {}
    cursor: str | None = ""
    while cursor is not None:
        # use only the cursor from the address of the next page, so that the login is sent to no other host
        page = f"&cursor={quote(cursor, safe='')}" if cursor else ""
        url = f"{endpoint()}/api/datasets/{repo}/tree/{commit}?recursive=true{page}"
        ask = functools.partial(_list_page, repo, url, timeout_seconds)
        page_sizes, cursor = retrying(ask, f"hub:{repo}: its list of files", timeout_seconds, remedy())
        sizes |= page_sizes
    return sizes


def _list_page(repo: str, url: str, timeout_seconds: float) -> tuple[dict[str, int], str | None]:
    """Sizes by path, and the cursor of the next page, None on the last one."""
    what = f"hub:{repo}"
    with send("GET", url, what, headers=login_headers(what), timeout_seconds=timeout_seconds) as response:
        check_status(response, f"hub:{repo}: {endpoint()}", hub=True)
        try:
            entries = response.json()
            sizes = {entry["path"]: int(entry["size"]) for entry in entries if entry["type"] == "file"}
        except (*BROKEN, ValueError, KeyError, TypeError) as error:
            raise TransientError(f"an answer that is not a list of files ({type(error).__name__})") from error
        following = parse_qs(urlsplit(response.links.get("next", {}).get("url", "")).query)
        return sizes, following.get("cursor", [None])[0]


def read_text(repo: str, commit: str, path: str, size: int, timeout_seconds: float) -> str:
    """The text of a small file of ``size`` bytes in a dataset. Raises SourceError."""
    what = f"hub:{repo}@{commit}/{path}"
    url = f"{endpoint()}/datasets/{repo}/resolve/{commit}/{quote(path)}"

    def ask() -> bytes:
        with send("GET", url, what, headers=login_headers(what), timeout_seconds=timeout_seconds) as response:
            check_status(response, what, hub=True)
            try:
                body = response.raw.read(decode_content=False)
            except BROKEN as error:
                raise TransientError(f"the body broke off ({type(error).__name__})") from error
        if len(body) != size:
            raise TransientError(f"{len(body)} bytes of {size}")
        return bytes(body)

    try:
        return retrying(ask, what, timeout_seconds, remedy()).decode()
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{what} describes the set, but is not UTF-8; name the files of the set as hub:{repo}/PATTERN"
        ) from error
