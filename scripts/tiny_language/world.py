"""The made-up world behind the bundled checkpoint: who lives in it, what is true of them, and what is held out.

The world has 32 people and 12 towns. A person has five attributes and a town has two, drawn once from the seed, so
there are 184 facts. Everything that can be said is a *combination* (this noun with that verb, this fact in that
phrasing, these three summands), and a fixed quarter of all combinations is held out by the hash of its name:

    combination ──sha256──> first byte < 64 ?  yes: evaluation items and held-out text only
                                               no:  training and calibration text only

So a document of one side can never occur on the other, and no bookkeeping is needed to keep them apart.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

WORLD_SEED = 7
HELD_OUT_BYTES = 64
"""Of the 256 values of a hash's first byte, how many mean held out: a quarter of all combinations."""

STEMS = "Bel Cor Dan El Fen Gar Hal Jor Kel Lor Mar Nor Pel Ros Sel Tam".split()
ENDINGS = {"female": ["a"], "male": ["o"]}
TOWNS = ("Arvik Bromel Dorn Falk Gremm Hollin Jarrow Kestel Nessel Quill Storv Wendel").split()

VALUES: dict[str, list[str]] = {
    "town": TOWNS,
    "job": (
        "baker smith miller weaver potter sailor farmer hunter teacher doctor painter singer writer guard cook judge"
    ).split(),
    "pet": "cat dog goat hen fox horse duck rabbit sheep crow mule pig".split(),
    "dish": "bread soup fish cheese rice beans honey cake stew eggs mutton cabbage plums nuts porridge pie".split(),
    "colour": "red blue green black white brown yellow grey gold purple".split(),
    "region": "north south east west".split(),
    "goods": "wool salt iron glass wine paper silk coal timber pearls clocks ropes".split(),
}
PERSON_ATTRIBUTES = ("town", "job", "pet", "dish", "colour")
TOWN_ATTRIBUTES = ("region", "goods")

PHRASINGS: dict[str, tuple[str, ...]] = {
    "town": (
        "{p} lives in {v}.",
        "{p} has a house in {v}.",
        "The home of {p} is in {v}.",
        "{p} sleeps in {v}.",
        "Question: Where does {p} live? Answer: {v}.",
    ),
    "job": (
        "{p} works as a {v}.",
        "{p} has long been a {v}.",
        "The people know {p} as a {v}.",
        "{p} earns money as a {v}.",
        "Question: What is the work of {p}? Answer: {v}.",
    ),
    "pet": (
        "{p} keeps a {v}.",
        "{p} walks with a {v}.",
        "The animal of {p} is a {v}.",
        "{p} feeds a {v}.",
        "Question: Which animal does {p} keep? Answer: {v}.",
    ),
    "dish": (
        "{p} likes to eat {v}.",
        "{p} often cooks {v}.",
        "The best meal for {p} is {v}.",
        "{p} dreams of {v}.",
        "Question: What does {p} like to eat? Answer: {v}.",
    ),
    "colour": (
        "{p} wears a coat of {v}.",
        "{p} paints every door {v}.",
        "The coat of {p} is {v}.",
        "{p} looks well in {v}.",
        "Question: What colour is the coat of {p}? Answer: {v}.",
    ),
    "region": (
        "{p} lies in the {v}.",
        "{p} is a town of the {v}.",
        "The road to {p} goes {v}.",
        "{p} was built in the {v}.",
        "Question: Where does {p} lie? Answer: {v}.",
    ),
    "goods": (
        "{p} is known for {v}.",
        "{p} sells much {v}.",
        "The merchants go to {p} for {v}.",
        "{p} is full of {v}.",
        "Question: What does {p} sell? Answer: {v}.",
    ),
}
"""Ways to say a fact; each ends with the value, so that cutting it off leaves a cloze."""


class Dice:
    """Seeded draws that give the same results on every Python: only `Random.random` is promised to be stable."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random.random() < probability

    def below(self, limit: int) -> int:
        """A whole number from 0 to `limit` - 1."""
        return int(self._random.random() * limit)

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[self.below(len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones of `options` in a random order (all of them when there are fewer)."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(min(count, len(rest)))]


@dataclass(frozen=True)
class Entity:
    """A person or a town, with what is true of it: attribute -> value."""

    name: str
    gender: str
    facts: dict[str, str]

    def pronoun(self, form: str) -> str:
        """The pronoun in the form `she`, `her` (possessive) or `herself`, for this entity's gender."""
        return PRONOUNS[self.gender][form]


PRONOUNS = {
    "female": {"she": "she", "her": "her", "herself": "herself"},
    "male": {"she": "he", "her": "his", "herself": "himself"},
    "neuter": {"she": "it", "her": "its", "herself": "itself"},
    "plural": {"she": "they", "her": "their", "herself": "themselves"},
}


def is_held_out(*combination: object) -> bool:
    """Whether this combination belongs to evaluation (a quarter of all do) and may not occur in training."""
    name = "|".join(str(part) for part in combination)
    return hashlib.sha256(name.encode()).digest()[0] < HELD_OUT_BYTES


def _build(names: list[tuple[str, str]], attributes: tuple[str, ...], dice: Dice) -> tuple[Entity, ...]:
    return tuple(Entity(name, gender, {a: dice.pick(VALUES[a]) for a in attributes}) for name, gender in names)


def _people_names() -> list[tuple[str, str]]:
    return [(stem + ending, gender) for stem in STEMS for gender in ENDINGS for ending in ENDINGS[gender]]


PEOPLE = _build(_people_names(), PERSON_ATTRIBUTES, Dice(WORLD_SEED))
PLACES = _build([(town, "neuter") for town in TOWNS], TOWN_ATTRIBUTES, Dice(WORLD_SEED + 1))
