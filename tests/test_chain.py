"""The whole chain with real models, a real tritonserver and real training, in miniature."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from helpers_jobs import (
    ROOT,
    TINY,
    command,
    nothing_left,
    pids_running,
    policy_sha256,
    start,
    submit,
    until_training,
    wait_for,
)

from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.run.progress import stage_of
from pipeline.stages.names import STAGES

pytestmark = [pytest.mark.chain, pytest.mark.triton]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages."""
    run = tmp_path_factory.mktemp("chain") / "run"
    done = submit(run)
    assert done.status == 0, done.out + done.err
    return run


def test_every_stage_has_outputs_and_nothing_is_left_running(finished: Path) -> None:
    run = RunDir(finished)
    assert [stage for stage in STAGES if run.outputs(stage) is None] == ["serve"]  # a service is never "done"
    assert nothing_left(finished)
    assert endpoint.read(run) is None


def test_the_policy_is_a_hugging_face_model(finished: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(finished / "models" / "policy")
    start_model = AutoModelForCausalLM.from_pretrained(finished / "models" / "sft")
    tokenizer = AutoTokenizer.from_pretrained(finished / "models" / "policy")
    assert tokenizer("\n\nHuman: hi")["input_ids"]
    changed = {
        name
        for (name, new), old in zip(policy.named_parameters(), start_model.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert any("layers.2." in name for name in changed)
    assert not any("layers.0." in name or "embed_in" in name for name in changed)  # the trunk is frozen


def test_metrics_and_report_are_there(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    phases = [row for row in rows if "policy/sqrt_kl" in row]
    assert phases[0]["ratio_first"] == 1.0
    assert phases[0]["policy/approx_kl_first"] == 0.0
    assert max(row["step"] for row in rows) == 12
    report = json.loads((finished / "report" / "report.json").read_text())
    assert report["paired"]["n"] == 16
    assert report["paired"]["low"] <= report["paired"]["mean"] <= report["paired"]["high"]
    assert "<svg" in (finished / "report" / "index.html").read_text()


def test_a_rerun_does_nothing_and_says_so(finished: Path) -> None:
    done = submit(finished)
    assert (done.status, "nothing to do" in done.out) == (0, True)


def test_a_changed_evaluation_plans_the_evaluation_only(finished: Path) -> None:
    done = submit(finished, "--set", "evaluate.num_prompts=12", "--dry-run")
    actions = dict(line.split()[:2] for line in done.out.splitlines()[1:9])
    assert [stage for stage, action in actions.items() if action != "skip"] == ["evaluate"]
    assert "config changed: evaluate.num_prompts: 16 to 12" in done.out


@pytest.mark.parametrize("victim", ["pipeline.training.ppo", "tritonserver --", "submitit.core._submit"])
def test_training_killed_anywhere_ends_in_the_same_weights(finished: Path, tmp_path: Path, victim: str) -> None:
    run = until_training(finished, tmp_path / "run")
    follower = start(run, "--stage", "serve,train")
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint")
    victims = pids_running(run, victim)
    assert victims
    os.kill(victims[-1], signal.SIGKILL)
    follower.wait(240)
    done = submit(run, "--stage", "serve,train")
    assert done.status == 0, done.err
    assert policy_sha256(run) == policy_sha256(finished)
    wait_for(lambda: nothing_left(run), "every process to end", 20)


def test_a_launcher_killed_at_its_start_leaves_no_process(finished: Path, tmp_path: Path) -> None:
    run = until_training(finished, tmp_path / "run")
    follower = start(run, "--stage", "serve,train")
    wait_for(lambda: pids_running(run, "-m pipeline.training.ppo", "-u"), "the ranks to start")
    for pid in pids_running(run, "pipeline.training.launch"):
        os.kill(pid, signal.SIGKILL)
    assert follower.wait(120) == 1
    wait_for(lambda: nothing_left(run), "every process to end", 20)


def test_force_trains_anew_and_ends_in_the_same_weights(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    done = submit(run, "--stage", "serve,train", "--force")
    assert done.status == 0, done.err
    outputs = RunDir(run).outputs("train")
    assert outputs is not None and outputs.attempt == 2
    assert policy_sha256(run) == policy_sha256(finished)
    folders = [path for path in (run / "checkpoints").iterdir() if stage_of(path.name) == "train"]
    (checkpoints,) = folders  # those of the first training are gone
    assert checkpoints.name.startswith(outputs.fingerprint + "-")


def test_without_a_server_the_trainer_scores_itself_with_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    run = until_training(finished, tmp_path / "run")
    done = submit(run, "--stage", "train", overrides=(*TINY, "sandbox.engine=none"))
    assert done.status == 0, done.err
    assert policy_sha256(run) == policy_sha256(finished)


def test_a_dead_server_or_another_model_is_refused_in_one_line(finished: Path, tmp_path: Path) -> None:
    run = until_training(finished, tmp_path / "run")
    for host, message in (("127.0.0.1:9/reward-model", "TRITON_HOST"), ("nonsense", "host:port/model")):
        done = submit(run, "--stage", "train", "--set", "serving.retry_timeout_s=1", env={"TRITON_HOST": host})
        assert done.status == 1
        assert message in done.err
        assert "Traceback" not in done.err
    assert RunDir(run).outputs("train") is None
    assert nothing_left(run)


def test_a_server_on_its_own_serves_trainings_until_it_is_cancelled(finished: Path, tmp_path: Path) -> None:
    run = until_training(finished, tmp_path / "run")
    served = submit(run, "--stage", "serve", "--set", "serving.bind=loopback")
    assert served.status == 0, served.err
    published = endpoint.read(RunDir(run))
    assert published is not None
    assert published.triton_host.startswith("127.0.0.1:")
    assert (run / "services" / "triton.json").stat().st_mode & 0o777 == 0o600
    words = {"TRITON_HOST": published.triton_host, "TRITON_TLS": f"{run}/services/tls"}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in words.items()]
    assert (run / "services" / "triton.env").read_text().splitlines() == lines
    cancelled = command("cancel", run)
    assert "cancelled serve" in cancelled.out
    assert endpoint.read(RunDir(run)) is None
    wait_for(lambda: nothing_left(run), "the server to end", 20)


def printed_commands() -> list[list[str]]:
    """The words of every command that README.md shows in an indented block, and of those at the top of
    docs/clusters.md; each once."""
    top = (ROOT / "docs" / "clusters.md").read_text().partition("\nClone to ")[0]
    text = (ROOT / "README.md").read_text() + top
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    commands = (shlex.split(line, comments=True) for line in lines if line.startswith(("python -m ", "make ")))
    return [list(words) for words in dict.fromkeys(map(tuple, commands))]


def test_the_commands_of_readme_and_clusters_are_understood_as_printed(finished: Path, tmp_path: Path) -> None:
    """Run as they stand, on a finished run and on real data's folder; what would take long is planned only."""
    commands = printed_commands()
    assert len(commands) >= 16
    rows = tmp_path / "hh"
    rows.mkdir()
    for split in ("train", "test"):
        shutil.copy(finished / "data" / f"{split}.jsonl", rows)
    there = {"runs/demo": finished, "runs/gptj": finished, "path/to/hh": rows}
    there["runs/store"] = tmp_path / "store"
    there["my-cluster.yaml"] = tmp_path / "my-cluster.yaml"  # the doctor's line writes it, the next ones read it
    for words in commands:
        if words[0] == "make":
            argv = ["make", "-n", *words[1:]]
            assert subprocess.run(argv, cwd=ROOT, capture_output=True, check=False).returncode == 0, words
            continue
        arguments = [word for word in words[2:] if word != "--watch"]  # which has no end
        for name, path in there.items():
            arguments = [word.replace(name, str(path)) for word in arguments]
        if arguments[0] == "pipeline.submit":
            arguments += ["--dry-run", "--run-dir", str(tmp_path / "run")]
        done = command(arguments[0].removeprefix("pipeline."), *arguments[1:])
        found_faults = arguments[0] == "pipeline.doctor" and done.status == 1  # of this machine
        assert done.status == 0 or found_faults, f"{words}: {done.err}"


HH = Path(os.environ.get("HH_DATA") or ROOT.parent / "shared" / "data" / "hh")


@pytest.mark.hh
@pytest.mark.skipif(not HH.is_dir(), reason="no HH rows: set HH_DATA to a folder with train.jsonl.gz and test.jsonl.gz")
def test_the_same_chain_runs_on_real_rows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (*TINY, f"data.source={HH}", "data.limit_train=96", "data.limit_test=32")
    done = submit(run, overrides=settings)
    assert done.status == 0, done.err
    values = RunDir(run).values("reward-model")
    assert 0.0 < values["accuracy"] < 1.0 and values["loss"] < 1.0  # it reads real pairs, and does not blow up
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["paired"]["n"] == 16
    assert all(sample["prompt"].endswith("Assistant:") for sample in report["samples"])
