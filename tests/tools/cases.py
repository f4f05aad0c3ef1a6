"""Many cases of one rule in one test, which tries all of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

FAILURES = (Exception, BaseExceptionGroup, pytest.fail.Exception)


def each_case(names: str | Sequence[str], cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As ``pytest.mark.parametrize``, but one test: it fails with the errors of all cases that fail.

    Each case has its own ``tmp_path``, ``monkeypatch`` and ``caplog``.
    """
    arguments = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
    given = [case if len(arguments) > 1 else (case,) for case in cases]
    assert given, "there are no cases"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def tried(**fixtures: Any) -> None:
            failed: list[BaseException] = []
            skipped: list[BaseException] = []
            for number, case in enumerate(given):
                values = dict(zip(arguments, case, strict=True))
                try:
                    with of_a_case(fixtures, number) as own:
                        test(**own, **values)
                except pytest.skip.Exception as reason:
                    skipped.append(reason)
                except FAILURES as error:
                    error.add_note(f"in the case {values}")
                    failed.append(error)
            if failed:
                raise BaseExceptionGroup(f"{len(failed)} of {len(given)} cases failed", failed)
            if len(skipped) == len(given):
                raise skipped[0]

        signature = inspect.signature(test)
        others = [parameter for name, parameter in signature.parameters.items() if name not in arguments]
        tried.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return tried

    return decorate


@contextmanager
def of_a_case(fixtures: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    own = dict(fixtures)
    if "tmp_path" in own:
        own["tmp_path"] = own["tmp_path"] / str(number)
        own["tmp_path"].mkdir()
    if "caplog" in own:
        own["caplog"].clear()
    with pytest.MonkeyPatch.context() as patch:
        if "monkeypatch" in own:
            own["monkeypatch"] = patch
        yield own
