"""What the doctor makes of Slurm's words: recorded answers in, findings out. No Slurm is needed."""

from __future__ import annotations

import pytest
import yaml

from pipeline.config import load
from pipeline.config.cluster import Cluster
from pipeline.config.schema import Config
from pipeline.site import slurm_here, slurm_profile, trial
from pipeline.site.ask import Answer
from pipeline.site.draft import Seen, draft, largest
from pipeline.site.engine import EngineFacts
from pipeline.site.findings import Finding
from pipeline.site.slurm import COMMANDS, SlurmFacts, gpus_of, minutes, read
from pipeline.stages.names import STAGES

ANSWERS = {
    "version": Answer(0, "slurm 23.11.4\n"),
    "ping": Answer(0, "Slurmctld(primary) at ctl1 is UP\nSlurmctld(backup) at ctl2 is DOWN\n"),
    "partitions": Answer(
        0,
        "PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES MaxNodes=UNLIMITED "
        "MaxTime=7-00:00:00 GraceTime=0 PreemptMode=OFF State=UP MaxMemPerNode=UNLIMITED MaxCPUsPerNode=UNLIMITED\n"
        "PartitionName=gpu AllowGroups=ALL AllowAccounts=proj1,proj2 AllowQos=normal,high Default=NO MaxNodes=4 "
        "MaxTime=1-00:00:00 GraceTime=30 PreemptMode=REQUEUE State=UP MaxMemPerNode=900000 MaxCPUsPerNode=UNLIMITED\n"
        "PartitionName=old AllowAccounts=ALL AllowQos=ALL Default=NO MaxTime=UNLIMITED State=DOWN\n",
    ),
    "nodes": Answer(
        0,
        "cpu|100|64|256000|(null)|idle|intel\n"
        "gpu|6|128|1031000|gpu:a100:8(S:0-1),nvme:1|mixed|ib,80g\n"
        "gpu|2|128|1031000|gpu:a100:8(S:0-1),nvme:1|drained|ib,80g\n"
        "gpu|3|96|512000|gpu:v100:4|allocated+|ib\n",
    ),
    "config": Answer(
        0,
        "Configuration data as of 2026-01-01T00:00:00\n"
        "ClusterName             = site\n"
        "AuthInfo                = (null)\n"
        "GresTypes               = gpu,nvme\n"
        "JobRequeue              = 0\n"
        "KillWait                = 30 sec\n"
        "PreemptType             = preempt/qos\n"
        "SelectType              = select/cons_tres\n"
        "TaskPlugin              = task/cgroup,task/affinity\n"
        "Cgroup Support Configuration:\n"
        "ConstrainDevices        = yes\n",
    ),
    "sacct": Answer(0, ""),
    "user": Answer(0, "proj1|high,normal|proj1\nproj3|normal|proj1\n"),
    "reservations": Answer(0, "ReservationName=course StartTime=2026-01-01T08:00:00 Nodes=g[1-2]\n"),
}
FACTS = read(ANSWERS)
PROFILE = {
    "name": "site",
    "executor": "slurm",
    "partition": "gpu",
    "account": "proj1",
    "gpu_type": "a100",
    "default": {"time_min": 60, "cpus": 8, "mem_gb": 64},
    "stages": {"train": {"time_min": 1440, "cpus": 128, "mem_gb": 800, "gpus": 8, "nodes": 2}},
}


def profile(**changes: object) -> Cluster:
    return Cluster.model_validate({**PROFILE, **changes})


def training(**changes: object) -> Cluster:
    train = {**PROFILE["stages"]["train"], **changes}
    return profile(stages={"train": train})


def faults(cluster: Cluster, facts: SlurmFacts = FACTS) -> list[str]:
    return [each.what for each in slurm_profile.judge(facts, cluster, STAGES) if each.level == "fail"]


def level_of(findings: list[Finding], words: str) -> str:
    (found,) = [each for each in findings if words in each.what]
    return found.level


