"""The curves of the figures agree with the data; their looks are not tested."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relora_mora.experiments.compare.curves import running_mean, styles
from relora_mora.experiments.compare.figures import figures_of, perplexity_figure, rank_figure
from relora_mora.experiments.compare.files import write_comparison, write_files
from relora_mora.experiments.compare.groups import Group, group_runs
from relora_mora.experiments.compare.losses import loss_figure
from relora_mora.experiments.compare.runs import TABLE
from tests.experiments.compare.folders import TOKENS, made_run
from tests.tools.commands import files_end_at, left_in

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'relora_mora[plot]'")

LOSSES = [9.0, 4.0, 3.0, 2.0, 1.0]
EVALUATIONS = [TOKENS * step for step in (0, 10, 20, 30, 40)]


@pytest.fixture
def groups(tmp_path: Path) -> list[Group]:
    """Full rank, and ReMoRA with two seeds."""
    higher = [loss + 0.2 for loss in LOSSES]
    runs = [
        made_run(tmp_path / "full", higher, method={"name": "full"}, step_seconds=4000.0),
        made_run(tmp_path / "remora", LOSSES),
        made_run(tmp_path / "remora_1", [loss + 0.1 for loss in LOSSES], train={"seed": 1}),
    ]
    return group_runs(runs)


def _lines(panel: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The curves of a panel that are in the legend."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in panel.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def test_curves_of_loss_are_means_over_seeds(groups: list[Group]) -> None:
    figure = loss_figure(groups, "tokens")
    [panel] = figure.axes
    lines = _lines(panel)
    assert list(lines) == ["Full rank", "ReMoRA (1, 2) (2 seeds)"]
    assert lines["Full rank"][0] == EVALUATIONS
    assert lines["Full rank"][1] == pytest.approx([9.2, 4.2, 3.2, 2.2, 1.2])
    assert lines["ReMoRA (1, 2) (2 seeds)"][1] == pytest.approx([9.05, 4.05, 3.05, 2.05, 1.05])
    [band] = [each for each in panel.collections if hasattr(each, "get_paths")]
    heights = band.get_paths()[0].vertices
    assert {1.0, 1.1} <= {round(float(y), 6) for x, y in heights if x == EVALUATIONS[-1]}


def test_merges_are_marked_along_the_axis(groups: list[Group]) -> None:
    panel = loss_figure(groups, "tokens").axes[0]
    [strokes] = [line for line in panel.get_lines() if line.get_marker() == "|"]
    assert list(strokes.get_xdata()) == [20 * TOKENS]
    assert 0 < strokes.get_ydata()[0] < 0.2
    assert strokes.get_transform() == panel.get_xaxis_transform()


def test_merges_too_many_to_tell_apart_are_not_marked(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora_mora.experiments.compare.losses.MOST_MERGES", 0)
    figure = loss_figure(groups, "tokens")
    assert not [line for line in figure.axes[0].get_lines() if line.get_marker() == "|"]
    assert "merge" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_time_is_in_the_unit_that_the_runs_need(groups: list[Group]) -> None:
    panel = loss_figure(groups, "time").axes[0]
    assert panel.get_xlabel() == "time of steps and merges, hours"
    lines = _lines(panel)
    assert lines["Full rank"][0] == pytest.approx([step * 4000 / 3600 for step in (0, 10, 20, 30, 40)])
    assert lines["ReMoRA (1, 2) (2 seeds)"][0][-1] == pytest.approx(85 / 3600)


def test_each_set_has_a_panel(tmp_path: Path) -> None:
    groups = group_runs([made_run(tmp_path / "a", sets=["web", "books"])])
    panels = loss_figure(groups, "tokens").axes
    assert [panel.get_ylabel() for panel in panels] == [
        "loss on web, nats per token",
        "loss on books, nats per token",
    ]
    assert [_lines(panel)["ReMoRA (1, 2)"][1][-1] for panel in panels] == [1.0, 2.0]


def test_the_last_perplexities_are_dots_with_the_lowest_group_at_the_top(
    groups: list[Group],
) -> None:
    for against, line in ((None, math.exp(1.2)), (groups[1], (math.exp(1.0) + math.exp(1.1)) / 2)):
        figure = perplexity_figure(groups, against)
        [panel] = figure.axes
        dots = [list(each.get_xdata()) for each in panel.get_lines() if each.get_marker() == "o"]
        assert dots == [pytest.approx([math.exp(1.0), math.exp(1.1)]), pytest.approx([math.exp(1.2)])]
        strokes = [float(each.get_xdata()[0]) for each in panel.get_lines() if each.get_marker() == "|"]
        assert strokes == pytest.approx([(math.exp(1.0) + math.exp(1.1)) / 2, math.exp(1.2)])
        [dashed] = [each.get_xdata()[0] for each in panel.get_lines() if each.get_linestyle() == "--"]
        assert dashed == pytest.approx(line)
        assert [text.get_text() for text in panel.get_yticklabels()] == ["ReMoRA (1, 2)", "Full rank (1 seed)"]
        assert panel.get_xlabel() == "validation perplexity"
        assert figure.get_supxlabel() == f"dashed: {(against or groups[0]).label}"
        assert panel.get_ylim()[0] > panel.get_ylim()[1], "the first row is at the top"
        colours = [each.get_color() for each in panel.get_lines() if each.get_marker() == "o"]
        of_groups = [style["color"] for style in itertools.islice(styles(), 2)]
        assert colours == of_groups[::-1], "as in the other figures"


def test_long_names_and_many_merging_rows_do_not_overlap(tmp_path: Path) -> None:
    runs = [
        made_run(tmp_path / f"{rank}", optim={"lr": rank / 1000}, method={"rank": rank, "reset_ratio": rank / 100})
        for rank in range(1, 13)
    ]
    groups = group_runs(runs)
    for group in groups:
        object.__setattr__(group, "differs", f"{group.differs}, " + "a long name " * 12)
    figure = perplexity_figure(groups)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(upper.ymin >= lower.ymax for upper, lower in itertools.pairwise(boxes))
    figure = loss_figure(groups, "tokens")
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width
    heights = [line.get_ydata()[0] for line in figure.axes[0].get_lines() if line.get_marker() == "|"]
    assert len(set(heights)) == 12
    assert max(heights) < 0.2


def test_losses_of_other_text_do_not_stretch_a_panel(groups: list[Group]) -> None:
    """Training losses fall from 99 to 60 here, held-out losses from 9 to 1."""
    whole = loss_figure(groups, "tokens").axes[0]
    assert whole.get_ylim()[1] < 15


def test_ranks_have_a_panel_for_each_kind_that_has_some(groups: list[Group]) -> None:
    figure = rank_figure(groups)
    assert figure is not None
    assert [panel.get_title() for panel in figure.axes] == ["q_proj"]
    assert _lines(figure.axes[0]) == {"ReMoRA (1, 2) (2 seeds)": ([20 * TOKENS], [7.5])}
    assert rank_figure(groups[:1]) is None


def test_runs_that_merge_other_projections_have_their_own_panels(groups: list[Group]) -> None:
    kinds = {"q_proj": 3.0, "down_proj": 5.0}
    apart = [
        replace(group, runs=tuple(replace(run, lines=[{"step": 10, f"u/{kind}": rank}]) for run in group.runs))
        for group, (kind, rank) in zip(groups[:2], kinds.items(), strict=True)
    ]
    figure = rank_figure(apart, "u", "rank")
    assert figure is not None
    assert [panel.get_title() for panel in figure.axes] == list(kinds)
    assert [[list(y) for _, y in _lines(panel).values()] for panel in figure.axes] == [[[3.0]], [[5.0]]]


def test_seeds_without_a_step_in_common_have_no_curve_of_ranks(groups: list[Group]) -> None:
    lines = [[{"step": step, "u/q_proj": 3.0}] for step in (10, 20)]
    apart = [replace(run, lines=more) for run, more in zip(groups[1].runs, lines, strict=True)]
    assert rank_figure([replace(groups[1], runs=tuple(apart))], "u", "rank") is None


def test_an_unfinished_run_is_marked_in_the_legend(tmp_path: Path) -> None:
    groups = group_runs([made_run(tmp_path / "a", LOSSES[:3])])
    assert list(_lines(loss_figure(groups, "tokens").axes[0])) == ["ReMoRA (1, 2) [unfinished, step 20 of 40]"]


def test_an_older_figure_of_ranks_does_not_stay(groups: list[Group], tmp_path: Path) -> None:
    write_comparison(tmp_path, {TABLE: "a table"}, figures_of(groups))
    assert "effective_rank.png" in left_in(tmp_path)
    write_comparison(tmp_path, {TABLE: "a table"}, figures_of(groups[:1]))
    assert "effective_rank.png" not in left_in(tmp_path)


def test_many_curves_differ_in_more_than_their_dashes() -> None:
    given = list(itertools.islice(styles(), 40))
    for key in ("marker", "linestyle"):
        assert len({(style["color"], str(style[key])) for style in given[:35]}) == 35


def test_files_are_written(groups: list[Group], tmp_path: Path) -> None:
    figures = figures_of(groups)
    out = tmp_path / "new" / "out"
    write_files(out, {"table.md": "a table"}, figures)
    assert (out / "table.md").read_text() == "a table"
    assert left_in(out) == [
        "effective_rank.png",
        "loss_by_time.png",
        "loss_by_tokens.png",
        "perplexity.png",
        "table.md",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    assert "effective_rank" not in figures_of(groups[:1])


def test_a_disk_that_fills_up_leaves_older_files_as_they_were(groups: list[Group], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_files(out, {"table.md": "a table", "long.md": "before"}, figures_of(groups))
    before = {path: path.read_bytes() for path in out.iterdir()}
    for text, said in (("longer" * 500, "long.md"), ("before", "")):  # the figures come after the texts
        with files_end_at(2000), pytest.raises(OSError, match=f"'{out / said}'"):
            write_files(out, {"table.md": "a table", "long.md": text}, figures_of(groups[:1]))
        assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_running_mean_takes_as_many_values_on_either_side() -> None:
    values = np.array([0.0, 3.0, 6.0, 3.0, 0.0])
    assert list(running_mean(values, 1)) == [0.0, 3.0, 4.0, 3.0, 0.0]
    assert list(running_mean(values, 2)) == [0.0, 3.0, 12 / 5, 3.0, 0.0]
    assert list(running_mean(values, 0)) == list(values)


@pytest.mark.parametrize(
    "losses", [[[9.0], [9.0]], [[9.0], LOSSES], [LOSSES, LOSSES]], ids=["just begun", "one of them", "alike"]
)
def test_runs_with_few_numbers_are_drawn(tmp_path: Path, losses: list[list[float]]) -> None:
    groups = group_runs(made_run(tmp_path / f"run{i}", each, optim={"lr": 0.1 + i}) for i, each in enumerate(losses))
    with warnings.catch_warnings(action="error"):
        warnings.simplefilter("ignore", ResourceWarning)  # from objects of other tests
        figures = figures_of(groups)
        write_files(tmp_path, {}, figures)
    assert {"loss_by_tokens", "loss_by_time"} <= set(figures)
