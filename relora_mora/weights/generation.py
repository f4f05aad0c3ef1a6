"""The settings of transformers' ``generate`` for a run's model: those of its base, and where an answer ends."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from relora_mora.config.load import read_json
from relora_mora.data.records.passages import end_of_turn, special_tokens
from relora_mora.system.run_folder import RunFolder
from relora_mora.weights.foreign import is_foreign

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_file(init_from: str | None) -> Path | None:
    """The generation_config.json of the model, run or checkpoint that a run starts from; None if it has none."""
    if init_from is None:
        return None
    folder = Path(init_from)
    places = [folder] if is_foreign(folder) else [folder, folder.absolute().parent.parent]
    return next((file for file in (place / GENERATION_CONFIG_NAME for place in places) if file.is_file()), None)


def ids_of_roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The ids of BOS, EOS and padding, by their names in a model's config."""
    return {name: getattr(tokenizer, name) for name in ROLES}


def generation_config(
    tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig, run: RunFolder | None
) -> GenerationConfig:
    """What ``generate`` does with a run's model: it stops at EOS and at the end of a turn.

    If the model's config lists several ids, as in instruct models, it also stops at those that are special tokens.
    Everything else is as in the base that the run started from.
    """
    has_base = run is not None and run.generation_config.is_file()
    base = read_json(run.generation_config, "generation_config.json") if run is not None and has_base else {}
    listed = model_config.eos_token_id if isinstance(model_config.eos_token_id, list) else []
    further = [end_of_turn(tokenizer), *sorted(special_tokens(tokenizer) & set(listed))]
    ends = dict.fromkeys([tokenizer.eos_token_id, *(end for end in further if end is not None)])
    config = GenerationConfig.from_dict({**base, **ids_of_roles(tokenizer)})
    config.eos_token_id = list(ends) if len(ends) > 1 else tokenizer.eos_token_id
    return config
