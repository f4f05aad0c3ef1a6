"""Rows for the tasks on local files."""

from __future__ import annotations

from typing import Any

from examples.uuid_pairs import uuid_pairs

ROWS: dict[str, list[dict[str, Any]]] = {
    "local_pubmedqa": [
        {"QUESTION": f"Is it {number}?", "CONTEXTS": ["One.", "Two."], "final_decision": answer}
        for number, answer in enumerate(["yes", "no", "maybe", "yes"])
    ],
    "local_medqa": [
        {"question": f"Which {number}?", "options": {"A": "a", "B": "b", "C": "c", "D": "d"}, "answer_idx": answer}
        for number, answer in enumerate("ABC")
    ]
    + [{"question": "Which 3?", "options": {"D": "d", "E": "e"}, "answer_idx": "E"}],
    "local_gsm8k": [{"question": "How many?", "answer": "Two and two.\n#### 1,004"}],
    "local_metamath": [
        {"question": "How many?", "answer": "#### 1,004"},
        {"question": "What part?", "answer": "\\frac{1}{2}"},
    ],
    "local_uuid": list(uuid_pairs(3, 0)),
}
