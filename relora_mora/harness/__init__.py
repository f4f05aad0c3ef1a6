"""Tasks of lm-evaluation-harness, its own and those of local data, on a model in memory."""

from relora_mora.harness.evaluate import HarnessError, check_tasks, evaluate_tasks
from relora_mora.harness.local import LOCAL_TASKS
from relora_mora.harness.report import record, table

__all__ = ["LOCAL_TASKS", "HarnessError", "check_tasks", "evaluate_tasks", "record", "table"]
