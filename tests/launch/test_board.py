"""launch/board.py: runs are found and named, and the page that it names shows both perplexities."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from relora_mora.train.tensorboard import board_tag
from tests.tools.commands import BOARD, call, module_of, refused

SCRIPT = BOARD


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for run in ("tiny", "sweep/seed-1"):
        _write_events(tmp_path / "runs" / run)
    (tmp_path / "runs" / "started" / "tensorboard").mkdir(parents=True)
    (tmp_path / "runs" / "site-packages" / "tensorboard").mkdir(parents=True)
    return tmp_path / "runs"


def _write_events(run: Path) -> None:
    (run / "tensorboard").mkdir(parents=True, exist_ok=True)
    (run / "tensorboard" / "events.out.tfevents.1").touch()


def test_runs_are_named_after_their_folders(runs: Path) -> None:
    boards = module_of(SCRIPT).boards
    assert boards(runs) == {"tiny": runs / "tiny/tensorboard", "sweep-seed-1": runs / "sweep/seed-1/tensorboard"}
    assert boards(runs / "tiny") == {"tiny": runs / "tiny/tensorboard"}


def test_runs_behind_links_are_found_once_and_long_names_cut(runs: Path, tmp_path: Path) -> None:
    _write_events(tmp_path / "scratch" / ("x" * 200) / ("y" * 200))
    (runs / "big").symlink_to(tmp_path / "scratch")
    (tmp_path / "scratch" / "loop").symlink_to(runs)
    (runs / "latest").symlink_to(runs / "tiny")
    (tmp_path / "links").mkdir()
    module_of(SCRIPT).link_boards(runs, tmp_path / "links")
    assert sorted(link.name for link in (tmp_path / "links").iterdir()) == [
        "sweep-seed-1",
        "tiny",
        "x" * 39 + "-" + "y" * 200,
    ]


def test_a_new_run_is_linked_beside_the_others(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for _ in range(2):
        module_of(SCRIPT).link_boards(runs, tmp_path / "links")
    _write_events(runs / "started")
    module_of(SCRIPT).link_boards(runs, tmp_path / "links")
    links = {link.name: link.resolve() for link in (tmp_path / "links").iterdir()}
    assert links == module_of(SCRIPT).boards(runs) and "started" in links


def test_the_page_pins_curves_that_are_written() -> None:
    address = urlsplit(module_of(SCRIPT).url("0.0.0.0", 6006))
    asked = parse_qs(address.query)
    tags = [card["tag"] for card in json.loads(asked["pinnedCards"][0])]
    assert (address.netloc, asked["smoothing"], tags) == (
        "localhost:6006",
        ["0"],
        ["eval/perplexity", "train/perplexity"],
    )
    assert [board_tag(tag) for tag in tags] == tags


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    refused(call(SCRIPT, tmp_path), "no run with TensorBoard's files", "give a run folder")
