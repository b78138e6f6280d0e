"""The plan: which stages run and why. Pure but for reading the run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.run import endpoint, reward_models
from pipeline.run.directory import Outputs
from pipeline.run.hashing import fingerprint
from pipeline.run.sources import check_sources
from pipeline.stages.base import Context, Stage, digest
from pipeline.stages.names import STAGES
from pipeline.stages.registry import REGISTRY

Action = Literal["run", "check", "skip"]
"""run: certainly. check: inputs may change first; the job decides when it knows them. skip: nothing to do."""


@dataclass(frozen=True)
class Planned:
    """What the plan says of one stage."""

    stage: str
    action: Action
    reason: str
    mem_gb: int = 0
    """Memory that an earlier job of it showed to be needed; 0: what the profile says. See scheduler/needs.py."""
    time_min: int = 0
    """The same of time."""


def basis(stage: Stage, context: Context) -> dict[str, Any]:
    """What the stage's fingerprint is computed from. All its inputs must be done."""
    inputs = {}
    for name in stage.needs(context.config):
        outputs = context.run.outputs(name)
        if outputs is None:
            raise UserError(f"{context.run.root}: stage {stage.name} needs {name}, which is not done; run it first")
        inputs[name] = digest(outputs)
    return {"version": stage.version, "settings": stage.settings(context), "inputs": inputs}


def verdict(stage: Stage, context: Context) -> Planned:
    """Whether a stage whose inputs are all done has to run, and why."""
    outputs = context.run.outputs(stage.name)
    if outputs is None:
        attempts = context.run.stage(stage.name) / "attempts"
        return Planned(stage.name, "run", "an earlier attempt did not finish" if attempts.is_dir() else "first run")
    now = basis(stage, context)
    if fingerprint(now) != outputs.fingerprint:
        return Planned(stage.name, "run", "; ".join(differences(outputs.basis, now)) or "fingerprint changed")
    gone = stage.missing(context, outputs)
    return Planned(stage.name, "run", gone) if gone else Planned(stage.name, "skip", "up to date")


def make_plan(
    context: Context, selected: Sequence[str], forced: Sequence[str], environ: Mapping[str, str]
) -> list[Planned]:
    """Plan the selected stages, in order. Raises UserError when one needs a stage that is neither done nor selected."""
    plan: dict[str, Planned] = {}
    for name in STAGES:
        if name in selected and name != "serve":
            plan[name] = _plan_stage(REGISTRY[name], context, plan, selected, name in forced)
    if "serve" in selected:
        plan["serve"] = _plan_serve(context, plan, selected, environ)
    return [plan[name] for name in STAGES if name in plan]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in words how two bases differ: changed settings with both values, changed inputs by name."""
    before, after = _flat(old), _flat(new)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        kind, _, rest = key.partition(".")
        if kind == "inputs":
            lines.append(f"input changed: {rest}")
        elif kind == "version":
            lines.append(f"the stage's version changed: {before.get(key)} to {after.get(key)}")
        else:
            lines.append(f"config changed: {rest}: {_shown(before, key)} to {_shown(after, key)}")
    return lines


def _plan_stage(
    stage: Stage, context: Context, plan: Mapping[str, Planned], selected: Sequence[str], force: bool
) -> Planned:
    if stage.name == "reward-model" and context.config.reward_model.checkpoint is not None:
        return Planned(stage.name, "skip", "not needed: reward_model.checkpoint is given")
    waits = []
    for need in stage.needs(context.config):
        planned = plan.get(need)
        if planned is not None and planned.action != "skip":
            waits.append(need)
        elif context.run.outputs(need) is None:
            raise UserError(
                f"--stage {stage.name}: needs {need}, which is not done in {context.run.root}; "
                f"add it, as in --stage {need},{stage.name}"
            )
    fetches = "prefetch" in plan and plan["prefetch"].action != "skip"
    if fetches and "prefetch" in stage.after(context.config):  # it may move to another commit of what the stage reads
        waits.append("prefetch")
    decided = _decided(stage, context, waits, force)
    if decided.action != "skip":
        for need in stage.needs(context.config):
            _check_there(stage.name, need, context, plan)
        if not fetches:
            check_sources(context.run, context.config, stage.name)
    return decided


def _check_there(stage: str, need: str, context: Context, plan: Mapping[str, Planned]) -> None:
    """UserError when what the stage needs of a finished stage, which is not looked at again, is gone."""
    outputs = context.run.outputs(need)
    if need in plan or outputs is None:
        return
    # What prefetch took from the hub is looked at by source: a stage reads only some of it.
    gone = Stage.missing(REGISTRY[need], context, outputs) or (
        REGISTRY[need].missing(context, outputs) if need != "prefetch" else None
    )
    if gone is not None:
        raise UserError(f"--stage {stage}: needs {need}, but {gone}; add it, as in --stage {need},{stage}")


def _decided(stage: Stage, context: Context, waits: Sequence[str], force: bool) -> Planned:
    if force:
        return Planned(stage.name, "run", "forced")
    outputs: Outputs | None = context.run.outputs(stage.name)
    if not waits or outputs is None:
        return verdict(stage, context)
    return Planned(stage.name, "check", f"waits for {', '.join(waits)}: runs if that changes its input")


def _plan_serve(
    context: Context, plan: Mapping[str, Planned], selected: Sequence[str], environ: Mapping[str, str]
) -> Planned:
    external = environ.get("TRITON_HOST")
    if external:
        return Planned("serve", "skip", f"not needed: TRITON_HOST is set ({external})")
    if context.config.sandbox.engine == "none":
        return Planned("serve", "skip", 'not needed: sandbox.engine is "none", rewards come from inside the trainer')
    if "train" not in selected:
        if _live_endpoint(context, plan) is not None:
            return Planned("serve", "skip", "a server is running already")
        missing = [need for need in ("convert", "sandbox") if need not in plan and context.run.outputs(need) is None]
        if missing:
            raise UserError(f"--stage serve: needs {missing[0]}, which is not done; add it to --stage")
        for need in ("convert", "sandbox"):
            _check_there("serve", need, context, plan)
        return Planned("serve", "run", "on its own, until it is cancelled")
    train = plan["train"]
    if train.action == "skip":
        return Planned("serve", "skip", "not needed: train is up to date")
    if _live_endpoint(context, plan) is not None:
        return Planned("serve", "skip", "a server is running already")
    _check_there("serve", "sandbox", context, plan)
    return Planned("serve", train.action, "serves train")


def _live_endpoint(context: Context, plan: Mapping[str, Planned]) -> endpoint.Endpoint | None:
    """The server that runs on its own, or None; UserError when it serves another store than this run will have."""
    from pipeline.scheduler.submission import service_alive

    found = endpoint.read(context.run)
    if found is None or not service_alive(context.run):
        return None
    convert = plan.get("convert")
    converts = convert is not None and convert.action != "skip"
    if converts or found.digest != (reward_models.expected(context.run) or found.digest):
        raise UserError(
            f"{context.run.root}: a server of this run serves its earlier model store (job {found.job_id}); "
            "stop it first with pipeline.cancel"
        )
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    text = repr(flat[key]) if key in flat else "nothing"
    return text if len(text) <= 40 else text[:37] + "..."
