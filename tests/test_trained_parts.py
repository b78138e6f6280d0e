"""What is trained beside the top: a critic of its own, adapters in place of weights; and what is saved of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from helpers_ppo import ARCHITECTURES, config_of, make_run, tiny_config, tiny_model
from helpers_process import fresh_accelerate, own_process_state  # noqa: F401
from helpers_update import ALONE, SCORES, TEMPERATURE, phase, rollouts, settings, updater
from test_ppo_experience import whole_model_logprobs
from transformers import AutoModelForCausalLM, GPTNeoXForSequenceClassification

from pipeline.config.methods import SFT
from pipeline.config.schema import LoRA
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.stages.launch import accelerate_config, precision_of
from pipeline.training import ilql_assemble, ppo
from pipeline.training.adapters import add_adapters, merged_weights, shared_reference, whole_with_merged
from pipeline.training.critic import Critic, load_critic
from pipeline.training.critic_warmup import RATE, parameter_groups
from pipeline.training.distributed import configure_deepspeed, may_fuse, was_skipped
from pipeline.training.experience import Packing, collate
from pipeline.training.microbatches import Limits
from pipeline.training.policy import Policy
from pipeline.training.split import Split, split_model
from pipeline.training.supervised import make_optimizer
from pipeline.training.update import targets_of

LORA = LoRA(rank=2, alpha=6.0)


def reward_model() -> Any:
    torch.manual_seed(5)
    config = config_of("gpt_neox")
    config.num_labels, config.pad_token_id = 1, 1
    return GPTNeoXForSequenceClassification(config).eval()


def randomise(top: torch.nn.Module) -> None:
    """Adapters as after training; B starts at 0."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in top.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0.0, 0.3, generator=generator)


