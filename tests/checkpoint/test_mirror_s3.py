"""The mirror of a run at a real S3 server (``make test-extras``)."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from relora_mora.checkpoint.mirror import Mirror, MirrorError
from relora_mora.system.run_folder import RunFolder
from tests.tools.mirrors import sent

moto = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")
s3fs = pytest.importorskip("s3fs")

pytestmark = pytest.mark.more


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.get_host_and_port()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # it would ask the server of another test
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield running
    running.stop()


def test_a_run_goes_on_from_s3_alone(server: object, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 10):
        sent(run, step, url="s3://bucket/some run")
    shutil.rmtree(run)
    again = Mirror("s3://bucket/some run", RunFolder(run))
    again.claim()
    assert again.fetch() == 10
    with pytest.raises(MirrorError, match="no such bucket"):
        Mirror("s3://another/run", RunFolder(run)).claim()
