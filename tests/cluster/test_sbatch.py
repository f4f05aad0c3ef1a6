"""launch/slurm/pretrain.sbatch with fakes in the place of Slurm and of the trainer: what it decides. test_slurm.py runs
it for real."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.each import each
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

SCRIPT = ROOT / "launch" / "slurm" / "pretrain.sbatch"
CONFIG = "configs/run/tiny_remora.yaml"
RUN = (CONFIG, "--train.run_dir=run")
# a task per code in CODES; its messages and its exit code imitate Slurm's
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "option $1"; shift; done
rank=0 highest=0
for code in $CODES; do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) CODE=$code "$@" &
    echo "task $rank is process $!"
    wait $!
    if [[ $code -gt 128 ]]; then
        echo "srun: error: node1: task $rank: Killed" >&2
    elif [[ $code -gt 0 ]]; then
        echo "srun: error: node1: task $rank: Exited with exit code $code" >&2
    fi
    if [[ $code -gt $highest ]]; then highest=$code; fi
    rank=$((rank + 1))
done
touch ended
if [[ -n $LOSES_LOGS ]]; then rm -r runs; fi
exit "$highest"
"""
SCONTROL = """#!/bin/bash
case $1.$2 in
    requeue.*)
        echo "requeued $2"
        exit "${REQUEUE_CODE:-0}"
        ;;
    show.hostnames) printf 'first\\nsecond\\n' ;;
    show.job)
        if [[ -n $AWAY && -e ended && ! -e asked ]]; then touch asked; exit 1; fi
        count=$STARTS
        state=RUNNING
        if [[ -e ended ]]; then count=${RESTARTS:-$STARTS} state=${STATE:-RUNNING}; fi
        echo "JobId=123456 JobState=$state Requeue=1 Restarts=$count BatchFlag=1"
        ;;
esac
"""
SLEEP = """#!/bin/bash
if [[ -n $ENDS ]]; then kill "$PPID"; fi
"""
TRAINER = f"""#!/bin/bash
if [[ $1 == -P ]]; then exec {sys.executable} "$@"; fi
echo "process $$ is task $RANK $LOCAL_RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT" \\
  "with $OMP_NUM_THREADS cores:" "$@"
if [[ -n $SAVES ]]; then
    mkdir -p run/checkpoints
    printf 'step-%08d' "$SAVES" >run/checkpoints/latest
fi
exit "$CODE"
"""
APPTAINER = """#!/bin/bash
printf '%s\\n' "$@" >"apptainer-$$"
while [[ $1 != *.sif ]]; do shift; done
shift
"$@"
"""
PROGRAMS = {"srun": SRUN, "scontrol": SCONTROL, "sleep": SLEEP, "python": TRAINER, "apptainer": APPTAINER}


