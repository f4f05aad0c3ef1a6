"""What the runs of a study will read, looked at before the first of them begins."""

from __future__ import annotations

from relora_mora.config import ConfigError
from relora_mora.study.cells import first_round
from relora_mora.study.design import Study
from relora_mora.study.folder import StudyFolder, cell_configs
from relora_mora.train.check import check_model
from relora_mora.train.inputs import open_inputs


def check_inputs(study: Study, folder: StudyFolder) -> None:
    """Looks for the model, the text and the tokenizer of every run of the first round that is not done.

    Raises :class:`relora_mora.config.ConfigError` with the faults of all, named once each.
    """
    cells = [cell for cell in first_round(study) if not folder.is_done(cell)]
    faults: dict[str, str] = {}
    opened: set[str] = set()
    for cell, config in cell_configs(study, cells, folder).items():
        read = config.model_dump_json(include={"data": True, "tokenizer": True, "model": {"init_from"}})
        for look in (check_model, open_inputs):
            if look is open_inputs and read in opened:
                continue
            try:
                look(config)
            except ConfigError as error:
                found = error.faults
            except (ValueError, OSError) as error:
                found = [str(error)]
            else:
                continue
            for fault in found:
                faults.setdefault(fault, cell.name)
        opened.add(read)
    if faults:
        raise ConfigError([f"{fault} (in {name})" for fault, name in faults.items()], f"the runs over {study.base}")
