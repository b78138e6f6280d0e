"""The typed, strict configuration. Unknown keys are errors; `pipeline.config.load` words them.

Names follow trlX where its users know them (CONFIG_NAME presets, train.*, method hyper-parameters as ppo.*).
Only what a stage lists in its fingerprint makes it run again; see `pipeline.stages`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config.cluster import Cluster
from pipeline.config.methods import ILQL, PPO, SFT, RewardModel
from pipeline.config.section import Section, Text
from pipeline.config.serving import Sandbox, Serving
from pipeline.config.training import Evaluate, Generate, Optimizer, Output, Scheduler, Train
from pipeline.stages.names import STAGES, StageName


class EmbeddedModel(Section):
    """The size of the model that is made on the spot when `model.path` is "embedded" (a random GPT-NeoX)."""

    vocab_size: int = Field(1024, ge=300)
    """Tokens, of a byte-level BPE that is trained on the training texts."""
    hidden_size: int = Field(256, ge=8)
    """Width of the hidden states; a multiple of num_heads."""
    num_layers: int = Field(4, ge=2)
    """Transformer layers."""
    num_heads: int = Field(4, ge=1)
    """Attention heads a layer."""
    max_positions: int = Field(256, ge=16)
    """The longest sequence, in tokens."""


class LoRA(Section):
    """Low-rank adapters on the trained layers (Hu et al. 2021, arXiv:2106.09685); they are merged into the result."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters, which PPO alone trains; 0 trains the weights themselves."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[Text, ...] = ()
    """Names of the linear modules that get adapters; empty takes all of the trained layers."""


class Model(Section):
    """The causal language model that everything starts from."""

    path: str = Field("EleutherAI/gpt-j-6B", min_length=1)
    """A hub id, a folder, or "embedded" for a small model that is made on the spot."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of a hub id; None takes its main branch."""
    tokenizer_path: str | None = Field(None, min_length=1)
    """A hub id or folder; by default the model's own."""
    num_layers_unfrozen: int = Field(2, ge=-1)
    """Layers that PPO and ILQL train, counted from the top; -1 trains all layers and the embeddings."""
    lora: LoRA = LoRA()
    embedded: EmbeddedModel = EmbeddedModel()


class DemoData(Section):
    """How many dialogues the project generates by itself when `data.source` is "demo"."""

    train: int = Field(2400, ge=8)
    """Training pairs."""
    test: int = Field(300, ge=4)
    """Test pairs, on prompts that no training pair has."""


class Data(Section):
    """Preference data in HH's format: rows with `chosen` and `rejected` dialogues, or prompt + chosen + rejected."""

    source: str = Field("Dahoas/rm-static", min_length=1)
    """"demo", a folder with train.jsonl[.gz] and test.jsonl[.gz], "hh" (the folder in HH_DATA), or a hub data set."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of a hub data set; None takes its main branch."""
    subsets: tuple[Text, ...] = ()
    """Folders of Anthropic/hh-rlhf (helpful-base, harmless-base, ...); empty takes the default."""
    limit_train: int | None = Field(None, ge=1)
    """Use the first so many training pairs; None uses all."""
    limit_test: int | None = Field(None, ge=1)
    """Use the first so many test pairs; None uses all."""
    demo: DemoData = DemoData()


class Config(Section):
    """A run's whole configuration, as runs/<name>/config.yaml holds it."""

    preset: str = Field("custom", min_length=1)
    """The preset that the configuration started from."""
    description: str = ""
    """What the preset is, for people."""
    fidelity: Literal["corrected", "trlx"] = "corrected"
    """"trlx" takes the original's data, learning rate and losses, as its preset lists them, where this project corrects
    them; see docs/configuration.md."""
    seed: int = Field(1000, ge=0)
    """Seed of demo data, initial weights, the order of batches, and sampling."""
    all: tuple[StageName, ...] = STAGES
    """The stages that `--stage all` stands for, in order."""
    model: Model = Model()
    data: Data = Data()
    sft: SFT = SFT()
    reward_model: RewardModel = RewardModel()
    sandbox: Sandbox = Sandbox()
    serving: Serving = Serving()
    train: Train = Train()
    ppo: PPO = PPO()
    ilql: ILQL = ILQL()
    generate: Generate = Generate()
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    evaluate: Evaluate = Evaluate()
    output: Output = Output()
    cluster: Cluster = Cluster()

    @property
    def prompt_length(self) -> int:
        """The most prompt tokens that fit beside a full response."""
        return self.train.seq_length - self.generate.max_new_tokens

    @model_validator(mode="after")
    def _sizes_fit(self) -> Config:
        from pipeline.config.checks import check_sizes

        check_sizes(self)
        return self

    def plain(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return self.model_dump(mode="json")