def start(
    folder: Path, *arguments: str, codes: str = "0 0", saves: object = "", restarts: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A start of the job, with the arguments of RUN if none are given, on a cluster without Slurm.

    ``codes`` are those of the tasks, and ``saves`` is the step that the trainer saves.
    """
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in PROGRAMS.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    variables = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_USER": "user",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_NTASKS": str(len(codes.split())),
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_SUBMIT_HOST": "login1",
        "PATH": f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "PYTHON": "python",
        "PYTHONPATH": str(ROOT),
        "CODES": codes,
        "SAVES": str(saves),
        "STARTS": str(restarts),
    }
    (folder / "ended").unlink(missing_ok=True)
    command = ["bash", SCRIPT, *(arguments or RUN)]
    done = subprocess.run(command, env=variables | environment, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    return done


def test_every_task_gets_its_rank_and_is_the_trainer_itself(tmp_path: Path) -> None:
    called = f"launch/pretrain.py {CONFIG} --method.operators=[1, 2] --train.micro_batch_size=4"
    done = start(tmp_path, CONFIG, "--method.operators=[1, 2]", "--train.micro_batch_size=4", codes="0 0 0 0")
    assert done.returncode == 0
    process = dict(re.findall(r"^task (\d) is process (\d+)$", done.stdout, re.MULTILINE))
    tasks = [re.sub(r":\d+ with", " with", line) for line in done.stdout.splitlines() if line.startswith("process")]
    # signals that Slurm sends to a task go to the trainer
    assert tasks == [
        f"process {process[str(n)]} is task {n} {n % 2} of 4 at first with 8 cores: {called}" for n in range(4)
    ]
    assert "option --kill-on-bad-exit=0" in done.stdout  # otherwise the first end hides the codes of the others
    assert {path.name for path in (tmp_path / "runs" / "slurm" / "123456").iterdir()} == {"progress", "srun.log"}
    [line] = [line for line in done.stdout.splitlines() if "TensorBoard" in line]
    tensorboard = "python -m tensorboard.main --logdir runs/tiny_remora --load_fast=false --host localhost --port 6006"
    assert line.endswith(f'ssh -t -L 6006:localhost:6006 user@login1 "cd {tmp_path} && {tensorboard}"')
    ports = {
        int(re.findall(r"at first:(\d+)", output)[0]) for output in (done.stdout, start(tmp_path, restarts=1).stdout)
    }
    assert len(ports) == 2 and all(20000 <= port < 32000 for port in ports)


@each(
    "codes,given,code,requeued",
    [
        ("0 0", {}, 0, False),
        ("75 75", {}, 75, True),
        ("69 137", {}, 137, True),
        ("134 69", {}, 134, True),
        ("69 135", {}, 135, True),
        ("139 69", {}, 139, True),
        ("143 75", {}, 143, False),
        ("1 69", {}, 1, False),
        ("2 137", {}, 2, False),
        ("137 2", {}, 2, False),
        ("127 69", {}, 127, False),
        ("69 69", {"LOSES_LOGS": "1"}, 69, True),
        ("75 75", {"REQUEUE_CODE": "1"}, 75, True),  # Slurm refuses
        ("75 75", {"AWAY": "1"}, 75, True),  # the controller
        ("75 75", {"SLURM_RESTART_COUNT": "3"}, 75, True),  # of the job that submitted this one
    ],
)
def test_the_first_failure_decides_the_exit_code(
    tmp_path: Path, codes: str, given: dict[str, str], code: int, requeued: bool
) -> None:
    done = start(tmp_path, codes=codes, **given)
    assert done.returncode == code
    assert ("requeued 123456" in done.stdout) == requeued
    assert ("could not be requeued" in done.stdout) == ("REQUEUE_CODE" in given)
    assert "(start 1)" in done.stdout
    # Slurm's words are shown
    assert ("Exited with exit code" in done.stderr) == any(0 < int(each) < 128 for each in codes.split())
    assert (tmp_path / "asked").exists() == ("AWAY" in given)


def test_starts_that_save_nothing_new_are_counted(tmp_path: Path) -> None:
    saves = [3, "", "", "", "", 4, "", "", "", "", ""]  # progress: the count begins again
    ends = [start(tmp_path, codes="69 137", saves=step, restarts=number) for number, step in enumerate(saves)]
    assert ["requeued" in end.stdout for end in ends] == [True] * 10 + [False]
    assert "5 starts in a row have saved nothing after step 4" in ends[-1].stdout
    assert ends[-1].returncode == 137


def test_progress_of_a_start_ended_by_slurm_counts_and_another_job_counts_again(tmp_path: Path) -> None:
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    for number in [*range(9), 0]:
        if number == 4:
            latest.write_text("step-00000010")
        assert "requeued" in start(tmp_path, codes="69 69", restarts=number).stdout


@each("state", [{"RESTARTS": "1"}, {"RESTARTS": "1", "STATE": "PENDING"}, {"STATE": "CANCELLED"}])
def test_leftovers_of_a_start_wait_for_its_end_and_stop_no_other(tmp_path: Path, state: dict[str, str]) -> None:
    """Slurm lost a node and requeued the job or started it on other nodes, or somebody canceled it."""
    done = start(tmp_path, codes="69 69", ENDS="1", **state)
    assert done.returncode == -signal.SIGTERM
    assert "requeued" not in done.stdout
    assert (tmp_path / "runs" / "slurm" / "123456" / "progress").read_text() == "0 0\n"


MATH = "configs/task/math.yaml"
TASK = {"SLURM_ARRAY_JOB_ID": "123450", "SLURM_ARRAY_TASK_ID": "7"}
ONE_FOLDER = "all tasks of the array would use the same run folder"


@each(
    "arguments,ranks,given,message",
    [
        ([CONFIG, "--train.stepps=3"], 2, {}, "did you mean steps?"),
        ([CONFIG, "--train.seed=3"], 4, {}, "4 ranks"),
        # the program for fine-tuning has its own defaults: no file of tasks names operators and embeddings
        ([MATH, "--method.square_size=33"], 4, {"PROGRAM": "launch/finetune.py"}, "operator 6 needs an even"),
        ([], 2, {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "4"}, "4 tasks but 8 GPUs per node"),
        ([], 2, {"SLURM_GPUS_ON_NODE": "1", "SLURM_NTASKS_PER_NODE": "8"}, "8 tasks but 1 GPUs per node"),
        ([CONFIG], 2, TASK, ONE_FOLDER),
        ([CONFIG, "--train.seed=$SLURM_ARRAY_TASK_ID"], 2, TASK, ONE_FOLDER),
        ([CONFIG, "--train.seed", "$SLURM_ARRAY_TASK_ID"], 2, TASK, ONE_FOLDER),
        ([], 2, {"PYTHON": "gone/python"}, "has no gone/python; submit from the checkout"),
    ],
)
def test_a_mistake_is_reported_once_and_starts_nothing(
    tmp_path: Path, arguments: list[str], ranks: int, given: dict[str, str], message: str
) -> None:
    done = start(tmp_path, *arguments, codes=" ".join("0" * ranks), **given)
    assert done.returncode == 2
    assert done.stderr.count(message) == 1
    assert "option" not in done.stdout


@each(
    "arguments,given,called",
    [
        ([MATH], {"PROGRAM": "launch/finetune.py"}, f"launch/finetune.py {MATH}"),
        ([], {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4"}, f"launch/pretrain.py {CONFIG}"),
        ([], {"SLURM_GPUS_ON_NODE": "0"}, f"launch/pretrain.py {CONFIG}"),
        (["$SLURM_ARRAY_TASK_ID.yaml"], TASK, "launch/pretrain.py 7.yaml"),
        *(
            (
                [CONFIG, f"--train.seed={name}", f"--train.run_dir=runs/{name}-{name}"],
                TASK,
                f"launch/pretrain.py {CONFIG} --train.seed=7 --train.run_dir=runs/7-7",
            )
            for name in ("$SLURM_ARRAY_TASK_ID", "${SLURM_ARRAY_TASK_ID}")
        ),
    ],
)
def test_the_trainer_that_is_started(tmp_path: Path, arguments: list[str], given: dict[str, str], called: str) -> None:
    (tmp_path / "7.yaml").symlink_to(ROOT / CONFIG)
    done = start(tmp_path, *arguments, codes="75 75", **given)
    assert called in done.stdout, done.stderr
    assert f"requeued {'123450_7' if given == TASK else '123456'}\n" in done.stdout


def test_in_a_container_the_image_runs_the_trainer_and_sees_the_checkout(tmp_path: Path) -> None:
    done = start(tmp_path, CONTAINER_IMAGE="image.sif", PYTHON="/none")
    place = ["exec", "--nv", "--bind", str(tmp_path), "--pwd", str(tmp_path), "image.sif", "python"]
    called = [path.read_text().splitlines() for path in tmp_path.glob("apptainer-*")]
    assert all(words[: len(place)] == place for words in called)
    assert done.returncode == 0
    rest = sorted(words[len(place)] for words in called)
    assert rest == ["-P", "launch/pretrain.py", "launch/pretrain.py"]  # the settings, and two ranks
    assert done.stdout.count("launch/pretrain.py configs/run/tiny_remora.yaml --train.run_dir=run") == 2


def test_without_arguments_it_trains_a_shipped_config_on_the_shipped_number_of_gpus(tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    shipped = {name: int(number) for name, number in re.findall(r"^#SBATCH --([a-z-]+)=(\d+)$", text, re.MULTILINE)}
    assert shipped["ntasks-per-node"] == shipped["gpus-per-node"]
    done = start(tmp_path, "--train.seed=2", SLURM_NTASKS=str(shipped["nodes"] * shipped["ntasks-per-node"]))
    assert done.returncode == 0
    assert "launch/pretrain.py configs/run/paper_" in done.stdout
