"""The ladder: known models come out exactly, rates are the tuned ones and scale by their rule, settings can be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.checks.combinations import unused_by
from relora_mora.config.load import load_config
from relora_mora.experiments import ladder
from relora_mora.model.config import read_model_config
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.work import meta_model
from tests.tools.commands import PLAN, call, refused
from tests.tools.helpers import ROOT

METHODS = list(ladder.TUNED)
SHAPES = {4: "tiny", 6: "35m", 8: "60m", 12: "130m"}


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def records(study: str) -> list[dict[str, Any]]:
    """The kept runs of a study with its first seed."""
    with gzip.open(ROOT / "docs" / "studies" / f"{study}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [record for record in map(json.loads, stream) if record["seed"] == 0]


def best(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings with the lowest last loss."""

    def loss(record: dict[str, Any]) -> float:
        return [float(values["eval/c4/loss"]) for values in record["metrics"] if "eval/c4/loss" in values][-1]

    return dict(min(found, key=loss)["given"])


NOT_COMPARED = ("lr", "lr_other", "run_dir")


def same_run(given: dict[str, Any], settings: ladder.Settings) -> bool:
    """Whether a kept run had these settings in everything but its rates and its folder, and one rank."""
    own = {
        (section, key): value for section in ("method", "optim", "train") for key, value in settings[section].items()
    }
    own["method", "rank_pattern"] = {}
    return all(given[section][key] == value for (section, key), value in own.items() if key not in NOT_COMPARED)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "name"), SHAPES.items())
def test_known_models_come_out_exactly(depth: int, name: str) -> None:
    known = json.loads((ROOT / "configs" / "model" / f"llama_{name}.json").read_text(encoding="utf-8"))
    model = ladder.model_of(depth, known["vocab_size"])
    if name == "35m":  # its heads are narrower; the weights have the same shapes
        assert (known["num_attention_heads"], model["num_attention_heads"]) == (8, 6)
        known |= {"num_attention_heads": 6, "num_key_value_heads": 6}
    assert model == {key: known[key] for key in model}


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_parameters_are_those_of_the_model(depth: int) -> None:
    assert call("configs", "size", "mine.yaml", f"--depth={depth}", "--vocab_size=1000").code == 0
    config = load_config("mine.yaml")
    counted = count_parameters(meta_model(read_model_config(config.model), config.method)).total
    assert ladder.parameters_of(ladder.model_of(depth, 1000)) == counted


# ---- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "matrices"), METHODS)
def test_depth_4_is_the_best_run_of_the_study_with_most_rates(method: str, matrices: str) -> None:
    _, settings = ladder.settings_of(depth=4, method=method, matrices=matrices, tokens=ladder.TOKENS)
    found = [
        [
            record
            for record in records(study)
            if record["given"]["optim"]["lr_other"] == ladder.TUNED_OTHER and same_run(record["given"], settings)
        ]
        for study in ("embeddings_tiny", "tuned_tiny")
    ]
    most = max(found, key=len)
    assert (len({record["given"]["optim"]["lr"] for record in most}) > 1) == ((method, matrices) != ("lora", "adamw"))
    tuned = best(most)
    assert settings["optim"]["lr"] == tuned["optim"]["lr"]
    assert (tuned["train"]["steps"], tuned["model"]["overrides"]) == (1000, {})
    assert tuned["data"]["sequence_length"] * tuned["train"]["batch_size"] == ladder.TOKENS_PER_STEP


def test_the_rate_of_the_embeddings_is_the_best_that_was_tried() -> None:
    _, settings = ladder.settings_of(depth=4, tokens=ladder.TOKENS)
    found = [
        record
        for record in records("embeddings_tiny")
        if same_run(record["given"], settings) and record["given"]["optim"]["lr"] == 2e-3
    ]
    assert len(found) > 3
    assert settings["optim"]["lr_other"] == best(found)["optim"]["lr_other"]


def scaled(matrices: str = "muon", **changes: float) -> list[float]:
    """The factors of the rates in a run that differs from the tuned one by these factors."""
    rates = ladder.scaled_rates(
        "full",
        matrices,
        width=int(ladder.WIDTH * changes.get("width", 1)),
        layers=int(ladder.LAYERS * changes.get("layers", 1)),
        tokens_per_step=int(ladder.TOKENS_PER_STEP * changes.get("batch", 1)),
        tokens=ladder.TOKENS * changes.get("tokens", 1),
    )
    return [rate.for_model * rate.for_run for rate in rates.values()]


def test_rates_scale_with_the_model_the_batch_and_the_tokens() -> None:
    assert scaled() == scaled("adamw") == [1, 1]
    assert scaled(width=4) == pytest.approx([1 / 2, 1 / 2])
    assert scaled("adamw", width=4) == pytest.approx([1 / 4, 1 / 2])
    assert scaled(layers=4) == scaled("adamw", layers=4) == pytest.approx([1 / 2, 1])
    assert scaled(batch=4) == pytest.approx([2, 2])
    assert scaled(tokens=16) == pytest.approx([1 / 2, 1 / 2])
    assert scaled(width=1 / 4, layers=1 / 4) == scaled("adamw", width=1 / 4, layers=1 / 4) == [1, 1]
    assert scaled(batch=4, tokens=16) == pytest.approx([1, 1])


def test_the_batch_grows_as_the_square_root_of_the_tokens() -> None:
    for factor in (1, 4, 16, 96):
        train = ladder.train_of(factor**2 * ladder.TOKENS, 256)
        assert (train["batch_size"], train["steps"]) == (8 * factor, 1000 * factor)
    short = ladder.train_of(ladder.TOKENS, 1024)
    assert (short["batch_size"], short["micro_batch_size"], short["steps"]) == (2, 2, 1000)


