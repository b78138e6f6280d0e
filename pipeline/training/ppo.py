"""PPO: `accelerate launch ... -m pipeline.training.ppo --run RUN --out DIR`.

Makes the artifact "policy": the whole trained model as a Hugging Face folder with its tokenizer. Exits with status 75,
and without a result, when it was asked to stop; started again, it goes on from its checkpoint to the same weights.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import heavy

if __name__ == "__main__":
    heavy.begin()  # before the imports below, which take seconds

import transformers
from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.config.training import KEPT_APART, SHOWN_APART
from pipeline.data.preferences import Preference, read_split
from pipeline.data.publish import push_if_asked
from pipeline.data.tokens import load_tokenizer, same_vocabulary
from pipeline.run import atomic, hashing, sources
from pipeline.run.directory import RunDir
from pipeline.run.work import Progress, parse_work, write_result
from pipeline.serving.model_store import reward_folder
from pipeline.training import baselines
from pipeline.training.assemble import load_policy, mean_baseline, prepare, save_policy
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.critic import check_critic, load_critic
from pipeline.training.distributed import whole_weights
from pipeline.training.metrics import read_rows
from pipeline.training.model_card import Card, sections_of, write_card, write_generation_config
from pipeline.training.models import check_positions
from pipeline.training.prompts import all_prompts
from pipeline.training.ranks import Ranks, make_accelerator
from pipeline.training.report_once import run_rank
from pipeline.training.reward_source import LEDGER, RewardSource
from pipeline.training.rollout import Sampler
from pipeline.training.schedule import learning_rate
from pipeline.training.scoring_text import ScoringText
from pipeline.training.split import Split
from pipeline.training.state import Data, TrainState, steps_per_phase
from pipeline.training.stop import EX_TEMPFAIL, STOPPED, StopRequest
from pipeline.training.stopping import StopSequences
from pipeline.training.tracking import end_tracking, run_id, start_tracker, tracker_of
from pipeline.training.trainer import Trainer
from pipeline.training.updater import Updater

FINGERPRINT = "HH_PIPELINE_FINGERPRINT"
"""Environment variable that names the checkpoints' folder: a changed configuration never resumes an old training."""
NOT_IN_TRAINING = {"preset", "description", "all", "cluster", "sandbox", "evaluate", "sft", "reward_model", "data"}
"""Sections that do not enter a training; data and models enter by their content."""


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    run, config, out = parse_work(__doc__.splitlines()[0], argv)
    quiet_libraries()
    stop = StopRequest(run.stop_flag)
    accelerator = start_accelerator(run, config)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    name = checkpoints_name(run, config, ranks)
    start_tracker(accelerator, config, sections_of("ppo"), run.tracker, run.root.name, run_id(run.root, name))
    if not ranks.first:
        logging.getLogger().setLevel(logging.WARNING)
    progress = Progress(out, config.train.total_steps)

    with contextlib.closing(RewardSource(run, config, run.checkpoints / name / LEDGER, ranks)) as rewards:
        trainer, split = assemble(run, config, accelerator, ranks, progress, stop, name, rewards)
        with trainer.checkpoints.finishing():
            state, complete = trainer.train()
    if complete:
        save_policy(split, trainer.sampler.tokenizer, out / "policy", accelerator, ranks)
        artifacts = {"policy": "policy", **save_best(trainer, split, state, out)}
        if ranks.first:
            for name, folder in artifacts.items():
                describe_policy(trainer, state, out / folder, best=name == "best" and folder == name)
            values = {**summary(state), "metrics": str(trainer.metrics.relative_to(run.root))}
            write_result(out, artifacts, values)
            push_if_asked(run, config, "train", out / "policy")
    elif ranks.first:
        logging.getLogger(__name__).info("stopped at step %d; start again to go on", state.step)
        atomic.write_json(out / STOPPED, {"step": state.step, "phase": state.phase})
    ranks.barrier()
    end_tracking(accelerator)
    return 0 if complete else EX_TEMPFAIL


def quiet_libraries() -> None:
    """Keep progress bars and the notes of every saved file out of the log."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)


def assemble(
    run: RunDir,
    config: Config,
    accelerator: Accelerator,
    ranks: Ranks,
    progress: Progress,
    stop: StopRequest,
    name: str,
    rewards: RewardSource,
) -> tuple[Trainer, Split]:
    """Load models and data, connect the scorer, and put the trainer together, with checkpoints below `name`."""
    start = sources.policy_start_path(run, config)
    check_positions(start, "train.seq_length", config.train.seq_length)
    tokenizer_folder = sources.tokenizer_path(run, config, start)
    tokenizer = load_tokenizer(tokenizer_folder)
    rewards_from = reward_folder(run, config)
    same_ids = same_vocabulary(tokenizer_folder, rewards_from)
    if config.ppo.critic == "model":
        check_critic(same_ids, rewards_from)
        check_positions(rewards_from, "train.seq_length", config.train.seq_length)
    split, reference = load_policy(start, config, accelerator)
    stops = StopSequences(tokenizer, config.generate.stop_sequences)
    scoring = ScoringText(
        policy=tokenizer,
        reward=load_tokenizer(rewards_from),
        same_vocabulary=same_ids,
        stops=stops,
        max_length=config.serving.max_length,
    )
    checkpoints = Checkpoints(run.checkpoints / name, ranks, config.train.keep_checkpoints, background=True)
    scorer = rewards.connect()
    sampler = Sampler(split, tokenizer, scoring, scorer, config.generate, config.prompt_length, accelerator.autocast)
    rescore = functools.partial(load_data, run, config, ranks=ranks, progress=progress)
    data = rescore(sampler)
    critic = None
    if config.ppo.critic == "model":
        critic = load_critic(rewards_from, split.device, bias=-mean_baseline(data))
    policy, optimizer = prepare(split, reference, config, accelerator, critic)
    sampler = replace(sampler, whole_weights=whole_weights(accelerator, split.top))
    total = config.train.total_steps
    updater = Updater(
        accelerator,
        policy,
        optimizer,
        config.ppo,
        ranks,
        config.generate.temperature,
        config.optimizer.max_grad_norm,
        rate=lambda step: learning_rate(step, config.optimizer, config.scheduler, total),
    )
    trainer = Trainer(
        run, config, data, sampler, updater, reference, ranks, checkpoints, progress, stop, rewards, rescore
    )
    return trainer, split


def checkpoints_name(run: RunDir, config: Config, ranks: Ranks) -> str:
    """The checkpoints' folder: what the control plane says, else made from all that enters a training by hand."""
    given = os.environ.get(FINGERPRINT)
    return given or str(ranks.from_first(manual_fingerprint(run, config) if ranks.first else None))


