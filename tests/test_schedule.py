"""The clock against the released numbers, and against tables around every boundary."""

import dataclasses
import json

import pytest

from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import MethodConfig
from relora_mora.optim.groups import make_schedule
from relora_mora.schedule import Schedule
from tests.tools.each import each
from tests.tools.shared import SHARED, needs_shared

REMORA = Schedule(
    kind="cosine",
    total_steps=100,
    warmup_steps=10,
    min_ratio=0.1,
    merge_every=20,
    restart_warmup_steps=5,
    operators=(1, 2, 3),
)


@needs_shared
def test_agrees_with_the_released_schedule_unless_that_is_zero():
    settings = json.loads((SHARED / "golden" / "cosine_restarts.json").read_text())
    alike = [each for each in settings if not each["adjust_step"]]  # which shifts ReLoRA's cosine
    assert len(alike) >= 3
    for setting in alike:
        schedule = Schedule(
            kind="cosine",
            total_steps=setting["num_training_steps"],
            warmup_steps=setting["warmup_steps"],
            min_ratio=setting["min_lr_ratio"],
            merge_every=setting["restart_every"],
            restart_warmup_steps=setting["restart_warmup_steps"],
        )
        points = [(step, expected) for step, expected in setting["points"] if expected]
        assert len(points) > 25
        for step, expected in points:
            assert schedule.rate(step) == pytest.approx(expected, rel=1e-14), (setting, step)


@each(
    "step,merge,done,operator",
    [
        (0, False, 0, 1),
        (1, False, 0, 1),
        (19, False, 0, 1),
        (20, True, 1, 2),
        (21, False, 1, 2),
        (39, False, 1, 2),
        (40, True, 2, 3),
        (60, True, 3, 1),
        (80, True, 4, 2),
        (99, False, 4, 2),
        (100, False, 4, 2),
    ],
)
def test_events_around_every_boundary(step, merge, done, operator):
    assert REMORA.merge_after(step) is merge
    assert REMORA.merges_done(step) == done
    assert REMORA.operator(step) == operator


@each("until", [40, 59])
def test_no_merge_comes_after_the_last_step_that_may_merge(until):
    schedule = dataclasses.replace(REMORA, merge_until_step=until)
    assert [step for step in range(101) if schedule.merge_after(step)] == [20, 40]
    assert [schedule.merges_done(step) for step in (39, 40, 60, 100)] == [1, 2, 2, 2]
    assert schedule.operator(100) == 3
    assert schedule.rate(41) == REMORA.rate(41)
    assert schedule.rate(61) == REMORA.envelope(61) > REMORA.rate(61)


@each(
    "schedule,step,left",
    [
        (dataclasses.replace(REMORA, merge_until_step=59), 0, [1, 2, 3]),
        (dataclasses.replace(REMORA, merge_until_step=100), 80, [2]),
        (dataclasses.replace(REMORA, merge_until_step=39), 0, [1, 2]),
        (REMORA, 0, [1, 2, 3]),
        (REMORA, 40, [3, 1, 2]),
        (REMORA, 100, [2]),
        (dataclasses.replace(REMORA, operators=()), 0, [None]),
    ],
)
def test_operators_left_at_a_step(schedule, step, left):
    assert schedule.operators_left(step) == left


def test_rates_around_a_merge():
    assert REMORA.rate(1) == 0.1
    assert REMORA.rate(10) == 1.0
    top = REMORA.envelope(25)
    # the step that ends a cycle still belongs to it; the released schedule has rate zero there
    assert REMORA.rate(20) == REMORA.envelope(20) > 0.9
    for n in range(1, 6):
        assert REMORA.rate(20 + n) == pytest.approx(n / 5 * top, rel=1e-15)
    assert REMORA.rate(26) == REMORA.envelope(26)
    assert REMORA.rate(21, rewarm=False) == REMORA.envelope(21)
    assert REMORA.rate(100) == pytest.approx(0.1)
    assert all(REMORA.rate(step) > 0 for step in range(1, 101))


def test_envelopes():
    linear = Schedule(kind="linear", total_steps=110, warmup_steps=10, min_ratio=0.0)
    assert [linear.rate(s) for s in (5, 10, 60, 110)] == [0.5, 1.0, 0.5, 0.0]
    wsd = Schedule(kind="wsd", total_steps=100, warmup_steps=10, min_ratio=0.0, decay_steps=20)
    assert [wsd.rate(s) for s in (1, 10, 80, 90, 100)] == [0.1, 1.0, 1.0, 0.5, 0.0]
    constant = Schedule(kind="constant", total_steps=100, warmup_steps=0, min_ratio=0.0)
    assert {constant.rate(s) for s in range(1, 101)} == {1.0}


@each("restart", [100, 50])
@each("kind", ["cosine", "linear", "wsd"])
def test_no_step_has_rate_zero_when_the_run_ends_within_a_restart(kind, restart):
    late = Schedule(
        kind=kind,
        total_steps=1000,
        warmup_steps=10,
        min_ratio=0.0,
        decay_steps=100,
        merge_every=190,
        restart_warmup_steps=restart,
    )
    rates = [late.rate(step) for step in range(951, 1000)]  # the last merge is at 950
    assert rates == [min(1, (step - 950) / restart) * late.envelope(step) for step in range(951, 1000)]
    assert min(rates) > 0


def test_lengths_that_do_not_fit_are_shortened():
    method = MethodConfig(name="remora", merge_every=6)
    optim = OptimConfig(schedule="wsd", warmup_steps=10, decay_steps=50, restart_warmup_steps=20)
    clock = make_schedule(method, optim, 40)
    assert [step for step in range(41) if clock.merge_after(step)] == [6, 12, 18, 24, 30, 36]
    assert (clock.restart_warmup_steps, clock.decay_steps) == (6, 30)
    assert [make_schedule(method, optim, steps).warmup_steps for steps in (1, 6, 10, 11)] == [1, 3, 5, 10]
    assert make_schedule(method, optim, 60).decay_steps == 50


def test_without_merges_nothing_restarts():
    plain = Schedule(kind="cosine", total_steps=100, warmup_steps=10, min_ratio=0.1)
    assert not any(plain.merge_after(step) for step in range(101))
    assert plain.operator(50) is None


@each("until", [None, 2**40])
def test_a_clock_of_many_steps_takes_no_time(until):
    clock = dataclasses.replace(REMORA, total_steps=2**53, merge_every=1, merge_until_step=until)
    assert clock.merges_done(2**53) == (until or 2**53 - 1)
    assert clock.merge_after(2**40)
    assert clock.merge_after(2**40 + 1) is (until is None)
