"""The documents name only what exists: files, settings, tags, options; and their launches can start.

`make docs` follows their links.
"""

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import relora_mora
from relora_mora.checkpoint.layout import Manifest
from relora_mora.commands import NAMES, main_of
from relora_mora.config.explain import model_in
from relora_mora.config.load import ConfigError, load_config
from relora_mora.config.removed import REMOVED
from relora_mora.config.schema import SETTINGS, Config, may_change
from relora_mora.train.begin.identity import FREE_SECTIONS
from tests.tools.each import each
from tests.tools.helpers import ROOT
from tests.tools.pages import PAGES, written

pytestmark = pytest.mark.more

SECTIONS = Config.model_fields
FOLDERS = (".", "docs", "docs/tutorials", "configs", "tokenizer")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
# files whose comments are instructions to a user, too
OTHERS = ("Dockerfile", "compose.yaml", "launch/slurm/*", "launch/hostfile*", "launch/k8s/*")
INSTRUCTIONS = [*DOCUMENTS, *(path for pattern in OTHERS for path in ROOT.glob(pattern))]


def name(path: Path) -> str:
    """The path of a document as links and messages give it."""
    return str(path.relative_to(ROOT))


def options(command: str) -> set[str]:
    """Names of the parameters of a command of relora-mora."""
    return set(inspect.signature(main_of(command)).parameters)


def is_setting(dotted: str) -> bool:
    """``section.key`` of the schema, or a key below one that takes names and values, or a record."""
    section, key, *below = dotted.split(".")
    model = SECTIONS[section].annotation if section in SECTIONS else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)) or key not in model.model_fields:
        return False
    annotation = model.model_fields[key].annotation
    record = model_in(annotation)
    if not below or record is None:
        return not below or "dict" in str(annotation)
    return below[0] in record.model_fields or "dict" in str(annotation)