def manual_fingerprint(run: RunDir, config: Config) -> str:
    """ "manual-" and a fingerprint of the settings that enter training, the models' files and the data's."""
    settings = {key: value for key, value in config.plain().items() if key not in NOT_IN_TRAINING}
    settings["serving"] = {key: settings["serving"][key] for key in ("dtype", "max_length")}
    settings["train"] = {key: value for key, value in settings["train"].items() if key not in KEPT_APART | SHOWN_APART}
    folders = (sources.policy_start_path(run, config), sources.reward_model_path(run, config))
    cache = hashing.HashCache(run.root / "cache" / "hashes.json")
    inputs = [hashing.hash_tree(folder, cache)[0] for folder in (*folders, run.artifact("prefetch", "data"))]
    cache.save()
    return f"manual-{hashing.fingerprint([settings, inputs])}"


def load_data(run: RunDir, config: Config, sampler: Sampler, ranks: Ranks, progress: Progress) -> Data:
    """Prompts, and the baselines of all that this training will use: of the held-out prompts alone where those of
    training cancel, since the held-out reward is reported."""
    train, heldout = read_split(run, "train"), read_split(run, "test")[: config.train.eval_prompts]
    if not config.ppo.delta_reward:
        return Data(train, heldout, None, None)

    def report(note: str) -> None:
        if ranks.first:
            progress.update(0, note)

    def scores(preferences: Sequence[Preference], rows: Sequence[int]) -> dict[int, float]:
        return baselines.baseline_scores(cache, preferences, rows, sampler.scoring, sampler.scorer, ranks, report)

    shared = config.serving.baseline_cache
    cache = Path(shared).expanduser() if shared else run.root / "cache"
    ours = None
    if not baselines.baselines_cancel(config.ppo):
        steps = 1 if config.ppo.max_update_kl else steps_per_phase(config)  # a phase that ends early has at least one
        phases = -(-config.train.total_steps // steps)
        ours = scores(
            train,
            all_prompts(phases, ranks.world, config.ppo.num_rollouts, len(train), config.seed, config.ppo.group_size),
        )
    return Data(train, heldout, ours, scores(heldout, range(len(heldout))))


def start_accelerator(run: RunDir, config: Config) -> Accelerator:
    """The Accelerator; its tracker is yet to be started."""
    return make_accelerator(1, tracker_of(config), run.tracker)  # the updater counts micro-batches itself


def save_best(trainer: Trainer, split: Split, state: TrainState, out: Path) -> dict[str, str]:
    """The artifact "best", the policy of the best held-out reward, where it is kept; it may be the last one itself.

    The models then hold its weights.
    """
    if not trainer.config.train.save_best:
        return {}
    if state.best_step == state.step:
        return {"best": "policy"}
    if not trainer.checkpoints.load_best(trainer.updater.accelerator, state.best_step):
        logging.getLogger(__name__).warning("the policy of step %d, the best, was not kept", state.best_step)
        return {}
    save_policy(split, trainer.sampler.tokenizer, out / "best", trainer.updater.accelerator, trainer.ranks)
    return {"best": "best"}


def describe_policy(trainer: Trainer, state: TrainState, folder: Path, best: bool) -> None:
    """Write the model card and the sampling settings of the policy in `folder`: the last one, or the best."""
    run, config, identity = trainer.run, trainer.config, trainer.sampler.scorer.identity
    reward_model = config.reward_model.checkpoint or "trained in the same run"
    figures = {
        "optimiser step": state.best_step if best else state.step,
        "held-out reward": state.best_reward if best else state.last_reward,
        "held-out reward of the start": state.first_reward,
        "KL to the start in the last phase (nats an answer)": state.kl,
        "rollouts": state.rollouts,
    }
    card = Card(
        method="PPO",
        sections=sections_of("ppo"),
        figures=figures,
        start="its supervised fine-tuning on the same data" if "sft" in config.all else None,
        reward_model=f"{Path(reward_model).name} (SHA-256 {identity})" if identity else Path(reward_model).name,
        rows=read_rows(trainer.metrics),
    )
    write_generation_config(folder, trainer.sampler.tokenizer, config)
    write_card(folder, run, config, card)


def summary(state: TrainState) -> dict[str, Any]:
    """The values that the stage records."""
    return {
        "steps": state.step,
        "phases": state.phase,
        "kl": state.kl,
        "kl_coefficient": state.kl_coefficient,
        "reward_mean_first": state.first_reward,
        "reward_mean_last": state.last_reward,
        "reward_mean_best": state.best_reward,
        "best_step": state.best_step,
        "rollouts": state.rollouts,
        "rollouts_per_second": state.rollouts / state.seconds if state.seconds else None,
        "train_seconds": state.seconds,
    }


if __name__ == "__main__":
    run_rank(main)
