"""Evaluation items: held-out sentences as multiple choice, one lm-eval task for each thing the model can do."""

from __future__ import annotations

from dataclasses import dataclass

from tiny_language.sentences import AGREEMENT, FACTS, RECALL, SUMS, Maker, Sentence, draw
from tiny_language.world import Dice

NUM_ITEMS = 200


@dataclass(frozen=True)
class Task:
    """One lm-eval task: its name, what it asks, the sentences it draws and the seed of its items."""

    name: str
    description: str
    makers: tuple[Maker, ...]
    seed: int


TASKS = (
    Task("tiny_agreement", "minimal pairs: number and gender agreement across a misleading noun", AGREEMENT, 101),
    Task("tiny_facts", "cloze: facts of the made-up world in phrasings never seen for that fact", FACTS, 102),
    Task("tiny_recall", "lists said again or backwards, and who holds what", RECALL, 103),
    Task("tiny_sums", "sums of two and three terms that were never seen as they stand", SUMS, 104),
)


def items(task: Task) -> list[dict[str, object]]:
    """`NUM_ITEMS` different items, each with its context, its choices in random order and the index of the answer."""
    dice, seen, found = Dice(task.seed), set[tuple[object, ...]](), list[dict[str, object]]()
    while len(found) < NUM_ITEMS:
        sentence = draw(task.makers, dice, held_out=True)
        if sentence.combination not in seen:
            seen.add(sentence.combination)
            found.append(_item(sentence, dice))
    return found


def _item(sentence: Sentence, dice: Dice) -> dict[str, object]:
    choices = dice.some(sentence.endings, len(sentence.endings))
    return {"context": sentence.context, "choices": choices, "answer": choices.index(sentence.endings[0])}
