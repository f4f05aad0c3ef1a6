"""Greedy generation as transformers does it, and how generated answers are compared."""

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AddedToken, AutoModelForCausalLM

from relora_mora.data.held_out import Answer, answer_of
from relora_mora.data.records.passages import special_tokens
from relora_mora.data.rows import Encoded
from relora_mora.evaluation.generation import (
    Generated,
    _with_leading_tokens_in_prompt,
    agreeing_characters,
    generate_answers,
    greedy,
    text_of,
)
from relora_mora.evaluation.loss import Ranks
from relora_mora.tokenizer.load import load_tokenizer
from tests.tools.runs import LLAMA

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(3)
    kind = CONFIG_MAPPING["qwen3"]
    return AutoModelForCausalLM.from_config(
        kind(**LLAMA, initializer_range=0.4, num_key_value_heads=1, head_dim=16)
    ).eval()


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 320, (length,), generator=generator) for length in (5, 1, 9, 4)]


def test_rows_that_fit_never_go_beyond_the_positions_of_the_model():
    """Where one does, dynamic rotary embeddings are stretched, and stay so for what is trained after that."""
    torch.manual_seed(3)
    config = CONFIG_MAPPING["llama"](
        **LLAMA | {"max_position_embeddings": 12},
        initializer_range=0.4,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
    )
    lm = AutoModelForCausalLM.from_config(config).eval()
    before = lm.model.rotary_emb.inv_freq.clone()
    wanted = [7, 7, 3, 7]
    found = greedy(lm, prompts(), 7, CPU, wanted)
    assert torch.equal(lm.model.rotary_emb.inv_freq, before)
    for row, (prompt, tokens) in enumerate(zip(prompts(), wanted, strict=True)):
        assert torch.equal(found[row, :tokens], greedy(lm, [prompt], tokens, CPU)[0])
    greedy(lm, prompts(), 7, CPU)
    assert not torch.equal(lm.model.rotary_emb.inv_freq, before)


def test_the_last_answer_of_a_record_is_generated():
    ids = list(range(8))

    def parts(*scored: int, cut: bool = False) -> list[list[int]] | None:
        found = answer_of(Encoded(ids, [place in scored for place in ids], cut))
        return None if found is None else [part.tolist() for part in found]

    assert parts(5, 6, 7) == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert parts(2, 3, 6) == [[0, 1, 2, 3, 4, 5], [6]]
    assert parts(*ids) is None
    assert parts(5, 6, 7, cut=True) is None
    assert answer_of(Encoded(ids)) is None


def test_the_end_of_a_turn_is_not_part_of_an_answer(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<|eot|>", special=False)])
    ids = tokenizer("the rank", add_special_tokens=False).input_ids
    of_a_turn, named = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot|>"])
    assert of_a_turn not in tokenizer.all_special_ids
    assert text_of(tokenizer, [*ids, of_a_turn], special_tokens(tokenizer)) == "the rank"
    assert named not in special_tokens(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
    assert named in special_tokens(tokenizer)


def test_leading_special_tokens_of_an_answer_are_given(lm, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    end = tokenizer.eos_token_id
    answers = [Answer(np.asarray([5], np.int32), np.asarray(ids, np.int32)) for ids in ([end, 6, 7, end], [end])]
    begun = [_with_leading_tokens_in_prompt(answer, special_tokens(tokenizer)) for answer in answers]
    assert [(each.prompt.tolist(), each.answer.tolist()) for each in begun] == [([5, end], [6, 7, end]), ([5], [end])]
    found = generate_answers(lm, answers[:1], tokenizer=tokenizer, batch_size=1, device=CPU)
    assert found is not None
    assert found.characters > 0


def test_every_answer_is_counted_once_on_any_number_of_ranks(lm, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    tokens = greedy(lm, prompts(), 6, CPU).numpy().astype(np.int32)
    found = [text_of(tokenizer, row.tolist(), set(tokenizer.all_special_ids)) for row in tokens]
    tokens[1] = tokenizer("the same", add_special_tokens=False).input_ids[:1] * 6
    answers = [Answer(prompt.numpy().astype(np.int32), row) for prompt, row in zip(prompts(), tokens, strict=True)]
    expected = [text_of(tokenizer, row.tolist(), set(tokenizer.all_special_ids)) for row in tokens]
    lost = len(expected[1]) - agreeing_characters(found[1], expected[1])
    for world_size, batch_size in ((1, 8), (1, 3), (2, 1), (3, 1), (8, 2)):
        results = [
            generate_answers(
                lm, answers, tokenizer=tokenizer, batch_size=batch_size, device=CPU, ranks=Ranks(rank, world_size)
            )
            for rank in range(world_size)
        ]
        whole = Generated.of_all(results)
        assert (whole.answers, whole.exact, whole.characters) == (4, 3, sum(map(len, expected)))
        assert lost > 0
        assert whole.agreeing == whole.characters - lost
        assert whole.as_dict() == {
            "exact_match": 0.75,
            "character_accuracy": whole.agreeing / whole.characters,
            "answers": 4,
        }
