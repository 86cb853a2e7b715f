"""Which layer of the teacher each layer of the student looks to.

    teacher   0  1  2  3  4  5         uniform   0:1  1:3  2:5     every layer stands for as many of the teacher's
                 |     |     |         last      0:3  1:4  2:5     the teacher's last layers
    student      0     1     2         final               2:5     the last one alone (DistilBERT)
                                       explicit  0:0  2:5          as said; layers that are not named are left free

`uniform` is TinyBERT's g(m) = m N / M (Jiao et al. 2020), rounded where M does not divide N.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.errors import LLMCompressError, raise_all

Pairs = tuple[tuple[int, int], ...]
"""(student's layer, teacher's layer), both counted from 0."""
NAMED = ("uniform", "last", "final")


def layer_map(asked: str, num_student: int, num_teacher: int) -> Pairs:
    """The pairs of a layer map: `uniform`, `last`, `final`, or `0:1,1:3` (student:teacher).

    Raises: LLMCompressError for a map that is none, and for each pair that is out of range or names a student's layer
    twice.

    >>> layer_map("uniform", 3, 6), layer_map("last", 2, 6), layer_map("0:1,1:5", 3, 6)
    (((0, 1), (1, 3), (2, 5)), ((0, 4), (1, 5)), ((0, 1), (1, 5)))
    """
    if asked == "final":
        return ((num_student - 1, num_teacher - 1),)
    if asked in NAMED:
        if num_student > num_teacher:
            raise LLMCompressError(
                f"layer_map {asked}: the student has {num_student} layers, the teacher {num_teacher}; at most as many",
                "name the pairs: --layer-map 0:0,1:0,…",
            )
        if asked == "last":
            return tuple((layer, num_teacher - num_student + layer) for layer in range(num_student))
        return tuple((layer, _uniform(layer, num_student, num_teacher)) for layer in range(num_student))
    pairs = parse(asked)
    raise_all(_problems(pairs, num_student, num_teacher))
    return pairs


def parse(asked: str) -> Pairs:
    """The pairs that a map spells, not yet held against any model; () for a named one.

    Raises: LLMCompressError.
    """
    if asked in NAMED:
        return ()
    pairs = []
    for piece in asked.split(","):
        student, colon, teacher = piece.strip().partition(":")
        if not colon or not student.isdecimal() or not teacher.isdecimal():
            raise LLMCompressError(
                f"layer_map {asked!r}: must be {', '.join(NAMED)}, or pairs student:teacher such as 0:1,1:3"
            )
        pairs.append((int(student), int(teacher)))
    return tuple(pairs)


def spelled(pairs: Pairs) -> str:
    """The map as it is written.

    >>> spelled(((0, 1), (1, 3)))
    '0:1,1:3'
    """
    return ",".join(f"{student}:{teacher}" for student, teacher in pairs)


def evenly(num_kept: int, num_layers: int) -> tuple[int, ...]:
    """`num_kept` of `num_layers` layers, evenly spaced, the first and the last among them.

    >>> evenly(3, 6), evenly(1, 4), evenly(4, 4)
    ((0, 2, 5), (0,), (0, 1, 2, 3))
    """
    if num_kept == 1:
        return (0,)
    return tuple(round(index * (num_layers - 1) / (num_kept - 1)) for index in range(num_kept))


def _uniform(layer: int, num_student: int, num_teacher: int) -> int:
    return round((layer + 1) * num_teacher / num_student) - 1


def _problems(pairs: Sequence[tuple[int, int]], num_student: int, num_teacher: int) -> list[LLMCompressError]:
    problems = []
    for student, teacher in pairs:
        for whose, index, count in (("student", student, num_student), ("teacher", teacher, num_teacher)):
            if index >= count:
                problems.append(
                    LLMCompressError(
                        f"layer_map {student}:{teacher}: the {whose} has layers 0 to {count - 1}, {index} is none"
                    )
                )
    named = [student for student, _ in pairs]
    twice = sorted({student for student in named if named.count(student) > 1})
    return problems + [LLMCompressError(f"layer_map: layer {layer} of the student is mapped twice") for layer in twice]
