"""The curves of the figures agree with the data; their looks are not tested."""

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'relora_mora[plot]'")


from relora_mora.experiments.compare.figures import loss_figure, perplexity_figure, styles
from relora_mora.experiments.compare.groups import Group, group_runs
from tests.experiments.compare.folders import TOKENS, made_run
from tests.tools.each import each

LOSSES = [9.0, 4.0, 3.0, 2.0, 1.0]
SETS = ("web", "books")
EVALUATIONS = [TOKENS * step for step in (0, 10, 20, 30, 40)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    """Full rank, and ReMoRA with two seeds, with two held-out sets."""
    folder = tmp_path_factory.mktemp("runs")
    given: list[dict[str, Any]] = [{"method": {"name": "full"}}, {}, {"train": {"seed": 1}}]
    return group_runs(
        made_run(folder / f"run{more}", [loss + more for loss in LOSSES], sets=SETS, **settings)
        for more, settings in zip((0.2, 0.0, 0.1), given, strict=True)
    )


def test_curves_of_loss_are_means_over_seeds_in_a_panel_for_each_set(groups: list[Group]) -> None:
    losses = loss_figure(groups)
    names = ["Full rank", "ReMoRA (1, 2) (2 seeds)"]
    assert [text.get_text() for text in losses.legends[0].get_texts()] == names
    assert [panel.get_ylabel() for panel in losses.axes] == [f"loss on {name}, nats per token" for name in SETS]
    for number, panel in enumerate(losses.axes):
        full, remora = panel.get_lines()
        assert list(full.get_xdata()) == EVALUATIONS[1:]
        assert list(full.get_ydata()) == pytest.approx([loss + 0.2 + number for loss in LOSSES[1:]])
        assert list(remora.get_ydata()) == pytest.approx([loss + 0.05 + number for loss in LOSSES[1:]])
        heights = panel.collections[1].get_paths()[0].vertices
        assert {1.0 + number, 1.1 + number} <= {round(float(y), 6) for x, y in heights if x == EVALUATIONS[-1]}
        low, high = panel.get_ylim()
        assert low < 1.0 + number and 3.5 + number < high < 5.0 + number


@each("against", [0, 1])
def test_the_last_perplexities_are_dots_with_the_lowest_group_at_the_top(groups: list[Group], against: int) -> None:
    figure = perplexity_figure(groups, groups[against])
    assert figure.get_supxlabel() == f"dashed: {groups[against].label}"
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["ReMoRA (1, 2) (2 seeds)", "Full rank"]
    for number, (panel, name) in enumerate(zip(figure.axes, SETS, strict=True)):
        low, high, full = (math.exp(loss + number) for loss in (1.0, 1.1, 1.2))
        dots = [each for each in panel.get_lines() if each.get_marker() == "o"]
        assert [list(each.get_xdata()) for each in dots] == [pytest.approx([low, high]), pytest.approx([full])]
        strokes = [each.get_xdata()[0] for each in panel.get_lines() if each.get_marker() == "|"]
        assert strokes == pytest.approx([(low + high) / 2, full])
        [dashed] = [each.get_xdata()[0] for each in panel.get_lines() if each.get_linestyle() == "--"]
        assert dashed == pytest.approx(full if against == 0 else (low + high) / 2)
        assert panel.get_xlabel() == f"perplexity on {name}"
        assert panel.get_ylim()[0] > panel.get_ylim()[1], "the first row is at the top"
        assert len({tuple(style.values()) for style in itertools.islice(styles(), 60)}) == 60
        of_groups = [style["color"] for style in itertools.islice(styles(), 2)]
        assert [each.get_color() for each in dots] == of_groups[::-1], "as in the other figures"


@each("losses", [[[9.0], [9.0]], [[9.0], LOSSES[:3]]])
def test_runs_with_few_numbers_are_drawn(tmp_path: Path, losses: list[list[float]]) -> None:
    groups = group_runs(made_run(tmp_path / f"run{i}", each, optim={"lr": 0.1 + i}) for i, each in enumerate(losses))
    with warnings.catch_warnings(action="error"):
        warnings.simplefilter("ignore", ResourceWarning)  # from objects of other tests
        perplexity_figure(groups, groups[0]).draw_without_rendering()
        figure = loss_figure(groups)
        figure.draw_without_rendering()
    step = 10 * (len(losses[1]) - 1)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[1] == f"ReMoRA (1, 2), lr 1.1 [unfinished, step {step} of 40]"
