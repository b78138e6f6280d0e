"""What the update sees: the sampled ids, the whole model's numbers, a first minibatch that finds nothing changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from helpers_ppo import ARCHITECTURES, tiny_model, tokenizer

from pipeline.config.methods import PPO
from pipeline.config.training import Generate
from pipeline.training.decode import Response, decode
from pipeline.training.experience import Packing, collate
from pipeline.training.policy import Policy, reference_logprobs
from pipeline.training.ranks import Ranks
from pipeline.training.split import Split, frozen_reference, split_model
from pipeline.training.stopping import StopSequences
from pipeline.training.update import Experience, experience, mean_kl, plan_phase, targets_of
from pipeline.training.updater import Updater

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
PPO_SETTINGS = PPO(num_rollouts=8, chunk_size=8, ppo_epochs=2)
PROMPTS = [[5, 9, 200], [7], [11, 12, 13, 14, 15, 16, 17], [40, 41], [99, 98, 97, 96], [3, 4], [8, 8, 8], [60]]
TEMPERATURE = 0.7


def rollouts(split: Split) -> list[Response]:
    generate = Generate(max_new_tokens=9, temperature=TEMPERATURE)
    end = 77  # random models end now and then
    return decode(split, PROMPTS, generate, StopSequences(tokenizer(), []), end, torch.Generator().manual_seed(0))


def phase(split: Split, micro: int, policy: Policy | None = None) -> tuple[Policy, list[Response], Any, Experience]:
    policy = policy or Policy(split.top, split.hidden_size, seed=1)
    reference = frozen_reference(split)
    responses = rollouts(split)
    plans = plan_phase([len(response.tokens) for response in responses], PPO_SETTINGS, 4, micro, 1, 0, 0)

    def of_reference(states: torch.Tensor, index: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return reference_logprobs(reference, states, index, targets, TEMPERATURE)

    return policy, responses, plans, experience(policy, of_reference, responses, plans[0], TEMPERATURE)


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
    _, responses, _, exp = phase(split, micro=4)
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
        values = policy(batch.states, batch.index, batch.targets, 1.0).values
        slow = []
        for response in (responses[2], responses[0]):
            hidden = model.gpt_neox(input_ids=torch.tensor([response.prompt + response.tokens])).last_hidden_state[0]
            slow.append(policy.value(hidden[len(response.prompt) - 1 : -1]).squeeze(-1))
    torch.testing.assert_close(values, torch.cat(slow), atol=1e-5, rtol=1e-4)


def test_a_fresh_value_head_says_zero() -> None:
    _, _, _, exp = phase(split_model(tiny_model(), 1), micro=4)
    assert not exp.values.any()


def test_left_padding_changes_no_logprob() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    _, responses, _, together = phase(split, micro=4)
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


def updater(policy: Policy, accumulation: int) -> Updater:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(policy, optimizer)
    return Updater(accelerator, prepared, optimizer, PPO_SETTINGS, ALONE, TEMPERATURE, 1.0, rate=lambda step: 0.1)


def trained(micro: int, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    policy, responses, plans, exp = phase(split_model(tiny_model(spread=3.0), 1), micro)
    targets = targets_of(exp, [float(row % 3) - 1.0 for row in range(len(responses))], 0.05, PPO_SETTINGS, ALONE)
    step, row = updater(policy, accumulation=-(-4 // micro)).run(exp, targets, plans, 0, steps)
    assert step == steps
    return copy.deepcopy(policy.state_dict()), row


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_the_first_minibatch_finds_ratio_one_and_no_kl(micro: int) -> None:
    _, row = trained(micro, steps=4)
    assert row["ratio_first"] == 1.0
    assert row["policy/approx_kl_first"] == 0.0
    assert row["ratio"] != 1.0


def test_accumulation_does_not_change_the_result() -> None:
    whole, _ = trained(micro=4, steps=4)
    for micro in (2, 1):
        cut, _ = trained(micro, steps=4)
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, atol=2e-6, rtol=1e-4)


def test_the_last_phase_may_be_cut_short() -> None:
    trained(micro=4, steps=3)


def test_kl_to_the_reference_is_zero_before_training() -> None:
    _, _, _, exp = phase(split_model(tiny_model(spread=3.0), 1), micro=2)
    assert mean_kl(exp, ALONE) == (0.0, 0.0)
