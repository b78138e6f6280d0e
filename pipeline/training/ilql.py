"""ILQL: `accelerate launch ... -m pipeline.training.ilql --run RUN --out DIR`.

Makes the artifact "policy": the trained language model as a Hugging Face folder, with its heads (ilql_output.py), and
with train.save_best "best", that of the best held-out reward. Exits with status 75, and without a result, when it was
asked to stop; started again, it goes on from its checkpoint to the same weights.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import heavy

if __name__ == "__main__":
    heavy.begin()  # before the imports below, which take seconds

from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.data.preferences import Preference, read_split
from pipeline.data.publish import push_if_asked
from pipeline.data.tokens import load_tokenizer, pad_id, same_vocabulary
from pipeline.run import atomic, sources
from pipeline.run.directory import RunDir
from pipeline.run.work import Progress, parse_work, write_result
from pipeline.serving.model_store import reward_folder
from pipeline.training.baselines import baseline_scores
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_files import STATE, all_checkpoints
from pipeline.training.distributed import compute_dtype, whole_weights
from pipeline.training.fit import Course, Fit, Hooks, Keeping, Loop
from pipeline.training.ilql_assemble import load_split, make_module, prepare, repeat_on_cpu
from pipeline.training.ilql_data import Trajectory, collate, make_trajectories
from pipeline.training.ilql_evaluation import Evaluation
from pipeline.training.ilql_model import ILQLModule, statistic_names
from pipeline.training.ilql_output import decoding_beta, save_heads
from pipeline.training.metrics import read_rows
from pipeline.training.model_card import Card, sections_of, write_card, write_generation_config
from pipeline.training.models import check_positions
from pipeline.training.ppo import checkpoints_name, quiet_libraries
from pipeline.training.ranks import Ranks, make_accelerator
from pipeline.training.report_once import run_rank
from pipeline.training.reward_source import LEDGER, RewardSource
from pipeline.training.rollout import Sampler
from pipeline.training.schedule import learning_rate
from pipeline.training.scoring_text import ScoringText
from pipeline.training.split import alias_tree
from pipeline.training.stop import EX_TEMPFAIL, STOPPED, StopRequest
from pipeline.training.stopping import StopSequences
from pipeline.training.task import Task
from pipeline.training.tracking import end_tracking, run_id, start_tracker, tracker_of

BEST_POLICY = "best-policy-"

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    run, config, out = parse_work(__doc__.splitlines()[0], argv)
    quiet_libraries()
    stop = StopRequest(run.stop_flag)
    accelerator = make_accelerator(1, tracker_of(config), run.tracker)
    repeat_on_cpu(accelerator)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    name = checkpoints_name(run, config, ranks)
    start_tracker(accelerator, config, sections_of("ilql"), run.tracker, run.root.name, run_id(run.root, name))
    if not ranks.first:
        logging.getLogger().setLevel(logging.WARNING)
    folder = run.checkpoints / name
    with contextlib.closing(RewardSource(run, config, folder / LEDGER, ranks)) as rewards:
        keeping = Keeping(
            Checkpoints(folder, ranks, config.train.keep_checkpoints, background=True),
            stop,
            Progress(out, config.train.total_steps),
        )
        training = Training(run, config, accelerator, ranks, rewards, keeping)
        done = training.train()
        if done.complete:
            training.save(out / "policy")
    if ranks.first and done.complete:
        artifacts = {"policy": "policy"}
        if config.train.save_best and take_best(folder, training.best["best_step"], out / "best"):
            artifacts["best"] = "best"
            training.describe(out / "best", figures_of_best(training.best, config))
        metrics = {"metrics": str(keeping.metrics.relative_to(run.root))}
        values = {**summary(done, training.best, config), **metrics}
        training.describe(out / "policy", values)
        write_result(out, artifacts, values)
        push_if_asked(run, config, "train", out / "policy")
    elif ranks.first:
        logger.info("stopped at step %d; start again to go on", done.step)
        atomic.write_json(out / STOPPED, {"step": done.step})
    ranks.barrier()
    end_tracking(accelerator)
    return 0 if done.complete else EX_TEMPFAIL


class Training:
    """Models, data and scorer of one process, put together for the loop."""

    def __init__(
        self,
        run: RunDir,
        config: Config,
        accelerator: Accelerator,
        ranks: Ranks,
        rewards: RewardSource,
        keeping: Keeping,
    ) -> None:
        self.run, self.config, self.accelerator, self.ranks = run, config, accelerator, ranks
        self.keeping, self.best = keeping, dict[str, Any]()
        start = sources.policy_start_path(run, config)
        check_positions(start, "train.seq_length", config.train.seq_length)
        tokenizer_folder = sources.tokenizer_path(run, config, start)
        self.tokenizer = load_tokenizer(tokenizer_folder)
        rewards_from = reward_folder(run, config)
        scoring = ScoringText(
            policy=self.tokenizer,
            reward=load_tokenizer(rewards_from),
            same_vocabulary=same_vocabulary(tokenizer_folder, rewards_from),
            stops=StopSequences(self.tokenizer, config.generate.stop_sequences),
            max_length=config.serving.max_length,
        )
        self.split = load_split(start, config, accelerator)
        module = make_module(self.split, config, accelerator)
        self.module: ILQLModule = alias_tree(module)  # a wrapper's hooks are not in what measures and is saved
        self.wrapped, self.optimizer = prepare(module, self.split, config, accelerator)
        train, heldout = read_split(run, "train"), read_split(run, "test")[: config.train.eval_prompts]
        encode = functools.partial(
            make_trajectories, tokenizer=self.tokenizer, max_length=config.train.seq_length, settings=config.ilql
        )
        self.examples = encode(train)
        pad = pad_id(self.tokenizer)
        self.task: Task[Trajectory] = Task(
            lambda rows: collate(rows, pad), lambda row: row.actions, statistic_names(2 if config.ilql.two_qs else 1)
        )
        sampler = Sampler(
            self.split,
            self.tokenizer,
            scoring,
            rewards.connect(),
            config.generate,
            config.prompt_length,
            accelerator.autocast,
            whole_weights(accelerator, self.split.top),
        )
        self.evaluation = Evaluation(
            config,
            accelerator,
            ranks,
            self.module,
            sampler,
            rewards,
            heldout,
            encode(heldout),
            self.task,
            micro_batch_tokens(config),
            rescore=lambda sampler: self._baselines(heldout, sampler),
            keep_best=self._keep_best,
            best=self.best,
        )

    def train(self) -> Fit:
        """To the end, or to a requested stop."""
        config = self.config
        if self.ranks.first:
            atomic.replace_symlink(self.run.metrics, self.keeping.metrics)
        course = Course(
            total_steps=config.train.total_steps,
            batch_size=config.train.batch_size * self.ranks.world,
            seed=config.seed,
            rate=lambda step: learning_rate(step, config.optimizer, config.scheduler, config.train.total_steps),
            micro_batch_tokens=micro_batch_tokens(config),
            max_grad_norm=config.optimizer.max_grad_norm,
            eval_interval=config.train.eval_interval,
            checkpoint_interval=config.train.checkpoint_interval,
        )
        hooks = Hooks(after_step=self.module.after_step, evaluate=self.evaluation.evaluate, extra=self.best)
        loop = Loop(
            self.accelerator,
            self.ranks,
            self.wrapped,
            self.optimizer,
            self.task,
            self.examples,
            course,
            self.keeping,
            hooks,
        )
        return loop.run()

    def save(self, folder: Path) -> None:
        """Write the language model, in one dtype, its tokenizer and the heads; to be called by every rank."""
        with whole_weights(self.accelerator, self.module)():
            if self.ranks.first:
                dtype = compute_dtype(self.accelerator)
                whole = self.split.whole
                weights = {name: weight.detach().to(dtype) for name, weight in whole.state_dict().items()}
                whole.config.dtype = dtype
                with atomic.disk_errors(folder):
                    whole.save_pretrained(folder, state_dict=weights)
                    self.tokenizer.save_pretrained(folder)
                save_heads(self.module.heads, self.module.targets, self.config.ilql, folder)
            self.ranks.barrier()

    def describe(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Write the model card and the sampling settings of the policy in `folder`."""
        identity, checkpoint = self.evaluation.sampler.scorer.identity, self.config.reward_model.checkpoint
        reward_model = Path(checkpoint).name if checkpoint else "trained in the same run"
        card = Card(
            method="ILQL",
            sections=sections_of("ilql"),
            figures=values,
            start="its supervised fine-tuning on the same data" if "sft" in self.config.all else None,
            reward_model=f"{reward_model} (SHA-256 {identity})" if identity else reward_model,
            rows=read_rows(self.keeping.metrics),
        )
        write_generation_config(folder, self.tokenizer, self.config)
        write_card(folder, self.run, self.config, card)

    def _keep_best(self, step: int) -> None:
        """Written beside and renamed. Those that a checkpoint knows of stay: a resume begins there."""
        target = best_folder(self.keeping.checkpoints.folder, step)
        unfinished = target.with_name(f"{target.name}.unfinished")
        if self.ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.save(unfinished)
        if self.ranks.first:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(unfinished, target)
            remove_forgotten(target.parent)
        self.ranks.barrier()

    def _baselines(self, heldout: list[Preference], sampler: Sampler) -> Mapping[int, float] | None:
        """The rewards of the data set's own answers to the held-out prompts, where rewards are measured from them."""
        if not self.config.ppo.delta_reward:
            return None
        shared, rows = self.config.serving.baseline_cache, range(len(heldout))
        cache = Path(shared).expanduser() if shared else self.run.root / "cache"

        def report(note: str) -> None:
            if self.ranks.first:
                self.keeping.progress.update(0, note)

        return baseline_scores(cache, heldout, rows, sampler.scoring, sampler.scorer, self.ranks, report)


