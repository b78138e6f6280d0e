"""The demo preference set: dialogues that the project makes up by itself, deterministic in the seed.

Every answer is put together from parts, and each part adds to a hidden score: a kind, neutral or rude opening; steps
that fit the question, a vague, a wrong or no answer; a friendly or brusque ending; and some say a thing twice.
Requests for mischief are answered best with a polite refusal, its reason and an alternative. The chosen answer
is the better of two draws, so that chosen answers still vary much in quality: a policy that imitates them has far to
go, and a person sees it improve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from pipeline.data import demo_text as text
from pipeline.data.demo_text import Mischief, Task
from pipeline.data.preferences import Preference
from pipeline.errors import UserError

MISCHIEF_SHARE = 0.25
FOLLOW_UP_SHARE = 0.2
"""Dialogues with an earlier turn."""
LABEL_NOISE = 0.03
"""Training pairs whose labels are swapped, as people's are; test pairs are labelled without error."""
SMALLEST_GAP = 1.0
"""The least difference in score between a pair's answers: people do not see less."""

OPENER_SCORES = {"kind": 1.0, "none": 0.0, "rude": -1.5}
CLOSING_SCORES = {"kind": 0.75, "none": 0.0, "rude": -1.0}
HELP_SCORES = {
    "three steps": 2.0,
    "two steps": 1.5,
    "one step": 1.0,
    "vague": 0.0,
    "refusal": -0.5,
    "off topic": -1.0,
    "nothing": -1.5,
}
MISCHIEF_SCORES = {
    "reason": 2.0,
    "alternative": 1.5,
    "refusal": 0.75,
    "vague": 0.0,
    "compliance": -1.5,
    "nothing": -0.5,
}
REPEATING_SHARE = 0.12
"""Answers that say one of their parts twice. Without such answers among the rejected ones, the reward
model would not know that they are bad, and PPO would find out: kind openings without end."""
REPEATING_SCORE = -2.5

_FRAME_ODDS = {"kind": 0.3, "none": 0.45, "rude": 0.25}
_HELP_ODDS = {
    "three steps": 0.14,
    "two steps": 0.16,
    "one step": 0.18,
    "vague": 0.2,
    "refusal": 0.1,
    "off topic": 0.14,
    "nothing": 0.08,
}
_MISCHIEF_ODDS = {
    "reason": 0.18,
    "alternative": 0.17,
    "refusal": 0.2,
    "vague": 0.1,
    "compliance": 0.28,
    "nothing": 0.07,
}


@dataclass(frozen=True)
class Answer:
    """An answer and its hidden score, from -6.5 (rude, empty, and saying it twice) to 3.75 (kind and complete)."""

    text: str
    score: float


def demo_preferences(seed: int, train: int, test: int) -> dict[str, list[Preference]]:
    """Make `train` and `test` preferences; no prompt occurs twice, within a split or across them.

    UserError when so many different prompts cannot be made.
    """
    prompts = _different_prompts(Random(f"{seed}/demo/prompts"), train + test)
    labels = Random(f"{seed}/demo/answers")
    pairs = [_pair(labels, prompt, subject) for prompt, subject in prompts]
    noisy = [_swapped(pair) if labels.random() < LABEL_NOISE else pair for pair in pairs[:train]]
    return {"train": noisy, "test": pairs[train:]}


def make_prompt(random: Random) -> tuple[str, Task | Mischief]:
    """A dialogue up to the assistant's turn, and what it asks for."""
    subjects: Sequence[Task | Mischief] = text.MISCHIEF if random.random() < MISCHIEF_SHARE else text.TASKS
    subject = random.choice(subjects)
    request = random.choice(text.REQUESTS).format(subject.what)
    context = random.choice(text.CONTEXTS).format(random.choice(text.PEOPLE))
    turns = f"\n\nHuman: {request}{context}\n\nAssistant:"
    if random.random() < FOLLOW_UP_SHARE:
        turns = _earlier_turn(random) + turns
    return turns, subject


