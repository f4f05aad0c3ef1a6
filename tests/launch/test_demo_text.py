"""The demo's corpus: real prose from source files, held out by file, the same every time."""

import gzip
import json
from pathlib import Path

import pytest

from relora_mora.commands import demo_text as demo

pytestmark = pytest.mark.more

SENTENCE = (
    "This is what the function number {} does with the values that are given to it, "
    "and it is not to be called when they are not known. "
)


def _prose(number: int) -> str:
    return (SENTENCE.format(number) * 2).strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """150 modules with docstrings of a module, a class, a method and a nested function, and files without prose."""
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
    others = {
        "syntax.py": f'"""{_prose(9000)}"""\nprint "python 2"',
        "nul.py": f'"""{_prose(9001)}"""\0',
        "test_it.py": f'"""{_prose(9003)}"""',
        "data.txt": _prose(9004),
        "tests/helper.py": f'"""{_prose(9005)}"""',
        "twice.py": f'"""{_prose(0)}"""',
        "explosive.py": f'"""{_prose(9006)}"""\nraise SystemExit("imported")',
    }
    (root / "package0" / "tests").mkdir()
    for name, text in others.items():
        (root / "package0" / name).write_text(text)
    (root / "package0" / "latin.py").write_bytes(f'"""{_prose(9002)} é"""'.encode("latin-1"))
    return root


def test_every_docstring_is_in_one_shard_held_out_by_file_and_nothing_is_imported(tree: Path, tmp_path: Path) -> None:
    found = list(demo.docstrings(tree))
    counts = demo.write(found, tmp_path / "a", 10**9)
    texts = {}
    for side in ("train", "validation"):
        shards = sorted((tmp_path / "a" / side).iterdir())
        rows = [gzip.decompress(path.read_bytes()).decode().splitlines() for path in shards]
        texts[side] = [json.loads(row)["text"] for shard in rows for row in shard]
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
    assert sorted(texts["train"] + texts["validation"]) == sorted(_prose(number) for number in (*range(600), 9006))
    assert counts == {side: len(chosen) for side, chosen in texts.items()}
    source_of = {text: source for source, text in found}
    files = {side: {source_of[text] for text in chosen} for side, chosen in texts.items()}
    assert not files["train"] & files["validation"]
    assert len(texts["validation"]) == 4 * len(files["validation"]) > 0
    demo.write(found, tmp_path / "b", 10**9)
    for path in (tmp_path / "a").rglob("*.gz"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_examples_and_code_are_dropped() -> None:
    examples = f"Example:\n    >>> call(1)\n    ... and_more\n    [1, 2]\n\n    {_prose(1)}"
    text = f"First line.\n\n{examples}\n\n\n```python\ncode()\n\nmore()\n```\nLast line.   \n"
    assert demo.prose(text) == f"First line.\n\nExample:\n\n    {_prose(1)}\n\nLast line."
