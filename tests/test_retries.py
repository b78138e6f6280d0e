"""When a failed job tries again, with what, and when it does not. tests/cluster/test_slurm_retry.py: for real."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers_jobs import fake_slurm

from pipeline import oom, status
from pipeline.config import load
from pipeline.config.cluster import Cluster
from pipeline.errors import UserError
from pipeline.run import atomic, bad_nodes, events
from pipeline.run.directory import RunDir
from pipeline.scheduler import needs, retries, script, slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.needs import Need
from pipeline.scheduler.options import Where, retry_lines, slurm_options
from pipeline.scheduler.retries import Asked, Retry, Room, decide
from pipeline.scheduler.state import recorded_state, set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages import faults, retry
from pipeline.stages.faults import Fault
from pipeline.stages.plan import Planned

MEMORY = Fault("memory", "it ran out of memory")
TIME = Fault("time", "it reached its time limit")
BROKEN = Fault("node", "n1 is broken: RuntimeError: No CUDA GPUs are available", "n1")
ROOM = Room(512, 0, frozenset({"n1", "n2"}))
PROFILE = {
    "name": "site",
    "executor": "slurm",
    "retries": 2,
    "default": {"mem_gb": 64, "time_min": 60, "cpus": 8},
}


def cluster(**changes: object) -> Cluster:
    return Cluster.model_validate({**PROFILE, **changes})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    config = load.resolve({**load.load_preset("demo"), "preset": "demo"}, [], None)
    config = config.model_copy(update={"cluster": cluster()})
    atomic.write_text(tmp_path / "config.yaml", load.dump(config))
    return RunDir(tmp_path)


# what is decided


def test_a_job_that_ran_out_of_memory_asks_for_more_and_one_out_of_time_for_longer() -> None:
    more = decide(cluster(), MEMORY, Asked(64, 60), ROOM, 0)
    assert (str(more), more.mem_gb, more.time_min) == ("retry 1 of 2 with 96 GB: it ran out of memory", 96, 0)
    longer = decide(cluster(), TIME, Asked(64, 61), ROOM, 1)
    assert (str(longer), longer.mem_gb, longer.time_min) == (
        "retry 2 of 2 with 92 min: it reached its time limit",
        0,
        92,
    )


def test_growth_ends_at_the_profiles_and_the_partitions_limits() -> None:
    assert decide(cluster(max_mem_gb=80), MEMORY, Asked(64), ROOM, 0).mem_gb == 80
    assert decide(cluster(max_mem_gb=80), MEMORY, Asked(80), ROOM, 0) == (
        "80 GB: no more may be asked for (cluster.max_mem_gb: 80)"
    )
    assert decide(cluster(), MEMORY, Asked(400), ROOM, 0).mem_gb == 512
    assert "the largest of its partition" in decide(cluster(), MEMORY, Asked(512), ROOM, 0)
    assert decide(cluster(), TIME, Asked(time_min=60), Room(time_min=70), 0).time_min == 70
    assert "cluster.max_time_min: 60" in decide(cluster(max_time_min=60), TIME, Asked(time_min=60), ROOM, 0)
    assert "does not ask for" in decide(cluster(memory_request="none"), MEMORY, Asked(0), ROOM, 0)


def test_no_more_retries_than_the_profile_allows() -> None:
    for fault in (MEMORY, TIME, BROKEN, Fault("killed", "it was killed (signal 9)")):
        assert isinstance(decide(cluster(), fault, Asked(64, 60), ROOM, 1), Retry)
        assert decide(cluster(), fault, Asked(64, 60), ROOM, 2) == "2 of 2 retries are used (cluster.retries)"


def test_a_broken_node_is_left_unless_no_other_could_take_the_job() -> None:
    away = decide(cluster(), BROKEN, Asked(), ROOM, 0)
    assert (away.without, str(away)) == ("n1", f"retry 1 of 2 without n1: {BROKEN.reason}")
    last = decide(cluster(), BROKEN, Asked(excluded=frozenset({"n2"})), ROOM, 0)
    assert (last.without, str(last)) == ("", f"retry 1 of 2, on any node: {BROKEN.reason}")
    assert decide(cluster(), BROKEN, Asked(nodes=2), ROOM, 0).without == ""
    assert decide(cluster(), BROKEN, Asked(), Room(), 0).without == ""  # what other nodes there are is not known


def test_what_was_asked_is_read_from_slurm_and_what_changes_is_said_in_its_words() -> None:
    fields = {"MinMemoryNode": "64G", "TimeLimit": "1-02:30:00", "NumNodes": "2", "ExcNodeList": "(null)"}
    assert retries.asked(cluster(), fields, 8, frozenset()) == Asked(64, 26 * 60 + 30, frozenset(), 2)
    by_cpu = {"MinMemoryCPU": "8000M", "TimeLimit": "UNLIMITED"}
    assert retries.asked(cluster(), by_cpu, 8, frozenset()) == Asked(63, 0)  # 62.5 GB
    assert retries.asked(cluster(memory_request="none"), by_cpu, 8, frozenset()) == Asked(0, 0)
    assert [retries.minutes(text) for text in ("00:01:00", "05:30", "infinite", "")] == [1, 6, 0, 0]
    more = Retry(1, 2, "", mem_gb=96)
    assert retries.changes(cluster(), more, 8, "(null)") == {"MinMemoryNode": "98304"}
    per_cpu = cluster(memory_request="mem-per-cpu")
    assert retries.changes(per_cpu, more, 7, "(null)") == {"MinMemoryCPU": "14044"}  # 98304 MB over 7, rounded up
    assert retries.changes(cluster(), Retry(1, 2, "", time_min=90), 8, "(null)") == {"TimeLimit": "90"}
    assert retries.changes(cluster(), Retry(1, 2, "", without="n3"), 8, "n[1-2]") == {"ExcNodeList": "n[1-2],n3"}
    assert retries.changes(cluster(), Retry(1, 2, ""), 8, "n9") == {}


def test_retries_need_a_job_that_may_be_queued_again() -> None:
    with pytest.raises(ValueError, match=r"cluster\.retries: .* set cluster\.requeue: true"):
        cluster(requeue=False)


# what was at fault


def test_only_what_another_try_may_cure_is_a_fault(monkeypatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(oom, "kills", lambda: 0)

    def fault(status: int, *log: str) -> tuple[str, str] | None:
        lines = "\n".join(log)
        told = log[-1].removeprefix("error: ") if log else ""
        found = faults.of_work(status, told, lines, 0)
        return (found.kind, found.node) if found else None

    ecc = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
    assert fault(1, ecc, "torch.distributed.elastic: Failures:") == ("node", "n7")
    assert fault(1, "RuntimeError: No CUDA GPUs are available") == ("node", "n7")
    assert fault(1, "OSError: [Errno 116] Stale file handle: '/scratch/x'") == ("node", "n7")
    assert fault(1, "error: 7 GPUs visible, 8 asked for") == ("node", "n7")
    assert fault(-9) == ("killed", "")
    assert fault(1, "  exitcode  : -9 (pid: 4242)", "  traceback : Signal 9 (SIGKILL) received") == ("killed", "")
    assert fault(1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB") is None
    assert fault(1, "RuntimeError: CUDA error: an illegal memory access was encountered") is None
    assert (
        fault(1, ecc, "error: train.seq_length: 9000 is more than the model has") is None
    )  # it says itself what it was
    assert fault(-11, "Fatal Python error: Segmentation fault") is None


def test_a_kill_by_the_kernel_counts_whatever_the_work_says(monkeypatch) -> None:
    monkeypatch.setattr(oom, "kills", lambda: 3)
    assert faults.of_work(1, "a data loader's worker died", "", 2) == MEMORY
    assert faults.of_work(1, "something else", "", 3) is None
    assert faults.of_work(None, "tritonserver failed 6 times in a row", "", 0) == MEMORY


@pytest.mark.parametrize(
    ("status", "log", "kind"),
    [
        (1, "srun: error: n1: task 0: Out Of Memory", "memory"),
        (137, "slurmstepd: error: Detected 2 oom-kill event(s) in StepId=7.0. Some of your processes", "memory"),
        (137, "slurmstepd-n1: error: StepId=1.0 exceeded memory limit (325287936 > 104857600), being killed", "memory"),
        (137, "srun: error: n1: task 0: Killed", "killed"),
        (1, "error: /scratch/me: this scratch folder cannot be used", "node"),
        (1, "error: module load 'cuda' failed", None),
        (143, "srun: error: n1: task 0: Terminated", None),
    ],
)
def test_a_task_that_ended_without_a_word_is_judged_by_what_slurm_wrote(status: int, log: str, kind: str) -> None:
    found = faults.of_task(status, log)
    assert (found.kind if found else None) == kind


def test_the_kernels_count_is_read_from_either_version_of_cgroups(tmp_path: Path) -> None:
    mounted = tmp_path / "memory"
    job = mounted / "slurm_n1" / "job_1" / "task_0"
    job.mkdir(parents=True)
    (job / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (job / "memory.events").write_text("low 0\nhigh 0\nmax 15\noom 4\noom_kill 3\noom_group_kill 0\n")

    def kills(groups: str, mount: str) -> int | None:
        (tmp_path / "cgroup").write_text(groups)
        (tmp_path / "mountinfo").write_text("20 1 0:19 / /proc rw - proc proc rw\n" + mount)
        return oom.kills(tmp_path)

    v1 = f"35 23 0:32 / {mounted} rw shared:9 - cgroup cgroup rw,memory\n"
    hybrid = v1 + f"36 23 0:33 / {tmp_path}/unified rw - cgroup2 cgroup2 rw\n"
    v2 = f"36 23 0:33 / {mounted} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
    assert kills("4:memory:/slurm_n1/job_1/task_0\n0::/slurm_n1\n", hybrid) == 2
    assert kills("0::/slurm_n1/job_1/task_0\n", v2) == 3
    inside = f"36 23 0:33 /slurm_n1 {mounted}/slurm_n1 rw - cgroup2 cgroup2 rw\n"  # a container shows a part
    assert kills("0::/slurm_n1/job_1/task_0\n", inside) == 3
    assert kills("0::/elsewhere\n", v2) is None
    assert kills("3:cpu:/x\n", v1) is None


# what is done about it


SHOW = "echo JobId=7 JobState={state} Reason={reason} Restarts=0 Partition=gpu MinMemoryNode=64G TimeLimit=01:00:00"


def in_job(run: RunDir, monkeypatch, state: str = "RUNNING", reason: str = "None", update: str = "") -> Path:
    """As inside job 7 of submission s1, with Slurm's commands answering so; returns the record of its calls."""
    for name, value in (("SUBMITIT_EXECUTOR", "slurm"), ("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(oom, "kills", lambda: 0)
    monkeypatch.setattr(retry.signal, "signal", lambda number, what: None)
    shown = SHOW.format(state=state, reason=reason)
    folder = run.root / "bin"
    folder.mkdir()
    return fake_slurm(
        monkeypatch,
        folder,
        scontrol=f'case "$1" in --oneliner) {shown};; update) {update or ":"};; esac',
        scancel="",
        sinfo="echo 'n1 512000 infinite'; echo 'n2 512000 infinite'",
    )


def test_a_retry_is_a_requeue_a_change_a_state_and_an_event(run, monkeypatch) -> None:
    calls = in_job(run, monkeypatch)
    retry.failed(run, "s1", ("serve", "train"), MEMORY, "killed by signal 9", 1)
    text = "retry 1 of 2 with 96 GB: it ran out of memory"
    for stage in ("serve", "train"):
        state = recorded_state(run, stage)
        assert state is not None
        assert (state.state, state.reason) == ("pending", text)
    assert calls.read_text().splitlines()[-2:] == ["scontrol requeue 7", "scontrol update JobId=7 MinMemoryNode=98304"]
    assert [event["reason"] for event in events.read(run) if event["event"] == "retry"] == [text]
    assert needs.recorded(run, "train").mem_gb == 96
    assert retry.note(run, "s1", ("serve", "train"), "first run") == text
    before = calls.read_text()
    assert retry.main([str(run.root), "serve+train", "s1", "137"]) == 0  # the script's end finds it done
    assert calls.read_text() == before


@pytest.mark.parametrize(("state", "reason"), [("COMPLETING", "None"), ("CANCELLED", "None"), ("", "")])
def test_a_job_that_is_cancelled_or_unknown_is_never_tried_again(run, monkeypatch, state: str, reason: str) -> None:
    calls = in_job(run, monkeypatch, state, reason)
    retry.failed(run, "s1", ("sft",), Fault("killed", "it was killed (signal 9)"), "killed by signal 9")
    recorded = recorded_state(run, "sft")
    assert recorded is not None
    assert (recorded.state, "no retry: Slurm ends the job" in recorded.reason) == ("failed", True)
    assert "requeue" not in calls.read_text()


def test_a_job_out_of_time_tries_again_while_slurm_ends_it(run, monkeypatch) -> None:
    calls = in_job(run, monkeypatch, "COMPLETING", "TimeLimit")
    retry.failed(run, "s1", ("sft",), TIME, "it reached its time limit")
    assert calls.read_text().splitlines()[-1] == "scontrol update JobId=7 TimeLimit=90"


def test_warnings_between_what_sinfo_says_of_nodes_are_passed_over(monkeypatch, tmp_path: Path) -> None:
    said = "echo 'sinfo: warning: the configuration file is old'; echo 'n1 512000+ 1-00:00:00 '; echo"
    fake_slurm(monkeypatch, tmp_path, sinfo=said)
    assert slurm.nodes("gpu") == {"n1": (512000, "1-00:00:00")}


def test_retries_inside_an_allocation_and_a_grace_time_as_long_as_the_limit_are_refused() -> None:
    def refused(**profile: object) -> str:
        with pytest.raises(UserError) as error:
            load.check({"cluster": {"executor": "slurm", "requeue": True, **profile}})
        return str(error.value)

    assert refused(executor="allocation", retries=1).startswith("cluster.retries: jobs inside one allocation")
    minute = {"stages": {"train": {"time_min": 2}}}
    assert refused(grace_s=120, **minute).startswith("cluster.grace_s: 120 s is all of the training's time_min = 2")
    load.check({"cluster": {"executor": "slurm", "grace_s": 119, **minute}})


def test_a_retry_that_slurm_refuses_is_a_failure_with_its_words(run, monkeypatch) -> None:
    calls = in_job(run, monkeypatch, update="echo 'Access/permission denied for job 7'; exit 1")
    retry.failed(run, "s1", ("sft",), MEMORY, "killed by signal 9")
    recorded = recorded_state(run, "sft")
    assert recorded is not None
    assert recorded.state == "failed"
    assert "Access/permission denied" in recorded.reason
    assert calls.read_text().splitlines()[-1] == "scancel 7"  # it would fail again
    assert not retry.queued(run, "s1", ("sft",))  # what a TERM, which follows, asks
    assert recorded_state(run, "sft") == recorded


def test_a_stage_that_said_how_it_failed_is_left_alone_by_the_script(run, monkeypatch) -> None:
    calls = in_job(run, monkeypatch)
    set_state(run, "sft", "s1", "failed", "data.source: no such file")
    assert retry.main([str(run.root), "sft", "s1", "137"]) == 0
    assert not calls.exists()
    assert retry.main([str(run.root), "sft", "s2", "137"]) == 0  # another submission's word is none
    recorded = recorded_state(run, "sft")
    assert recorded is not None
    assert recorded.reason == "retry 1 of 2: it was killed (signal 9)"


def test_what_slurm_wrote_of_an_earlier_start_is_not_taken_for_this_one(run, monkeypatch) -> None:
    in_job(run, monkeypatch)
    log = run.root / "jobs" / "s1-sft" / "7_0_log.err"
    atomic.write_text(log, "pipeline: start 0\nsrun: error: n1: task 0: Out Of Memory\npipeline: start 1\nKilled\n")
    retry.main([str(run.root), "sft", "s1", "137"])
    recorded = recorded_state(run, "sft")
    assert recorded is not None
    assert recorded.reason == "retry 1 of 2: it was killed (signal 9)"


def test_nodes_that_fail_one_after_the_other_are_forgiven(run, monkeypatch) -> None:
    in_job(run, monkeypatch)
    retry.failed(run, "s1", ("sft",), BROKEN, "No CUDA GPUs are available")
    assert [bad.node for bad in bad_nodes.known(run)] == ["n1"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    retries.claim(run.root / "jobs" / "s1-sft", "7", 1, BROKEN, Retry(2, 2, "again"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(slurm, "queued_again", lambda fields: False)
    retry.failed(run, "s1", ("sft",), Fault("node", "n2 is broken", "n2"), "No CUDA GPUs are available")
    recorded = recorded_state(run, "sft")
    assert recorded is not None
    assert recorded.reason == (
        "No CUDA GPUs are available; no retry: 2 of 2 retries are used (cluster.retries); "
        "it failed so on n1, n2, so the nodes are hardly the reason"
    )
    assert bad_nodes.known(run) == []


# what later jobs do with it


def test_bad_nodes_are_shown_avoided_by_later_jobs_and_forgotten(run, monkeypatch, capsys) -> None:
    bad_nodes.remember(run, "n1", BROKEN.reason)
    text = script.render(run, "s2", cluster(exclude=["n9"]), Job(("sft",)), run.root / "code")
    assert "#SBATCH --exclude=n9,n1\n" in text
    status.main([str(run.root)])
    shown = capsys.readouterr().out
    assert f": {BROKEN.reason} (to use it again: rm " in shown
    assert "control/bad-nodes/n1.json" in shown
    week = bad_nodes.known(run)[0].time + bad_nodes.KEEP_S
    monkeypatch.setattr(bad_nodes.time, "time", lambda: week + 1)
    assert bad_nodes.known(run) == []


def test_a_later_submission_asks_for_what_the_last_turned_out_to_need(run, monkeypatch) -> None:
    needs.remember(run, "sft", Need(mem_gb=96, reason="it ran out of memory"))
    plan = [Planned("sft", "run", "first run"), Planned("evaluate", "run", "first run")]
    asked = needs.apply(run, cluster(), plan)
    assert asked[0].reason == "first run; asks for 96 GB: it ran out of memory"
    assert asked[1] == plan[1]
    job = Job(("sft",), mem_gb=asked[0].mem_gb, time_min=asked[0].time_min)
    assert (slurm_options(cluster(), job)["mem"], slurm_options(cluster(), job)["time"]) == ("96G", 60)
    assert needs.apply(run, cluster(max_mem_gb=80), plan)[0].mem_gb == 80
    assert needs.apply(run, cluster(default={"mem_gb": 128}), plan) == plan  # the profile has grown itself
    assert needs.apply(run, cluster(retries=0), plan) == plan


@pytest.mark.parametrize(
    ("end", "asks"),
    [
        ("OUT_OF_MEMORY", "asks for 150 GB: job 94 ran out of memory"),
        ("TIMEOUT", "asks for 90 min: job 94 reached its time limit"),
        ("NODE_FAIL", None),
        ("CANCELLED", None),
    ],
)
def test_after_a_death_that_nobody_could_act_upon_the_plan_asks_for_more(run, monkeypatch, end: str, asks: str) -> None:
    monkeypatch.setattr(slurm, "_ends", {})
    fake_slurm(monkeypatch, run.root, scontrol=f"echo JobId=94 JobState={end}")
    submissions.write(run, Submission("s1", "slurm", (Job(("sft",), job_id="94", mem_gb=100),)))
    set_state(run, "sft", "s1", "running", attempt=1)
    plan = [Planned("sft", "run", "an earlier attempt did not finish")]
    told = needs.apply(run, cluster(), plan)[0].reason
    assert told == "an earlier attempt did not finish" + (f"; {asks}" if asks else "")


# the script


@pytest.mark.parametrize("end", ["exit 7", "false", "true", "cd /nowhere 2>/dev/null || exit 1"])
def test_a_script_asks_for_another_try_and_ends_as_it_would(tmp_path: Path, end: str) -> None:
    python = tmp_path / "it's python"
    python.write_text(f'#!/bin/sh\necho "$SUBMITIT_EXECUTOR $PYTHONPATH $*" > "{tmp_path}/called"\nexit 3\n')
    python.chmod(0o755)
    where = Where.at(tmp_path / "a run", tmp_path / "code")
    lines = retry_lines(cluster(), str(python), where, Job(("serve", "train")), "s1")
    done = subprocess.run(["bash", "-c", "\n".join([*lines, end])], check=False, capture_output=True, text=True)
    expected = {"exit 7": 7, "true": 0}.get(end, 1)
    assert done.returncode == expected
    called = tmp_path / "called"
    words = f"slurm {tmp_path}/code -m pipeline.stages.retry {tmp_path}/a run serve+train s1 {expected}\n"
    assert (called.read_text() if called.exists() else "") == (words if expected else "")
    assert retry_lines(cluster(retries=0), str(python), where, Job(("sft",)), "s1") == []


def test_a_record_is_claimed_by_one_process_only(tmp_path: Path) -> None:
    assert atomic.create_json(tmp_path / "a" / "x.json", {"first": True})
    assert not atomic.create_json(tmp_path / "a" / "x.json", {"first": False})
    assert atomic.read_json(tmp_path / "a" / "x.json") == {"first": True}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.json"]
