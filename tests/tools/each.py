"""One test that tries every row of a table."""

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

Test = Callable[..., None]
FAILURES = (Exception, BaseExceptionGroup, pytest.fail.Exception)


def each(names: str | Sequence[str], rows: Iterable[Any]) -> Callable[[Test], Test]:
    """Calls the test for every row, also after one has failed, and names the rows that failed.

    For a rule with many cases, which ``pytest.mark.parametrize`` would make as many tests. For every row,
    ``tmp_path`` is a new folder, ``capsys`` and ``caplog`` are empty, and ``monkeypatch`` is undone after it.
    """
    keys = names.replace(",", " ").split() if isinstance(names, str) else list(names)
    table = [dict(zip(keys, row if len(keys) > 1 else (row,), strict=True)) for row in rows]
    assert table, "there are no rows"

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def all_rows(**fixtures: Any) -> None:
            failures: list[BaseException] = []
            skipped: list[BaseException] = []
            for number, row in enumerate(table):
                try:
                    with _renewed(fixtures, number) as given:
                        test(**given, **row)
                except pytest.skip.Exception as reason:
                    skipped.append(reason)
                except FAILURES as error:
                    error.add_note(textwrap.shorten(f"with {row}", 500))
                    failures.append(error)
            if len(failures) == 1:
                raise failures[0]
            if failures:
                raise BaseExceptionGroup(f"{len(failures)} of {len(table)} rows failed", failures)
            if len(skipped) == len(table):
                raise skipped[0]

        signature = inspect.signature(test)
        fixtures = [parameter for name, parameter in signature.parameters.items() if name not in keys]
        all_rows.__signature__ = signature.replace(parameters=fixtures)  # type: ignore[attr-defined]
        return all_rows

    return decorate


@contextmanager
def _renewed(fixtures: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    given = dict(fixtures)
    with ExitStack() as stack:
        if "tmp_path" in given:
            given["tmp_path"] = given["tmp_path"] / f"row-{number}"
            given["tmp_path"].mkdir()
        if "monkeypatch" in given:
            given["monkeypatch"] = stack.enter_context(pytest.MonkeyPatch.context())
        if "capsys" in given:
            given["capsys"].readouterr()
        if "caplog" in given:
            given["caplog"].clear()
        yield given
