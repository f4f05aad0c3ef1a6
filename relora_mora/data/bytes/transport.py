"""One request to an http(s) server.

A fault that may pass is a TransientError, any other a SourceError. Neither contains a url, which may hold a secret.
"""

import http.client
import urllib.request
from collections.abc import Mapping

import requests
import urllib3

from relora_mora.data.bytes.retry import TransientError, retry_after_seconds
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import Version

CONNECT_SECONDS = 20.0
IDLE_SECONDS = 20.0  # a connection that was not used for so long may be dead, so it is reopened
STALL_SECONDS = 30.0

BROKEN = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)  # requests' exceptions are OSErrors
_WRONG_URL = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema)


def stall_seconds(timeout_seconds: float) -> float:
    """The longest wait for a byte."""
    return min(STALL_SECONDS, max(1.0, timeout_seconds / 4))


def send(
    method: str,
    url: str,
    what: str,
    *,
    headers: Mapping[str, str],
    timeout_seconds: float,
    session: requests.Session | None = None,
) -> requests.Response:
    """The answer to one request after redirects. Its body is not read yet and is not decoded.

    A login is not sent to another host. Raises TransientError, and SourceError for a url that cannot be right.
    """
    stall = stall_seconds(timeout_seconds)
    request = session.request if session is not None else requests.request
    try:
        return request(
            method,
            url,
            headers={"Accept-Encoding": "identity", **headers},
            auth=_keep_login if any(name.lower() == "authorization" for name in headers) else None,
            stream=True,
            timeout=(min(CONNECT_SECONDS, stall), stall),
            allow_redirects=True,
        )
    except _WRONG_URL as error:
        fault = f"{what} is not a valid url ({type(error).__name__}); check it"
        if urllib.request.getproxies():
            fault += (
                ", and the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY (socks:// needs pip install requests[socks])"
            )
        raise SourceError(fault) from error
    except requests.exceptions.TooManyRedirects as error:
        raise SourceError(f"{what} redirects without end; check the url") from error
    except BROKEN as error:  # only the type: the message may contain the whole url
        raise TransientError(f"no connection ({type(error).__name__})") from error
    except ValueError as error:
        fault = f"{what} redirects to an invalid url, or has a login that cannot be sent ({type(error).__name__})"
        raise SourceError(f"{fault}; check it") from error


def _keep_login(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Without an ``auth``, requests replaces the login in the headers by one from ``~/.netrc``."""
    return request


def check_status(response: requests.Response, what: str, *, hub: bool) -> None:
    """Raises TransientError for a status that may pass, SourceError for any other than 200 and 206."""
    status = response.status_code
    if status in (408, 425, 429) or status >= 500:
        raise TransientError(f"status {status}", retry_after_seconds(response.headers))
    if status in (401, 403):
        hint = "accept the dataset's terms and log in (hf auth login, or HF_TOKEN)" if hub else "check who may read it"
        raise SourceError(f"{what}: access denied (status {status}); {hint}")
    if status not in (200, 206):
        raise SourceError(f"{what}: the server answered status {status}; check the address")


def version_of(response: requests.Response) -> Version:
    """The version of a file according to an answer."""
    # The hub redirects to its storage, which may give another ETag. The file's own ETag is in the redirect.
    linked = [answer.headers["X-Linked-Etag"] for answer in response.history if "X-Linked-Etag" in answer.headers]
    etag = linked[0] if linked else response.headers.get("ETag")
    return Version(etag and etag.removeprefix("W/"), response.headers.get("Last-Modified"), size_of(response))


def size_of(response: requests.Response) -> int | None:
    """The size of the whole file in bytes according to an answer; None if it does not say."""
    partial = response.status_code in (206, 416)
    size = (
        response.headers.get("Content-Range", "").rpartition("/")[2]
        if partial
        else response.headers.get("Content-Length", "")
    )
    return int(size) if size.isdecimal() else None