def best_folder(checkpoints: Path, step: int) -> Path:
    """Where the policy of the best held-out reward, after `step` steps, is kept."""
    return checkpoints / f"{BEST_POLICY}{step:08d}"


def remove_forgotten(checkpoints: Path) -> None:
    """Remove the best policies that no checkpoint knows of, but for those behind the newest's, as `rotate` does.

    The next checkpoint will know of one of these. Without a checkpoint a training begins anew, and keeps all again.
    """
    states = [atomic.read_json(path / STATE) or {} for path in all_checkpoints(checkpoints)]
    known = [state.get("extra", {}).get("best_step", -1) for state in states]
    for path in all_checkpoints(checkpoints, BEST_POLICY):
        step = int(path.name[len(BEST_POLICY) :])
        if step < max(known, default=-1) and step not in known:
            shutil.rmtree(path)


def take_best(checkpoints: Path, step: int, folder: Path) -> bool:
    """Copy the best policy, of `step`, to `folder`; False, with a warning, where it is gone."""
    kept = best_folder(checkpoints, step)
    if not kept.is_dir():
        logger.warning("the policy of step %d, the best, was not kept", step)
        return False
    with atomic.disk_errors(folder):
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    return True


def figures_of_best(best: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What the best policy's card says of it."""
    return {
        "optimiser step": best["best_step"],
        "beta": decoding_beta(config.ilql),
        "held-out reward": best["best_reward"],
        "held-out reward of the start": best["first_reward"],
    }


def micro_batch_tokens(config: Config) -> int:
    """Padded tokens of one forward."""
    train = config.train
    return train.micro_batch_tokens or (train.micro_batch_size or train.batch_size) * train.seq_length


def summary(done: Fit, best: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The values that the stage records."""
    return {
        **done.figures(),
        "beta": decoding_beta(config.ilql),
        "reward_mean_first": best["first_reward"],
        "reward_mean_last": best["last_reward"],
        "reward_mean_best": best["best_reward"],
        "best_step": best["best_step"],
    }


if __name__ == "__main__":
    run_rank(main)
