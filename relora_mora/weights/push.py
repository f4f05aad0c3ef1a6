"""The model card of an export, and its upload to the Hugging Face hub.

A card says what the run folder says about the model, and nothing that was not recorded. Login, name and rights are
checked before the export, which costs no time.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from relora_mora.checkpoint.layout import Manifest
from relora_mora.config.checks.combinations import unused_settings
from relora_mora.config.load import stored_config
from relora_mora.config.registry import METHODS
from relora_mora.config.schema import Config
from relora_mora.config.secrets import redact
from relora_mora.data.errors import SourceError
from relora_mora.data.network import endpoint, login_headers
from relora_mora.system.logs import counted
from relora_mora.system.run_folder import RunFolder, read_json_lines

CARD = "README.md"
_CACHED = re.compile(r"models--([^/]+)--([^/]+)")  # the folder of a model in the hub's cache
_OF_TRAINING = ("data.document_mask", "data.packing", "data.seed", "train.epochs", "train.precision", "train.seed")
_FIGURES = {"tokens": ",", "perplexity": ",.2f", "bits_per_byte": ".4f"}  # of an evaluation, and how they are shown
_LICENSE = "none is chosen yet: name one that the base model and the data allow, here and in the header"
_STALL_SECONDS = 60.0
_OF_OLDER_EXPORTS = ["model*.safetensors", "model.safetensors.index.json"]


def model_card(manifest: Manifest, run: RunFolder, title: str, library: str) -> str:
    """Markdown with a YAML header for the hub. ``run`` need not exist: then its figures are left out.

    ``library`` loads the export: transformers or peft.
    """
    config = stored_config(manifest.config, str(run.path))
    cached = _CACHED.search(config.model.init_from or "")
    repos = {key.rpartition("@")[0] for key in config.data.commits}
    header = {
        "base_model": "/".join(cached.groups()) if cached else None,
        "datasets": sorted(repo for repo in repos if any(repo in each.source for each in config.data.train)),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["relora_mora", config.method.name],
    }
    given = yaml.safe_dump({key: value for key, value in header.items() if value}, sort_keys=False)
    rows = "".join(f"| {name} | {value} |\n" for name, value in _facts(manifest, config, run))
    unused = unused_settings(config.by_name)
    settings = {
        f"{section}.{key}": value
        for section, values in manifest.config.items()
        for key, value in values.items()
        if (section in ("method", "optim") or f"{section}.{key}" in _OF_TRAINING)
        and f"{section}.{key}" not in unused
        and value not in (None, {})
    }
    return (
        f"---\n{given}# license: CHOOSE ONE\n---\n\n# {title}\n\n**License:** {_LICENSE}.\n\n| | |\n|---|---|\n{rows}\n"
        f"{''.join(_figures(run, manifest.step))}"
        f"## Settings\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n"
    )


def _facts(manifest: Manifest, config: Config, run: RunFolder) -> Iterator[tuple[str, str]]:
    base = config.model.init_from
    yield "base model", "none, trained from random weights" if base is None else _shown(base)
    yield "text", ", ".join(f"{_shown(each.source)} (weight {each.weight:g})" for each in config.data.train)
    yield "method", f"{METHODS[config.method.name].title}, {counted(manifest.merges_done, 'merge')}"
    for start in _recorded(run.starts)[-1:]:
        yield "parameters", f"{start['parameters']['total']:,}, of which {start['parameters']['trainable']:,} trained"
    length = f"{config.data.sequence_length:,} tokens"
    yield "training", f"{counted(manifest.step, 'step')} of {config.train.batch_size} sequences of up to {length}"
    if "tokens" in manifest.counters:
        yield "training text seen", counted(manifest.counters["tokens"], "token")


def _figures(run: RunFolder, step: int) -> Iterator[str]:
    """A table of the last evaluation until ``step``; nothing if none was recorded."""
    lines = [line for line in _recorded(run.metrics) if line["step"] <= step]
    last: dict[str, Any] = next((line for line in reversed(lines) if any(k.startswith("eval/") for k in line)), {})
    names = [key.removesuffix("perplexity") for key in last if re.fullmatch("eval/(.+/)?perplexity", key)]
    if names:
        yield f"## Held-out text at step {last['step']}\n\n"
        yield f"| text | {' | '.join(_FIGURES).replace('_', ' ')} |\n{'|---' * (1 + len(_FIGURES))}|\n"
        for name in names:
            cells = (f"{last[tag]:{spec}}" if (tag := f"{name}{key}") in last else "" for key, spec in _FIGURES.items())
            yield f"| {name.removeprefix('eval/').rstrip('/') or 'all'} | {' | '.join(cells)} |\n"
        yield "\n"


def _shown(place: str) -> str:
    """A source without secrets; of an absolute path only the last two parts, since a card may become public."""
    parts = redact(place).split("/")
    return f"`{'/'.join(parts[-2:] if place.startswith('/') else parts)}`"


def _recorded(path: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return read_json_lines(path)
    return []


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
