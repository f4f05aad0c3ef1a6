"""Finds tokens and passwords in settings, which are saved and logged, and hides them in messages."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_WANDB_KEY = re.compile(r"wandb_v\d+_\w{20,}")
_OLD_WANDB_KEY = re.compile(r"(\w+-)?[0-9a-f]{40}")  # a commit elsewhere
# the part before the @ of scheme://user:password@host, even if the password has a / that should have been %2F
_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/?#]*|[^\s/?#@:]*:(?!\d+[/?#])\S*)@")
_QUERY = re.compile(r"(https?://[^\s?#]*[?#])\S*[^\s:;,.)\]'\"]")
# signatures in urls of S3, GCS, Azure and CloudFront, and keys that other services put into queries
_SIGNATURE = re.compile(
    r"https?://[^\s?#]*\?(?:\S*?&)??"
    r"(?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|sig|AWSAccessKeyId|Key-Pair-Id"
    r"|(?:access_?|auth_?)?token|api_?key|password|secret)=",
    re.IGNORECASE,
)
WANDB_REMEDY = "it holds what looks like a key of Weights & Biases; use `wandb login` or WANDB_API_KEY instead"
_REMEDIES = {
    _TOKEN: "it holds what looks like a token of the Hugging Face hub; use `hf auth login` or HF_TOKEN instead",
    _WANDB_KEY: WANDB_REMEDY,
    _CREDENTIALS: "it holds a url with a user or password; put them into ~/.netrc, which is read for http(s) sources",
    _SIGNATURE: "it holds a url with a secret in its query; give the plain url and put the login into ~/.netrc, or "
    "download the files",
}


def redact(text: str) -> str:
    """Hides tokens, users and passwords in urls, and whole queries of urls, which may be signatures."""
    return _QUERY.sub(rf"\1{HIDDEN}", _CREDENTIALS.sub(f"{HIDDEN}@", _WANDB_KEY.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))))


def secret_in(text: str) -> str | None:
    """Describes a secret in a text and says where it belongs; None if there is none."""
    return next((remedy for pattern, remedy in _REMEDIES.items() if pattern.search(text)), None)


def secrets_in(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, message) for every text and every key with a secret in a tree of settings."""
    if isinstance(value, str):
        is_key = name == "log.wandb" and _OLD_WANDB_KEY.fullmatch(value)
        message = WANDB_REMEDY if is_key else secret_in(value)
        if message:
            yield name, message
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            inner_name = f"{name}.{key}" if name else str(key)
            if isinstance(key, str) and (message := secret_in(key)):
                yield inner_name, message
            yield from secrets_in(inner, inner_name)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from secrets_in(inner, f"{name}.{index}")
