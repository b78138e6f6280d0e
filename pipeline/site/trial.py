"""The truest test of a profile: what sbatch says of each job's script, without queueing it (sbatch --test-only)."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.run import snapshot
from pipeline.run.directory import RunDir
from pipeline.scheduler import script
from pipeline.scheduler.executor import passed_on
from pipeline.scheduler.options import job_resources
from pipeline.scheduler.submission import Job
from pipeline.scheduler.submit import group_jobs
from pipeline.site.ask import Answer, ask, together
from pipeline.site.findings import Finding
from pipeline.stages.plan import Planned

TOPIC = "Cluster profile"
_TRIAL_S = 15.0
"""Seconds that a controller may think about one script: many scripts at once keep it busy."""

_KEYS = (
    ("accounting/qos policy", "cluster.qos, and the site's limits on it (sacctmgr show qos)"),
    ("account", "cluster.account, and whether it may use cluster.partition"),
    ("qos", "cluster.qos"),
    ("feature", "cluster.constraint"),
    ("reservation", "cluster.reservation"),
    ("gres", "cluster.gpu_request and cluster.gpu_type"),
    ("time limit", "time_min of that stage"),
    ("memory", "cluster.memory_request, and mem_gb of that stage"),
    ("processors", "cpus of that stage"),
    ("cpu count", "cpus of that stage"),
    ("node count", "nodes of that stage"),
    ("node configuration", "gpus, cpus, mem_gb and nodes of that stage"),
    ("node name", "cluster.exclude"),
    ("option", "cluster.extra"),
    ("permission", "cluster.partition: jobs of yours, or from this host, are not admitted"),
    ("partition", "cluster.partition"),
)
"""What sbatch says and which key of the profile it is about; the first that fits."""


def jobs_of(config: Config) -> tuple[Job, ...]:
    """The jobs of `--stage all`, as if none of its stages were done."""
    return group_jobs(config, [Planned(stage, "run", "") for stage in config.all])


def probe(run: RunDir, config: Config) -> dict[str, Answer]:
    """What sbatch says of each job, by the job's name. Nothing is submitted."""
    code = snapshot.folder(run)
    env = passed_on(os.environ)
    with tempfile.TemporaryDirectory(prefix="hh-doctor-") as folder:

        def test(job: Job) -> Answer:
            path = Path(folder) / f"{job.name}.sh"
            path.write_text(script.render(run, "doctor", config.cluster, job, code))
            return ask(["sbatch", "--test-only", str(path)], timeout_s=_TRIAL_S, env=env)

        jobs = jobs_of(config)
        answers = together({job.name: functools.partial(test, job) for job in jobs}, _TRIAL_S + 2)
    return {name: answer or Answer(None, "sbatch: no answer") for name, answer in answers.items()}


def judge(answers: Mapping[str, Answer], config: Config) -> list[Finding]:
    """One line for all jobs that are accepted, and one for each reason of a refusal."""
    accepted = [name for name, answer in answers.items() if answer.ok]
    findings = []
    if accepted:
        starts = sorted(found[1] for name in accepted if (found := re.search(r"to start at (\S+)", answers[name].text)))
        when = f"; the last would start at {starts[-1].replace('T', ' ')}" if starts else ""
        findings.append(Finding(TOPIC, "ok", f"sbatch accepts the jobs of {', '.join(accepted)}{when}"))
    silent = [name for name, answer in answers.items() if answer.status is None]
    if silent:
        what = f"the controller did not say in time whether it takes the jobs of {', '.join(silent)}"
        findings.append(Finding(TOPIC, "unknown", what, "it is busy: run the doctor again later"))
    reasons: dict[str, list[str]] = {}
    for name, answer in answers.items():
        if answer.status:
            reasons.setdefault(words(answer.text), []).append(name)
    findings += [_refused(reason, names, config) for reason, names in reasons.items()]
    return findings


def words(text: str) -> str:
    """What sbatch said, on one line and without its prefixes."""
    lines = (re.sub(r"^(sbatch: )?(error: |allocation failure: )?", "", line.strip()) for line in text.splitlines())
    return "; ".join(dict.fromkeys(filter(None, lines)))


def _refused(reason: str, names: Sequence[str], config: Config) -> Finding:
    asked = [_asks(config, name) for name in names]
    keys = next((keys for word, keys in _KEYS if word in reason.lower()), "the profile's options")
    what = f"sbatch refuses the jobs of {', '.join(names)}: {reason}"
    return Finding(TOPIC, "fail", what, f"look at {keys} (asked for: {'; '.join(dict.fromkeys(asked))})")


def _asks(config: Config, name: str) -> str:
    asked = job_resources(config.cluster, Job(tuple(name.split("+"))))
    where = f"{asked.nodes} nodes of " if asked.nodes > 1 else ""
    return f"{where}{asked.gpus} GPUs, {asked.cpus} CPUs, {asked.mem_gb} GiB for {asked.time_min} min"
