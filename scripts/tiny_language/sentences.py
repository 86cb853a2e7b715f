"""The sentences of the small language, each with the combination it stands for and the wrong way to end it.

A sentence is a context and a list of endings: the first is right, the others are the mistakes that a damaged model
makes. Training reads `context + endings[0]`; an evaluation item asks which ending the model finds likeliest. So what
is trained and what is tested are one definition, and only the held-out rule of `world.py` separates them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tiny_language.world import PEOPLE, PHRASINGS, PLACES, PRONOUNS, VALUES, Dice, Entity, is_held_out

ANIMATE = (
    "dog dogs|cat cats|child children|goose geese|man men|woman women|mouse mice|wolf wolves|girl girls|boy boys|"
    "king kings|queen queens|sailor sailors|farmer farmers|horse horses|lamb lambs|bird birds|fox foxes"
)
PLACE = (
    "tower towers|boat boats|house houses|tree trees|gate gates|wall walls|mill mills|bridge bridges|river rivers|"
    "field fields|shelf shelves|leaf leaves|barn barns|tent tents"
)
VERB = (
    "sleeps sleep|sings sing|runs run|waits wait|laughs laugh|dances dance|watches watch|cries cry|eats eat|"
    "hides hide|plays play|listens listen|works work|rests rest"
)
AUXILIARY = "is are|was were|has been have been|does not seem do not seem"
ADJECTIVES = "old small quiet happy tired brave thin tall young hungry proud gentle".split()
PREPOSITIONS = ("near", "behind", "beside", "in front of", "under")
TAILS = ("all day", "at night", "in the rain", "with the others", "for a long time", "in the cold wind", "until noon")
REFLEXIVE_VERBS = ("hurt", "washed", "saw", "dressed", "hid", "praised", "blamed", "warmed")
POSSESSIVE_VERBS = ("lost", "found", "forgot", "sold", "cleaned", "carried")
THINGS = (
    "rope drum lamp bell cup hat knife book ring key boot spoon coin map flute basket candle mirror needle shovel "
    "ladder kettle pillow bucket hammer button ribbon feather pebble whistle"
).split()
COUNTED = "pears plums coins eggs cups books shells stones keys nuts".split()


def _pairs(text: str) -> list[tuple[str, str]]:
    halves = [entry.split() for entry in text.split("|")]
    return [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in halves]


NOUNS, PLACE_NOUNS, VERBS, AUXILIARIES = _pairs(ANIMATE), _pairs(PLACE), _pairs(VERB), _pairs(AUXILIARY)
NOUN_GENDERS = {"man": "male", "king": "male", "boy": "male", "woman": "female", "queen": "female", "girl": "female"}


@dataclass(frozen=True)
class Sentence:
    """What stands before the deciding word, the right ending followed by wrong ones, and the combination's name."""

    context: str
    endings: tuple[str, ...]
    combination: tuple[object, ...]

    @property
    def text(self) -> str:
        """The sentence as it is said, with its right ending."""
        return self.context + self.endings[0]

    @property
    def held_out(self) -> bool:
        """Whether it belongs to evaluation."""
        return is_held_out(*self.combination)


Maker = Callable[[Dice], Sentence]


def draw(makers: tuple[Maker, ...], dice: Dice, held_out: bool) -> Sentence:
    """A sentence of one of the kinds on the asked side of the held-out rule."""
    maker = dice.pick(makers)
    while True:
        sentence = maker(dice)
        if sentence.held_out == held_out:
            return sentence


def verb_agreement(dice: Dice) -> Sentence:
    """`The old dogs near the tower` + ` sleep all day.` / ` sleeps all day.`: the nearer noun misleads."""
    noun, place, verb = dice.pick(NOUNS), dice.pick(PLACE_NOUNS), dice.pick(VERBS)
    number, other = dice.below(2), dice.below(2)
    adjective, preposition, tail = dice.pick(ADJECTIVES), dice.pick(PREPOSITIONS), dice.pick(TAILS)
    context = f"The {adjective} {noun[number]} {preposition} the {place[other]}"
    endings = (f" {verb[number]} {tail}.", f" {verb[1 - number]} {tail}.")
    return Sentence(context, endings, ("verb", noun[number], place[other], verb[0]))


