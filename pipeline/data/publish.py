"""Sending a trained model's folder to the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.data.hub import hub_errors
from pipeline.errors import UserError


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
