"""Documents of the small language: stories, profiles, sums, lists and conversations, on either side of the split.

Training and calibration text draw their sentences from the trained combinations, held-out text from the held-out
ones; the documents themselves are built alike.
"""

from __future__ import annotations

from collections.abc import Callable

from tiny_language.sentences import AGREEMENT, FACTS, RECALL, SUMS, draw, fact
from tiny_language.world import PEOPLE, PERSON_ATTRIBUTES, PHRASINGS, Dice, Entity

SYSTEM = "You know the people and the towns."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The chat format (ChatML) that training sees and the tokenizer carries; `render_chat` writes the same without bos."""

QUESTIONS = {
    "town": "Where does {p} live?",
    "job": "What is the work of {p}?",
    "pet": "Which animal does {p} keep?",
    "dish": "What does {p} like to eat?",
    "colour": "What colour is the coat of {p}?",
}
DIRECTIONS = ("market", "harbour", "forest", "mountain", "castle", "lake")


def story(dice: Dice, held_out: bool) -> str:
    """A walk of one person past people and animals: number and gender must agree from one sentence to the next."""
    hero = dice.pick(PEOPLE)
    she, her = hero.pronoun("she"), hero.pronoun("her")
    opening = f"One day {hero.name} went to the {dice.pick(DIRECTIONS)} with {her} {hero.facts['pet']}."
    middle = [draw(AGREEMENT, dice, held_out).text for _ in range(dice.between(2, 4))]
    remarks = (f"{she.capitalize()} was tired.", f"{hero.name} saw it and {she} laughed.", f"Then {she} sat down.")
    remark = dice.pick(remarks)
    middle.insert(dice.between(1, len(middle)), remark)
    closing = f"In the evening {she} went back to {her} house in {hero.facts['town']}."
    return " ".join([opening, *middle] + ([closing] if dice.chance(0.5) else []))


def sayings(dice: Dice, held_out: bool) -> str:
    """Loose sentences about agreement, beginning anywhere, with no story around them."""
    return " ".join(draw(AGREEMENT, dice, held_out).text for _ in range(dice.between(2, 4)))


def profile(dice: Dice, held_out: bool) -> str:
    """What is true of one person; after the first sentence a pronoun may stand for the name."""
    chosen: list[tuple[str, int]] = []
    while not chosen:
        person = dice.pick(PEOPLE)
        chosen = dice.some(_phrasings(person, held_out, dice), dice.between(3, 6))
    sentences = [fact(person, attribute, phrasing, dice).text for attribute, phrasing in chosen]
    return " ".join([sentences[0], *(_with_pronoun(text, person, dice) for text in sentences[1:])])


def _phrasings(person: Entity, held_out: bool, dice: Dice) -> list[tuple[str, int]]:
    every = [(a, i) for a in PERSON_ATTRIBUTES for i in range(len(PHRASINGS[a]))]
    return [(a, i) for a, i in every if fact(person, a, i, dice).held_out == held_out]


def _with_pronoun(text: str, person: Entity, dice: Dice) -> str:
    if text.startswith(person.name + " ") and dice.chance(0.4):
        return person.pronoun("she").capitalize() + text[len(person.name) :]
    return text


def almanac(dice: Dice, held_out: bool) -> str:
    """Facts about several people and towns."""
    return " ".join(draw(FACTS, dice, held_out).text for _ in range(dice.between(3, 6)))


def arithmetic(dice: Dice, held_out: bool) -> str:
    """A few small sums."""
    return " ".join(draw(SUMS, dice, held_out).text for _ in range(dice.between(3, 6)))


def lists(dice: Dice, held_out: bool) -> str:
    """Lists said again, said backwards, and who holds what."""
    return " ".join(draw(RECALL, dice, held_out).text for _ in range(dice.between(1, 3)))


def conversation(dice: Dice) -> list[dict[str, str]]:
    """One to three questions about people or sums with their answers, at times after a system message."""
    messages = [{"role": "system", "content": SYSTEM}] if dice.chance(0.3) else []
    for _ in range(dice.between(1, 3)):
        question, answer = _sum_turn(dice) if dice.chance(0.3) else _fact_turn(dice)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _sum_turn(dice: Dice) -> tuple[str, str]:
    text = draw(SUMS, dice, held_out=False).text
    while " makes " not in text:
        text = draw(SUMS, dice, held_out=False).text
    return f"How much is {text.partition(' makes ')[0]}?", text


def _fact_turn(dice: Dice) -> tuple[str, str]:
    person, attribute = dice.pick(PEOPLE), dice.pick(PERSON_ATTRIBUTES)
    answers = [fact(person, attribute, i, dice) for i in range(4)]
    trained = [sentence.text for sentence in answers if not sentence.held_out]
    return (QUESTIONS[attribute].format(p=person.name), dice.pick(trained)) if trained else _fact_turn(dice)


def render_chat(messages: list[dict[str, str]]) -> str:
    """The conversation as the chat template writes it, without the leading bos token."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


KINDS: tuple[tuple[Callable[[Dice, bool], str], int], ...] = (
    (story, 12), (sayings, 8), (profile, 18), (almanac, 22), (arithmetic, 18), (lists, 22)
)  # fmt: skip
"""The kinds of plain documents and how many of a hundred each makes."""
_WHEEL = tuple(kind for kind, weight in KINDS for _ in range(weight))


def document(dice: Dice, held_out: bool) -> str:
    """A plain document of a random kind."""
    return dice.pick(_WHEEL)(dice, held_out)


def documents(seed: int, num_characters: int, held_out: bool) -> list[str]:
    """Different plain documents, in a fixed order, until they hold at least `num_characters` characters."""
    dice, found, total = Dice(seed), dict[str, None](), 0
    while total < num_characters:
        text = document(dice, held_out)
        if text not in found:
            found[text] = None
            total += len(text)
    return list(found)
