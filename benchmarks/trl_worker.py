"""TRL's side of ppo_iteration.py: `TRL_PYTHON benchmarks/trl_worker.py SETTINGS.json`, in TRL's own environment.

Reads one line from its input before each iteration of `trl.experimental.ppo.PPOTrainer`, and writes one line of JSON
after it: seconds, seconds of generation, response tokens, mean score. Imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class TokenReward(torch.nn.Module):
    """ppo_iteration.token_reward as TRL wants a reward model: `score` at a token is the reward of the text so far."""

    base_model_prefix = "backbone"

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period

    def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_unused: Any) -> Any:
        """ "Hidden states" (B, T, 1): the mean over the tokens up to here."""
        mask = attention_mask.float()
        worth = (input_ids % self.period).float() / self.period * mask
        means = worth.cumsum(dim=1) / mask.cumsum(dim=1).clamp(min=1.0)
        return transformers.modeling_outputs.BaseModelOutput(hidden_states=(means[..., None],))

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, 1)."""
        return hidden


class Turns(TrainerCallback):
    """Waits for a line before an iteration, and reports after it."""

    def __init__(self, reports: Any, watch: Watch) -> None:
        self.reports, self.watch, self.score = reports, watch, 0.0

    def on_train_begin(self, *_unused: Any, **_also: Any) -> None:
        self._wait()

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_also: Any) -> None:
        self.score = logs.get("objective/scores", self.score)

    def on_step_end(self, *_unused: Any, **_also: Any) -> None:
        took = time.perf_counter() - self.started
        line = {"seconds": took, "generate": self.watch.seconds, "tokens": self.watch.tokens, "score": self.score}
        print(json.dumps(line), file=self.reports, flush=True)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # nobody waits for the rest
        self.started = time.perf_counter()


class Watch:
    """Times TRL's generation and counts what it sampled."""

    def __init__(self, pad: int) -> None:
        self.seconds, self.tokens = 0.0, 0
        generation = ppo_trainer.batch_generation

        def watched(model: Any, queries: Any, *rest: Any) -> Any:
            started = time.perf_counter()
            sequences, logits = generation(model, queries, *rest)
            self.seconds = time.perf_counter() - started
            self.tokens = int((sequences[:, queries.shape[1] :] != pad).sum())
            return sequences, logits

        ppo_trainer.batch_generation = watched


def main() -> None:
    """Train until the input ends."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what TRL prints is no report
    settings = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(settings["threads"])
    transformers.utils.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(settings["policy"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(settings["policy"]) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(settings["reward"], num_labels=1)
    prompts, rows = settings["prompts"], len(settings["prompts"])
    arguments = PPOConfig(
        output_dir=settings["out"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # slower, and there is memory enough
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=settings["seed"],
        # All rollouts are one batch of its loader, cut into minibatches: one optimiser step each.
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_mini_batches=rows // settings["batch_size"],
        num_ppo_epochs=settings["epochs"],
        total_episodes=rows * 10**6,
        local_rollout_forward_batch_size=rows,
        num_sample_generations=0,
        response_length=settings["new_tokens"],
        temperature=1.0,
        learning_rate=settings["lr"],
        kl_coef=0.05,
        vf_coef=1.0,
        max_grad_norm=1.0,
    )
    data = Dataset.from_dict({"input_ids": prompts})
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=TokenReward(settings["period"]),
        train_dataset=data,
        eval_dataset=data,
        value_model=value,
        callbacks=[Turns(reports, Watch(tokenizer.pad_token_id))],
    )
    trainer.train()


if __name__ == "__main__":
    main()