def test_slurms_words_are_understood() -> None:
    gpu = FACTS.partition("gpu")
    assert gpu is not None
    assert (gpu.max_time_min, gpu.max_nodes, gpu.max_mem_mb, gpu.max_cpus) == (1440, 4, 900000, None)
    assert gpu.accounts == ("proj1", "proj2")
    assert [kind.gpus for kind in FACTS.kinds(gpu)] == [{"a100": 8}, {"a100": 8}, {"v100": 4}]
    assert [kind.usable for kind in FACTS.kinds(gpu)] == [True, False, True]
    default = FACTS.partition(None)
    assert default is not None
    assert default.name == "cpu"
    assert FACTS.version == (23, 11, 4)
    assert FACTS.answers
    assert FACTS.associations[0].default
    assert FACTS.reservations == ("course",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("UNLIMITED", None), ("30", 30), ("30:00", 30), ("04:00:00", 240), ("1-00:00:00", 1440), ("2-12", 3600)],
)
def test_time_limits_are_minutes(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


def test_gpus_of_all_ways_to_write_them() -> None:
    assert gpus_of("gpu:8") == {"": 8}
    assert gpus_of("gpu:a100:4(S:0,1),gpu:a100_1g.5gb:7(S:1),nvme:2") == {"a100": 4, "a100_1g.5gb": 7}
    assert gpus_of("(null)") == {}


def test_a_profile_that_fits_has_one_good_line() -> None:
    (only,) = slurm_profile.judge(FACTS, profile(), STAGES)
    assert only.level == "ok"


@pytest.mark.parametrize(
    ("cluster", "expected", "remedy"),
    [
        (profile(partition="gpuu"), "cluster.partition: Slurm has no partition gpuu (did you mean 'gpu'?)", "cpu, gpu"),
        (profile(partition="old"), "partition old is not up", "choose another"),
        (profile(account="proj2"), "cluster.account: you have no account proj2", "proj1, proj3"),
        (profile(account="proj3"), "cluster.account: partition gpu does not admit proj3", "proj1, proj2"),
        (profile(qos="low"), "cluster.qos: partition gpu does not admit low", "normal, high"),
        (profile(reservation="exam"), "cluster.reservation: Slurm has no reservation exam", "course"),
        (profile(constraint="ib&nvlink"), "no node of partition gpu has the feature nvlink", "80g, ib"),
        (profile(gpu_type="h100"), "cluster.gpu_type: partition gpu has no GPUs of type h100", "a100, v100"),
        (training(gpus=16), "cluster.stages.train.gpus: 16, but no node of partition gpu has more than 8", "at most 8"),
        (training(cpus=256), "cluster.stages.train.cpus: 256, but a job gets at most 128", "at most 128"),
        (training(mem_gb=900), "cluster.stages.train.mem_gb: 900, but a job gets at most 878", "at most 878"),
        (training(nodes=5), "cluster.stages.train.nodes: 5, but a job of partition gpu has at most 4", "at most 4"),
        (training(time_min=2880), "cluster.stages.train.time_min: 2880, but partition gpu ends jobs", "at most 1440"),
        (profile(default={"time_min": 2000}), "cluster.default.time_min: 2000", "at most 1440"),
        (training(time_min=2), "cluster.grace_s: 120 s is all of cluster.stages.train.time_min", "raise time_min"),
    ],
)
def test_each_impossible_wish_is_found_under_its_key(cluster: Cluster, expected: str, remedy: str) -> None:
    (found,) = [each for each in slurm_profile.judge(FACTS, cluster, STAGES) if expected in each.what]
    assert found.level == "fail"
    assert remedy in found.remedy


def test_wishes_that_no_single_node_grants_together() -> None:
    wide = training(gpus=4, cpus=100)
    assert faults(wide.model_copy(update={"gpu_type": "v100"})) == [
        "cluster.stages.train: 2 such nodes are asked for, and partition gpu has 0"
    ]
    assert faults(wide) == []


def test_nodes_that_are_down_are_no_fault_of_the_profile() -> None:
    drained = read({**ANSWERS, "nodes": Answer(0, "gpu|2|128|1031000|gpu:a100:8|drained|ib\n")})
    found = slurm_profile.judge(drained, profile(), STAGES)
    assert [each.level for each in found] == ["warn", "warn"]
    assert found[1].what == "cluster.stages.train: 0 of the 2 nodes that fit are up; its jobs wait for more"


def test_of_several_partitions_one_that_fits_is_enough() -> None:
    assert faults(profile(partition="cpu,gpu")) == []
    assert faults(profile(partition="cpu")) != []
    assert faults(profile(partition="gpu,gpx")) == [
        "cluster.partition: Slurm has no partition gpx (did you mean 'gpu'?)"
    ]


def test_one_of_two_alternative_features_is_enough() -> None:
    assert faults(profile(constraint="80g|h100")) == []
    assert len(faults(profile(constraint="h100|h200"))) == 2
    assert faults(profile(constraint="[80g*2]&ib")) == []


def test_ways_to_ask_that_the_site_does_not_take() -> None:
    linear = read({**ANSWERS, "config": Answer(0, "SelectType = select/linear\n")})
    assert "cluster.gpu_request: gpus-per-node needs select/cons_tres, and Slurm runs select/linear" in faults(
        profile(), linear
    )
    assert faults(profile(gpu_request="gres"), linear) == []
    unknown = read({**ANSWERS, "nodes": Answer(0, "gpu|2|128|1|gpu:a100:8|idle|ib\n")})
    assert any("memory_request" in fault for fault in faults(profile(), unknown))
    assert faults(profile(memory_request="none"), unknown) == []


def preemption(cluster: Cluster, config: str) -> list[Finding]:
    return slurm_profile.judge_preemption(read({**ANSWERS, "config": Answer(0, config)}), cluster)


def test_what_a_preempted_training_may_expect() -> None:
    on = "PreemptType = preempt/qos\nAuthInfo = cred_expire=20\n"
    signal = on + "PreemptParameters = send_user_signal\n"
    assert level_of(preemption(profile(), on), "preempts with TERM alone") == "warn"
    assert level_of(preemption(profile(), signal), "leaves a preempted job 30 s (GraceTime)") == "warn"
    assert level_of(preemption(profile(grace_s=30), signal), "has 30 s to save in") == "ok"
    assert level_of(preemption(profile(), on), "starts after 20 s at the earliest") == "ok"
    assert level_of(preemption(profile(), "PreemptType = preempt/none\n"), "are not preempted") == "ok"
    cancelling = ANSWERS["partitions"].text.replace("PreemptMode=REQUEUE", "PreemptMode=CANCEL")
    facts = read({**ANSWERS, "partitions": Answer(0, cancelling)})
    assert level_of(slurm_profile.judge_preemption(facts, profile()), "not queued again (PreemptMode=CANCEL)") == "warn"


def test_slurm_that_is_not_there_matters_only_to_a_profile_that_wants_it() -> None:
    absent = SlurmFacts(missing=COMMANDS)
    (fault,) = slurm_here.judge(absent, profile())
    assert fault.level == "fail"
    assert fault.what == "cluster.executor: slurm (profile site), but there is no sbatch on PATH"
    (fine,) = slurm_here.judge(absent, Cluster())
    assert fine.level == "ok"


def test_a_controller_that_is_silent_is_one_fault_and_nothing_else_is_guessed() -> None:
    silent = read({name: Answer(1, "Slurmctld(primary) at ctl1 is DOWN") for name in ANSWERS})
    (fault,) = slurm_here.judge(silent, profile())
    assert (fault.level, "at ctl1 is DOWN" in fault.what) == ("fail", True)
    assert slurm_profile.judge(silent, profile(), STAGES) == []


def test_what_slurm_has_is_listed_with_the_profiles_partition_first() -> None:
    lines = [each.what for each in slurm_here.judge(FACTS, profile())]
    assert lines[0] == "Slurm 23.11.4, cluster site; the controller answers"
    assert lines[1] == (
        "partition gpu (this profile's): 11 nodes (9 up), GPUs a node: 4 v100 or 8 a100, 96-128 CPUs, "
        "500-1006 GiB, at most 24 h"
    )
    assert any("accounting works" in line for line in lines)
    assert any("cgroups fence off" in line for line in lines)


def test_sbatchs_refusals_are_grouped_and_name_the_key() -> None:
    config = load.check({**load.load_preset("demo"), "cluster": PROFILE})
    yes = Answer(0, "sbatch: Job 7 to start at 2026-01-01T10:00:00 using 8 processors on nodes g1 in partition gpu\n")
    no = Answer(1, "allocation failure: Requested node configuration is not available\n")
    good, bad = trial.judge({"prefetch": yes, "sft": no, "serve+train": no}, config)
    assert good.what == "sbatch accepts the jobs of prefetch; the last would start at 2026-01-01 10:00:00"
    assert bad.what == "sbatch refuses the jobs of sft, serve+train: Requested node configuration is not available"
    assert "gpus, cpus, mem_gb and nodes" in bad.remedy
    assert "2 nodes of 8 GPUs, 128 CPUs, 800 GiB for 1440 min" in bad.remedy
    (unsaid,) = trial.judge({"sft": Answer(None, "sbatch: no answer within 15 s")}, config)
    assert unsaid.level == "unknown"
    twice = Answer(1, "sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name\n")
    (named,) = trial.judge({"sft": twice}, config)
    assert "cluster.partition" in named.remedy
    assert "invalid partition specified: x; Invalid partition name" in named.what


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("Invalid account or account/partition combination specified", "cluster.account"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "cluster.qos"),
        ("Invalid qos specification", "cluster.qos"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "time_min"),
        ("Invalid generic resource (gres) specification", "cluster.gpu_type"),
        ("Memory specification can not be satisfied", "mem_gb"),
        ("More processors requested than permitted", "cpus"),
        ("unrecognized option '--bogus=1'", "cluster.extra"),
        ("Access/permission denied", "not admitted"),
        ("Invalid partition name specified", "cluster.partition"),
    ],
)
def test_sbatchs_words_lead_to_the_key(said: str, key: str) -> None:
    config = load.check({**load.load_preset("demo"), "cluster": PROFILE})
    (found,) = trial.judge({"sft": Answer(1, f"sbatch: error: {said}\n")}, config)
    assert found.remedy.startswith("look at ")
    assert key in found.remedy.split("(asked for")[0]


