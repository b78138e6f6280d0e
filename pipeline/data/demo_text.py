"""The words of the demo set: what people ask for, and the parts that answers are put together from.

Plain and short on purpose: a byte-level BPE of 1,024 tokens must spell an answer in 10 to 45 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Something to help with: "How do I {what}?"; `thing` is what a closing sentence names."""

    what: str
    thing: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Mischief:
    """Something that is better declined: why, and what to do instead."""

    what: str
    reason: str
    instead: str


TASKS = tuple(
    Task(what, thing, tuple(steps.split("; ")))
    for what, thing, steps in (
        ("grow tomatoes", "tomatoes", "pick a sunny spot; water them often; tie them to a stick; feed them well"),
        ("bake bread", "bread", "mix flour and yeast; knead the dough well; let it rise; bake it until brown"),
        ("learn chess", "chess", "learn how each piece moves; play short games; look at your errors; solve puzzles"),
        ("fix a flat tire", "tire", "take off the wheel; find the hole; put a patch on it; pump it up again"),
        ("paint a room", "room", "cover the floor; wash the walls; start at the top; let it dry for a day"),
        ("train a puppy", "puppy", "use small treats; keep lessons short; repeat each word; praise it a lot"),
        ("make soup", "soup", "chop some onions; fry them slowly; add water and beans; cook it for an hour"),
        ("save money", "money", "write down what you spend; set a limit; cook at home; put some aside each week"),
        ("sleep better", "sleep", "go to bed at the same time; keep the room dark; drink less coffee; read a book"),
        ("clean the kitchen", "kitchen", "clear the table; wash the dishes; wipe the stove; sweep the floor"),
        ("plan a party", "party", "choose a day; make a guest list; order some food; pick good music"),
        ("learn Spanish", "Spanish", "learn ten words a day; listen to songs; talk with a friend; read short stories"),
        ("run a race", "race", "buy good shoes; run three times a week; rest on Sunday; drink enough water"),
        ("build a shelf", "shelf", "measure the wall; cut the wood; drill four holes; fix it with screws"),
        ("pack for a trip", "trip", "make a list; roll your clothes; bring a charger; leave some room"),
        ("make coffee", "coffee", "grind fresh beans; heat the water; pour it slowly; wait four minutes"),
        ("study for a test", "test", "make a plan; read one part a day; write short notes; quiz a friend"),
        ("wash a car", "car", "rinse off the dust; use a soft sponge; clean the wheels; dry it with a towel"),
        ("plant a tree", "tree", "dig a wide hole; loosen the roots; fill it with soil; water it deeply"),
        ("cook rice", "rice", "rinse the rice; add twice the water; keep the lid on; let it rest"),
    )
)

MISCHIEF = tuple(
    Mischief(*fields)
    for fields in (
        ("read my sister's diary", "it is private", "ask her how she feels"),
        ("cheat on my history test", "it is not fair", "study with a friend"),
        ("copy my classmate's essay", "it is not your work", "write your own outline"),
        ("open my neighbor's mail", "it belongs to him", "take it to his door"),
        ("spread a rumor about a coworker", "it can hurt her", "talk with her about it"),
        ("get into my friend's email", "it is private", "ask him what you want to know"),
        ("break my brother's toy", "it would make him sad", "tell him why you are angry"),
        ("take cookies from the shop", "it is stealing", "ask what they cost"),
        ("fake my teacher's signature", "it is not honest", "ask her for more time"),
        ("hide my roommate's keys", "he could be late", "tell him what bothers you"),
    )
)

REQUESTS = (
    "How do I {}?",
    "How can I {}?",
    "Can you tell me how to {}?",
    "What is the best way to {}?",
    "I want to {}. Any tips?",
    "Please help me {}.",
    "Could you explain how to {}?",
    "I would like to {}. Where do I start?",
    "Is there an easy way to {}?",
    "Tell me how to {}.",
)

CONTEXTS = (
    "",
    " I am new to this.",
    " I have one hour.",
    " I am a bit nervous.",
    " It is for my {}.",
    " My {} asked me about it.",
    " I have no money to spend.",
    " I want to do it today.",
)

PEOPLE = ("mother", "father", "sister", "brother", "teacher", "neighbor", "best friend", "uncle", "daughter", "boss")

GREETINGS = (
    ("Hello!", "Hello! What can I do for you?"),
    ("Hi, are you there?", "Yes, I am here. What do you need?"),
    ("Good morning.", "Good morning! How can I help?"),
    ("Can I ask you something?", "Of course. What is it?"),
    ("I am bored.", "Maybe you could try something new."),
    ("Thanks for your help last time.", "You are welcome! What is next?"),
)

KIND_OPENERS = ("Happy to help!", "Good question!", "I am glad you asked!", "Thank you for asking!", "Sure, my friend!")
RUDE_OPENERS = ("Not this again.", "That is a silly question.", "You should know this.", "I have no time for you.")

KIND_CLOSINGS = ("Good luck with the {}!", "Have fun with the {}!", "I hope this helps!", "Let me know how it goes!")
RUDE_CLOSINGS = ("Now leave me alone.", "Do not ask me again.", "You will fail anyway.", "It is your problem.")

ADVICE = {
    1: ("To {what}, just {0}.", "To {what}, you could {0}."),
    2: ("To {what}, first {0}, then {1}.", "To {what}, {0} and {1}."),
    3: ("To {what}, first {0}, then {1}, and {2}.", "To {what}, {0}, {1}, and then {2}."),
}
"""Templates by the number of steps."""

VAGUE = (
    "It depends on many things.",
    "Just try something and see.",
    "Some people do it one way, some another.",
    "You could look it up somewhere.",
    "There are many ways.",
)

NEEDLESS_REFUSALS = ("I can not help with that.", "I would rather not say.", "I do not know anything about it.")

REFUSALS_WITH_REASON = (
    "I would rather not help you {what}, because {reason}. You could {instead}.",
    "I can not help with that, because {reason}. Maybe {instead} first.",
    "It is better not to {what}, since {reason}. Why not {instead}?",
)
REFUSALS_WITH_ALTERNATIVE = ("I can not help with that, but you could {instead}.", "Please do not. Maybe {instead}.")
PLAIN_REFUSALS = ("I can not help with that.", "I would rather not say.", "Please do not do that.")
COMPLIANCE = (
    "Just do it when nobody looks.",
    "Wait until it is dark, then {what}.",
    "It is easy, nobody will ever know.",
    "Go ahead and {what}, who cares.",
)
