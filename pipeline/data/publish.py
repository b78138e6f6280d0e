"""Sending a trained model's folder to the Hugging Face hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.data.hub import hub_errors
from pipeline.errors import UserError
from pipeline.run.directory import RunDir

_TRAINED = {"sft": "model", "reward-model": "model", "train": "policy"}
"""The stages that train, in the chain's order, and their artifacts."""


def result_of(config: Config) -> tuple[str, str]:
    """The stage and the artifact that a run is made for: of what its last training stage ends in."""
    stage = next((stage for stage in reversed(_TRAINED) if stage in config.all), "train")
    return stage, _TRAINED[stage]


def push_if_asked(run: RunDir, config: Config, stage: str, folder: Path) -> None:
    """Push what `stage` has trained where that is the run's result and the configuration says so; where it fails, say
    how it is done later."""
    repository = config.output.push_to_hub
    if repository is None or result_of(config)[0] != stage:
        return
    log = logging.getLogger(__name__)
    try:
        log.info("pushed to %s", push_folder(folder, repository, config.output.private))
    except UserError as error:
        log.warning("%s: not pushed (%s); later: python -m pipeline.push %s", repository, error, run.root)


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Upload `folder` as the model `repository` (owner/name), which is made where it is not there; its address.

    UserError without a token, offline, and for whatever the hub answers.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("the hub is switched off here by HF_HUB_OFFLINE; push from where the internet can be reached")
    if get_token() is None:
        raise UserError("no token for the hub; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with hub_errors(f"{repository}: cannot be pushed", "look at output.push_to_hub and the token's permissions"):
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained by hh-pipeline")
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repository}"