def commands(text: str) -> Iterator[list[str]]:
    """Command lines in fenced blocks, with their continuation lines, as words."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            yield line.removeprefix("$ ").split("  #")[0].split()


@each("page", [page for page in PAGES if page != "recipes"])  # whose commands and rows its own test tries
def test_a_page_that_follows_from_the_code_is_up_to_date(page: str) -> None:
    now, then = written(page)
    assert now == then, f"run: python -m tests.tools.pages {page}"


@each("path", INSTRUCTIONS)
def test_every_file_of_the_repository_that_is_named_exists(path: Path) -> None:
    folder = r"(?<![\w./-])(?:launch|configs|tokenizer|docs|tests|relora_mora)/"
    pattern = folder + r"[\w./-]*\.(?:py|ya?ml|json|md|sbatch|example)\b"
    for found in re.findall(pattern, path.read_text()):
        assert (ROOT / found).is_file(), f"{name(path)}: {found}"


def test_recipes_name_code_that_exists() -> None:
    recipes = (ROOT / "CONTRIBUTING.md").read_text().partition("## How to add")[2]
    files = [ROOT / "mkdocs.yml", *(ROOT / "relora_mora").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    words = {word for path in files for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    named = re.findall(r"`(?:\w+\.)*(\w+)(?:\([^`]*\))?`", recipes)
    assert len(named) > 50
    assert set(named) - words == set()


TELL_OF_REMOVED = ("CHANGELOG.md", "docs/promises.md", "docs/experiments.md")


@each("path", INSTRUCTIONS)
def test_every_setting_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    flags = re.findall(r"--([a-z_]+\.[\w.]+\w)(?==)", text)
    quoted = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]+)(?:=[^`]*)?`", text)
    files = (".json", ".yaml", ".py", ".md", ".model")
    for dotted in [*flags, *quoted]:
        deliberate = dotted in ("section.key", "data.KEY", "method.merge_evry") or dotted.endswith(files)
        deliberate |= dotted in REMOVED and name(path) in TELL_OF_REMOVED
        assert deliberate or is_setting(dotted), f"{name(path)}: {dotted}"


@each("path", DOCUMENTS)
def test_commands_use_options_that_they_take(path: Path) -> None:
    for words in commands(path.read_text()):
        if words[:1] != ["relora-mora"]:
            continue
        command = words[1]
        assert command in NAMES, f"{name(path)}: relora-mora {command}"
        for word in words[2:]:
            option = re.match(r"--([\w.]+)", word)
            taken = option is None or "." in option[1] or option[1] in options(command)
            assert taken, f"{name(path)}: relora-mora {command} has no {word}"


@each("path", DOCUMENTS)
def test_every_make_target_that_is_named_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", path.read_text(), re.MULTILINE))
    assert targets
    assert {target for pair in named for target in pair if target} <= targets


def test_the_readme_shows_the_message_that_the_program_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = re.search(
        r"^\$ relora-mora pretrain (\S+) (.+)\n((?:.+\n)+?)```", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert shown is not None
    overrides = dict(word.removeprefix("--").split("=", 1) for word in shown[2].split())
    with pytest.raises(ConfigError) as raised:
        load_config(shown[1], overrides, world_size=1)
    assert str(raised.value) == shown[3].rstrip("\n")


def test_described_metrics_are_the_written_ones() -> None:
    files = [path for path in sorted((ROOT / "relora_mora" / "train").rglob("*.py")) if path.name != "loggers.py"]
    # keys of dictionaries
    written = set(re.findall(r'"([a-z]+/[a-z_]+)[^"]*"[]:]', "".join(path.read_text() for path in files)))
    table = (ROOT / "docs" / "metrics.md").read_text().partition("| tag |")[2].partition("\n\n")[0]
    described = set(re.findall(r"`([a-z]+/[a-z_]+)", table))
    assert len(written) > 25
    assert written - {"train/lr_"} <= described
    put_together = {
        tag for tag in described if re.match("eval/|launch/|train/lr_|merge/(delta_norm|effective_rank)", tag)
    }
    assert described - written == put_together - written


def test_the_documents_say_what_may_change_at_a_resume() -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    table = text.partition("| may differ |")[2].partition("\n\n")[0]
    first_column = "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    named = set(re.findall(r"`([a-z_]+\.[a-z_]+)`", first_column))
    assert named == {setting for setting in SETTINGS if may_change(setting) in ("free", "data")}
    assert all(f"`{section}`" in first_column for section in FREE_SECTIONS)


def test_the_start_and_the_loop_are_as_contributing_shows_them() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for title, file in (("start", "pretrain.py"), ("step", "loop/loop.py")):
        shown = text.partition(f"**The path of a {title}**")[2].split("```")[1]
        code = (ROOT / "relora_mora" / "train" / file).read_text(encoding="utf-8")
        for line in shown.strip().splitlines():
            _, found, code = code.partition(line.partition("  # ")[0].strip())
            assert found, line


def test_the_documents_describe_every_field_of_a_manifest() -> None:
    table = (ROOT / "docs" / "checkpoints.md").read_text().partition("`manifest.json` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= {*Manifest.__annotations__, "format", "version"}


def test_no_text_has_a_path_of_somebodys_machine() -> None:
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt|scratch)/(?!\.cache/pip)[\w.-]+")
    folders = ("configs", "docs", "launch")
    kinds = (".md", ".yaml", ".sbatch", ".py", ".sh")
    inside = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds)
    found = [f"{name(file)}: {match}" for file in {*INSTRUCTIONS, *inside} for match in home.findall(file.read_text())]
    assert not found


def launches(path: Path) -> Iterator[str]:
    """Command lines that train one of the shipped configs: of code, and of comments."""
    starts_one = (
        r"(?=.*configs/run/\S+\.yaml)"
        r".*(?:launch/pretrain\.py|relora-mora pretrain|pretrain\.sbatch|docker (?:run|compose))"
    )
    for line in re.split(r"[`\n]", re.sub(r"\\\n[# ]*", "", path.read_text())):
        command = re.split(r" {2,}#|; done", line.removeprefix("#"))[0].strip()
        if re.match(starts_one, command):
            yield command


def ranks_of(command: str) -> int | None:
    """How many ranks a command line starts; None if another file says it, or if it takes all GPUs."""
    given = {option: int(number) for option, number in re.findall(r"(?:--|\b)([\w-]+)[= ](\d+)\b", command)}
    if "deepspeed" in command or "sbatch" in command:
        return given.get("num_gpus")
    if "torchrun" in command:
        return given.get("nnodes", 1) * given["nproc_per_node"]
    return given.get("GPUS", 1)


LAUNCHES = sorted(
    {(name(path), command) for path in [*INSTRUCTIONS, *ROOT.glob("configs/run/*.yaml")] for command in launches(path)}
    - {("README.md", command) for command in launches(ROOT / "README.md") if "merge_evry" in command}
)


@each("document,command", LAUNCHES)
@pytest.mark.usefixtures("at_root")
def test_the_config_of_a_launch_suits_its_number_of_ranks(document: str, command: str) -> None:
    [config] = re.findall(r"configs/run/\S+?\.yaml", command)
    words = shlex.split(
        command.replace('CONFIG="', "").replace('" docker', " docker").replace("$SLURM_ARRAY_TASK_ID", "1")
    )
    overrides = dict(word.removeprefix("--").split("=", 1) for word in words if re.match(r"--[a-z_]+\.", word))
    assert {1, 2, 4, 8} <= {ranks_of(other) for _, other in LAUNCHES}
    for path in ROOT.glob(re.sub(r"\$\w+", "*", config)):
        load_config(path, overrides, world_size=ranks_of(command))


def test_the_api_page_has_every_name_of_the_library() -> None:
    names = re.findall(r"^::: relora_mora\.(\w+)$", (ROOT / "docs/site/api.md").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(relora_mora.__all__)
