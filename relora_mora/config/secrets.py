"""Settings are saved and logged, so tokens and passwords are found in them here, and hidden in messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
WANDB_REMEDY = "it holds what looks like a key of Weights & Biases; use `wandb login` or WANDB_API_KEY instead"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_WANDB_KEY = re.compile(r"wandb_v\d+_\w{20,}")
_OLD_WANDB_KEY = re.compile(r"(\w+-)?[0-9a-f]{40}")  # a commit elsewhere
# what stands before the @ of scheme://user:password@host, also where the password holds a / that should have been %2F
_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/?#]*|[^\s/?#@:]*:(?!\d+[/?#])\S*)@")
_QUERY = re.compile(r"(https?://[^\s?#]*[?#])\S*[^\s:;,.)\]'\"]")
# what signs a url of S3, GCS, Azure and CloudFront, and keys that others put into queries
_SIGNATURE = re.compile(
    r"https?://[^\s?#]*\?(?:\S*?&)??"
    r"((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|sig|AWSAccessKeyId|Key-Pair-Id"
    r"|(?:access_?|auth_?)?token|api_?key|password|secret))=",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text without tokens, user and password of urls, and queries of urls, which may be signatures."""
    return _QUERY.sub(rf"\1{HIDDEN}", _CREDENTIALS.sub(f"{HIDDEN}@", _WANDB_KEY.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))))


def secret_in(text: str) -> str | None:
    """What is secret in a text and where it belongs instead; None when there is nothing."""
    if _TOKEN.search(text):
        return "it holds what looks like a token of the Hugging Face hub; use `hf auth login` or HF_TOKEN instead"
    if _WANDB_KEY.search(text):
        return WANDB_REMEDY
    if _CREDENTIALS.search(text):
        return "it holds the user or password of a url; put them into ~/.netrc, which is read for http(s) sources"
    if signature := _SIGNATURE.search(text):
        return (
            f"it holds a url with a secret in its query ({signature[1]}), which would be saved with the run; "
            "give the plain url, with the login in ~/.netrc, or download the files"
        )
    return None


def secrets_in(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, what is secret there) for every text and every key of a tree of settings."""
    if isinstance(value, str):
        is_key = name == "log.wandb" and _OLD_WANDB_KEY.fullmatch(value)
        found = WANDB_REMEDY if is_key else secret_in(value)
        if found:
            yield name, found
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            below = f"{name}.{key}" if name else str(key)
            if isinstance(key, str) and (found := secret_in(key)):
                yield below, found
            yield from secrets_in(inner, below)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from secrets_in(inner, f"{name}.{index}")
