"""What the SFT and the reward-model stage share: the process, what is trained, its checkpoints, and its result.

Started as one process or by `accelerate launch` with several. Exits with status 75, and without a result, when it was
asked to stop; started again, it goes on from its checkpoint to the same weights.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.config.methods import Supervised
from pipeline.config.schema import Config
from pipeline.config.training import KEPT_APART
from pipeline.data.publish import push_if_asked
from pipeline.run import atomic, hashing
from pipeline.run.directory import RunDir
from pipeline.run.work import Progress, parse_work, write_result
from pipeline.training import sharding
from pipeline.training.batches import E, epoch_steps
from pipeline.training.best import Best
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.distributed import configure_deepspeed, may_fuse, uses_deepspeed
from pipeline.training.fit import Course, Hooks, Keeping, Loop
from pipeline.training.last_layer import last_layer_at
from pipeline.training.metrics import Row, read_rows
from pipeline.training.ranks import Ranks, make_accelerator
from pipeline.training.stop import EX_TEMPFAIL, STOPPED, StopRequest
from pipeline.training.task import Task, sum_over
from pipeline.training.tracking import end_tracking, run_id, start_tracker, tracker_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_GRAD_NORM = 1.0
FINGERPRINT = "HH_PIPELINE_FINGERPRINT"
"""Environment variable that names the checkpoints' folder: a changed configuration never resumes an old training."""

_log = logging.getLogger(__name__)


@dataclass
class Session:
    """A work command on its way: what it was asked for, and this process among the others."""

    run: RunDir
    config: Config
    out: Path
    settings: Supervised
    stage: str
    accelerator: Accelerator
    ranks: Ranks
    stop: StopRequest
    started: float = field(default_factory=time.monotonic)

    @property
    def section(self) -> str:
        """The section of the configuration that its settings are."""
        return section_of(self.stage)


def section_of(stage: str) -> str:
    """The section of the configuration that holds a supervised stage's settings."""
    return stage.replace("-", "_")


def start(stage: str, description: str, argv: list[str] | None) -> Session:
    """Parse the command line, join the other ranks (if any), seed everything, make CPU kernels repeatable."""
    run, config, out = parse_work(description, argv)
    settings: Supervised = getattr(config, section_of(stage))
    stop = StopRequest(run.stop_flag, run.save_flag(stage))
    accelerator = start_process(config, settings, run.tracker)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    return Session(run, config, out, settings, stage, accelerator, ranks, stop)


def start_process(config: Config, settings: Supervised, tracker: Path | None = None) -> Accelerator:
    """This process's Accelerator; seeds everything, and on a CPU makes kernels repeatable bit for bit."""
    from accelerate.utils import set_seed
    from transformers.utils import logging as transformers_logging

    # models.py checks what fits and what does not; transformers' tables and bars would only fill the stage's log.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = make_accelerator(1, tracker_of(config), tracker, settings.mixed_precision)
    if accelerator.num_processes != world:
        raise RuntimeError(f"accelerate sees {accelerator.num_processes} processes, the launcher started {world}")
    if accelerator.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
    set_seed(config.seed)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    return accelerator


def learning_rate(step: int, total: int, settings: Supervised) -> float:
    """The rate of optimiser step `step` (from 0): linear warm-up, then as it is or down to a tenth of the peak."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.lr * (0.1 + 0.9 * left[settings.scheduler])


def make_optimizer(module: nn.Module, settings: Supervised, fused: bool = True) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on biases and norms."""
    matrices = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim >= 2]
    vectors = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)


def freeze_bottom(model: PreTrainedModel, fraction: float) -> int:
    """Freeze this share of the layers, rounded down, from the bottom, with what lies below them; return how many.

    What is frozen gets no gradient, and where nothing below needs one, no backward pass at all. A head that is tied to
    the embedding is frozen with it.
    """
    if fraction == 0.0:
        return 0
    base: nn.Module = model.base_model
    count = int(model.config.num_hidden_layers)
    frozen = int(fraction * count + 1e-9)  # 0.29 * 100 is a little less than 29
    for child in base.children():  # in the order of the forward pass: embeddings, layers, the final norm
        if isinstance(child, nn.ModuleList) and len(child) == count:
            for layer in child[:frozen]:
                layer.requires_grad_(False)
            break
        child.requires_grad_(False)
    return frozen


