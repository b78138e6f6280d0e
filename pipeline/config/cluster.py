"""What differs between machines and sites: the cluster profile (slurm/*.yaml)."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section, Text
from pipeline.errors import nearest
from pipeline.stages.names import STAGES


class Resources(Section):
    """What one stage's job asks Slurm for. Executor `local` reads the time limit only, `allocation` nothing."""

    time_min: int = Field(24 * 60, ge=1)
    """The job's time limit, in minutes."""
    cpus: int = Field(8, ge=1)
    """CPU cores on each node."""
    mem_gb: int = Field(64, ge=1)
    """Main memory on each node, in GiB."""
    gpus: int = Field(0, ge=0)
    """GPUs on each node; 0 asks for none."""
    nodes: int = Field(1, ge=1)
    """Nodes of the job. A training spreads over them; each node of a job with the server runs one server."""


class Cluster(Section):
    """A cluster profile: how and where the stages' jobs run."""

    name: str = Field("local", min_length=1)
    """What the profile is called, for people."""
    executor: Literal["local", "slurm", "allocation"] = "local"
    """Jobs are processes of this machine, Slurm jobs, or processes inside the one allocation that submit runs in."""
    placement: Literal["colocated", "separate"] = "colocated"
    """Server and training in one job, or the server in a job of its own on any node."""
    account: str | None = Field(None, min_length=1)
    """Slurm account that is charged (sbatch --account)."""
    partition: str | None = Field(None, min_length=1)
    """Slurm partition (sbatch --partition)."""
    qos: str | None = Field(None, min_length=1)
    """Slurm quality of service (sbatch --qos)."""
    constraint: str | None = Field(None, min_length=1)
    """Features that the nodes must have (sbatch --constraint)."""
    exclude: tuple[Text, ...] = ()
    """Nodes that jobs must avoid (sbatch --exclude)."""
    modules: tuple[Text, ...] = ()
    """Environment modules that each job loads (module load ...)."""
    setup: tuple[Text, ...] = ()
    """Shell lines before each job's work, after its modules."""
    reservation: str | None = Field(None, min_length=1)
    """Slurm reservation (sbatch --reservation)."""
    gpu_request: Literal["gpus-per-node", "gres", "gpus"] = "gpus-per-node"
    """The one way to ask for GPUs that the site accepts: --gpus-per-node=8, --gres=gpu:8 or --gpus=8."""
    gpu_type: str | None = Field(None, min_length=1)
    """The GPUs' type, as in a100 (--gres=gpu:a100:8); None takes any."""
    memory_request: Literal["mem", "mem-per-cpu", "none"] = "mem"
    """How memory is asked for: each node's, the same divided by its CPUs, or not at all."""
    requeue: bool = True
    """Whether a training that is preempted, or nears its time limit, saves, is queued again and goes on later."""
    grace_s: int = Field(120, ge=10)
    """Seconds before the time limit at which the training is told to save (sbatch --signal)."""
    srun_args: tuple[Text, ...] = ("--cpu-bind=none",)
    """Options of the srun that starts a job's work."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables that every job sets before its work, such as NCCL_IB_HCA."""
    interface: str | None = Field(None, pattern=r"^[\w.:-]+$")
    """Network interface between nodes, as in ib0: for NCCL, gloo, the rendezvous and the server's address."""
    proxy: str | None = Field(None, min_length=1)
    """HTTP(S) proxy of the stages that need the internet, as in http://proxy:3128; no other stage sees it."""
    engine: Literal["venv", "singularity", "apptainer", "docker"] | None = None
    """The site's container engine: what `sandbox.engine: auto` means there."""
    scratch: str | None = Field(None, min_length=1)
    """Folder on a node's own disk for temporary files; the job expands $VARIABLES in it, as in $SLURM_TMPDIR."""
    cache: str | None = Field(None, min_length=1)
    """Folder that all nodes see, for models, data and images; default: the user's own cache folders."""
    internet: bool | None = None
    """Whether the jobs' nodes reach the internet; None: local jobs' do. Without it Weights & Biases writes offline."""
    trainer_image: str | None = Field(None, min_length=1)
    """A .sif file or sandbox folder (containers/trainer.def) in which the stages' work runs; None: no container."""
    binds: tuple[Text, ...] = ()
    """Further folders that the trainer's container sees, such as a site's project space; $VARIABLES are expanded."""
    on_login_node: tuple[Literal["prefetch", "sandbox"], ...] = ()
    """Stages that submit runs where it runs itself, before it submits the others: they need the internet."""
    retries: int = Field(0, ge=0, le=10)
    """How often a job tries again that ran out of memory or time, was killed, or met a broken node (needs requeue)."""
    retry_growth: float = Field(1.5, gt=1, le=4)
    """Such a retry asks for so many times the memory, or the time, that did not suffice."""
    max_time_min: int | None = Field(None, ge=1)
    """The longest time limit that a retry may ask for; None: no bound."""
    max_mem_gb: int | None = Field(None, ge=1)
    """The most memory that a retry may ask for; None: no bound."""
    job_arrays: bool = True
    """Whether a sweep's points are tasks of job arrays, one for each stage's job; false: each has jobs of its own."""
    extra: dict[str, str | int | bool] = Field(default_factory=dict)
    """Further sbatch options, by their long names."""
    default: Resources = Resources()
    stages: dict[str, Resources] = Field(default_factory=dict)
    """Resources of single stages; a stage that is not named takes `default`."""

    @field_validator("stages")
    @classmethod
    def _stages_exist(cls, stages: dict[str, Resources]) -> dict[str, Resources]:
        for name in stages:
            if name not in STAGES:
                raise ValueError(
                    f"cluster.stages.{name}: unknown stage{nearest(name, STAGES)}; stages: {', '.join(STAGES)}"
                )
        return stages

    @field_validator("extra")
    @classmethod
    def _signal_is_ours(cls, extra: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        if "signal" in extra:
            raise ValueError("cluster.extra: signal: jobs are told by USR2; say with cluster.grace_s how long before")
        return extra

    @field_validator("environment")
    @classmethod
    def _variables_have_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"cluster.environment: {name!r} is no variable's name; use letters, digits and _")
        return environment

    @model_validator(mode="after")
    def _retries_requeue(self) -> Cluster:
        if self.retries and not self.requeue:
            raise ValueError("cluster.retries: a job tries again by queueing itself again; set cluster.requeue: true")
        return self

    @property
    def reaches_internet(self) -> bool:
        """Whether the jobs' nodes do: as the profile says, else only where they are this machine."""
        return self.executor == "local" if self.internet is None else self.internet

    def resources(self, stage: str) -> Resources:
        """What `stage` asks for."""
        return self.stages.get(stage, self.default)