@pytest.mark.parametrize("sequence_length", [256, 1000])
def test_up_to_eight_ranks_can_share_a_batch(sequence_length: int) -> None:
    for depth in range(4, ladder.DEEPEST + 1):
        tokens = 20 * ladder.parameters_of(ladder.model_of(depth, 8192))
        train = ladder.train_of(tokens, sequence_length)
        exact = ladder.TOKENS_PER_STEP * (tokens / ladder.TOKENS) ** 0.5
        assert train["batch_size"] % 8 == 0
        assert train["batch_size"] * sequence_length == pytest.approx(exact, rel=0.35)
        if train["batch_size"] >= 64:
            assert train["batch_size"] % (8 * train["micro_batch_size"]) == 0


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "matrices"), METHODS)
def test_settings_of_a_size_can_be_used(method: str, matrices: str) -> None:
    answer = call("configs", "size", "mine.yaml", "--depth=6", f"--method={method}", f"--matrices={matrices}")
    assert answer.code == 0, answer.err
    config = load_config("mine.yaml", world_size=1)
    assert not unused_by(config)
    assert (config.method.name, config.optim.matrices) == (method, matrices)
    assert config.train.batch_size % config.train.micro_batch_size == 0
    parameters = ladder.parameters_of(ladder.model_of(6, 8192))
    assert 0 <= config.tokens_per_step * config.train.steps - 20 * parameters < config.tokens_per_step
    assert ladder.rate_notes(config, width=384, layers=6) == []
    head = Path("mine.yaml").read_text(encoding="utf-8").partition("\nmodel:")[0]
    assert all(line.startswith("# ") for line in head.splitlines())
    assert f"{parameters:,} parameters" in head
    assert f"optim.lr {config.optim.lr:g} = {ladder.TUNED[method, matrices]:g} x " in head


def test_the_plan_names_rates_that_are_far_from_the_scaled_ones() -> None:
    assert call("configs", "size", "mine.yaml", "--depth=4", "--tokens=2.048e6").code == 0
    answer = call(PLAN, "mine.yaml", "--world_size=1", "--optim.lr=1e-2", "--optim.lr_other=null")
    assert answer.out.count("learning rates") == 1
    assert "optim.lr 0.01 and optim.lr_other 0.01; tuned at 7M and scaled to this run: 0.003 and 0.032" in answer.out


@pytest.mark.parametrize(
    "setting",
    [
        {"optim.lr": "4e-3"},
        {"optim.lr": "1", "method.name": "mora"},
        {"optim.lr": "1", "optim.others": "adamw8bit"},
        {"optim.lr": "1", "model.init_from": "weights"},
        {"optim.lr": "1", "train.batch_size": "64"},
        {"optim.lr": "1", "train.steps": "5000"},
        {"optim.lr": "1", "method.full_steps": "5"},
    ],
)
def test_there_is_no_note_about_similar_rates_or_without_a_tuned_one(setting: dict[str, str]) -> None:
    assert call("configs", "size", "mine.yaml", "--depth=4", "--tokens=2.048e6").code == 0
    tuned = {"width": ladder.WIDTH, "layers": ladder.LAYERS}
    config = load_config("mine.yaml", {"optim.lr": "1"})
    assert ladder.rate_notes(config, **tuned)
    assert ladder.rate_notes(config, width=2 * ladder.CHECKED_WIDTHS[1], layers=ladder.LAYERS) == []
    assert ladder.rate_notes(load_config("mine.yaml", setting), **tuned) == []


def test_of_the_shipped_runs_only_the_untuned_base_of_the_studies_gets_a_note() -> None:
    noted = []
    for path in sorted((ROOT / "configs" / "run").glob("*.yaml")):
        config = load_config(str(path))
        if config.model.config is not None:
            model = read_model_config(config.model)
            if ladder.rate_notes(config, width=model.hidden_size, layers=model.num_hidden_layers):
                noted.append(path.stem)
    assert noted == ["study_full"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depth=0"], "--depth: got 0, expected at least 1"),
        (["--depth=65"], "--depth: got 65, expected 1 to 64"),
        (["--depth=4", "--method=mora"], "--method=mora --matrices=muon: no rate was tuned for it; expected full with"),
        (
            ["--depth=4", "--tokens=1000"],
            "1,000 tokens are too few for 100 steps of 1 x 256 tokens; give at least --tokens=25600",
        ),
        (["--depth=4", "--vocab_size=1"], "--vocab_size: got 1, expected 256 to 10000000"),
        (["--depth=4", f"--vocab_size={10**15}"], "expected 256 to 10000000"),
        (["--depth=4", "--tokens=-1"], "--tokens: got -1, expected a number above 0, and at most 1e+15"),
        (["--depth=4", "--tokens_per_parameter=.inf"], "--tokens_per_parameter: got inf, expected a number above 0"),
        (["--depth=4", "--tokens=2e6", "--tokens_per_parameter=20"], "--tokens: given together with --tokens_per"),
        ([], "got size mine.yaml; give nothing, or: copy NAME PATH, or: size PATH --depth=N"),
    ],
)
def test_a_mistake_is_refused_and_nothing_written(words: list[str], message: str) -> None:
    refused(call("configs", "size", "mine.yaml", *words), message)
    assert not Path("mine.yaml").exists()


def test_a_file_that_exists_stays(tmp_path: Path) -> None:
    Path("mine.yaml").write_text("x: 1\n", encoding="utf-8")
    refused(call("configs", "size", "mine.yaml", "--depth=4"), "mine.yaml: already exists; give a new path")
    assert Path("mine.yaml").read_text(encoding="utf-8") == "x: 1\n"
    refused(
        call("configs", "copy", "tiny_remora", "other.yaml", "--depth=4"), "got copy tiny_remora other.yaml --depth=4"
    )
