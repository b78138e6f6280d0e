"""A trained model's folder says how it came about, samples as the run did, and goes to the hub when asked."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from helpers_ppo import finish_stage, tiny_config, tokenizer
from transformers import GenerationConfig

from pipeline import push
from pipeline.config.load import dump, resolve
from pipeline.config.schema import Config
from pipeline.data import publish
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.directory import Outputs, RunDir
from pipeline.training.model_card import Card, render_card, write_generation_config

REPOSITORY = "someone/tiny-policy"


def config(**output: Any) -> Config:
    return tiny_config(
        model={"path": "some/base", "num_layers_unfrozen": 1, "tokenizer_path": "/secret/place/tokenizer"},
        data={"source": "some/data"}, generate={"max_new_tokens": 12, "temperature": 0.7, "top_k": 20}, output=output,
    )  # fmt: skip


def pinned(root: Path) -> RunDir:
    """A run whose base model and data came from the hub."""
    run = RunDir(root)
    names = {"model": "some/base", "data": "some/data"}
    pins = {
        source: {"name": name, "revision": None, "commit": "c0ffee", "folder": "/cache", "files": {}}
        for source, name in names.items()
    }
    run.write_outputs(Outputs("prefetch", "f", 1, {}, {"hub": pins}))
    return run


def test_a_card_holds_what_the_run_knows_and_nothing_else(tmp_path: Path) -> None:
    rows = [{"step": 2 * i, "reward/mean": 0.1 * i} for i in range(41)] + [{"step": 80, "policy/kl": 1.5}]
    card = Card("PPO", ("model", "ppo", "generate"), {"held-out reward": 4.0, "unknown": None}, rows=rows)
    text = render_card(pinned(tmp_path), config(), card)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rlhf", "ppo"],
        "base_model": "some/base", "datasets": ["some/data"],
    }  # fmt: skip
    huggingface_hub.ModelCardData(**yaml.safe_load(front))
    assert "- base model: some/base (c0ffee)" in body and "- held-out reward: 4" in body
    assert "unknown" not in body and "None" not in body and "/secret" not in body
    table = [line for line in body.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(table) == 12 and table[0] == "| 0 | 0 |  |" and table[-1] == "| 80 | 4 | 1.5 |"
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["generate"]["temperature"] == 0.7 and settings["ppo"]["ppo_epochs"] == 2


@pytest.mark.parametrize(
    ("rows", "header", "last"),
    [
        (
            [{"step": 0, "reward/mean@beta=0": 1.0, "reward/mean@beta=4": 2.0, "losses/loss_q": 3.0}],
            "| step | reward/mean@beta=0 | reward/mean@beta=4 |",
            "| 0 | 1 | 2 |",
        ),
        (
            [{"step": 9, "losses/loss": 0.5}, {"step": 9, "test/loss": 0.25, "test/accuracy": 0.75}],
            "| step | losses/loss | test/loss | test/accuracy |",
            "| 9 | 0.5 | 0.25 | 0.75 |",
        ),
    ],
    ids=["ilql", "reward model"],
)
def test_a_card_shows_the_curves_of_each_method(
    rows: list[dict[str, Any]], header: str, last: str, tmp_path: Path
) -> None:
    lines = render_card(RunDir(tmp_path), config(), Card("M", (), {}, rows=rows)).splitlines()
    assert lines[lines.index(header) + 2] == last


def test_the_same_training_makes_the_same_card_whenever_it_ran(tmp_path: Path) -> None:
    """What needs the model runs again when its folder has changed, and only then."""
    first, second = (
        render_card(RunDir(tmp_path), config(), Card("SFT", (), {"loss": 0.5, **of_the_day}))
        for of_the_day in (
            {"train_seconds": 3.5, "seconds": 9.0, "tokens_per_second": 80.0, "metrics": "checkpoints/a/metrics.jsonl"},
            {"train_seconds": 4.5, "seconds": 8.0, "tokens_per_second": 70.0, "metrics": "checkpoints/b/metrics.jsonl"},
        )
    )
    assert first == second and "- loss: 0.5" in first


def test_local_folders_are_no_hub_names(tmp_path: Path) -> None:
    text = render_card(RunDir(tmp_path), config(), Card("SFT", ("sft",), {}))
    front = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in front and "datasets" not in front
    assert "- base model: base\n" in text and "# SFT on data\n" in text


def test_generation_samples_as_the_run_did(tmp_path: Path) -> None:
    write_generation_config(tmp_path, tokenizer(), config())
    read = GenerationConfig.from_pretrained(tmp_path)
    assert (read.do_sample, read.temperature, read.top_k, read.max_new_tokens) == (True, 0.7, 20, 12)
    assert read.eos_token_id == tokenizer().eos_token_id and read.pad_token_id == tokenizer().pad_token_id


class Hub:
    """As much of the hub's HTTP interface as an upload of small files asks for."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuse = False


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    stand_in = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            if stand_in.refuse or self.headers.get("Authorization") != "Bearer hf_test":
                return self._say(403, {"error": "forbidden"})
            if path == "/api/repos/create":
                stand_in.created.append(json.loads(body))
                return self._say(200, {"url": f"{endpoint}/{REPOSITORY}", "id": REPOSITORY})
            if path == f"/api/models/{REPOSITORY}/preupload/main":
                asked = json.loads(body)["files"]
                return self._say(
                    200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
                )
            if path == f"/api/models/{REPOSITORY}/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        stand_in.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self._say(200, {"commitUrl": f"{endpoint}/{REPOSITORY}/commit/1", "commitOid": "1"})
            return self._say(200, {})

        def do_GET(self) -> None:
            self._say(200, {"id": REPOSITORY, "sha": "0", "siblings": []})

        def _say(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield stand_in
    server.shutdown()
    server.server_close()


def trained(root: Path, **output: Any) -> RunDir:
    """A run with a finished policy, as far as pushing looks at it."""
    run = RunDir(root)
    atomic.write_text(run.config, dump(config(**output)))
    policy = root / "stages/train/out/policy"
    atomic.write_text(policy / "README.md", "---\nlibrary_name: transformers\n---\n# PPO\n")
    atomic.write_text(policy / "config.json", "{}\n")
    finish_stage(run, "train", "policy", policy)
    return run


def test_a_policy_is_pushed_by_a_command(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, push_to_hub=REPOSITORY)
    assert push.main([str(run.root)]) == 0
    assert capsys.readouterr().out.startswith("pushed to http://127.0.0.1:")
    assert hub.created[0]["name"] == "tiny-policy" and hub.created[0].get(
        "private", hub.created[0].get("visibility")
    ) in (True, "private")
    assert hub.files.keys() == {"README.md", "config.json"} and hub.files["config.json"] == b"{}\n"


def test_what_hinders_a_push_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path)
    with pytest.raises(UserError, match=r"output\.push_to_hub: names no repository; give one with --to owner/name"):
        push.main([str(run.root)])
    hub.refuse = True
    with pytest.raises(UserError, match=rf"{REPOSITORY}: cannot be pushed \(.*403.*\); look at output\.push_to_hub"):
        push.main([str(run.root), "--to", REPOSITORY])
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the hub; log in with `hf auth login`, or set HF_TOKEN"):
        push.main([str(run.root), "--to", REPOSITORY])


