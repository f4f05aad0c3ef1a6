"""Loggers besides metrics.jsonl: the values they get, faults that do not end a run, and Weights & Biases."""

import importlib.machinery
import importlib.util
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relora_mora.config.load import ConfigError, dump, validate
from relora_mora.config.schema import LogConfig
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.log.loggers import WeightsAndBiases, check_loggers, make_loggers
from tests.tools.config_tools import faults_of, tree
from tests.tools.each import each
from tests.tools.runs import metrics, opened

OLD_KEY = "0123456789abcdef" * 2 + "01234567"


class Recorder:
    """Records its calls. While ``broken``, every call fails with a generic error."""

    def __init__(self, *, broken: bool = False) -> None:
        self.title = "a broken recorder" if broken else "a recorder"
        self.broken = broken
        self.events: list[Any] = []

    def _record(self, *event: Any) -> None:
        if self.broken:
            raise RuntimeError("the server said no")
        self.events.append(event)

    def open(self, step: int) -> None:
        self._record("open", step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._record(step, dict(values))

    def close(self) -> None:
        self._record("close")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder that has been started."""
    run = tmp_path / "small run"
    run.mkdir()
    RunFolder(run).config.write_text(dump(validate(tree(optim={"lr": 0.25}), "the test")))
    return run


def test_a_failing_logger_does_not_affect_the_file_or_other_loggers(
    folder: Path, logged: pytest.LogCaptureFixture
) -> None:
    broken, whole = Recorder(broken=True), Recorder()
    written = opened(folder, 0, loggers=[broken, whole])
    written.write(1, {"train/loss": 1.0})
    broken.broken = False
    written.write(2, {"train/loss": 2.0})
    broken.broken = True
    for step in (3, 4):
        written.write(step, {"train/loss": 3.0})
    written.close()
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4] == [event[0] for event in whole.events[1:-1]]
    assert broken.events == [(2, {"train/loss": 2.0})]
    messages = [record.getMessage() for record in logged.records]
    assert len(messages) == 2, "once for each time that it begins to fail"
    assert "a broken recorder: metrics cannot be written (the server said no)" in messages[0]


@each("found", [None, importlib.machinery.ModuleSpec("wandb", None)])
def test_without_the_package_a_run_does_not_begin(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    check_loggers(LogConfig())
    with pytest.raises(ConfigError, match=r"pip install .relora_mora\[wandb\]"):
        check_loggers(LogConfig(wandb="small"))


@each(
    ("given", "expected"),
    [
        (OLD_KEY, "looks like a key of Weights & Biases; use `wandb login` or WANDB_API_KEY"),
        (f"wandb_v1_{'Ab1Cd2Ef3Gh4' * 3}", "looks like a key of Weights & Biases"),
        ("a/b/c", "PROJECT or ENTITY/PROJECT"),
    ],
)
def test_an_invalid_project_is_refused_and_no_key_is_shown(given: object, expected: str) -> None:
    faults = faults_of(tree(log={"wandb": given}))
    assert len(faults) == 1
    assert faults[0].startswith("log.wandb: ")
    assert expected in faults[0]
    assert OLD_KEY not in faults[0] and "Ab1Cd2" not in faults[0]


class Service:
    """Stands in for the package: keeps what a run is made with and what it logs."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.offline = True
        self.dir = "wandb/offline-run/files"
        self.finished = threading.Event()

    Settings = SimpleNamespace

    def init(self, **given: Any) -> "Service":
        self.made.append(given)
        return self

    def define_metric(self, name: str, step_metric: str | None = None, hidden: bool | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished.set()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    stand_in = Service()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]
    return stand_in


def test_a_run_has_its_project_name_and_settings(folder: Path, service: Service) -> None:
    logger = WeightsAndBiases(folder, "lab/small")
    logger.open(0)
    logger.write(3, {"train/loss": 1.5, "train/skipped_data": ["a text"]})
    logger.close()
    [made] = service.made
    assert (made["entity"], made["project"], made["name"]) == ("lab", "small", "small run")
    assert made["config"]["optim"]["lr"] == 0.25
    assert made["dir"] == str(folder)
    assert service.metrics == [("step", None), ("*", "step")]
    assert service.rows == [{"step": 3, "train/loss": 1.5}]
    assert service.finished.is_set()


def test_a_resume_continues_the_run_and_a_new_start_does_not(folder: Path, service: Service) -> None:
    for step in (0, 4, 0):
        logger = WeightsAndBiases(folder, "small")
        logger.open(step)
        logger.open(2)  # a rollback: the run goes on
        logger.close()
    first, resumed, restarted = service.made
    assert first["id"] == resumed["id"] != restarted["id"]
    assert (first["resume"], resumed["resume"], restarted["resume"]) == (None, "allow", None)
    assert first["entity"] is None
    assert RunFolder(folder).wandb_id.read_text() == restarted["id"] + "\n"


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed: pip install 'relora_mora[wandb]'"
)
def test_the_package_takes_a_run_and_its_resume_and_writes_no_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", OLD_KEY)
    for first in (0, 2):
        written = opened(folder, first, loggers=make_loggers(folder, LogConfig(wandb="small", tensorboard=False)))
        written.write(first + 1, {"train/loss": 1.0, "train/skipped_data": ["a text"]})
        written.close()
    identifier = RunFolder(folder).wandb_id.read_text().strip()
    assert len(list(folder.glob(f"wandb/offline-run-*/run-{identifier}.wandb"))) == 2
    assert not any(path.is_file() and OLD_KEY.encode() in path.read_bytes() for path in folder.rglob("*"))
