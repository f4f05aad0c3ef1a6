"""What is not a checkpoint any more, or never was: the run takes an older one and names the reason."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from relora_mora.checkpoint.layout import VERSION, Manifest
from relora_mora.checkpoint.reader import find_checkpoint
from relora_mora.config.registry import MATRIX_OPTIMIZERS
from tests.checkpoint.tools import FILES, STATE, TOKENIZER, change_state, rewrite
from tests.tools.each import each

Damage = Callable[[Path], Any]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


WAYS: list[Damage] = [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    _flip,
    lambda path: path.write_bytes(b""),
    lambda path: (path.unlink(), path.mkdir()),
    lambda path: (path.unlink(), os.mkfifo(path)),
]


def _linked(name: str, place: str) -> Damage:
    def damage(checkpoint: Path) -> None:
        file, elsewhere = checkpoint / name, checkpoint / place / "elsewhere"
        file.rename(elsewhere)
        file.symlink_to(elsewhere.resolve())

    return damage


def _values(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """As another version or a stranger could write them, with the right checksums."""
    return lambda checkpoint: rewrite(checkpoint, change)


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    return lambda checkpoint: change_state(checkpoint, change)


def _coded(codes: torch.Tensor) -> Damage:
    """Adds codes for the moments of a matrix."""

    def damage(checkpoint: Path) -> None:
        change_state(checkpoint, lambda tensors: tensors.update({"exp_avg_codes|a|0": codes}))
        rewrite(checkpoint, lambda values: values.update(matrix_states={"a": {"exp_avg_codes": [4, 3]}}))

    return damage


def _without_checksum(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "checksum"}))


ONE_BYTE = {"bytes": 1, "xxh3_128": "0" * 32}
REQUIRED = [field.name for field in dataclasses.fields(Manifest) if field.default is dataclasses.MISSING]
BYTES = [
    (lambda checkpoint, file=file, way=way: way(checkpoint / file), file)
    for file in (STATE, FILES[2], TOKENIZER[1], "manifest.json")
    for way in WAYS
]
LINKS = [
    (_linked(name, place), name)
    for name in (STATE, "manifest.json", "tokenizer", "tokenizer/tokenizer.model")
    for place in ("..", ".")
]
PIECES = [
    (_tensors(lambda t: t.update({"master|a|0": torch.zeros(7)})), "12 elements of master of a once"),
    (_tensors(lambda t: t.update({"master|a|5": torch.zeros(7)})), "12 elements of master of a once"),
    (_tensors(lambda t: t.update({"master|a|8": t.pop("master|a|7")})), "12 elements of master of a once"),
    (_tensors(lambda t: t.pop("exp_avg|b|0")), "2 elements of exp_avg of b once"),
    (_tensors(lambda t: t.update({"exp_avg_sq|b|0": torch.zeros(1)})), "2 elements of exp_avg_sq of b once"),
    (_tensors(lambda t: t.update({"master|b|2": torch.zeros(3)})), "2 elements of master of b once"),
    (_tensors(lambda t: t.update({"master|b|0": torch.zeros(2).bfloat16()})), "(BF16) is not an F32 piece"),
    (_tensors(lambda t: t.update({"master|c|0": torch.zeros(2)})), "master|c|0 (F32) is not an F32 piece"),
    (_tensors(lambda t: t.update({"master|b|-1": torch.zeros(2)})), "is not an F32 piece"),
    (_tensors(lambda t: t.update({"b": torch.zeros(2)})), "is not an F32 piece"),
    (_coded(torch.zeros(4, 3)), "exp_avg_codes|a|0 (F32) is not an I8 piece"),
    (_coded(torch.zeros(4, 3, dtype=torch.uint8)), "exp_avg_codes|a|0 (U8) is not an I8 piece"),
    (_coded(torch.zeros(4, 2, dtype=torch.int8)), "12 elements of exp_avg_codes of a once"),
    (lambda path: (torch.save({"a": 1}, path / STATE), rewrite(path, lambda values: None)), "cannot be read"),
]
MANIFESTS = [
    *((_values(lambda values, name=name: values.pop(name)), name) for name in (*REQUIRED, "version")),
    (_values(lambda values: values.pop("format")), "not the manifest of a"),
    (_without_checksum, "checksum"),
    *(
        (_values(lambda values, name=name: values["files"].update({name: ONE_BYTE})), "not a path inside")
        for name in ("../x", "/etc/passwd", "tokenizer/../../x", "a//b", "", ".", "a/", "x\0y")
    ),
    *(
        (_values(lambda values, value=value: values.update(step=value)), "step")
        for value in (-1, 10**400, 1.5, "15", True, None)
    ),
    *(
        (_values(lambda values, size=size: values["files"].update(x=ONE_BYTE | {"bytes": size})), "files.x.bytes")
        for size in (-1, 2**60)
    ),
    (_values(lambda values: values["files"].update(latest=ONE_BYTE)), "latest: damaged, No such file"),
    (_values(lambda values: values["files"].update(x=ONE_BYTE | {"xxh3_128": "../x"})), "files.x.xxh3_128"),
    (_values(lambda values: values["parameters"].update(a=[-4, 3])), "parameters.a.0"),
    (_values(lambda values: values["parameters"].update(a=[2**52, 2**52])), "elements of master of a once"),
    (_values(lambda values: values["group_steps"].update(adapters=-1)), "group_steps.adapters"),
    (_values(lambda values: values.update(world_size=0)), "world_size"),
    (_values(lambda values: values.update(config={"optim": 3})), "config.optim"),
    (_values(lambda values: values["config"].update(train={"on_spike": "flag"})), "of release 0.2; use that release"),
    (
        _values(lambda values: values["config"]["optim"].update(matrices=["x"])),
        f"optim.matrices=['x'], but this program only knows {', '.join(MATRIX_OPTIMIZERS)}; use the release",
    ),
    (_values(lambda values: values["config"]["optim"].update(others="x")), "trained with optim.others='x'"),
    (_values(lambda values: values.update(matrix_states={"a": {"updates": []}})), "1 elements of updates of a once"),
    (_values(lambda values: values.update(matrix_states={"a": {"x": [-1]}})), "matrix_states.a.x.0"),
    (_values(lambda values: values.update(trust_me=1)), "trust_me"),
    (_values(lambda values: values.update(version=99)), f"format version 99, expected version {VERSION}"),
    (_values(lambda values: values.update(step=14)), "manifest.json: damaged, it belongs to step 14"),
    (_values(lambda values: values.update(files={})), "once"),
    *(
        (lambda path, content=content: (path / "manifest.json").write_bytes(content), "manifest.json: ")
        for content in (b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b'{"format": "x"}', b"1" * 5000)
    ),
]


@each("damage,says", [*BYTES, *LINKS, *PIECES, *MANIFESTS])
def test_the_newest_checkpoint_is_passed_over_with_the_reason(made, tmp_path, caplog, damage, says):
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    damage(folder / "step-00000015")
    assert find_checkpoint(folder) == folder / "step-00000010"
    [line] = caplog.messages
    assert line.startswith(f"passed over {folder}/step-00000015")
    assert says in line.removeprefix(f"passed over {folder}/step-00000015")
    assert "; use " in line or "; give a folder" in line
