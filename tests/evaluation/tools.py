"""Rows for the tasks on local files, and a task of one's own."""

import json
from pathlib import Path
from typing import Any

from examples.uuid_pairs import uuid_pairs
from tests.tools.data_tools import write_json_lines

ROWS: dict[str, list[dict[str, Any]]] = {
    "local_gsm8k": [{"question": "How many?", "answer": "Two and two.\n#### 1,004"}],
    "local_metamath": [
        {"question": "How many?", "answer": "#### 1,004"},
        {"question": "What part?", "answer": "\\frac{1}{2}"},
    ],
    "local_uuid": list(uuid_pairs(3, 0)),
}
CHOICES = ["yes", "no", "maybe"]
QUESTIONS = [{"question": f"Is it {number}?", "answer": answer} for number, answer in enumerate([*CHOICES, "yes"])]


def own_task(folder: Path) -> Path:
    """A task in lm-eval's format, in a file of the user."""
    settings = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_json_lines(folder / "questions.jsonl", QUESTIONS))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "doc_to_choice": CHOICES,
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    path = folder / "own.yaml"
    path.write_text(json.dumps(settings))
    return path