def prepare(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Module and optimiser as accelerate wraps them."""
    configure_deepspeed(accelerator, 1, MAX_GRAD_NORM)  # task.py says which backward pass is a step's last
    return sharding.prepare(accelerator, module, optimizer)


def course_of(settings: Supervised, examples: int, seed: int, shuffled: bool = True) -> Course:
    """The settings as the loop takes them."""
    total = settings.epochs * epoch_steps(examples, settings.batch_size)
    total = min(total, settings.max_steps or total)
    return Course(
        total_steps=total,
        batch_size=settings.batch_size,
        seed=seed,
        rate=lambda step: learning_rate(step, total, settings),
        shuffled=shuffled,
        micro_batch_tokens=settings.micro_batch_tokens,
        max_grad_norm=MAX_GRAD_NORM,
        eval_interval=settings.eval_interval,
        checkpoint_interval=settings.checkpoint_interval,
    )


def train(
    session: Session,
    base: Path,
    module: nn.Module,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task[E],
    examples: Sequence[E],
    heldout: Sequence[E],
    summarise: Callable[[list[float]], dict[str, float]],
    shuffled: bool = True,
    counts: dict[str, float] | None = None,
    describe: Callable[[Path, dict[str, Any], list[Row]], None] = lambda folder, values, rows: None,
) -> int:
    """Train `module`, which holds `model`, write OUT/model (and OUT/best) and the result; returns the exit status.

    `summarise` makes figures of the module's sums over the held-out examples; one of them is called "loss". `describe`
    adds to a model's folder what says where it comes from, given its figures and the training's metrics.
    """
    settings, accelerator, ranks = session.settings, session.accelerator, session.ranks
    name = checkpoints_name(session, base, tokenizer)
    start_tracker(
        accelerator,
        session.config,
        (session.section,),
        session.run.tracker,
        f"{session.run.root.name}-{session.stage}",
        run_id(session.run.root, name),
    )
    freeze_bottom(model, settings.frozen_fraction)
    wrapped, optimizer = prepare(accelerator, module, make_optimizer(module, settings, may_fuse(accelerator)))
    course = course_of(settings, len(examples), session.config.seed, shuffled)
    keeping = Keeping(
        Checkpoints(
            session.run.checkpoints / name,
            ranks,
            settings.keep_checkpoints,
            background=True,
            processes=f"{session.section}.num_processes",
        ),
        session.stop,
        Progress(session.out, course.total_steps),
    )
    best = Best(accelerator, keeping.checkpoints, settings.save_best, course.total_steps)

    def evaluate(step: int) -> dict[str, float]:
        sums = sum_over(accelerator, wrapped, task, heldout, settings.micro_batch_tokens)
        figures = summarise(sums.tolist())
        best.consider(step, figures)
        _log.info("step %d: held-out %s", step, ", ".join(f"{key} {value:.4f}" for key, value in figures.items()))
        return {f"test/{key}": value for key, value in figures.items()}

    hooks = Hooks(evaluate=evaluate, extra=best.state)
    done = Loop(accelerator, ranks, wrapped, optimizer, task, examples, course, keeping, hooks).run()
    if done.complete:
        last = {key.removeprefix("test/"): value for key, value in done.evaluated.items()}
        others = {
            **(counts or {}),
            "best_loss": best.figures["loss"],
            "best_step": best.step,
            **done.figures(),
            "processes": ranks.world,
        }
        models = {"model": last}
        save_trained(accelerator, wrapped, module, model, tokenizer, session.out / "model")
        if settings.save_best and not best.is_last:
            best.load()
            models["best"] = best.figures
            save_trained(accelerator, wrapped, module, model, tokenizer, session.out / "best")
        if ranks.first:
            for name, figures in models.items():
                describe(session.out / name, {**figures, **others}, read_rows(keeping.metrics))
            finish(session, best, last, others, keeping.metrics)
    elif ranks.first:
        _log.info("stopped at step %d; start again to go on", done.step)
        atomic.write_json(session.out / STOPPED, {"step": done.step})
    ranks.barrier()
    end_tracking(accelerator)
    return 0 if done.complete else EX_TEMPFAIL


def finish(session: Session, best: Best, last: dict[str, float], others: dict[str, Any], metrics: Path) -> None:
    """Write the result. With `save_best` its figures are the best model's, which is what goes on to other stages."""
    artifacts, figures = {"model": "model"}, last
    if session.settings.save_best:
        artifacts["best"] = "model" if best.is_last else "best"
        figures = {**best.figures, "last_loss": last["loss"]}
    values = {
        **figures,
        **others,
        "seconds": round(time.monotonic() - session.started, 3),
        "metrics": str(metrics.relative_to(session.run.root)),
    }
    write_result(session.out, artifacts, values)
    push_if_asked(session.run, session.config, session.stage, session.out / artifacts.get("best", "model"))


def checkpoints_name(session: Session, base: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The checkpoints' folder: what the control plane says, else made from all that enters the training."""
    given = os.environ.get(FINGERPRINT)
    made = _manual_name(session, base, Path(tokenizer.name_or_path)) if session.ranks.first and not given else None
    return given or str(session.ranks.from_first(made))


def _manual_name(session: Session, base: Path, tokenizer: Path) -> str:
    """The stage, "manual" and a fingerprint of its settings, the start's files, the tokenizer's and the data's."""
    cache = hashing.HashCache(session.run.root / "cache" / "hashes.json")
    folders = (base, tokenizer, session.run.artifact("prefetch", "data"))
    inputs = [hashing.hash_tree(folder, cache)[0] for folder in folders]
    cache.save()
    settings = session.settings.model_dump(mode="json", exclude=KEPT_APART)
    return f"{session.stage}-manual-{hashing.fingerprint([settings, session.config.seed, inputs])}"


def save_trained(
    accelerator: Accelerator,
    wrapped: nn.Module,
    module: nn.Module,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write the trained model as a Hugging Face folder; every rank takes part, since weights may be sharded."""
    weights: dict[str, Tensor] | None = None
    if uses_deepspeed(accelerator):
        prefix = next(name for name, child in module.named_modules() if child is model) + "."
        whole = accelerator.get_state_dict(wrapped)
        weights = {key.removeprefix(prefix): value for key, value in (whole or {}).items() if key.startswith(prefix)}
    if accelerator.is_main_process:
        with atomic.disk_errors(folder):
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()


def hidden_states(
    model: PreTrainedModel, ids: Tensor, places: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Final hidden states at `places` (n,) in the flat (B * T) of right-padded rows.

    # (B, T), (n,), (B, T), (B, 1, T, T) -> (n, H)

    Without a mask, no attention mask: padding lies behind every real token, where a causal model does not look.
    """
    with last_layer_at(model.base_model, places):
        output: Any = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1).index_select(0, places)
