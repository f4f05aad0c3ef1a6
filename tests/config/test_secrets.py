"""No token or password gets into settings, and no message repeats one."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_mora.config.load import ConfigError, load_config, validate
from relora_mora.config.secrets import redact, secret_in
from tests.tools.commands import EVALUATE, PLAN, TRAIN, call, refused
from tests.tools.config_tools import faults_of, tree
from tests.tools.each import each

TOKEN = "hf_" + "Ab1Cd2Ef3Gh4" * 3
LOGIN = "https://ann:pa55w0rd@example.org/a.json.gz"
SECRETS = (TOKEN[3:12], TOKEN[-9:], "pa55w0rd", "Sign4ture")


def refuses_and_hides(path: Path, text: str, overrides: dict[str, str] | None = None) -> str:
    """The message about settings, after a look at everything that could show with it."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    error = caught.value
    sent = pickle.loads(pickle.dumps(error))  # as another rank gets it
    for shown in (str(error), repr(error), str(error.faults), str(error.__cause__), str(error.__context__), str(sent)):
        assert not any(secret in shown for secret in SECRETS), shown
    return str(error)


@each(
    "sections",
    [
        {"data": {"train": TOKEN}},
        {"data": {"train": ["a.json", f"https://example.org/{TOKEN}.json"]}},
        {"model": {"overrides": {"hidden_size": TOKEN}}},
        {"model": {"overrides": {TOKEN: 1}}},
        {"train": {"deepspeed": {"zero_optimization": {"stage": [{"token": TOKEN}]}}}},
        {"method": {"name": TOKEN}},  # no such method
        {"train": {"steps": TOKEN}},  # no number
        {"train": {"steps": ["x" * 60 + TOKEN]}},  # cut off at the end of the message
        {"train": {"token": TOKEN}},  # no such setting
        {TOKEN: {"a": 1}},
    ],
)
def test_a_token_is_refused_in_any_setting(tmp_path: Path, sections: dict[str, dict[str, Any]]) -> None:
    message = refuses_and_hides(tmp_path / "run.yaml", yaml.safe_dump(tree(**sections)))
    assert "use `hf auth login` or HF_TOKEN instead" in message


@each(
    "source,named",
    [
        (["a.json", LOGIN], "~/.netrc"),
        ("http://pa55w0rd@example.org/a", "~/.netrc"),
        ("https://ann:pa55w0rd/x@example.org/a.json", "~/.netrc"),
        ("https://a.org/b?X-Amz-Credential=AK%2F1&X-Amz-Signature=Sign4ture", "its query"),
        ("https://a.org/b?sv=2024&se=2026&sig=Sign4ture", "its query"),
        ("https://a.org/b?a=1&access_token=Sign4ture", "its query"),
    ],
)
def test_a_login_or_a_signature_in_a_url_is_refused(source: Any, named: str) -> None:
    [found] = faults_of(tree(data={"validation": source}))
    assert found.startswith("data.validation") and named in found
    assert not any(secret in found for secret in SECRETS)


@each(
    "text",
    [
        "https://example.org/a@v1.json",
        "https://example.org:8080/a@v1.json",
        "https://[::1]:8080/a.json",
        "https://example.org/part-{000..127}.jsonl.zst",
        "hub:allenai/c4/en/c4-train.{00000..00015}-of-01024.json.gz",
        "runs/hf_demo_of_a_long_name_with_underscores",
        "me@home:runs",
        "https://example.org/a.json?signatures=1&tokens=5&design=2",
    ],
)
def test_text_that_is_not_a_secret_is_accepted_and_shown(text: str) -> None:
    assert secret_in(text) is None
    assert redact(text) == text or "?" in text
    assert validate(tree(data={"train": text}), "the test").data.train[0].source == text


@each(
    "text",
    [
        f"data: {{train: {TOKEN}",  # does not end
        f"data: [{TOKEN}: a: {TOKEN}]",
        f"a: 1\n{'x' * 60} {TOKEN}: [\n",
        f"{TOKEN}: 1\n{TOKEN}: 2",  # twice
        f"a: *{TOKEN}",
        f"- {TOKEN}",
        f"a: {LOGIN}: b: [",
    ],
)
def test_invalid_yaml_is_explained_without_the_secret(tmp_path: Path, text: str) -> None:
    refuses_and_hides(tmp_path / "run.yaml", text)
    flags = {"data.train": f"[{text}", TOKEN: "1", f"data.{TOKEN}": "2", "train.run_dir.x": TOKEN}
    refuses_and_hides(tmp_path / "run.yaml", yaml.safe_dump(tree()), flags)


@each(
    "text,shown",
    [
        (f"x {TOKEN}, y", "x ***, y"),
        (f"got '{LOGIN}'", "got 'https://***@example.org/a.json.gz'"),
        ("https://example.org/a.json?X-Amz-Signature=Sign4ture&b=c: a.json", "https://example.org/a.json?***: a.json"),
        ("['https://example.org/a?Sign4ture', 'b']", "['https://example.org/a?***', 'b']"),
        ("is it here? yes", "is it here? yes"),
    ],
)
def test_messages_are_redacted(text: str, shown: str) -> None:
    assert redact(text) == shown


@each(
    "argv",
    [
        (EVALUATE, "model", f"--data={LOGIN}"),
        (EVALUATE, TOKEN, "--data=d"),
        (EVALUATE, "model", "--data=d", f"--max_tokens={TOKEN}"),
        (TRAIN, f"--data=[a.json, {LOGIN}]", "--out=o"),
        (PLAN, "c.yaml", f"--{TOKEN}=1"),
    ],
)
def test_a_command_refuses_and_hides_them(argv: tuple[str, ...]) -> None:
    answer = call(*argv)
    refused(answer, "the command line:", "it holds")
    assert not any(secret in answer.err for secret in SECRETS)
