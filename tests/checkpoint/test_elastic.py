"""A run that moves to another number of ranks, ZeRO stage and micro-batch size continues as if it had not moved.

The reference is one run per method that never moved, on one rank at stage 0: the same global batches, exactly, and the
same losses within 1e-5. Runs that never moved differ from each other by up to 3e-7 in 25 steps.
"""

import hashlib
import itertools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.tools.grids import STAGES, rest
from tests.tools.runs import copy_cut_at, logged_steps, logged_values, run_config, train, write_inputs

pytestmark = pytest.mark.distributed

METHODS = ("full", "relora", "remora")
SETTINGS = {method: {"name": method} for method in METHODS}
SETTINGS["int8"] = {"name": "remora", "base": "int8", "base_products": True, "form": "decoupled"}
WORLDS = (1, 2, 4)
MERGE_EVERY = 4
STOPS = (3, 4, 5)  # before, at and after a merge
STEPS = 13  # two merges follow
LONG = 25  # five merges follow
BATCH = 8
Batches = dict[int, list[str]]  # by step: a hash of each sequence, over all ranks, in any order


class Move(NamedTuple):
    method: str
    world: int
    stage: int
    to_world: int
    to_stage: int

    @property
    def stop(self) -> int:
        places = list(SETTINGS).index(self.method) + WORLDS.index(self.world) + WORLDS.index(self.to_world)
        return STOPS[(places + self.stage + self.to_stage) % 3]

    @property
    def micro_batch_size(self) -> int:
        fitting = [size for size in (1, 2, 4, 8) if BATCH // self.to_world % size == 0]
        return fitting[(self.stage + 2 * self.to_stage + self.world) % len(fitting)]

    def __str__(self) -> str:
        to = f"{self.to_world}x{self.micro_batch_size}-zero{self.to_stage}"
        return f"{self.method}-{self.world}x2-zero{self.stage}-at{self.stop}-{to}"


MATRIX = [Move(*values) for values in itertools.product(METHODS, WORLDS, STAGES, WORLDS, STAGES)]


# each pair of world sizes once; the first two in ``make test``
SUBSET = [
    Move("full", 1, 2, 2, 1),
    Move("remora", 4, 3, 2, 0),
]
FURTHER = [
    Move("relora", 1, 0, 4, 2),
    Move("full", 2, 2, 1, 3),
    Move("remora", 2, 1, 2, 2),
    Move("remora", 1, 1, 1, 0),
    Move("full", 2, 3, 4, 2),
    Move("relora", 4, 1, 1, 3),
    Move("relora", 4, 0, 4, 1),
]


def followed(config: Any, stop_after: int | None = None) -> Batches:
    """Trains and returns the batches of this rank."""
    seen: Batches = {}

    def watch(trainer: Any, share: Any) -> None:
        rows = zip(share.batch.input_ids.numpy(), share.batch.labels.numpy(), strict=True)
        seen[trainer.state.step + 1] = [
            hashlib.sha256(ids.tobytes() + labels.tobytes()).hexdigest() for ids, labels in rows
        ]

    train(config, stop_after, watch)
    return seen


class Course:
    """The runs of this module: the batches of all ranks, and the losses in the run folder."""

    def __init__(self, pools: Any, inputs: Path, tokenizer: str, folder: Path, steps: int) -> None:
        self.pools = pools
        self.steps = steps
        self.inputs = inputs
        self.tokenizer = tokenizer
        self.folder = folder
        self.origins: dict[tuple[str, int, int], Path] = {}
        self.references: dict[str, tuple[Batches, list[float]]] = {}

    def run(self, folder: Path, method: str, world: int, stage: int, micro: int, stop: int | None = None) -> Batches:
        config = run_config(
            self.inputs,
            self.tokenizer,
            folder,
            world,
            method=SETTINGS[method] | {"merge_every": MERGE_EVERY},
            train={"steps": self.steps, "batch_size": BATCH, "micro_batch_size": micro, "zero_stage": stage},
            eval={"at_start": False, "every_steps": 0, "max_tokens": 64},
            checkpoint={"every_steps": 1 if stop else 0},
        )
        of_ranks = self.pools(world)(followed, config, stop_after=stop)
        assert len({tuple(batches) for batches in of_ranks}) == 1
        return {step: sorted(itertools.chain(*(batches[step] for batches in of_ranks))) for step in of_ranks[0]}

    def reference(self, method: str) -> tuple[Batches, list[float]]:
        if method not in self.references:
            folder = self.folder / f"reference-{method}"
            self.references[method] = self.run(folder, method, 1, 0, 2), logged_values(folder)
        return self.references[method]

    def origin(self, method: str, world: int, stage: int) -> Path:
        """A run that was stopped after the last of STOPS, with a checkpoint of every step."""
        if (method, world, stage) not in self.origins:
            folder = self.folder / f"{method}-{world}-{stage}"
            batches = self.run(folder, method, world, stage, 2, stop=max(STOPS))
            assert batches == {step: self.reference(method)[0][step] for step in range(1, max(STOPS) + 1)}
            self.origins[method, world, stage] = folder
        return self.origins[method, world, stage]


@pytest.fixture(scope="module")
def course(request, pools, tokenizer_path, tmp_path_factory) -> Course:
    """With as many steps as the test asks for."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    return Course(pools, inputs, tokenizer_path, tmp_path_factory.mktemp("runs"), request.param)


def _check(course: Course, move: Move, folder: Path, tolerance: float = 1e-5) -> None:
    origin = course.origin(move.method, move.world, move.stage)
    copy_cut_at(origin, folder, move.stop)
    batches = course.run(folder, move.method, move.to_world, move.to_stage, move.micro_batch_size)
    expected, losses = course.reference(move.method)
    assert batches == {step: expected[step] for step in range(move.stop + 1, course.steps + 1)}
    assert logged_values(folder) == pytest.approx(losses, rel=0, abs=tolerance)
    assert len(losses) == course.steps
    merges = logged_steps(folder, "merge/layers")
    assert merges == ([] if move.method == "full" else list(range(MERGE_EVERY, course.steps, MERGE_EVERY)))
    shutil.rmtree(folder)


@pytest.mark.parametrize("course", [STEPS], indirect=True)
@pytest.mark.parametrize("move", [*SUBSET, *rest(*((move,) for move in FURTHER))], ids=str)
def test_a_moved_run_continues_as_if_it_had_not_moved(course, tmp_path, move):
    _check(course, move, tmp_path / "run")


@pytest.mark.elastic
@pytest.mark.parametrize("course", [LONG], indirect=True)
@pytest.mark.parametrize("move", MATRIX, ids=str)
def test_every_move(course, tmp_path, move):
    _check(course, move, tmp_path / "run")


@pytest.mark.elastic
@pytest.mark.parametrize("course", [STEPS], indirect=True)
@pytest.mark.parametrize("world,stage,to_world,to_stage", [(2, 2, 1, 3), (1, 3, 4, 1)])
def test_a_run_with_weights_in_8_bits_moves(course, tmp_path, world, stage, to_world, to_stage):
    """If sums differ in their last bits, some values round to the next of 127 steps: losses differed by up to 8e-4."""
    _check(course, Move("int8", world, stage, to_world, to_stage), tmp_path / "run", tolerance=3e-3)
