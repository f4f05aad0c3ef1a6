"""Checkpoints of no run, and trainers that send them to a mirror."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from relora_mora.checkpoint.layout import file_entry, step_folder
from relora_mora.checkpoint.mirror import Mirror
from relora_mora.system.run_folder import RunFolder
from tests.tools.checkpoints import made_manifest
from tests.tools.helpers import wait_until

URL = "memory://bucket/run"


def checkpoint(run: Path, step: int, base: str = "base", **values: Any) -> Path:
    folder = run / "checkpoints" / step_folder(step)
    (folder / "tokenizer").mkdir(parents=True)
    for name, content in (("state", f"{step} {values}"), ("base", base), ("tokenizer/t.json", "{}")):
        (folder / name).write_text(content)
    files = {name: file_entry(folder / name) for name in ("state", "base", "tokenizer/t.json")}
    manifest = made_manifest(step=step, files=files, parameters={}, frozen={}, **values)
    (folder / "manifest.json").write_text(manifest.dump())
    (run / "metrics.jsonl").write_text(f"{step}\n")
    return folder


def opened(run: Path, url: str = URL) -> Mirror:
    return Mirror(url, RunFolder(run))


def sent(run: Path, *steps: int, url: str = URL, **values: Any) -> None:
    """A trainer that saves checkpoints of these steps and ends."""
    trainer = opened(run, url=url)
    trainer.claim()
    for step in steps:
        checkpoint(run, step, **values)
    trainer.start()
    trainer.close()


def wait_for(condition: Callable[[], Any]) -> None:
    wait_until(condition, 60)
