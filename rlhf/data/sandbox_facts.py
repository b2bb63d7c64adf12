"""What the sandbox's world consists of: small tables of facts, and the phrases that answers are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskKind:
    """One kind of task: how it is asked, how a full answer reads, and what is right."""

    questions: tuple[str, ...]
    sentence: str
    answers: Mapping[str, str]


def _table(text: str) -> dict[str, str]:
    return {subject.replace("_", " "): answer.replace("_", " ") for subject, answer in (entry.split(":") for entry in text.split())}


NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry"]

TASKS: dict[str, TaskKind] = {
    "opposite": TaskKind(
        (
            "What is the opposite of {s}?",
            "Which word means the opposite of {s}?",
            "Give me the opposite of {s}.",
            "The opposite of {s} is what?",
        ),
        "The opposite of {s} is {a}.",
        _table("hot:cold big:small fast:slow young:old happy:sad light:dark wet:dry full:empty"),
    ),
    "colour": TaskKind(
        ("What colour is {s}?", "Which colour does {s} have?", "Tell me the colour of {s}.", "The colour of {s} is what?"),
        "The colour of {s} is {a}.",
        _table("grass:green snow:white coal:black blood:red the_sky:blue a_lemon:yellow a_carrot:orange chocolate:brown"),
    ),
    "capital": TaskKind(
        ("What is the capital of {s}?", "Which city is the capital of {s}?", "Name the capital of {s}.", "The capital of {s} is what?"),
        "The capital of {s} is {a}.",
        _table("France:Paris Spain:Madrid Italy:Rome Germany:Berlin Japan:Tokyo Egypt:Cairo Norway:Oslo Poland:Warsaw"),
    ),
    "sound": TaskKind(
        ("What does a {s} say?", "Which sound does a {s} make?", "Tell me the sound of a {s}.", "How does a {s} sound?"),
        "A {s} says {a}.",
        _table("cow:moo cat:meow dog:woof duck:quack sheep:baa pig:oink lion:roar snake:hiss"),
    ),
    "plural": TaskKind(
        ("What is the plural of {s}?", "How do I write more than one {s}?", "Give me the plural of {s}.", "The plural of {s} is what?"),
        "The plural of {s} is {a}.",
        _table("child:children foot:feet tooth:teeth goose:geese man:men box:boxes leaf:leaves mouse:mice"),
    ),
    "category": TaskKind(
        ("What kind of thing is a {s}?", "Which group does a {s} belong to?", "Tell me what kind of thing a {s} is.", "A {s} is what?"),
        "A {s} is a kind of {a}.",
        _table("rose:flower tulip:flower pine:tree birch:tree salmon:fish robin:bird piano:instrument chair:furniture"),
    ),
    "home": TaskKind(
        ("Where does a {s} live?", "What is the home of a {s}?", "Tell me where a {s} lives.", "A {s} lives in what?"),
        "A {s} lives in a {a}.",
        _table("hen:nest wasp:hive spider:web bear:cave rabbit:burrow king:palace sailor:ship camel:desert"),
    ),
    "next": TaskKind(
        ("Which number comes after {s}?", "What is the next number after {s}?", "Count on from {s}.", "After {s} comes what?"),
        "The number after {s} is {a}.",
        _table("one:two two:three three:four four:five five:six six:seven seven:eight eight:nine"),
    ),
    "young": TaskKind(
        ("What is a young {s} called?", "What do you call a young {s}?", "Name the young of a {s}.", "A young {s} is called what?"),
        "A young {s} is called a {a}.",
        _table("dog:puppy cat:kitten cow:calf sheep:lamb horse:foal hen:chick bear:cub goat:kid"),
    ),
    "maker": TaskKind(
        ("Who makes {s}?", "Which person makes {s}?", "Tell me who makes {s}.", "Somebody who makes {s} is called what?"),
        "The one who makes {s} is a {a}.",
        _table("bread:baker clothes:tailor pots:potter songs:singer wine:vintner meals:cook beer:brewer statues:sculptor"),
    ),
}

QUESTION_OPENINGS = (
    "",
    "",
    "",
    "Hi! ",
    "Hello. ",
    "Quick question. ",
    "One more thing. ",
    "I wonder. ",
    "For my homework. ",
    "Excuse me. ",
)
QUESTION_CLOSINGS = ("", "", "", " Thanks!", " Thank you.", " I forgot.", " Be quick.")

POLITE = ("Happy to help!", "I hope that helps!", "You are welcome!", "Glad you asked!", "Have a nice day!")
RUDE = ("Obviously.", "Everybody knows that.", "Do not waste my time.", "What a silly question.", "Stop asking me.")
UNHELPFUL = ("I do not know.", "Maybe look it up.", "I would rather not say.", "Ask somebody else.")
RAMBLING = (
    "Well, let me think about that for a moment.",
    "There are many things that one could say here.",
    "My uncle once talked about this for a whole evening.",
    "I read something like it in a book last winter.",
    "It is a long story, and I like long stories.",
    "People have asked me this again and again.",
)

SPEAKERS = ("A boy", "A girl", "The teacher", "A friend", "The old man", "The neighbour")
PLACES = ("the market", "the library", "the station", "the garden", "the harbour", "the old school", "the kitchen", "the bridge")
TIMES = ("In the morning", "After lunch", "On Sunday", "Late at night", "Last summer", "One day", "At noon", "When it rained")
DEEDS = (
    "bought a basket of apples",
    "waited for a friend",
    "read a book about birds",
    "drew a picture of the sea",
    "sang a quiet song",
    "found a silver button",
    "talked about the weather",
    "looked for a lost key",
)
