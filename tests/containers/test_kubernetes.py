"""The files for Kubernetes: schemas, what belongs together in them, and the Job's own command as two pods on this
machine."""

import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from relora_mora.config.load import load_config
from relora_mora.supervise.exits import FAILED, LOST, REQUEUE, USER_ERROR
from tests.tools.each import each
from tests.tools.helpers import ROOT
from tests.tools.jobs import PACED, Started, ends, last_step, write_config
from tests.tools.ports import free_port
from tests.tools.runs import run_config

pytestmark = pytest.mark.more

FOLDER = ROOT / "launch" / "k8s"
OBJECTS = {
    f"{path.name}: {body['kind']}": body
    for path in sorted(FOLDER.glob("*.yaml"))
    for body in yaml.safe_load_all(path.read_text())
}
SERVICE, JOB = OBJECTS["job.yaml: Service"], OBJECTS["job.yaml: Job"]
POD = JOB["spec"]["template"]["spec"]
TRAINER = POD["containers"][0]
TENSORBOARD = OBJECTS["tensorboard.yaml: Pod"]["spec"]
ENVIRONMENT = {entry["name"]: entry["value"] for entry in TRAINER["env"] if "value" in entry}
# takes the trainer's place: prints its rank and ends as the test wants
FAKE = """#!/bin/bash
trap 'trap "" TERM; echo "rank $RANK saves"; sleep 1; exit 75' TERM
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK of $LOCAL_WORLD_SIZE, store $MASTER_ADDR:$MASTER_PORT:" "$@"
for ((n = 0; n < ${WAITS:-0}; n++)); do sleep 0.1; done
exit "$(cut -d' ' -f$((RANK + 1)) <<<"$CODES")"
"""