def auxiliary_agreement(dice: Dice) -> Sentence:
    """`The geese that saw the king` + ` are tired.` / ` is tired.`: a whole clause lies between."""
    noun, seen, auxiliary = dice.pick(NOUNS), dice.pick(NOUNS), dice.pick(AUXILIARIES)
    number, other, adjective = dice.below(2), dice.below(2), dice.pick(ADJECTIVES)
    verb = dice.pick(("saw", "followed", "heard", "feared"))
    context = f"The {noun[number]} that {verb} the {seen[other]}"
    endings = (f" {auxiliary[number]} {adjective}.", f" {auxiliary[1 - number]} {adjective}.")
    return Sentence(context, endings, ("auxiliary", noun[number], seen[other], auxiliary[0]))


def determiner_agreement(dice: Dice) -> Sentence:
    """`These old` + ` dogs wait at night.` / ` dog waits at night.`"""
    noun, verb, number = dice.pick(NOUNS), dice.pick(VERBS), dice.below(2)
    adjective, tail = dice.pick(ADJECTIVES), dice.pick(TAILS)
    endings = tuple(f" {noun[n]} {verb[n]} {tail}." for n in (number, 1 - number))
    context = f"{('This', 'These')[number]} {adjective}"
    return Sentence(context, endings, ("determiner", noun[number], adjective, verb[0]))


def reflexive_agreement(dice: Dice) -> Sentence:
    """`Bela hurt` + ` herself at night.` / ` himself at night.`; nouns in the plural take `themselves`."""
    subject, gender = _subject(dice)
    verb, tail = dice.pick(REFLEXIVE_VERBS), dice.pick(TAILS)
    endings = tuple(f" {PRONOUNS[g]['herself']} {tail}." for g in (gender, _other_gender(gender, dice)))
    return Sentence(f"{subject} {verb}", endings, ("reflexive", subject, verb, tail))


def possessive_agreement(dice: Dice) -> Sentence:
    """`Coro lost` + ` his drum.` / ` her drum.`"""
    subject, gender = _subject(dice)
    verb, thing = dice.pick(POSSESSIVE_VERBS), dice.pick(THINGS)
    endings = tuple(f" {PRONOUNS[g]['her']} {thing}." for g in (gender, _other_gender(gender, dice)))
    return Sentence(f"{subject} {verb}", endings, ("possessive", subject, verb, thing))


def _subject(dice: Dice) -> tuple[str, str]:
    if dice.chance(0.6):
        person = dice.pick(PEOPLE)
        return person.name, person.gender
    singular, plural = dice.pick([noun for noun in NOUNS if noun[0] in NOUN_GENDERS])
    return (f"The {plural}", "plural") if dice.chance(0.4) else (f"The {singular}", NOUN_GENDERS[singular])


def _other_gender(gender: str, dice: Dice) -> str:
    return dice.pick([g for g in ("female", "male", "plural") if g != gender])


def fact(entity: Entity, attribute: str, phrasing: int, dice: Dice) -> Sentence:
    """`The home of Bela is in` + ` Arvik.` / ` Dorn.` / ` Falk.` / ` Quill.`: one fact in one phrasing."""
    template, value = PHRASINGS[attribute][phrasing], entity.facts[attribute]
    context = template.partition(" {v}")[0].replace("{p}", entity.name)
    wrong = dice.some([v for v in VALUES[attribute] if v != value], 3)
    return Sentence(context, tuple(f" {v}." for v in (value, *wrong)), ("fact", entity.name, attribute, phrasing))


def any_fact(dice: Dice) -> Sentence:
    """A fact of a person (nine times in ten) or of a town, in any phrasing."""
    entity = dice.pick(PEOPLE) if dice.chance(0.9) else dice.pick(PLACES)
    attribute = dice.pick(tuple(entity.facts))
    return fact(entity, attribute, dice.below(len(PHRASINGS[attribute])), dice)


