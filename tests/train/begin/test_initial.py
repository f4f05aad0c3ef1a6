"""The start of a run: every weight is made once, by one rank, and a resume makes none."""

import shutil
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relora_mora.config.yaml_text import parse_yaml
from relora_mora.model.causal import build_model
from relora_mora.sizing.memory import state_memory
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model
from tests.tools.faulty_server import COMMIT, serving
from tests.tools.mirrors import wait_for
from tests.tools.runs import LLAMA, built, train
from tests.tools.tiny import whole_weights

pytestmark = pytest.mark.distributed


def started(config) -> dict[str, Any]:
    """Runs on every rank: builds the run; what was drawn or read here, the base, the masters and the weights."""
    from relora_mora.train.begin import build

    drawn: list[str] = []
    read: list[str] = []
    held: list[int] = []

    def kept(values: Any) -> Any:
        held.append(sum(value.nbytes for value in values[1].values()))
        return values

    with pytest.MonkeyPatch.context() as patch:
        draw, foreign = build.initial_values, build._foreign_weights
        patch.setattr(build, "initial_values", lambda lm, names, seed: drawn.extend(names) or draw(lm, names, seed))
        patch.setattr(
            build, "_foreign_weights", lambda config, lm, shapes: read.extend(shapes) or foreign(config, lm, shapes)
        )
        values = build.start_values
        patch.setattr(build, "start_values", lambda *given: kept(values(*given)))
        run = built(config)
    engine = run.engine
    masters = {name: engine.gather(name) for name in engine.moments}
    return {
        "drawn": drawn,
        "read": read,
        "held": held,
        "base": run.base.weights,
        "masters": masters,
        "weights": whole_weights(engine, engine.parameters),
        "owned": run.base.owned,
    }


def _check_values(ranks: list[dict[str, Any]], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Compares the float32 masters and the compute weights with the plain model."""
    assert set().union(*(rank["base"] for rank in ranks)) | set(ranks[0]["masters"]) >= set(expected)
    for rank in ranks:
        assert list(rank["base"]) == rank["owned"]
        for name, value in {**rank["base"], **{n: v for n, v in rank["masters"].items() if n in expected}}.items():
            assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name
        for name, value in expected.items():
            assert torch.equal(rank["weights"][name], value.to(dtype)), name


@pytest.mark.parametrize(
    "method,stage,bf16,world",
    [
        ("remora", 0, False, 2),
        ("remora", 1, True, 2),
        ("full", 3, True, 2),
    ],
)
def test_every_weight_is_drawn_once(runs, pools, tmp_path, method, stage, bf16, world):
    sections = {"train": {"zero_stage": stage, "precision": "bf16" if bf16 else "fp32"}, "method": {"name": method}}
    ranks = pools(world)(started, runs.config(tmp_path / "run", world, **sections))
    expected = {name: p.detach() for name, p in build_model(LlamaConfig(**LLAMA), seed=0).named_parameters()}
    assert sorted(name for rank in ranks for name in rank["drawn"]) == sorted(expected)
    sizes = [sum(expected[name].numel() for name in rank["drawn"]) for rank in ranks]
    assert min(sizes) > 0.3 * sum(sizes)  # about as much for each
    _check_values(ranks, expected, torch.bfloat16 if bf16 else torch.float32)


def test_foreign_weights_are_read_by_the_first_rank(runs, pools, tmp_path):
    torch.manual_seed(3)
    foreign = LlamaForCausalLM(LlamaConfig(**LLAMA))
    foreign.save_pretrained(tmp_path / "foreign")
    sections = {"train": {"precision": "bf16"}, "model": {"init_from": str(tmp_path / "foreign")}}
    config = runs.config(tmp_path / "run", 2, **sections)
    ranks = pools(2)(started, config)
    setup = Setup(config, config.train.zero_stage, 2, bf16=True)
    planned = state_memory(meta_model(LlamaConfig(**LLAMA), config.method), setup)
    assert ranks[0]["held"] == [planned.host_start]
    assert ranks[1]["held"] == [0]
    assert ranks[0]["read"]
    assert not ranks[1]["read"]
    assert not ranks[0]["drawn"]
    _check_values(ranks, {name: p.detach() for name, p in foreign.named_parameters()}, torch.bfloat16)


def train_from_hub(config, endpoint: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", endpoint)
        train(config, stop_after=1)


@pytest.mark.more
def test_one_rank_asks_the_hub_for_all(runs, pools, inputs, tmp_path):
    """Two repositories have two commits; both are asked for once, at a start as at a resume."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ends.jsonl").touch()  # of a start that saved nothing, so what it read does not count
    (tmp_path / "run" / "config.yaml").write_text(f"data: {{commits: {{some/train@main: {'0' * 40}}}}}")
    with serving(inputs) as server:
        sources = {
            split: f"hub:some/{split}/{split}/part-{{00000..00000}}.json.gz" for split in ("train", "validation")
        }
        config = runs.config(tmp_path / "run", 2, data=sources)
        pools(2)(train_from_hub, config, server.url)
        assert sorted(path for path in server.paths if path.startswith("/api/")) == [
            f"/api/datasets/some/{split}/revision/main" for split in sources
        ]
        assert f"/datasets/some/train/resolve/{COMMIT}/train/part-00000.json.gz" in server.paths
        server.requests.clear()
        data = sources | {"validation": sources["train"]}
        pools(2)(train_from_hub, runs.config(tmp_path / "run", 2, data=data), server.url)
        assert not [path for path in server.paths if path.startswith("/api/")], (
            "a resume reads the commits it began with"
        )
        given = {"resume": str(tmp_path / "run")}
        mirror = {"mirror": str(tmp_path / "store")}
        other = runs.config(tmp_path / "other", 2, data=data, train=given, checkpoint=mirror)
        for _ in range(2):  # then from the mirror alone
            pools(2)(train_from_hub, other, server.url)
            assert not [path for path in server.paths if path.startswith("/api/")], (
                "so does a run that begins with its checkpoint"
            )
            wait_for((tmp_path / "store/manifests/step-00000001.json").exists)
            wait_for(lambda: not (tmp_path / "store/owner.json").exists())
            shutil.rmtree(tmp_path / "other")
            shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    saved = parse_yaml((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert saved["commits"] == {"some/train@main": COMMIT}
    assert saved["revision"] == "main"
