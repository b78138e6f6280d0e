"""Scoring texts by hand: what a row may be, and that it is read as training reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_ppo import make_run, preferences, tiny_config, tokenizer
from transformers import AutoModelForSequenceClassification

from pipeline import score
from pipeline.data.tokens import encode
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.serving.texts import TextScorer, asked, open_texts, read_rows

PROMPT = "\n\nHuman: hello\n\nAssistant:"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("scored"), tiny_config())


@pytest.fixture
def texts(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextScorer]:
    monkeypatch.delenv("TRITON_HOST", raising=False)
    with open_texts(run.root, None) as (texts, _):
        yield texts


def eager(run: RunDir, ids: list[int]) -> float:
    """The plain model's score of one sequence, at its last token."""
    model = AutoModelForSequenceClassification.from_pretrained(run.artifact("reward-model", "model"))
    model.config.pad_token_id = None
    with torch.no_grad():
        return float(model.eval()(input_ids=torch.tensor([ids])).logits[0, 0])


def rows_of(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_come_back_in_order_with_their_rewards(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rows_of(
        tmp_path / "in.jsonl",
        {"prompt": PROMPT, "response": " hi there", "id": 7},
        {"text": "a text"},
        {"prompt": PROMPT, "chosen": "good", "rejected": "bad"},
        {"chosen": f"{PROMPT} good", "rejected": f"{PROMPT} bad"},
    )
    score.main(["--run", str(run.root), str(file), "--out", str(tmp_path / "out.jsonl")])
    one, two, three, four = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    end = tokenizer().eos_token_id
    prompt, hi = encode(tokenizer(), PROMPT), encode(tokenizer(), " hi there")
    assert one["id"] == 7 and one["reward"] == pytest.approx(eager(run, [*prompt, *hi, end]), abs=1e-5)
    assert two["reward"] == pytest.approx(eager(run, [*encode(tokenizer(), "a text"), end]), abs=1e-5)
    good = [*prompt, *encode(tokenizer(), " good"), end]  # one space before it, as in training
    assert three["chosen_reward"] == pytest.approx(eager(run, good), abs=1e-5)
    assert [four[f"{side}_reward"] for side in ("chosen", "rejected")] == pytest.approx(
        [three[f"{side}_reward"] for side in ("chosen", "rejected")], abs=1e-6
    )
    assert three["chosen_reward"] != three["rejected_reward"]

    score.main(["--run", str(run.root), str(file)])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [one, two, three, four]


def test_a_special_token_that_is_spelt_out_ends_nothing(texts: TextScorer) -> None:
    end = tokenizer().eos_token_id
    for prompt, response in ((PROMPT, " a<|endoftext|> b"), ("<|endoftext|>", " a"), ("", "<|endoftext|>")):
        ids = texts.sequence(prompt, response)
        assert ids.count(end) == 1 and ids[-1] == end


def test_what_is_too_long_keeps_its_end(texts: TextScorer) -> None:
    whole = [*encode(tokenizer(), PROMPT * 30), *encode(tokenizer(), " yes"), tokenizer().eos_token_id]
    assert texts.sequence(PROMPT * 30, " yes") == whole[-texts.max_length :]
    response = " yes and no" * 60
    long = [*encode(tokenizer(), response), tokenizer().eos_token_id]
    assert len(long) > texts.max_length
    assert texts.sequence(PROMPT, response) == long[-texts.max_length :]


def test_more_texts_than_a_call_holds_keep_their_order(texts: TextScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.serving.texts.BLOCK", 3)
    pairs = [(row.prompt, row.chosen) for row in preferences()["train"][:20]]
    done: list[int] = []
    assert texts.score(pairs, done.append) == pytest.approx([texts.score([pair])[0] for pair in pairs], abs=1e-5)
    assert done == [3, 6, 9, 12, 15, 18, 20]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{", r"in\.jsonl:2: not valid JSON"),
        ("[1]", r"in\.jsonl:2: a JSON list, not an object"),
        ({"prompt": "a"}, r"in\.jsonl:2: the row has nothing to score; its keys are: prompt"),
        ({"response": "a"}, r"in\.jsonl:2: the row has a 'response' without its 'prompt'"),
        ({"text": 3}, r"in\.jsonl:2: the row has a 'text' that is int, not text"),
        ({"text": "a", "response": "b"}, r"in\.jsonl:2: the row has 'text' and 'response'"),
        ({"chosen": "no turn"}, r"in\.jsonl:2: the row has no 'prompt', and its 'chosen' no .* turn"),
        ('{"text": "\\ud83d"}', r"in\.jsonl:2: the row has a 'text' with half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_understood_is_named_before_anything_is_scored(
    row: Any, fault: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=fault) as error:
        read_rows(rows_of(tmp_path / "in.jsonl", {"text": "a"}, row))
    assert "\n" not in str(error.value)


def test_where_nothing_can_be_written_nothing_is_scored(run: RunDir, tmp_path: Path) -> None:
    file = rows_of(tmp_path / "in.jsonl", {"text": "a text"})
    with pytest.raises(UserError, match=r"--out /proc/out\.jsonl: cannot write in /proc \(.*\); choose another place"):
        score.main(["--run", str(run.root), str(file), "--out", "/proc/out.jsonl"])


def test_an_empty_file_and_no_file_are_one_line(run: RunDir, tmp_path: Path) -> None:
    for path, fault in ((rows_of(tmp_path / "in.jsonl"), "is empty"), (tmp_path / "gone.jsonl", "no such file")):
        with pytest.raises(UserError, match=fault):
            score.main(["--run", str(run.root), str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_is_no_dialogue_is_taken_as_it_is() -> None:
    assert asked({"prompt": "2 + 2 =", "response": "4"}) == {"reward": ("2 + 2 =", "4")}
    assert asked({"prompt": f"{PROMPT} ", "response": "4\n"}) == {"reward": (PROMPT, " 4")}
