"""The tokens that end an answer, for ``generate`` of transformers."""

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from relora_mora.data.records.chat import end_of_turn

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


def ids_of_roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The ids of BOS, EOS and padding, by their names in a model's config."""
    return {name: getattr(tokenizer, name) for name in ROLES}


def generation_config(tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> GenerationConfig:
    """The settings of ``generate`` in transformers for this tokenizer: it stops at EOS and at the end of a turn.

    If the model's config lists several ids, as in instruct models, it also stops at those that are special tokens.
    """
    listed = model_config.eos_token_id if isinstance(model_config.eos_token_id, list) else []
    further = [end_of_turn(tokenizer), *sorted(special_tokens(tokenizer) & set(listed))]
    ends = dict.fromkeys([tokenizer.eos_token_id, *(end for end in further if end is not None)])
    config = GenerationConfig(**ids_of_roles(tokenizer))
    config.eos_token_id = list(ends) if len(ends) > 1 else tokenizer.eos_token_id
    return config


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that are not part of an answer, such as EOS, and the end of a turn, even one without a role."""
    added = {token for token, described in tokenizer.added_tokens_decoder.items() if described.special}
    end = end_of_turn(tokenizer)
    return frozenset(added | set(tokenizer.all_special_ids) | ({end} if end is not None else set()))
