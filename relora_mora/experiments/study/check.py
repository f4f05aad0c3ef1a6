"""Checks the inputs of all runs of a study before the first run starts."""

from typing import Any

from relora_mora.experiments.study.conduct import known_cells
from relora_mora.experiments.study.design import Study
from relora_mora.experiments.study.folder import StudyFolder, cell_configs, checked
from relora_mora.optim.own import with_rule
from relora_mora.train.begin.settings import check_model
from relora_mora.train.begin.text import open_text
from relora_mora.weights.vocabulary import with_vocabulary


def check_inputs(study: Study, folder: StudyFolder) -> None:
    """Checks the model, the text and the tokenizer of every known run that is not done.

    Raises :class:`relora_mora.config.load.ConfigError` with the faults of all runs, each fault once.
    """
    configs = cell_configs(study, folder.missing(known_cells(study, folder)), folder)
    # text is opened only once for all runs that read the same text with the same model and tokenizer
    include: Any = {"data": True, "tokenizer": True, "model": {"config", "init_from", "adapter"}}
    texts = {
        config.model_dump_json(include=include, exclude={"data": {"seed"}}): (cell, config)
        for cell, config in reversed(configs.items())
    }
    checks: list[Any] = [(cell, (check_model, config)) for cell, config in configs.items()]
    checks += [(cell, (open_text, config)) for cell, config in texts.values()]
    checked(study, checks, lambda item: item[0](with_vocabulary(with_rule(item[1]))))
