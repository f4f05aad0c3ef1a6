"""Runs beside each other: rows of a table, curves and figures, from the files of their folders alone."""

from relora_mora.compare.errors import CompareError
from relora_mora.compare.figures import figures_of, reach_figure
from relora_mora.compare.files import check_plots, save, write_files
from relora_mora.compare.groups import Group, group_of, group_runs
from relora_mora.compare.reach import Reach, parse_reach, reach_notes, step_cells
from relora_mora.compare.runs import Run, is_model, read_run, read_runs
from relora_mora.compare.table import as_json, compare, markdown, table_of

__all__ = [
    "CompareError",
    "Group",
    "Reach",
    "Run",
    "as_json",
    "check_plots",
    "compare",
    "figures_of",
    "group_of",
    "group_runs",
    "is_model",
    "markdown",
    "parse_reach",
    "reach_figure",
    "reach_notes",
    "read_run",
    "read_runs",
    "save",
    "step_cells",
    "table_of",
    "write_files",
]
