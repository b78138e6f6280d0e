"""What the update sees: the sampled ids, the whole model's numbers, a first minibatch that finds nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_ppo import ARCHITECTURES, tiny_model, tokenizer
from helpers_update import ALONE, TEMPERATURE, phase, rollouts, trained

from pipeline.config.methods import PPO
from pipeline.config.training import Generate
from pipeline.training.decode import Response, decode
from pipeline.training.experience import Packing, collate
from pipeline.training.microbatches import Limits
from pipeline.training.policy import Policy
from pipeline.training.split import split_model
from pipeline.training.stopping import StopSequences
from pipeline.training.update import targets_of


def whole_model_logprobs(model: Any, response: Response) -> torch.Tensor:
    ids = torch.tensor([response.prompt + response.tokens])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double() / TEMPERATURE
    first = len(response.prompt) - 1
    table = logits[first:-1].log_softmax(-1)
    return table[torch.arange(len(response.tokens)), torch.tensor(response.tokens)].float()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cached_states_give_the_whole_models_logprobs(kind: str) -> None:
    split = split_model(tiny_model(kind, spread=3.0), 1)
    _, responses, _, exp = phase(split, Limits(4))
    expected = torch.cat([whole_model_logprobs(split.whole, response) for response in responses])
    torch.testing.assert_close(exp.logprobs, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(exp.reference, expected, atol=2e-5, rtol=1e-4)


def test_values_are_read_from_the_last_hidden_state_of_the_token_before() -> None:
    model = tiny_model(spread=3.0)
    split = split_model(model, 1)
    policy = Policy(split.top, split.hidden_size, seed=1)
    torch.nn.init.ones_(policy.value[2].weight)  # type: ignore[arg-type]
    responses = rollouts(split)
    packing = Packing([len(response.tokens) for response in responses])
    batch = collate(responses, [2, 0], packing)
    with torch.no_grad():
        values = policy(batch.states, batch.lengths, batch.index, batch.targets, 1.0).values
        slow = []
        for response in (responses[2], responses[0]):
            hidden = model.gpt_neox(input_ids=torch.tensor([response.prompt + response.tokens])).last_hidden_state[0]
            slow.append(policy.value(hidden[len(response.prompt) - 1 : -1]).squeeze(-1))
    torch.testing.assert_close(values, torch.cat(slow), atol=1e-5, rtol=1e-4)


def test_a_fresh_value_head_says_zero() -> None:
    _, _, _, exp = phase(split_model(tiny_model(), 1), Limits(4))
    assert not exp.values.any()


def test_company_changes_no_logprob() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    _, responses, _, together = phase(split, Limits(4))
    generate = Generate(max_new_tokens=9, temperature=TEMPERATURE)
    stops = StopSequences(tokenizer(), [])
    for row, response in enumerate(responses):
        [alone] = decode(split, [response.prompt], generate, stops, 77, torch.Generator().manual_seed(0))
        shared = min(alone.states.shape[0], len(response.prompt))
        torch.testing.assert_close(alone.states[:shared], response.states[:shared], atol=1e-5, rtol=1e-4)
        expected = whole_model_logprobs(split.whole, response)
        place = together.packing.offsets[row]
        torch.testing.assert_close(together.logprobs[place : place + len(expected)], expected, atol=2e-5, rtol=1e-4)


def test_sampled_ids_are_trained_as_sampled() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    responses = rollouts(split)
    packing = Packing([len(response.tokens) for response in responses])
    batch = collate(responses, [3, 1], packing)
    assert batch.targets.tolist() == responses[3].tokens + responses[1].tokens
    offsets = packing.offsets
    assert batch.packed.tolist() == [
        *range(offsets[3], offsets[3] + len(responses[3].tokens)),
        *range(offsets[1], offsets[1] + len(responses[1].tokens)),
    ]


CUTS = {
    "whole": Limits(4),
    "two-rows": Limits(2),
    "one-row": Limits(1),
    "by-tokens": Limits(4, tokens=30),
    "by-few-tokens": Limits(4, tokens=1),
}


@pytest.mark.parametrize("limits", CUTS.values(), ids=CUTS)
def test_the_first_minibatch_finds_ratio_one_and_no_kl(limits: Limits) -> None:
    _, row = trained(limits)
    assert row["ratio_first"] == 1.0
    assert row["policy/approx_kl_first"] == 0.0
    assert row["ratio"] != 1.0


def test_accumulation_does_not_change_the_result() -> None:
    whole, row = trained(Limits(4))
    for limits in list(CUTS.values())[1:]:
        cut, cut_row = trained(limits)
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, atol=2e-6, rtol=1e-4)
        assert cut_row == pytest.approx(row, abs=2e-5)


def test_the_last_phase_may_be_cut_short() -> None:
    trained(Limits(4), steps=3)


def test_kl_to_the_reference_is_zero_before_training() -> None:
    _, _, _, exp = phase(split_model(tiny_model(spread=3.0), 1), Limits(2))
    figures = targets_of(exp, [0.0] * len(exp.responses), 0.05, PPO(), ALONE).figures
    assert figures["policy/kl"] == figures["policy/kl_per_token"] == 0.0
