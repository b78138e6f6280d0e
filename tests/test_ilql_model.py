"""ILQL's module on real (tiny) models: its data, its losses from a batch's ids, and its decoding."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_ppo import ARCHITECTURES, VOCAB, preferences, tiny_model, tokenizer
from torch import Tensor

from pipeline.config.methods import ILQL
from pipeline.config.training import Generate
from pipeline.data.tokens import encode, encode_pair, end_id
from pipeline.training import vocabulary
from pipeline.training.decode import decode
from pipeline.training.ilql_data import Trajectory, collate, make_trajectories
from pipeline.training.ilql_decoding import beta_suffix, steer
from pipeline.training.ilql_heads import Heads
from pipeline.training.ilql_model import LOSSES, ILQLModule, merge_statistics, metrics_of, statistic_names
from pipeline.training.split import split_model
from pipeline.training.stopping import StopSequences

ROWS = [
    Trajectory(array("i", [5, 6, 7, 8, 0]), 2, 1.0),
    Trajectory(array("i", [9, 4, 0]), 1, -1.0),
    Trajectory(array("i", [11, 12, 13, 14, 15, 3, 0]), 5, 1.0),
]
SETTINGS = ILQL(tau=0.7, gamma=0.9, beta=0.5, cql_scale=0.3, awac_scale=0.8, alpha=0.25)


def module_of(kind: str = "gpt_neox", layers: int = 1, settings: ILQL = SETTINGS, two_qs: bool = True) -> ILQLModule:
    """In float64, with heads and targets that say something, each something else."""
    split = split_model(tiny_model(kind, spread=2.0).double(), layers)
    module = ILQLModule(split, Heads(split.hidden_size, VOCAB, two_qs, seed=1), settings).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in (module.heads, module.targets):
            for parameter in part.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def reference(module: ILQLModule, model: Any, rows: list[Trajectory]) -> dict[str, Tensor]:
    """The losses by their definitions, one row and one token at a time, over all outputs of every head."""
    settings, sums = SETTINGS, dict.fromkeys(("q", "v", "cql", "awac"), torch.zeros((), dtype=torch.float64))
    for row in rows:
        ids = torch.tensor(row.ids.tolist())[None]
        output = model(input_ids=ids, output_hidden_states=True)
        hidden, logits = output.hidden_states[-1][0], output.logits[0]
        values = module.heads.v_head(hidden)[:, 0]
        for at in range(row.first, row.length):
            state, action, ends = at - 1, int(ids[0, at]), at == row.length - 1
            target_q = min(head(hidden)[state, action] for head in module.targets.q_heads).detach()
            following = torch.zeros(()) if ends else values[state + 1].detach()
            goal = (row.reward if ends else 0.0) + settings.gamma * following
            difference = target_q - values[state]
            weight = torch.exp(settings.beta * difference).detach()
            for head in module.heads.q_heads:
                q = head(hidden)[state]
                sums["q"] = sums["q"] + (q[action] - goal) ** 2
                sums["cql"] = sums["cql"] + F.cross_entropy(q[None], torch.tensor([action]))
            share = settings.tau if difference >= 0 else 1 - settings.tau
            sums["v"] = sums["v"] + share * difference**2
            sums["awac"] = sums["awac"] - weight * logits[state].log_softmax(-1)[action]
    sums["loss"] = sums["q"] + sums["v"] + settings.cql_scale * sums["cql"] + settings.awac_scale * sums["awac"]
    return sums


def test_both_answers_become_rows_with_their_rewards_and_the_projects_ids() -> None:
    some = preferences()["train"][:3]
    rows = make_trajectories(some, tokenizer(), 48, ILQL(reward_chosen=2.0, reward_rejected=-0.5))
    assert [row.reward for row in rows] == [2.0, -0.5] * 3
    for row, (preference, key) in zip(rows, [(p, key) for p in some for key in ("chosen", "rejected")], strict=True):
        text = getattr(preference, key)
        prompt, answer = encode_pair(tokenizer(), preference.prompt, text, 48, end_cut=False)
        assert row.ids.tolist() == prompt + answer
        assert row.first == max(1, len(prompt))
        fits = len(encode(tokenizer(), text)) < 48  # else it is cut, and does not end there
        assert (row.ids[-1] == end_id(tokenizer())) == fits


def test_a_row_without_room_for_its_prompt_has_no_state_before_its_first_token() -> None:
    [row, *_] = make_trajectories(preferences()["train"][:1], tokenizer(), 4, ILQL())
    assert (row.length, row.first, row.actions) == (4, 1, 3)


def test_states_are_one_place_before_their_actions_and_only_the_last_is_paid() -> None:
    ids, places, actions, rewards, last = collate(ROWS[:2], pad=99)
    assert ids.tolist() == [[5, 6, 7, 8, 0], [9, 4, 0, 99, 99]]
    assert places.tolist() == [1, 2, 3, 5, 6]
    assert actions.tolist() == [7, 8, 0, 4, 0]
    assert rewards.tolist() == [0, 0, 1, 0, -1]
    assert last.tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("layers", [1, -1], ids=["top", "all"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_modules_losses_and_gradients_are_the_definitions(kind: str, layers: int) -> None:
    module, whole = module_of(kind, layers), tiny_model(kind, spread=2.0).double()
    loss, sums = module(*collate(ROWS, pad=0))
    expected = reference(module, whole, ROWS)
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    found = dict(zip(LOSSES, sums.tolist(), strict=False))
    for name in ("q", "v", "cql", "awac"):
        assert found[f"loss_{name}"] == pytest.approx(expected[name].item(), rel=1e-6)
    loss.backward()
    expected["loss"].backward()
    theirs = {name: weight.grad for name, weight in whole.named_parameters()}
    norm = "final_layer_norm.weight" if kind == "gpt_neox" else "ln_f.weight" if "gpt" in kind else "norm.weight"
    mine = next(weight.grad for name, weight in module.top.named_parameters() if name.endswith(f"body.{norm}"))
    torch.testing.assert_close(
        mine, next(grad for name, grad in theirs.items() if name.endswith(f".{norm}")), rtol=1e-5, atol=1e-6
    )


def test_what_is_frozen_is_not_trained_and_what_is_not_is() -> None:
    for layers in (1, -1):
        module = module_of(layers=layers)
        module(*collate(ROWS, pad=0))[0].backward()
        assert all(weight.grad is not None for weight in module.parameters() if weight.requires_grad)
        assert all(weight.grad is None for weight in module.targets.parameters())
        trunk = list(module._trunk[0].parameters())
        assert all(weight.grad is None and not weight.requires_grad for weight in trunk)
        assert bool(trunk) == (layers == 1)


def test_only_actions_meet_the_vocabulary_and_chunks_of_them_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = module_of(), collate(ROWS, pad=0)
    widths: list[int] = []

    def note(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.ndim == 2:  # (n, V), and not the values (n,) of actions alone
            widths.append(output.numel() // VOCAB)

    for layer in (module.top.head, *(head[2] for head in (*module.heads.q_heads, *module.targets.q_heads))):
        layer.register_forward_hook(note)
    loss, _ = module(*batch)
    assert widths == [len(batch[1])] * 3  # two trained heads and the language model's; never a target head
    loss.backward()
    whole = [weight.grad.clone() for weight in module.parameters() if weight.grad is not None]
    module.zero_grad()
    widths.clear()
    original = vocabulary.token_logprobs
    chunked = lambda *arguments: original(*arguments, max_logits=3 * VOCAB)  # noqa: E731
    monkeypatch.setattr("pipeline.training.ilql_heads.token_logprobs", chunked)
    monkeypatch.setattr("pipeline.training.ilql_model.token_logprobs", chunked)
    pieces, _ = module(*batch)
    assert max(widths) == 3
    torch.testing.assert_close(pieces, loss)
    pieces.backward()
    torch.testing.assert_close([weight.grad for weight in module.parameters() if weight.grad is not None], whole)


def test_without_cql_no_head_meets_the_vocabulary() -> None:
    module = module_of(settings=SETTINGS.model_copy(update={"cql_scale": 0.0}))
    dimensions: list[int] = []
    for head in module.heads.q_heads:
        head[2].register_forward_hook(lambda layer, inputs, output: dimensions.append(output.ndim))  # type: ignore[index]
    loss, sums = module(*collate(ROWS, pad=0))
    assert dimensions == [1, 1]  # the values (n,) of actions
    expected = reference(module, tiny_model(spread=2.0).double(), ROWS)
    assert loss.item() == pytest.approx((expected["loss"] - SETTINGS.cql_scale * expected["cql"]).item())
    assert sums[LOSSES.index("loss_cql")] == 0


def test_rows_spread_over_batches_sum_to_the_same_loss_and_metrics() -> None:
    module = module_of()
    together, statistics = module(*collate(ROWS, pad=0))
    apart = [module(*collate([row], pad=0)) for row in ROWS]
    torch.testing.assert_close(sum(loss for loss, _ in apart), together)
    torch.testing.assert_close(merge_statistics(torch.stack([part for _, part in apart])), statistics)


def test_metrics_are_means_and_spreads_under_trlx_names() -> None:
    module = module_of()
    ids, places, actions, *_ = batch = collate(ROWS, pad=0)
    row = metrics_of(module(*batch)[1], len(actions))
    hidden = module.top.part(module._trunk[0](ids)).flatten(0, 1)[places]
    values, q = module.heads.values(hidden), module.heads.taken(hidden, actions)
    assert row["values/mean"] == pytest.approx(values.mean().item())
    assert row["values/std"] == pytest.approx(values.std(correction=0).item())
    assert (row["qvalues/1/min"], row["qvalues/1/max"]) == pytest.approx((q[1].min().item(), q[1].max().item()))
    assert row["awac_weight/min"] > 0
    assert set(statistic_names(2)) <= set(row)


def test_the_targets_follow_at_every_so_many_steps() -> None:
    """trlX synchronises once a pass over the data, so that its targets never leave their random start."""
    module = module_of(settings=SETTINGS.model_copy(update={"steps_for_target_q_sync": 2}))
    [before, trained] = [next(part.parameters()).clone() for part in (module.targets, module.heads.q_heads)]
    for step in range(1, 6):
        module.after_step(step)  # at 2 and 4
    kept = (1 - SETTINGS.alpha) ** 2
    torch.testing.assert_close(next(module.targets.parameters()), kept * before + (1 - kept) * trained)


def test_steering_samples_from_the_policy_of_the_formula() -> None:
    module = module_of()
    hidden, logits = torch.randn(3, 32, dtype=torch.float64), torch.randn(3, VOCAB, dtype=torch.float64)
    q = torch.stack([head(hidden) for head in module.targets.q_heads]).amin(dim=0)
    whole = logits.log_softmax(-1) + 4.0 * (q - module.heads.values(hidden)[:, None])
    scores = steer(module.targets, 4.0)(logits, hidden)
    torch.testing.assert_close(scores.softmax(-1), whole.softmax(-1))
    assert torch.equal(steer(module.targets, 0.0)(logits, hidden), logits)
    assert (beta_suffix(4.0), beta_suffix(0.5)) == ("@beta=4", "@beta=0.5")


@pytest.mark.parametrize("layers", [1, -1], ids=["top", "all"])
def test_decoding_goes_where_q_is_high(layers: int) -> None:
    """Target heads that value token 7, whatever the state, and then the end."""
    split = split_model(tiny_model(), layers)
    module = ILQLModule(split, Heads(split.hidden_size, VOCAB, True, seed=1), ILQL())
    with torch.no_grad():
        for head in module.targets.q_heads:
            head[2].bias[7] = 1.0  # type: ignore[index]

    def sampled(beta: float) -> list[list[int]]:
        responses = decode(
            split, [[5, 6], [9]], Generate(max_new_tokens=4), StopSequences(tokenizer(), ()), end_id(tokenizer()),
            torch.Generator().manual_seed(0), adjust=steer(module.targets, beta),
        )  # fmt: skip
        return [response.tokens for response in responses]

    assert sampled(100.0) == [[7] * 4, [7] * 4]
    assert sampled(0.0) != sampled(100.0)
