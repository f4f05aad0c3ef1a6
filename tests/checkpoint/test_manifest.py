"""The manifest of a checkpoint: every bit is protected, and a hostile manifest is refused."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

from relora_mora.checkpoint.layout import VERSION, CheckpointError, Manifest, read_manifest
from relora_mora.checkpoint.reader import verify
from relora_mora.config.registry import MATRIX_OPTIMIZERS
from relora_mora.system.files import write_synced
from tests.checkpoint.tools import passed_over, rewrite
from tests.tools.each import each


def test_a_manifest_survives_writing_and_reading(folder):
    verify(folder / "step-00000015")
    manifest = read_manifest(folder / "step-00000015")
    (folder / "again").mkdir()
    write_synced(folder / "again" / "manifest.json", manifest.dump())
    assert read_manifest(folder / "again") == manifest
    assert manifest.data_fingerprint == "größe"


def test_every_byte_of_a_manifest_is_protected(folder):
    path = folder / "step-00000015" / "manifest.json"
    manifest = read_manifest(path.parent)
    same = 0
    with path.open("r+b", buffering=0) as stream:
        for at, byte in enumerate(path.read_bytes()):
            os.pwrite(stream.fileno(), bytes([byte ^ 1 << at % 8]), at)
            try:
                assert read_manifest(path.parent) == manifest  # 1e-05 may become 1E-05, and \u00f6 \u00F6
                same += 1
            except CheckpointError:
                pass
            os.pwrite(stream.fileno(), bytes([byte]), at)
    assert same < 10


REQUIRED = [field.name for field in dataclasses.fields(Manifest) if field.default is dataclasses.MISSING]


@each("field", [*REQUIRED, "version", "format", "checksum"])
def test_a_manifest_without_one_of_its_fields_is_refused(made, tmp_path, field):
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    rewrite(folder / "step-00000015", lambda values: values.pop(field, None))
    if field == "checksum":
        path = folder / "step-00000015" / "manifest.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != field}))
    line = passed_over(folder)
    assert line.startswith("manifest.json: ")
    assert field in line or field == "format"


ONE_BYTE = {"bytes": 1, "xxh3_128": "0" * 32}
HOSTILE: list[tuple[Callable[[dict], Any], str]] = [
    *(
        (lambda values, name=name: values["files"].update({name: ONE_BYTE}), "not a path inside")
        for name in ("../x", "/etc/passwd", "tokenizer/../../x", "a//b", "", ".", "a/", "x\0y")
    ),
    *(
        (lambda values, value=value: values.update(step=value), "step")
        for value in (-1, 10**400, 1.5, "15", True, None)
    ),
    *(
        (lambda values, size=size: values["files"].update(x=ONE_BYTE | {"bytes": size}), "files.x.bytes")
        for size in (-1, 2**60)
    ),
    (lambda values: values["files"].update(latest=ONE_BYTE), "latest: damaged, No such file"),
    (lambda values: values["files"].update(x=ONE_BYTE | {"xxh3_128": "../x"}), "files.x.xxh3_128"),
    (lambda values: values["parameters"].update(a=[-4, 3]), "parameters.a.0"),
    (lambda values: values["parameters"].update(a=[2**52, 2**52]), "elements of master of a once"),
    (lambda values: values["group_steps"].update(adapters=-1), "group_steps.adapters"),
    (lambda values: values.update(world_size=0), "world_size"),
    (lambda values: values.update(config={"optim": 3}), "config.optim"),
    (
        lambda values: values["config"]["optim"].update(matrices=["x"]),
        f"optim.matrices=['x'], but this program only knows {', '.join(MATRIX_OPTIMIZERS)}; use the release",
    ),
    (lambda values: values["config"]["optim"].update(others="x"), "trained with optim.others='x'"),
    (lambda values: values.update(matrix_states={"a": {"updates": []}}), "1 elements of updates of a once"),
    (lambda values: values.update(matrix_states={"a": {"x": [-1]}}), "matrix_states.a.x.0"),
    (lambda values: values.update(trust_me=1), "trust_me"),
    (lambda values: values.update(version=99), f"format version 99, expected version {VERSION}"),
    (lambda values: values.update(step=14), "manifest.json: belongs to step 14"),
    (lambda values: values.update(files={}), "once"),
]


@each("change,says", HOSTILE)
def test_a_hostile_manifest_is_refused(made, tmp_path, change, says):
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    rewrite(folder / "step-00000015", change)
    assert says in passed_over(folder)


def test_a_manifest_of_02_without_what_is_gone_is_read(folder):
    checkpoint = folder / "step-00000015"
    before = read_manifest(checkpoint)
    rewrite(checkpoint, lambda values: values.update(operator_seed=None))
    rewrite(checkpoint, lambda values: values["config"].update(method={"full_steps": 0, "sparse_density": 0.03}))
    assert dataclasses.replace(read_manifest(checkpoint), config=before.config) == before


@each("content", [b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b'{"format": "x"}', b"1" * 5000])
def test_json_that_is_not_a_manifest_is_refused(made, tmp_path, content):
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    (folder / "step-00000015" / "manifest.json").write_bytes(content)
    assert passed_over(folder).startswith("manifest.json: ")
