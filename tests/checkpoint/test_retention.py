"""Which checkpoints are kept."""

from relora_mora.checkpoint import writer
from relora_mora.checkpoint.layout import CheckpointError, step_folder, step_of
from tests.tools.checkpoints import made_manifest
from tests.tools.each import each

GOOD = "good"
BAD = "bad"
UNREADABLE = "unreadable"


@each(
    "checkpoints,keep_last,keep_every_steps,best,kept",
    [
        ({10: GOOD, 20: GOOD, 30: GOOD}, 2, 0, 0, [20, 30]),
        ({10: GOOD, 20: GOOD, 25: GOOD, 30: GOOD}, 1, 20, 0, [20, 30]),
        ({10: GOOD, 20: GOOD, 30: BAD, 40: BAD}, 1, 0, 0, [20, 40]),  # a rollback would go to step 20
        ({10: GOOD, 20: UNREADABLE, 30: BAD}, 1, 0, 0, [10, 30]),
        ({10: BAD, 20: BAD}, 1, 0, 0, [20]),
        ({10: GOOD, 20: GOOD, 30: GOOD}, 1, 0, 10, [10, 30]),
    ],
)
def test_retention_keeps_the_right_checkpoints(
    tmp_path, monkeypatch, checkpoints, keep_last, keep_every_steps, best, kept
):
    def read_manifest(folder):
        state = checkpoints[step_of(folder)]
        if state == UNREADABLE:
            raise CheckpointError("damaged")
        counters = {"bad_steps": int(state == BAD)}
        return made_manifest(step=step_of(folder), counters=counters, parameters={}, frozen={})

    monkeypatch.setattr(writer.layout, "read_manifest", read_manifest)
    newest = max(checkpoints)
    of_others = [step_folder(newest + 10), "abandoned-step-00000001"]
    for name in [*of_others, *map(step_folder, checkpoints)]:
        (tmp_path / name).mkdir()
    (tmp_path / "best").write_text(step_folder(best))
    writer.retire(tmp_path, newest, keep_last=keep_last, keep_every_steps=keep_every_steps)
    assert {path.name for path in tmp_path.iterdir()} == {"best", *of_others, *(step_folder(step) for step in kept)}