@pytest.mark.parametrize("layers", [-1, 3])
def test_without_a_trunk_a_phase_gives_the_whole_models_logprobs(layers: int) -> None:
    split = split_model(tiny_model(spread=3.0), layers)
    _, responses, _, exp = phase(split, Limits(2))
    assert all(response.states.dtype == torch.int64 and response.states.dim() == 1 for response in responses)
    assert responses[0].states.tolist() == responses[0].prompt + responses[0].tokens[:-1]
    expected = torch.cat([whole_model_logprobs(split.whole, response) for response in responses])
    torch.testing.assert_close(exp.logprobs, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(exp.logprobs, exp.reference)


def test_all_layers_take_the_step_that_the_whole_model_would_take() -> None:
    """The gradient of the clipped loss through top and ids is that through Hugging Face's own forward."""
    split = split_model(tiny_model(spread=3.0), -1)
    policy = Policy(split.top, split.hidden_size, seed=1)
    responses = rollouts(split)
    batch = collate(responses, [2, 0, 3], Packing([len(response.tokens) for response in responses]))
    policy(batch.states, batch.lengths, batch.index, batch.targets, TEMPERATURE).logprobs.sum().backward()
    got = {name: weight.grad.clone() for name, weight in split.whole.named_parameters() if weight.grad is not None}
    split.whole.zero_grad()
    for row in (2, 0, 3):
        ids = torch.tensor([responses[row].prompt + responses[row].tokens])
        table = (split.whole(input_ids=ids, use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        first = len(responses[row].prompt) - 1
        table[first:-1].gather(-1, ids[0, first + 1 :, None]).sum().backward()
    assert "gpt_neox.embed_in.weight" in got
    for name, weight in split.whole.named_parameters():
        torch.testing.assert_close(got[name], weight.grad, atol=2e-4, rtol=1e-3)


def test_a_critic_starts_as_the_reward_models_scores_before_each_token() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    model = reward_model()
    policy = Policy(split.top, split.hidden_size, 1, Critic(model, bias=-0.25))
    responses = rollouts(split)
    batch = collate(responses, [2, 0], Packing([len(response.tokens) for response in responses]))
    with torch.no_grad():
        values = policy(batch.states, batch.lengths, batch.index, batch.targets, 1.0, ids=batch.ids).values
        slow = []
        for response in (responses[2], responses[0]):
            for length in range(len(response.prompt), len(response.prompt) + len(response.tokens)):
                ids = torch.tensor([(response.prompt + response.tokens)[:length]])
                hidden = model.gpt_neox(input_ids=ids).last_hidden_state[0, -1]
                slow.append(model.score(hidden) - 0.25)
    torch.testing.assert_close(values, torch.cat(slow), atol=1e-5, rtol=1e-4)


def test_a_critic_is_trained_in_full_at_a_rate_of_its_own(tmp_path: Path) -> None:
    reward_model().save_pretrained(tmp_path)
    split = split_model(tiny_model(spread=3.0), 1)
    critic = load_critic(tmp_path, torch.device("cpu"), bias=0.0)
    policy = Policy(split.top, split.hidden_size, 1, critic)
    groups = parameter_groups(policy, critic, 3.0)
    assert [group[RATE] for group in groups] == [1.0, 3.0]
    assert {id(weight) for weight in groups[1]["params"]} == {id(weight) for weight in critic.parameters()}

    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    _, _, plans, exp = phase(split, Limits(2), policy=policy)
    targets = targets_of(exp, SCORES, 0.05, settings(), ALONE)
    trainer = updater(policy, settings())
    trainer.optimizer.param_groups[0][RATE] = 0.5
    _, row = trainer.run(exp, targets, plans, 0, 4)
    assert trainer.optimizer.param_groups[0]["lr"] == row["learning_rate_group_0"] == 0.05
    assert trainer.optimizer.param_groups[1]["lr"] == row["learning_rate_group_1"] == 0.1
    moved = {name for name, weight in policy.named_parameters() if not torch.equal(weight, before[name])}
    dead = {name for name in before if name.endswith("key_value.bias")}
    assert {name for name in before if name.startswith("critic.")} - dead <= moved
    assert any(name.startswith("top.") for name in moved)


@pytest.mark.parametrize("layers", [1, -1])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_adapters_change_nothing_at_first_and_merge_to_what_they_compute(kind: str, layers: int) -> None:
    split = split_model(tiny_model(kind, spread=3.0), layers)
    ids = torch.randint(0, 320, (2, 9))
    states = split.trunk(ids)
    with torch.no_grad():
        start = split.top(states)
        reference = shared_reference(split.top)
        add_adapters(split.top, LORA, seed=1)
        assert torch.equal(split.top(states), start)
        randomise(split.top)
        adapted = split.top(states)
        assert torch.equal(reference(states), start)
        assert torch.equal(split.whole(input_ids=ids, use_cache=False).logits, start)
        merged = whole_with_merged(split, torch.float32)
        assert merged.state_dict().keys() == split.whole.state_dict().keys()
        assert not torch.allclose(adapted, start, atol=1e-2)
        torch.testing.assert_close(merged(input_ids=ids, use_cache=False).logits, adapted, atol=1e-4, rtol=1e-4)
    trained = [name for name, weight in split.top.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert len({name.split(".layers.")[-1].split(".h.")[-1].split(".")[0] for name in trained}) == (
        3 if layers == -1 else 1
    )


def test_an_adapters_gradient_is_the_merged_weights_gradient_through_the_other_factor() -> None:
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW of the merged model and s = alpha / rank."""
    split = split_model(tiny_model(spread=3.0), 1)
    add_adapters(split.top, LoRA(rank=2, alpha=6.0, targets=("dense_4h_to_h",)), seed=1)
    randomise(split.top)
    ids = torch.randint(0, 320, (2, 9))
    split.top(split.trunk(ids)).square().mean().backward()
    [layer] = [module for module in split.top.modules() if hasattr(module, "lora_A")]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    merged = whole_with_merged(split, torch.float32)
    weight = merged.gpt_neox.layers[2].mlp.dense_4h_to_h.weight.requires_grad_(True)
    torch.testing.assert_close(weight.detach(), merged_weights(split.top)[id(layer.base_layer.weight)])
    merged(input_ids=ids, use_cache=False).logits.square().mean().backward()
    torch.testing.assert_close(b.grad, 3.0 * weight.grad @ a.detach().T, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(a.grad, 3.0 * b.detach().T @ weight.grad, atol=1e-6, rtol=1e-4)


def test_rank_zero_changes_nothing() -> None:
    split = split_model(tiny_model(), 1)
    before = {name: id(weight) for name, weight in split.top.named_parameters()}
    add_adapters(split.top, LoRA(rank=0), seed=1)
    assert {name: id(weight) for name, weight in split.top.named_parameters()} == before
    assert all(weight.requires_grad for weight in split.top.parameters())


def split_of_three() -> Split:
    return split_model(tiny_model(), 1)


def test_targets_that_are_not_there_and_a_missing_package_are_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^model.lora.targets: the trained layers have no linear module 'densse'.*dense,"
    ):
        add_adapters(split_of_three().top, LoRA(rank=1, targets=("densse",)), seed=1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^model.lora.rank: LoRA needs the package peft; install it"):
        add_adapters(split_of_three().top, LORA, seed=1)


class Scaler:
    def __init__(self, scale: float) -> None:
        self._scale = scale

    def get_scale(self) -> float:
        return self._scale


def test_a_step_that_fp16_leaves_out_is_no_fault_until_the_scale_is_used_up() -> None:
    def skips(precision: str, scale: float, skipped: bool) -> bool:
        accelerator = SimpleNamespace(mixed_precision=precision, scaler=Scaler(scale))
        return was_skipped(cast(Any, accelerator), SimpleNamespace(step_was_skipped=skipped))

    assert skips("fp16", 1024.0, True) and not skips("fp16", 1024.0, False) and not skips("no", 0.0, True)
    with pytest.raises(UserError, match=r"^train: fp16 gradients overflow at the smallest loss scale; take"):
        skips("fp16", 0.5, True)


def test_accelerate_sees_the_steps_that_fp16s_scaler_leaves_out() -> None:
    """torch's fused AdamW leaves them out by itself, and unseen."""
    fresh_accelerate()
    Accelerator(cpu=True)
    layer, scaler = torch.nn.Linear(2, 1), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    accelerator = cast(Any, SimpleNamespace(mixed_precision="fp16", scaler=scaler))
    assert not may_fuse(accelerator) and may_fuse(cast(Any, SimpleNamespace(scaler=None)))
    inner = make_optimizer(layer, SFT(), fused=may_fuse(accelerator))
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    seen = []
    for factor in (1.0, float("inf"), 1.0):
        before = layer.weight.detach().clone()
        scaler.scale(layer(torch.ones(1, 2)).sum() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((was_skipped(accelerator, optimizer), torch.equal(before, layer.weight)))
    assert seen == [(False, False), (True, True), (False, False)]
    fresh_accelerate()


def test_deepspeed_without_masters_is_refused() -> None:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=0, deepspeed_config={}))
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
    with pytest.raises(UserError, match=r"^accelerate_config: DeepSpeed's zero_stage 0 has no float32 masters"):
        configure_deepspeed(cast(Any, accelerator), 1, 1.0)


def test_ilql_does_not_spread_a_head_that_the_frozen_layers_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    monkeypatch.setattr(ilql_assemble, "shards_weights", lambda accelerator: True)
    monkeypatch.setattr(ilql_assemble, "loads_weights", lambda accelerator: True)
    accelerator = cast(Any, SimpleNamespace(mixed_precision="no", device=torch.device("cpu"), distributed_type=None))
    with pytest.raises(
        UserError, match=r"^train\.accelerate_config: ZeRO-3 would spread the head, which is the embedding"
    ):
        ilql_assemble.load_split(tmp_path, tiny_config(model={"num_layers_unfrozen": 1}), accelerator)
    assert ilql_assemble.load_split(tmp_path, tiny_config(model={"num_layers_unfrozen": -1}), accelerator).tied


@pytest.mark.parametrize(
    ("name", "precision"),
    [("ddp", "bf16"), ("ddp-cpu", "no"), ("zero2-bf16", "bf16"), ("zero2-fp16", "fp16"), ("zero3", "bf16")],
)
def test_the_config_files_name_decides_the_precision(name: str, precision: str) -> None:
    assert precision_of(accelerate_config(name, 0)) == precision


def test_a_precision_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mixed_precision: fp8\n")
    with pytest.raises(UserError, match=r"mine.yaml: mixed_precision: fp8 is not supported; give 'no', bf16 or fp16$"):
        precision_of(accelerate_config(str(tmp_path / "mine.yaml"), 0))


def moved(run: RunDir, folder: Path) -> set[str]:
    start = AutoModelForCausalLM.from_pretrained(run.artifact("sft", "model")).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert saved.keys() == start.keys()
    return {name for name, value in saved.items() if not torch.equal(value, start[name])}


def train(run: RunDir, out: str) -> int:
    fresh_accelerate()
    return ppo.main(["--run", str(run.root), "--out", str(run.root / out)])


@pytest.mark.usefixtures("own_process_state")
def test_a_training_with_all_layers_and_a_critic_and_one_with_adapters_end_in_ordinary_models(tmp_path: Path) -> None:
    base = tiny_config()
    short = {**base.train.model_dump(), "num_processes": 1, "total_steps": 4}
    critic = {**base.ppo.model_dump(), "critic": "model", "critic_lr": 1e-3}
    whole = tiny_config(train=short, ppo=critic, model={**base.model.model_dump(), "num_layers_unfrozen": -1})
    run = make_run(tmp_path / "whole", whole)
    assert train(run, "out") == 0
    assert {"gpt_neox.embed_in.weight", "lm_head.weight"} <= moved(run, run.root / "out/policy")

    adapters = tiny_config(train=short, model={**base.model.model_dump(), "lora": {"rank": 2}})
    run = make_run(tmp_path / "lora", adapters)
    assert train(run, "out") == 0
    assert moved(run, run.root / "out/policy") == {
        f"gpt_neox.layers.2.{name}.weight"
        for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    }
    [latest] = run.checkpoints.glob("*/latest")
    from safetensors import safe_open

    with safe_open(latest / "model.safetensors", "pt") as file:
        assert all("lora_" in name or name.startswith("value.") for name in file.keys())  # noqa: SIM118
