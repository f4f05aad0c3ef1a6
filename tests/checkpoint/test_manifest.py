"""The manifest of a checkpoint: what is written is read, and every bit is protected."""

import dataclasses
import os

from relora_mora.checkpoint.layout import CheckpointError, read_manifest
from relora_mora.checkpoint.reader import verify
from relora_mora.system.files import write_synced
from tests.checkpoint.tools import rewrite


def test_a_manifest_survives_writing_and_reading(folder):
    verify(folder / "step-00000015")
    manifest = read_manifest(folder / "step-00000015")
    (folder / "again").mkdir()
    write_synced(folder / "again" / "manifest.json", manifest.dump())
    assert read_manifest(folder / "again") == manifest
    assert manifest.tokenizer_fingerprint == "größe"


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


def test_a_manifest_of_02_without_what_is_gone_is_read(folder):
    checkpoint = folder / "step-00000015"
    before = read_manifest(checkpoint)
    rewrite(checkpoint, lambda values: values.update(operator_seed=None))
    rewrite(checkpoint, lambda values: values["config"].update(method={"full_steps": 0, "sparse_density": 0.03}))
    assert dataclasses.replace(read_manifest(checkpoint), config=before.config) == before
