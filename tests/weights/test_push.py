"""Uploads to a hub on loopback: what is checked before the merge, what arrives, and what is left after a failure."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.commands import EXPORT, call, refused
from tests.tools.each import each
from tests.tools.upload_hub import TOKEN, UploadHub, upload_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with upload_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_an_export_arrives_and_a_later_one_keeps_the_card(hub: UploadHub, run: Path, tmp_path: Path) -> None:
    answer = call(EXPORT, run, tmp_path / "out", "--push=me/mine", "--private")
    assert answer.code == 0, answer.err
    assert f"{hub.url}/me/mine/commit/" in answer.out
    assert TOKEN not in answer.out + answer.err
    assert hub.private == {"me/mine": True}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files["me/mine"] == {".gitattributes": b""} | written
    assert b"# me/mine" in written["README.md"]
    mine = {"README.md": b"with a license", "model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    hub.files["me/mine"] |= mine
    assert call(EXPORT, run, tmp_path / "again", "--push=me/mine").code == 0
    files = hub.files["me/mine"]
    assert files["README.md"] == b"with a license" and files["notes.txt"] == b"mine"
    assert "model-00001-of-00002.safetensors" not in files and "model.safetensors" in files


@each(
    "args, token, refusal, public, said",
    [
        (["--push=mine"], TOKEN, {}, False, "OWNER/NAME"),
        (["--push=me/mi ne"], TOKEN, {}, False, "OWNER/NAME"),
        (["--private"], TOKEN, {}, False, "--push"),
        (["--push=me/mine"], "", {}, False, "HF_TOKEN"),
        (["--push=me/mine"], "hf_" + "x" * 30, {}, False, "token may write"),
        (["--push=me/mine"], TOKEN, {"auth-check/write": 403}, False, "token may write"),
        (["--push=me/mine", "--private"], TOKEN, {}, True, "public"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_merge(
    hub: UploadHub,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    token: str,
    refusal: dict[str, int],
    public: bool,
    said: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("relora_mora.weights.export.merged_model", None)
    hub.refused = refusal
    if public:
        hub.files["me/mine"], hub.private["me/mine"] = {}, False
    answer = call(EXPORT, run, tmp_path / "out", *args)
    refused(answer, said)
    assert TOKEN not in answer.err
    assert not (tmp_path / "out").exists()


def test_a_failing_upload_leaves_the_export_and_says_how_to_go_on(hub: UploadHub, run: Path, tmp_path: Path) -> None:
    hub.refused = {"/commit/": 403}
    out = tmp_path / "out"
    refused(call(EXPORT, run, out, "--push=me/mine"), f"hf upload me/mine {out}")
    assert (out / "model.safetensors").is_file()
    wrong = call(EXPORT, tmp_path / "nowhere", tmp_path / "other", "--push=me/other")
    assert wrong.code == 2 and "me/other" not in hub.files, "a wrong path creates no repository"