def bodies(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping below."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from bodies(child)


@each("name,version", itertools.product(OBJECTS, ("1.31", kubernetes_validate.latest_version())))
def test_the_files_follow_the_schema(name: str, version: str) -> None:
    kubernetes_validate.validate(OBJECTS[name], version, strict=True)


def test_the_numbers_and_names_agree() -> None:
    spec, name = JOB["spec"], JOB["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] == int(ENVIRONMENT["PODS"])
    assert TRAINER["resources"]["limits"]["nvidia.com/gpu"] == int(ENVIRONMENT["RANKS_PER_POD"])
    service = SERVICE["metadata"]["name"]
    assert ENVIRONMENT["MASTER_ADDR"] == f"{name}-0.{service}"
    assert POD["subdomain"] == service
    assert [port["port"] for port in SERVICE["spec"]["ports"]] == [int(ENVIRONMENT["MASTER_PORT"])]
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    claim = OBJECTS["volume.yaml: PersistentVolumeClaim"]["metadata"]["name"]
    assert {body["claimName"] for body in bodies(list(OBJECTS.values())) if "claimName" in body} == {claim}
    images = {container["image"] for body in bodies(list(OBJECTS.values())) for container in body.get("containers", [])}
    assert len(images) == 1


def test_the_shipped_config_suits_the_shipped_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config, *settings = TRAINER["args"]
    overrides = dict(setting.removeprefix("--").split("=", 1) for setting in settings)
    load_config(config, overrides, world_size=int(ENVIRONMENT["PODS"]) * int(ENVIRONMENT["RANKS_PER_POD"]))


def action_after(code: int) -> str:
    """What the Job does after a pod that ended with a code and was not evicted."""
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", ()):
            return str(rule["action"])
    return "Count"


def test_exit_codes_decide_whether_a_pod_is_started_again() -> None:
    codes = (REQUEUE, LOST, 128 + signal.SIGTERM, FAILED, USER_ERROR, 128 + signal.SIGKILL)
    assert list(map(action_after, codes)) == ["Ignore", "Ignore", "Ignore", "FailJob", "FailJob", "Count"]
    assert JOB["spec"]["backoffLimit"] > 0
    evicted, *rules = JOB["spec"]["podFailurePolicy"]["rules"]
    assert (evicted["action"], evicted["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    for rule in rules:  # what the API demands beyond the schema
        values = rule["onExitCodes"]["values"]
        assert values == sorted(set(values))
        assert rule["onExitCodes"]["containerName"] == TRAINER["name"]
    assert POD["restartPolicy"] == "Never"
    assert POD["terminationGracePeriodSeconds"] >= 120
    # A rank ends with 0 after a barrier that follows the last save. A pod lost after that is created again, waits for
    # peers that will not come, and ends with 69 again and again: none of the codes above stops it.
    assert JOB["spec"]["successPolicy"] == {"rules": [{"succeededCount": 1}]}


@each("pod", [POD, TENSORBOARD])
def test_pods_run_as_the_user_of_the_image_without_privileges(pod: dict[str, Any]) -> None:
    user = f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['fsGroup']}\n"
    assert user in (ROOT / "Dockerfile").read_text()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod is POD or "--host=localhost" in container["args"]  # TensorBoard listens only inside its pod
    assert "ports" not in TENSORBOARD["containers"][0]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/app/runs", "/tmp"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def pod(index: int, folder: Path, *arguments: str, **environment: str) -> Started:
    """The trainer's container as Kubernetes starts it in a pod, with some of its variables replaced."""
    place = {"JOB_COMPLETION_INDEX": str(index), "PYTHON": sys.executable, "PATH": os.environ["PATH"]}
    command = [*TRAINER["command"], *(arguments or TRAINER["args"])]
    return Started(folder / f"pod-{index}.log", command, ENVIRONMENT | place | environment)


def pods(folder: Path, *arguments: str, **environment: str) -> list[Started]:
    """Two pods with a rank each that find each other on this machine."""
    changed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANKS_PER_POD": "1"}
    changed |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HOME": os.environ.get("HOME", "/")}
    return [pod(index, folder, *arguments, **changed, **environment) for index in range(2)]


def fake_pod(index: int, folder: Path, **environment: str) -> Started:
    """With a fake trainer."""
    (folder / "fake_python").write_text(FAKE)
    (folder / "fake_python").chmod(0o755)
    return pod(index, folder, PYTHON=str(folder / "fake_python"), **environment)


def test_every_rank_of_a_pod_gets_its_number(tmp_path: Path) -> None:
    started = fake_pod(1, tmp_path, CODES=" ".join(["0"] * 16))
    assert started.wait(20) == 0
    lines = sorted(started.output.splitlines(), key=lambda line: int(line.split()[1]))
    assert lines == [
        f"rank {8 + n} of 16, local {n} of 8, store relora-mora-0.relora-mora:29500: "
        f"launch/pretrain.py {TRAINER['args'][0]}"
        for n in range(int(ENVIRONMENT["RANKS_PER_POD"]))
    ]


@each(
    "codes,code",
    [("0 0", 0), ("0 69", 69), ("69 137", 137), ("1 69", 1), ("75 75", 75), ("69 139", 139), ("75 1", 1)],
)
def test_a_pod_exits_with_the_code_of_the_rank_that_failed(tmp_path: Path, codes: str, code: int) -> None:
    assert fake_pod(0, tmp_path, RANKS_PER_POD="2", CODES=codes).wait(20) == code


def test_sigterm_to_a_pod_reaches_all_its_ranks(tmp_path: Path) -> None:
    started = fake_pod(0, tmp_path, RANKS_PER_POD="3", CODES="0 0 0", WAITS="300")
    for said in ("store", "saves"):
        started.wait_until(lambda said=said: started.output.count(said) == 3, 20)
        started.process.terminate()  # only the first process of the pod, as kubelet does; once more changes nothing
    assert started.wait(20) == 75


def test_sigterm_before_the_first_rank_is_not_reported_as_success(tmp_path: Path) -> None:
    """A loop before the first rank simulates a slow start."""
    text = (FOLDER / "ranks.sh").read_text()
    begin = "for ((local_rank = 0;"
    assert text.count(begin) == 1
    script = tmp_path / "ranks.sh"
    script.write_text(text.replace(begin, f"echo ready; while [[ -z $stopping ]]; do sleep 0.1; done; {begin}"))
    place = {"JOB_COMPLETION_INDEX": "0", "PATH": os.environ["PATH"]}
    started = Started(tmp_path / "log", ["bash", str(script), *TRAINER["args"]], ENVIRONMENT | place)
    started.wait_until(lambda: started.output == "ready\n", 20)
    started.process.terminate()
    assert action_after(started.wait(20)) == "Ignore"
    assert started.output == "ready\n"


@each(
    "name,value,expected",
    [
        ("MASTER_ADDR", "", "a host"),
        ("PODS", "0", "a number from 1 on"),
        ("RANKS_PER_POD", "08", "a number from 1 on"),
        ("RANKS_PER_POD", "all", "a number from 1 on"),
        ("MASTER_PORT", "http", "a number from 0 on"),
    ],
)
def test_a_pod_names_a_missing_or_wrong_variable(tmp_path: Path, name: str, value: str, expected: str) -> None:
    started = pod(0, tmp_path, **{name: value})
    assert started.wait(20) == 2
    assert started.output == f"ranks.sh: {name} is '{value}', expected {expected}; see launch/k8s/job.yaml\n"


def test_a_wrong_setting_fails_the_job_immediately(tmp_path: Path) -> None:
    started = pods(tmp_path, TRAINER["args"][0], "--train.stepps=3")
    assert [action_after(each.wait()) for each in started] == ["FailJob", "FailJob"]


@pytest.mark.distributed
@pytest.mark.stops  # of make test-stops
def test_a_pod_is_restarted_until_the_other_pods_are_there(inputs: Path, tokenizer_path: str, tmp_path: Path) -> None:
    settings = run_config(inputs, tokenizer_path, tmp_path / "run", 2, train={"peer_timeout_seconds": 5.0})
    first, second = pods(tmp_path, str(write_config(settings, tmp_path / "run.yaml")))
    first.kill()
    assert action_after(second.wait()) == "Ignore"
    assert "rank 1 of 2 did not join the others" in second.output


@pytest.mark.stops
@pytest.mark.distributed
def test_a_drained_pod_saves_and_the_same_pods_finish_the_run(
    inputs: Path, tokenizer_path: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = run_config(
        inputs, tokenizer_path, run_dir, 2, train={"steps": 100_000}, checkpoint={"every_steps": 20, "keep_last": 2}
    )
    config = str(write_config(settings, tmp_path / "run.yaml"))
    started = pods(tmp_path, config, PROGRAM=str(PACED))
    started[0].wait_for_step(run_dir, 5)
    started[1].process.terminate()
    assert [each.wait() for each in started] == [75, 75], started[0].output
    (end,) = ends(run_dir)
    assert "SIGTERM to rank 1" in end["reason"]
    assert action_after(end["code"]) == "Ignore"
    again = pods(tmp_path, config, f"--train.steps={end['step'] + 4}", "--train.allow_changes=[train.steps]")
    assert [each.wait() for each in again] == [0, 0], again[0].output
    assert last_step(run_dir) == end["step"] + 4