def drafted(facts: SlurmFacts, **environ: str) -> tuple[Config, str]:
    text = draft(Seen(facts, EngineFacts(), ("lo", "eth0", "ib0"), environ))
    return load.resolve({**load.load_preset("gptj"), "cluster": yaml.safe_load(text)}), text


def test_a_draft_takes_the_nodes_with_the_most_gpus_and_fits_them() -> None:
    config, text = drafted(FACTS, SCRATCH="/scratch/me/")
    cluster = config.cluster
    assert (cluster.name, cluster.partition, cluster.account, cluster.gpu_type) == ("site", "gpu", "proj1", "a100")
    assert cluster.interface == "ib0"
    assert cluster.cache == "/scratch/me/hh-pipeline"
    train = cluster.resources("train")
    assert (train.gpus, train.cpus, train.time_min) == (8, 128, 1440)  # the partition's day, not two
    assert train.mem_gb == 791  # nine tenths of MaxMemPerNode
    assert cluster.resources("convert").gpus == 1
    assert cluster.resources("prefetch").gpus == 0
    assert faults(cluster) == []
    assert "# Other partitions: cpu, old." in text


def test_a_draft_without_slurm_is_a_local_profile() -> None:
    config, _ = drafted(SlurmFacts(missing=COMMANDS))
    assert (config.cluster.executor, config.cluster.engine) == ("local", "venv")


def test_a_draft_keeps_a_proxys_password_out_of_the_file() -> None:
    assert drafted(FACTS, https_proxy="http://proxy:3128")[0].cluster.proxy == "http://proxy:3128"
    config, text = drafted(FACTS, https_proxy="http://me:secret@proxy:3128")
    assert config.cluster.proxy is None
    assert "secret" not in text


def test_odd_names_survive_the_drafts_yaml() -> None:
    odd = ANSWERS["config"].text.replace("= site", "= on: #1")
    assert drafted(read({**ANSWERS, "config": Answer(0, odd)}))[0].cluster.name == "on: #1"


def test_partitions_that_are_down_or_drained_are_not_drafted() -> None:
    nodes = "old|9|128|1031000|gpu:h100:8|idle|x\ngpu|2|128|1031000|gpu:a100:8|down|x\ncpu|2|64|256000|gpu:1|idle|x\n"
    best = largest(read({**ANSWERS, "nodes": Answer(0, nodes)}))
    assert best is not None
    assert best[0].name == "cpu"
