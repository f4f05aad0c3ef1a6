"""Shows the progress of a run: log lines, on a terminal also bars, and the commands for a finished run."""

import shlex
import time
from pathlib import Path

import torch
from tqdm import tqdm

from relora_mora.system.bars import Bar, is_watched
from relora_mora.system.logs import counted, log
from relora_mora.system.process import own_command
from relora_mora.train.begin.build import Run
from relora_mora.train.state.run_state import RunState


def describe(run: Run, state: RunState) -> str:
    """Describes the run, its device and its batch in one line."""
    config = run.config
    engine = run.engine
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
    precision = "bf16" if engine.bf16 else "fp32"
    ranks = counted(engine.world_size, "rank")
    batch = counted(config.train.batch_size, "sequence")
    return (
        f"{config.method.name} on {ranks} ({device}), ZeRO-{engine.stage}, {precision}; a step has {batch} of "
        f"{config.data.sequence_length} tokens, {config.accumulation_steps(engine.world_size)} x "
        f"{config.train.micro_batch_size} on each rank; "
        f"step {state.step} of {config.train.steps}; run folder {config.train.run_dir}"
    )


class Progress:
    """Shows steps and the time left. Bars appear only on a terminal; the lines of :meth:`show` appear everywhere.

    With ``show`` False (other ranks, log.progress=false), nothing is shown.
    """

    def __init__(self, total_steps: int, *, show: bool) -> None:
        self.total_steps = total_steps
        self._show = show
        self._bar = Bar("", "step", total=total_steps, show=show)

    def begin(self, step: int) -> None:
        """The step after ``step`` comes next, and the time left is measured from here."""
        self._bar.restart(step)
        self._first = step
        self._begin = time.monotonic()

    def update(self, step: int) -> None:
        self._bar.update(step)

    def show(self, step: int, values: str) -> None:
        """Logs one line, which stays above the bars."""
        if not self._show:
            return
        seconds_each = (time.monotonic() - self._begin) / max(1, step - self._first)
        left = tqdm.format_interval(seconds_each * (self.total_steps - step))
        log.info("step %d/%d: %s, %s left", step, self.total_steps, values, left)

    @property
    def is_watched(self) -> bool:
        return self._show and is_watched()

    def bar(self, title: str, unit: str = "") -> Bar:
        """A second bar below the bar of the steps."""
        return Bar(title, unit, show=self._show)

    def close(self) -> None:
        self._bar.close()


def next_commands(run_dir: str) -> str:
    """The commands for a finished run, one per line."""
    program = own_command()
    run = shlex.quote(run_dir)
    folder = Path(run_dir)
    export = shlex.quote(str(folder.with_name(f"{folder.name}_export")))
    return "\n".join(
        [
            "next:",
            f"  {program} evaluate {run}",
            f"  {program} sample {run} 'The'",
            f"  {program} export {run} {export}",
            f"  {program} board {shlex.quote(str(folder.parent))}    # TensorBoard",
        ]
    )
