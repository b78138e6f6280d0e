"""The run directory: the only contract between the submitter, the stages' jobs and the trainers.

runs/<name>/
  config.yaml  provenance.json  events.jsonl
  stages/<stage>/plan.json  state.json  outputs.json  needs.json
  stages/<stage>/attempts/<n>/{stdout.log, job.json, exit.json, out/}
  services/triton.json  services/triton.env
  models/  model_store  report        links to the artifacts of the latest attempts
  checkpoints/  metrics.jsonl (a link into them)  tracker/  control/ (bad-nodes/ in it)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run import atomic

LAYOUT_VERSION = 1
"""Raised when a run directory of an older version can no longer be read."""


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a stage made; `path` is relative to the run directory."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Outputs:
    """A stage's outputs.json: written last and atomically, so its presence means that the stage is done."""

    stage: str
    fingerprint: str
    attempt: int
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    basis: dict[str, Any] = field(default_factory=dict)
    """What the fingerprint was computed from: version, settings and the digests of the inputs."""
    finished: float = 0.0
    seconds: float = 0.0
    submission: str = ""
    """Whose job made them."""


@dataclass(frozen=True)
class RunDir:
    """Paths of a run directory and what is read from them. Writing is the business of the stages' runner."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def endpoint(self) -> Path:
        return self.root / "services" / "triton.json"

    @property
    def stop_flag(self) -> Path:
        """Its presence asks the trainer to save and stop at the next step."""
        return self.root / "control" / "STOP"

    @property
    def submit_lock(self) -> Path:
        """Held by whoever submits the run's jobs, or ends them."""
        return self.root / "control" / "submit.lock"

    def save_flag(self, stage: str) -> Path:
        """The same for one stage: its job's own request. PPO's and ILQL's, which share a job with a server, is STOP."""
        return self.stop_flag if stage == "train" else self.stop_flag.with_name(f"STOP.{stage}")

    @property
    def tracker(self) -> Path:
        """What Weights & Biases or TensorBoard wrote."""
        return self.root / "tracker"

    def stage(self, stage: str) -> Path:
        return self.root / "stages" / stage

    def attempt(self, stage: str, number: int) -> Path:
        return self.stage(stage) / "attempts" / f"{number:04d}"

    def outputs(self, stage: str) -> Outputs | None:
        """The stage's outputs, or None while it is not done."""
        path = self.stage(stage) / "outputs.json"
        raw = atomic.read_json(path)
        if raw is None:
            return None
        try:
            artifacts = {name: Artifact(**value) for name, value in raw.pop("artifacts").items()}
            return Outputs(artifacts=artifacts, **raw)
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"{path}: not of this version; run the stage again with --force --stage {stage}") from None

    def write_outputs(self, outputs: Outputs) -> None:
        atomic.write_json(self.stage(outputs.stage) / "outputs.json", asdict(outputs))

    def artifact(self, stage: str, name: str) -> Path:
        """The absolute path of a finished stage's artifact; UserError when the stage is not done."""
        outputs = self.outputs(stage)
        if outputs is None:
            raise UserError(f"{self.root}: stage {stage} is not done; run it first with --stage {stage}")
        if name not in outputs.artifacts:
            raise UserError(f"{self.root}: stage {stage} made no artifact '{name}'; run it again with --force")
        path = self.root / outputs.artifacts[name].path
        if not path.exists():
            raise UserError(f"{path}: artifact of stage {stage} is gone; run it again with --force --stage {stage}")
        return path

    def values(self, stage: str) -> dict[str, Any]:
        """The values that a finished stage recorded; empty while it is not done."""
        outputs = self.outputs(stage)
        return outputs.values if outputs else {}