def test_of_a_run_that_ends_in_a_reward_model_that_is_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = resolve({"all": ["prefetch", "sft", "reward-model"], "output": {"push_to_hub": REPOSITORY}})
    run = RunDir(tmp_path)
    atomic.write_text(run.config, dump(settings))
    for stage in ("sft", "reward-model"):
        folder = tmp_path / "stages" / stage / "out/model"
        atomic.write_text(folder / "config.json", json.dumps(stage))
        finish_stage(run, stage, "model", folder)
    publish.push_if_asked(run, settings, "sft", run.artifact("sft", "model"))
    assert not hub.created  # the reward model's start is no result
    publish.push_if_asked(run, settings, "reward-model", run.artifact("reward-model", "model"))
    assert hub.files.pop("config.json") == b'"reward-model"'
    assert push.main([str(run.root)]) == 0 and hub.files == {"config.json": b'"reward-model"'}
    with pytest.raises(
        UserError, match=r"--best: the stage reward-model kept no best model \(reward_model\.save_best\); leave it out"
    ):
        push.main([str(run.root), "--best"])


def test_a_push_that_fails_does_not_fail_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    run = trained(tmp_path, push_to_hub=REPOSITORY)
    publish.push_if_asked(run, config(push_to_hub=REPOSITORY), "train", run.artifact("train", "policy"))
    assert f"{REPOSITORY}: not pushed (the hub is switched off here by HF_HUB_OFFLINE" in caplog.text
    assert f"later: python -m pipeline.push {run.root}" in caplog.text