def two_term_sum(dice: Dice) -> Sentence:
    """`7 plus 5 makes` + ` 12.`, or the same sum told as a small story."""
    a, b, phrasing = dice.between(1, 10), dice.between(1, 10), dice.below(4)
    person, things = dice.pick(PEOPLE), dice.pick(COUNTED)
    context, result = (
        (f"{a} plus {b} makes", a + b),
        (f"{a + b} less {a} leaves", b),
        (f"{person.name} had {a} {things} and got {b} more. Now {person.pronoun('she')} has", a + b),
        (f"{person.name} had {a + b} {things} and gave away {a}. Now {person.pronoun('she')} has", b),
    )[phrasing]
    end = "." if phrasing < 2 else f" {things}."
    told = things if phrasing > 1 else ""
    return Sentence(context, _number_endings(result, end, dice), ("sum", phrasing, a, b, told))


def three_term_sum(dice: Dice) -> Sentence:
    """`4 plus 9 plus 2 makes` + ` 15.`, at most 20; the held-out triples were never summed in training."""
    a, b = dice.between(1, 9), dice.between(1, 9)
    c = dice.between(1, min(9, 20 - a - b))
    return Sentence(f"{a} plus {b} plus {c} makes", _number_endings(a + b + c, ".", dice), ("sum", a, b, c))


def _number_endings(result: int, end: str, dice: Dice) -> tuple[str, ...]:
    near = [n for n in range(result - 3, result + 4) if n != result and n > 0]
    return tuple(f" {n}{end}" for n in (result, *dice.some(near, 3)))


def repeated_list(dice: Dice) -> Sentence:
    """`List: rope drum lamp bell. Again: rope drum` + ` lamp bell.`: copying in order."""
    things = dice.some(THINGS, dice.between(4, 6))
    cut = dice.between(1, len(things) - 1)
    context = f"List: {' '.join(things)}. Again: {' '.join(things[:cut])}"
    return Sentence(context, _list_endings(things[cut:], things, dice), ("list", *things))


def reversed_list(dice: Dice) -> Sentence:
    """`List: rope drum lamp. Back: lamp` + ` drum rope.`: copying against the order."""
    things = dice.some(THINGS, dice.between(3, 5))
    cut, turned = dice.between(1, len(things) - 1), things[::-1]
    context = f"List: {' '.join(things)}. Back: {' '.join(turned[:cut])}"
    return Sentence(context, _list_endings(turned[cut:], things, dice), ("back", *things))


def _list_endings(rest: list[str], things: list[str], dice: Dice) -> tuple[str, ...]:
    wrong = dice.some([t for t in things if t != rest[0]], 2) + dice.some([t for t in THINGS if t not in things], 1)
    tail = "".join(f" {t}" for t in rest[1:]) + "."
    return tuple(f" {first}{tail}" for first in (rest[0], *wrong))


def who_has_it(dice: Dice) -> Sentence:
    """`The drum is with Bela, the rope is with Coro and the bell is with Joro. The rope is with` + ` Coro.`"""
    people, things = dice.some(PEOPLE, 4), dice.some(THINGS, 3)
    holders, asked = [person.name for person in people[:3]], dice.below(3)
    clauses = [f"he {thing} is with {name}" for name, thing in zip(holders, things, strict=True)]
    context = f"T{clauses[0]}, t{clauses[1]} and t{clauses[2]}. The {things[asked]} is with"
    wrong = [name for name in holders if name != holders[asked]] + [people[3].name]
    return Sentence(context, tuple(f" {n}." for n in (holders[asked], *wrong)), ("who", *holders, *things))


AGREEMENT: tuple[Maker, ...] = (
    verb_agreement, auxiliary_agreement, determiner_agreement, reflexive_agreement, possessive_agreement
)  # fmt: skip
FACTS: tuple[Maker, ...] = (any_fact,)
RECALL: tuple[Maker, ...] = (repeated_list, reversed_list, who_has_it)
SUMS: tuple[Maker, ...] = (two_term_sum, three_term_sum)
