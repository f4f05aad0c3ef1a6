"""Which tokens end an answer, as ``generate`` of transformers needs to know."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from relora_mora.data.records.chat import end_of_turn

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


def ids_of_roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The ids of BOS, EOS and padding, by the names that a model's config has for them."""
    return {name: getattr(tokenizer, name) for name in ROLES}


def generation_config(tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> GenerationConfig:
    """What ``generate`` of transformers needs for this tokenizer: it stops at EOS, and where a turn ends.

    Where the model's config lists several ids, as instruct models have, those that are special tokens stop it, too.
    """
    listed = model_config.eos_token_id if isinstance(model_config.eos_token_id, list) else []
    further = [end_of_turn(tokenizer), *sorted(special_tokens(tokenizer) & set(listed))]
    ends = dict.fromkeys([tokenizer.eos_token_id, *(end for end in further if end is not None)])
    config = GenerationConfig(**ids_of_roles(tokenizer))
    config.eos_token_id = list(ends) if len(ends) > 1 else tokenizer.eos_token_id
    return config


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that are no part of an answer, such as EOS, and the end of a turn where the tokenizer gives it no role."""
    added = {token for token, described in tokenizer.added_tokens_decoder.items() if described.special}
    end = end_of_turn(tokenizer)
    return frozenset(added | set(tokenizer.all_special_ids) | ({end} if end is not None else set()))
