"""Checks the inputs of all runs of a study before the first run starts."""

from collections.abc import Callable

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config
from relora_mora.experiments.study.conduct import known_cells
from relora_mora.experiments.study.design import Study
from relora_mora.experiments.study.folder import StudyFolder, cell_configs, input_key, refuse
from relora_mora.optim.own import with_rule
from relora_mora.train.begin.check import check_model
from relora_mora.train.begin.inputs import open_inputs
from relora_mora.weights.vocabulary import with_vocabulary


def check_inputs(study: Study, folder: StudyFolder) -> None:
    """Checks the model, the text and the tokenizer of every known run that is not done.

    Raises :class:`relora_mora.config.load.ConfigError` with the faults of all runs, each fault once.
    """
    cells = [cell for cell in known_cells(study, folder) if not folder.is_done(cell)]
    faults: dict[str, str] = {}
    opened: set[str] = set()
    for cell, config in cell_configs(study, cells, folder).items():
        cell_faults = [*_faults(lambda each: check_model(with_vocabulary(each)), config), *_faults(with_rule, config)]
        inputs = input_key(config)
        if inputs not in opened:
            opened.add(inputs)
            cell_faults += _faults(lambda each: open_inputs(with_vocabulary(each)), config)
        for fault in cell_faults:
            faults.setdefault(fault, cell.name)
    refuse(faults, study)


def _faults(check: Callable[[Config], object], config: Config) -> list[str]:
    try:
        check(config)
    except ConfigError as error:
        return error.faults
    except (ValueError, OSError) as error:
        return [str(error)]
    return []