def _earlier_turn(random: Random) -> str:
    if random.random() < 0.6:
        human, assistant = random.choice(text.GREETINGS)
    else:
        task = random.choice(text.TASKS)
        human, assistant = random.choice(text.REQUESTS).format(task.what), f"You could {random.choice(task.steps)}."
    return f"\n\nHuman: {human}\n\nAssistant: {assistant}"


def make_answer(random: Random, subject: Task | Mischief) -> Answer:
    """Draw an answer to a request for `subject`, and score it."""
    opener, closing = _draw(random, _FRAME_ODDS), _draw(random, _FRAME_ODDS)
    kind = _draw(random, _HELP_ODDS if isinstance(subject, Task) else _MISCHIEF_ODDS)
    if (opener, kind, closing) == ("none", "nothing", "none"):
        opener = "kind"  # an answer must say something
    score = OPENER_SCORES[opener] + CLOSING_SCORES[closing]
    if isinstance(subject, Task):
        answered = _another_task(random, subject) if kind == "off topic" else subject
        body, thing, score = _help(random, answered, kind), answered.thing, score + HELP_SCORES[kind]
    else:
        body, thing, score = _decline(random, subject, kind), "rest of the day", score + MISCHIEF_SCORES[kind]
    openers = {"kind": text.KIND_OPENERS, "none": ("",), "rude": text.RUDE_OPENERS}
    closings = {"kind": text.KIND_CLOSINGS, "none": ("",), "rude": text.RUDE_CLOSINGS}
    drawn = (random.choice(openers[opener]), body, random.choice(closings[closing]).format(thing))
    parts = [part for part in drawn if part]
    if random.random() < REPEATING_SHARE:
        again = random.randrange(len(parts))
        parts[again : again + 1] = [parts[again]] * 2
        score += REPEATING_SCORE
    return Answer(" " + " ".join(parts), score)


def _another_task(random: Random, task: Task) -> Task:
    return random.choice([other for other in text.TASKS if other is not task])


def _help(random: Random, task: Task, kind: str) -> str:
    if kind == "nothing":
        return ""
    if kind == "vague":
        return random.choice(text.VAGUE)
    if kind == "refusal":
        return random.choice(text.NEEDLESS_REFUSALS)
    count = {"three steps": 3, "two steps": 2, "one step": 1}.get(kind) or random.randint(1, 3)
    first = random.randint(0, len(task.steps) - count)  # steps follow each other, so their order makes sense
    return random.choice(text.ADVICE[count]).format(*task.steps[first : first + count], what=task.what)


def _decline(random: Random, subject: Mischief, kind: str) -> str:
    if kind == "nothing":
        return ""
    templates = {
        "reason": text.REFUSALS_WITH_REASON,
        "alternative": text.REFUSALS_WITH_ALTERNATIVE,
        "refusal": text.PLAIN_REFUSALS,
        "vague": text.VAGUE,
        "compliance": text.COMPLIANCE,
    }[kind]
    what = subject.what.replace("my ", "your ").replace("I am", "you are")
    return random.choice(templates).format(what=what, reason=subject.reason, instead=subject.instead)


def _pair(random: Random, prompt: str, subject: Task | Mischief) -> Preference:
    while True:
        first, second = make_answer(random, subject), make_answer(random, subject)
        if abs(first.score - second.score) >= SMALLEST_GAP:
            better, worse = sorted((first, second), key=lambda answer: -answer.score)
            return Preference(prompt, better.text, worse.text)


def _swapped(pair: Preference) -> Preference:
    return Preference(pair.prompt, pair.rejected, pair.chosen)


def _different_prompts(random: Random, count: int) -> list[tuple[str, Task | Mischief]]:
    found: dict[str, Task | Mischief] = {}
    for _ in range(50 * count):
        prompt, subject = make_prompt(random)
        found.setdefault(prompt, subject)
        if len(found) == count:
            return list(found.items())
    raise UserError(
        f"data.demo: train + test = {count} are more dialogues than can be made up without repeating one "
        f"({len(found)} were found); lower data.demo.train or data.demo.test"
    )


def _draw(random: Random, odds: dict[str, float]) -> str:
    return random.choices(list(odds), weights=list(odds.values()))[0]
