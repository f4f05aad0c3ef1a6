"""The demo's corpus: real prose from source files, held out by file, the same every time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from relora_mora.commands import demo_text as demo
from relora_mora.config.data import DataConfig
from relora_mora.data.read import iter_texts

pytestmark = pytest.mark.more

SENTENCE = (
    "This is what the function number {} does with the values that are given to it, "
    "and it is not to be called when they are not known. "
)


def _prose(number: int) -> str:
    return (SENTENCE.format(number) * 2).strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """150 modules with docstrings of a module, a class, a method and a nested function; and files that must not
    matter."""
    root = tmp_path / "site"
    for number in range(150):
        package = root / f"package{number % 5}"
        package.mkdir(parents=True, exist_ok=True)
        body = [
            f'"""{_prose(4 * number)}"""',
            "class Thing:",
            f'    """{_prose(4 * number + 1)}"""',
            "    if True:",
            "        async def method(self):",
            f'            """{_prose(4 * number + 2)}"""',
            "            def inner():",
            f"                '''{_prose(4 * number + 3)}'''",
            "def short():",
            '    """Too short."""',
            f'NOT_A_DOCSTRING = 1; """{_prose(9999)}"""',
        ]
        (package / f"module{number}.py").write_text("\n".join(body))
    broken = root / "package0"
    (broken / "syntax.py").write_text(f'"""{_prose(9000)}"""\nprint "python 2"')
    (broken / "nul.py").write_bytes(f'"""{_prose(9001)}"""\0'.encode())
    (broken / "latin.py").write_bytes(f'"""{_prose(9002)} é"""'.encode("latin-1"))
    (broken / "test_it.py").write_text(f'"""{_prose(9003)}"""')
    (broken / "data.txt").write_text(_prose(9004))
    (root / "tests").mkdir()
    (root / "tests" / "helper.py").write_text(f'"""{_prose(9005)}"""')
    (broken / "twice.py").write_text(f'"""{_prose(0)}"""')
    (broken / "explosive.py").write_text(f'"""{_prose(9006)}"""\nraise SystemExit("imported")')
    return root


def _read(folder: Path) -> list[str]:
    shards = sorted(folder.glob("*.json.gz"))
    return [json.loads(line)["text"] for shard in shards for line in gzip.open(shard, "rt", encoding="utf-8")]


def test_every_docstring_is_found_once_and_nothing_is_imported(tree: Path, tmp_path: Path) -> None:
    found = list(demo.docstrings(tree))
    of_module = [text for source, text in found if source == "python://package2/module7.py"]
    assert of_module == [_prose(number) for number in range(28, 32)]
    assert {text for _, text in found} == {_prose(number) for number in (*range(600), 9006)}
    counts = demo.write(found, tmp_path / "out", 10**9)
    assert len(found) == 602
    assert sum(counts.values()) == 601  # one appeared twice


def test_shards_are_held_out_by_file(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    counts = demo.write(demo.docstrings(tree), out, 10**9)
    train, validation = sides = [_read(out / side) for side in ("train", "validation")]
    assert counts == {"train": len(train), "validation": len(validation)}
    source_of = {text: source for source, text in demo.docstrings(tree)}
    files = [{source_of[text] for text in side} for side in sides]
    assert not files[0] & files[1]
    assert len(validation) == 4 * len(files[1])
    assert not set(train) & set(validation)
    shards = sorted((out / "train").iterdir())
    assert [path.name for path in shards] == [f"demo-train.{i:05}-of-00008.json.gz" for i in range(8)]
    lines = [gzip.decompress(path.read_bytes()).count(b"\n") for path in shards]
    assert max(lines) - min(lines) <= 1
    config = DataConfig(train=str(out / "train" / "*.json.gz"), validation="x")
    assert sorted(iter_texts(config.train, split="train", config=config)) == sorted(train)


def test_the_same_files_every_time(tree: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        demo.write(demo.docstrings(tree), tmp_path / name, 60_000)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")})
    assert len(contents[0]) == 9
    assert contents[0] == contents[1]


def test_examples_and_code_are_dropped() -> None:
    examples = "Example:\n    >>> call(1)\n    ... and_more\n    [1, 2]\n\n    Between."
    text = f"First line.\n\n{examples}\n\n\n```python\ncode()\n\nmore()\n```\nLast line.   \n"
    assert demo.prose(text) == "First line.\n\nExample:\n\n    Between.\n\nLast line."
