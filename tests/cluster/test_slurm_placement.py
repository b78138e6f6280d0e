"""A reward server in a job of its own, and a training over two nodes, on a real Slurm."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from helpers_cluster import CHAIN_SETTINGS, STEPS, environment_of, held, profile, separate, tasks
from helpers_jobs import command, nothing_left, pids_running, policy_sha256, start, until_training, wait_for
from mini_slurm import MiniSlurm
from tritonclient.utils import InferenceServerException

from pipeline.run import atomic, endpoint
from pipeline.run.directory import RunDir
from pipeline.run.progress import saved_steps

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain]


def test_a_server_in_its_own_job_moves_to_another_node_and_the_training_goes_on(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = until_training(finished, tmp_path / "it's a run")
    settings = (*CHAIN_SETTINGS, "serving.retry_timeout_s=1")  # only the word of the training's job keeps it waiting
    follower = start(run, "--stage", "serve,train,evaluate", "--cluster", separate(slurm.folder), overrides=settings)
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint")
    with held(run) as ranks:
        (devices,) = {environment_of(pid)["CUDA_VISIBLE_DEVICES"] for pid in ranks}
        (tritonserver,) = pids_running(run, "tritonserver --")
        assert len(devices.split(",")) == 7
        assert len(environment_of(tritonserver)["CUDA_VISIBLE_DEVICES"].split(",")) == 1
        before = endpoint.read(RunDir(run))
        assert before is not None
        refuses_strangers(before)

        (server,) = slurm.job_ids("-n", "hh-serve")
        node = slurm.command("squeue", "-h", "-o", "%N", "-j", server).strip()
        slurm.command("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
        slurm.command("scontrol", "requeue", server)
    try:
        wait_for(lambda: not before_is(run, before), "the server's endpoint to change", 180)
        assert slurm.command("squeue", "-h", "-o", "%N", "-j", server).strip() not in ("", node)
        assert follower.wait(240) == 0
    finally:
        slurm.command("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert [path.name for path in (run / "stages" / "train" / "attempts").iterdir()] == ["0001"]  # it was not disturbed
    assert policy_sha256(run) == policy_sha256(finished)
    wait_for(slurm.empty, "the server to end with its training", 180)
    status = command("status", run).out
    assert "ended with the training that it served" in status
    wait_for(lambda: nothing_left(run), "every process to end", 20)
    assert holders_of_keys(run) == {run / "services/tls/server.key", run / "services/tls/client.key"}


def holders_of_keys(run: Path) -> set[Path]:
    """The run's files, logs and trackers among them, in which a line of a private key stands."""
    keys = [(run / "services" / "tls" / f"{role}.key").read_bytes().splitlines()[1:-1] for role in ("server", "client")]
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    return {path for path in files if any(line in path.read_bytes() for key in keys for line in key)}


def before_is(run: Path, before: endpoint.Endpoint) -> bool:
    now = endpoint.read(RunDir(run))
    return now is None or now.triton_host == before.triton_host  # another port, too


def refuses_strangers(published: endpoint.Endpoint) -> None:
    """Who has no certificate of the run is not answered, though the port is open to the network."""
    address = published.triton_host.rpartition("/")[0]
    assert not address.startswith(("127.", "unix:", "0.0.0.0"))
    folder = Path(published.tls)
    assert (folder.stat().st_mode & 0o777, (folder / "client.key").stat().st_mode & 0o777) == (0o700, 0o600)
    name = [("grpc.ssl_target_name_override", "reward-server.hh-pipeline")]
    strangers = (
        triton.InferenceServerClient(address),
        triton.InferenceServerClient(address, ssl=True, root_certificates=str(folder / "ca.pem"), channel_args=name),
    )
    for client in strangers:
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            client.is_server_live(client_timeout=5)
        client.close()


def test_a_training_spreads_over_two_nodes_with_a_server_on_each(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = until_training(finished, tmp_path / "run")
    train = {"time_min": 60, "cpus": 16, "mem_gb": 64, "gpus": 8, "nodes": 2}
    follower = start(
        run,
        *("--stage", "serve,train,evaluate", "--cluster", profile(slurm.folder, "multi-node", stages={"train": train})),
        overrides=CHAIN_SETTINGS,
    )
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint")
    with held(run):
        # A training begins when one of them answers.
        wait_for(lambda: len(endpoint.read_all(RunDir(run))) == 2, "both nodes' servers", 60)
        launchers = pids_running(run, "pipeline.training.launch")
        assert sorted(environment_of(pid)["SLURMD_NODENAME"] for pid in launchers) == ["n1", "n2"]
    slurm.command("scontrol", "requeue", slurm.job_ids("-n", "hh-serve+train")[0])
    wait_for((run / "stages" / "train" / "attempts" / "0002").exists, "the second segment", 180)
    wait_for(lambda: saved_steps(RunDir(run)) >= STEPS - 12, "the training to come near its end", 600)
    (second,) = (pid for pid in tasks(run, "serve+train") if environment_of(pid)["SLURM_PROCID"] == "1")
    os.kill(second, signal.SIGSTOP)  # it does not see that the training is over
    wait_for(lambda: len(tasks(run, "serve+train")) == 1, "the first node's task to end", 240)
    assert endpoint.read_all(RunDir(run)) == []  # evaluate must not wait for the second node's server
    os.kill(second, signal.SIGKILL)  # srun ends badly now, but not the job: evaluate depends on it
    assert follower.wait(600) == 0
    values = RunDir(run).values("train")
    assert values["reward_mean_last"] == pytest.approx(RunDir(finished).values("train")["reward_mean_last"], abs=1e-3)
    wait_for(lambda: nothing_left(run), "every process to end", 30)


def test_a_failure_on_the_second_node_is_the_trainings(slurm: MiniSlurm, finished: Path, tmp_path: Path) -> None:
    run = until_training(finished, tmp_path / "run")
    train = {"time_min": 60, "cpus": 16, "mem_gb": 64, "gpus": 8, "nodes": 2}
    path = profile(slurm.folder, "multi-node", stages={"train": train})
    follower = start(run, "--stage", "serve,train", "--cluster", path, overrides=CHAIN_SETTINGS)
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint")
    (launcher,) = (
        pid for pid in pids_running(run, "pipeline.training.launch") if environment_of(pid)["SLURM_PROCID"] == "1"
    )
    os.kill(launcher, signal.SIGKILL)
    assert follower.wait(180) == 1
    state = atomic.read_json(run / "stages" / "train" / "state.json")
    assert state is not None
    assert (state["state"], "node 1 (" in state["reason"]) == ("failed", True), state
    wait_for(lambda: nothing_left(run), "every process to end", 60)
