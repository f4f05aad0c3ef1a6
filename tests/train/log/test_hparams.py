"""TensorBoard's own table of runs: what its plugin reads from the folders of two runs of different methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, get_experiment, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from relora_mora.config.load import dump, validate
from relora_mora.train.log.loggers import TensorBoard
from relora_mora.train.log.report import Metrics
from tests.tools.config_tools import tree


def _run(folder: Path, perplexity: float, **sections: dict[str, Any]) -> None:
    folder.mkdir()
    data = {"validation": {"web": "a", "books": "b"}}
    (folder / "config.yaml").write_text(dump(validate(tree(data=data, **sections), "the test")))
    metrics = Metrics(folder, step=0, loggers=[TensorBoard(folder)])
    for step, value in ((0, 9000.0), (10, perplexity)):
        metrics.write(step, {"eval/perplexity": value, "eval/books/perplexity": value + 1})
    metrics.write(10, {"perf/tokens_per_second": 1234.0, "perf/peak_memory_gib": 5.0})
    metrics.close()


def _table(root: Path) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Names of the columns, and by run its settings and its results, as the page HParams asks for them."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(root))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(root))
    context = Context(TBContext(data_provider=provider, logdir=str(root), multiplexer=multiplexer))
    asked = api_pb2.GetExperimentRequest(include_metrics=True)
    experiment = get_experiment.Handler(RequestContext(), context, "", asked).run()
    columns = [info.name for info in experiment.hparam_infos]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING, api_pb2.STATUS_SUCCESS],
        col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
        include_metrics=True,
    )
    found = list_session_groups.Handler(RequestContext(), context, "", request).run()
    settings, results = {}, {}
    for group in found.session_groups:
        run = group.sessions[0].name.partition("/")[0]
        settings[run] = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
        results[run] = {value.name.tag: value.value for value in group.metric_values}
    return columns, settings, results


@pytest.mark.parametrize("first", ["full", "remora"])
def test_runs_of_different_methods_are_compared_by_settings_and_newest_results(tmp_path: Path, first: str) -> None:
    """TensorBoard takes the columns of the run that it reads first."""
    names = {"full": "a_full" if first == "full" else "b_full", "remora": "b_remora" if first == "full" else "a_remora"}
    _run(tmp_path / names["full"], 30.0, method={"name": "full"}, optim={"lr": 0.25})
    _run(tmp_path / names["remora"], 20.0, method={"rank": 7, "operators": [2, 1]}, train={"run_dir": "r", "seed": 3})
    columns, settings, results = _table(tmp_path)
    assert {"method.name", "method.rank", "method.operators", "optim.lr", "train.seed"} <= set(columns)
    full, remora = settings[names["full"]], settings[names["remora"]]
    assert full["method.name"] == "full"
    assert full["optim.lr"] == full["optim.lr_other"] == 0.25
    assert "method.rank" not in full
    assert "method.merge_every" not in full
    assert remora["method.rank"] == 7
    assert remora["method.operators"] == "2, 1"
    assert remora["train.seed"] == 3
    for run, perplexity in (("full", 30.0), ("remora", 20.0)):
        assert results[names[run]] == {
            "eval/perplexity": perplexity,
            "eval/books/perplexity": perplexity + 1,
            "training speed/tokens_per_second": 1234.0,
            "training speed/peak_memory_gib": 5.0,
        }
