"""A rule of one's own: what is accepted, what is refused before anything is built, and what its state is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relora_mora.config.load import load_config
from relora_mora.config.optim import OptimConfig
from relora_mora.optim.own import RuleError, own_rule, with_rule
from relora_mora.optim.rules import MatrixRule, MatrixState, shapes_of
from tests.tools.each import each
from tests.tools.helpers import ROOT
from tests.tools.tiny import tiny_config

SIGN = """
from relora_mora.optim.rules import MatrixRule, MatrixState


class Sign(MatrixRule):
    def __init__(self, momentum: float = 0.9, betas: tuple[float, float] = (0.5, 0.25)) -> None:
        if momentum >= 1:
            raise ValueError("momentum is below 1")
        self.momentum = momentum
        self.betas = betas

    def state_shapes(self, rows, columns):
        return {"average": (rows, columns)}

    def update(self, gradient, state):
        return state["average"].lerp_(gradient, 1 - self.momentum).sign()


class Half(MatrixRule):
    def update(self, gradient, state):
        return gradient / 2


class Needs(Sign):
    def __init__(self, rank: int) -> None:
        self.rank = rank
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sign.py"
    path.write_text(SIGN)
    return path


def _rule(spec: str, **settings: Any) -> MatrixRule:
    return own_rule(OptimConfig(matrices=spec, rule=settings))


def test_a_rule_is_made_with_its_settings(file):
    rule: Any = _rule(f"{file}:Sign", momentum="0.5", betas=[1, 2])
    assert (rule.momentum, rule.betas) == (0.5, (1.0, 2.0))  # as its signature says
    assert _rule(f"{file}:Needs", rank=3).rank == 3


def test_a_rule_of_a_module_that_can_be_imported(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    assert type(_rule("sign:Sign")).__module__ == "sign"
    in_file, in_module = (with_rule(tiny_config(optim={"matrices": spec})) for spec in (f"{file}:Sign", "sign:Sign"))
    assert in_file.optim.rule_digest == in_module.optim.rule_digest is not None


def test_the_rule_in_the_documents_is_one(tmp_path):
    """It is Adam, if all squares of gradients are products of a row's and a column's number."""
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").partition("### A rule of your own")[2]
    [code] = re.findall(r"```python\n(.*?)```", text.partition("\n### ")[0], re.DOTALL)
    path = tmp_path / "factored.py"
    path.write_text(code)
    rule = _rule(f"{path}:Factored", momentum=0.8)
    state = MatrixState(0, shapes_of(rule, 2, 3))
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.8, 0.99), eps=1e-12)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.tensor([[1.0], [-2.0]]) * torch.tensor([3.0, 0.5, -4.0])
        adam.step()
        assert torch.allclose(rule.update(weight.grad.clone(), state), before - weight.detach(), rtol=1e-4)


@each(
    "spec,settings,setting,part",
    [
        ("none.py:Sign", {}, "optim.matrices", "FileNotFoundError"),
        ("sign.py:Other", {}, "optim.matrices", "expected a subclass"),
        ("sign.py:MatrixState", {}, "optim.matrices", "expected a subclass"),
        ("no_such_package.rules:Sign", {}, "optim.matrices", "ModuleNotFoundError"),
        ("broken.py:Sign", {}, "optim.matrices", "line 2"),
        ("exits.py:Sign", {}, "optim.matrices", "SystemExit"),
        ("sign.py:Sign", {"momentun": 0.5}, "optim.rule", "momentun: Unexpected keyword argument; its constructor has"),
        ("sign.py:Sign", {"momentum": 1.5}, "optim.rule", "momentum is below 1"),
        ("sign.py:Needs", {}, "optim.rule", "rank: Missing required argument"),
        ("sign.py:Half", {}, "optim.rule", "state_shapes"),
    ],
)
def test_what_is_not_a_rule_or_has_wrong_settings_is_refused(file, monkeypatch, spec, settings, setting, part):
    monkeypatch.chdir(file.parent)
    Path("broken.py").write_text("import math\nmath.sqrt(-1)\n")
    Path("exits.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(RuleError) as caught:
        _rule(spec, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{setting}: ")
    assert part in message


def test_a_run_records_the_digest_of_the_file_and_can_insist_on_it(file):
    config = with_rule(tiny_config(optim={"matrices": f"{file}:Sign"}))
    digest = config.optim.rule_digest
    assert with_rule(config) == config
    file.write_text(SIGN.replace("sign()", "sign().neg()"))
    with pytest.raises(RuleError, match=r"optim\.rule_digest"):
        with_rule(config)
    changed = with_rule(tiny_config(optim={"matrices": f"{file}:Sign"}))
    assert changed.optim.rule_digest not in (None, digest)
    rule = own_rule(changed.optim)
    assert rule.update(torch.ones(2, 3), MatrixState(0, shapes_of(rule, 2, 3))).sum() == -6  # the new code
    assert with_rule(tiny_config()).optim.rule_digest is None


def test_a_file_is_found_next_to_the_settings(file, monkeypatch):
    monkeypatch.chdir("/")
    text = (
        "{model: {config: m}, tokenizer: {path: t}, data: {train: t, validation: v}, method: {reset: full}, "
        "train: {run_dir: r}, optim: {matrices: sign.py:Sign}}"
    )
    settings = file.parent / "settings.yaml"
    settings.write_text(text)
    assert load_config(settings).optim.matrices == f"{file}:Sign"


class Given(MatrixRule):
    """Has these shapes, and transposes what it is given."""

    def __init__(self, shapes: Any) -> None:
        self.shapes = shapes

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return self.shapes

    def update(self, gradient: Tensor, state: MatrixState) -> Tensor:
        return gradient.mT


@each("shapes", [{"a|b": (1,)}, {"master": (1,)}, {3: ()}, {"a": (1.5,)}, {"a": (-1,)}])
def test_states_that_a_checkpoint_cannot_have_and_updates_of_another_shape_are_refused(shapes):
    with pytest.raises(ValueError, match=r"^optim\.matrices: Given\.state_shapes\(2, 3\)"):
        shapes_of(Given(shapes), 2, 3)
    with pytest.raises(ValueError, match=r"^optim\.matrices: Given\.update returned the shape \[3, 2\]"):
        Given({}).update_stack(torch.zeros(1, 2, 3), [MatrixState(0, {})])


def test_an_assigned_state_is_copied_and_keeps_its_shape():
    state = MatrixState(7, {"average": (2, 3), "updates": ()})
    before = state["average"]
    state["average"] = torch.ones(2, 3, dtype=torch.float64)
    assert state["average"] is before
    assert (before.dtype, before.sum()) == (torch.float32, 6)
    with pytest.raises(ValueError, match="average"):
        state["average"] = torch.ones(3)


def test_draws_depend_on_the_matrix_and_the_number_only():
    def drawn(seed: int, number: int) -> Tensor:
        return torch.randn(9, generator=MatrixState(seed, {}).generator(number))

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert not any(torch.equal(drawn(1, 2), other) for other in (drawn(1, 3), drawn(2, 2)))
