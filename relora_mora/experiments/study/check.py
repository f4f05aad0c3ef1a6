"""What the runs of a study will read, looked at before the first of them begins."""

from __future__ import annotations

from collections.abc import Callable

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config
from relora_mora.experiments.study.conduct import known_cells
from relora_mora.experiments.study.design import Study
from relora_mora.experiments.study.folder import StudyFolder, cell_configs, refuse, what_it_reads
from relora_mora.train.begin.check import check_model
from relora_mora.train.begin.inputs import open_inputs
from relora_mora.weights.load import with_tokenizer


def check_inputs(study: Study, folder: StudyFolder) -> None:
    """Looks for the model, the text and the tokenizer of every run that is known and not done.

    Raises :class:`relora_mora.config.load.ConfigError` with the faults of all, named once each.
    """
    cells = [cell for cell in known_cells(study, folder) if not folder.is_done(cell)]
    faults: dict[str, str] = {}
    opened: set[str] = set()
    for cell, config in cell_configs(study, cells, folder).items():
        found = _faults(check_model, config)
        read = what_it_reads(config)
        if read not in opened:
            opened.add(read)
            found += _faults(lambda each: open_inputs(with_tokenizer(each)), config)
        for fault in found:
            faults.setdefault(fault, cell.name)
    refuse(faults, study)


def _faults(look: Callable[[Config], object], config: Config) -> list[str]:
    try:
        look(config)
    except ConfigError as error:
        return error.faults
    except (ValueError, OSError) as error:
        return [str(error)]
    return []
