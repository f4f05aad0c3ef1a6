"""Checks the inputs of all runs of a study before the first run starts."""

from relora_mora.config.load import ConfigError
from relora_mora.experiments.study.conduct import known_cells
from relora_mora.experiments.study.design import Study
from relora_mora.experiments.study.folder import StudyFolder, cell_configs, refuse
from relora_mora.optim.own import with_rule
from relora_mora.train.begin.settings import check_model
from relora_mora.train.begin.text import open_text
from relora_mora.weights.vocabulary import with_vocabulary


def check_inputs(study: Study, folder: StudyFolder) -> None:
    """Checks the model, the text and the tokenizer of every known run that is not done.

    Raises :class:`relora_mora.config.load.ConfigError` with the faults of all runs, each fault once.
    """
    cells = folder.missing(known_cells(study, folder))
    faults: dict[str, str] = {}
    opened: set[str] = set()
    for cell, config in cell_configs(study, cells, folder).items():
        # text is opened only once for all runs that read the same text with the same model and tokenizer
        inputs = config.model_dump_json(
            include={"data": True, "tokenizer": True, "model": {"config", "init_from", "adapter"}},
            exclude={"data": {"seed"}},
        )
        checks = [check_model, open_text] if inputs not in opened else [check_model]
        opened.add(inputs)
        for check in [with_rule, *(lambda config, check=check: check(with_vocabulary(config)) for check in checks)]:
            try:
                check(config)
            except (ValueError, OSError) as error:
                for fault in error.faults if isinstance(error, ConfigError) else [str(error)]:
                    faults.setdefault(fault, cell.name)
    refuse(faults, study)
