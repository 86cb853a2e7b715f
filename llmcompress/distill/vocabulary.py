"""Whether two models speak of the same tokens, which a comparison of their predictions takes for granted.

Checkpoints of one family often differ in padding rows alone: Qwen2.5's smaller models have 151936 rows of embeddings,
the larger ones 152064, and their tokenizer 151665 tokens. Comparing the tensors fails; padding the shorter one teaches
the student to spend probability on rows that stand for nothing.

    teacher  [ tokens ........................ | padding ......... ]
    student  [ tokens ........................ | padd ]
             [ what both distributions are taken over ]   the rest is cut off, then both are normalized

Token by token, the tokenizers must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmcompress.errors import LLMCompressError


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """size: rows of logits that both models have. note: what was cut off, None where nothing was."""

    size: int
    note: str | None


def shared_vocabulary(
    teacher: str,
    teacher_tokens: Mapping[str, int],
    teacher_rows: int,
    student: str,
    student_tokens: Mapping[str, int],
    student_rows: int,
) -> SharedVocabulary:
    """The rows of logits to compare; `*_tokens` map token to id, `*_rows` are the widths of the logits.

    Raises: LLMCompressError when the tokenizers differ in any token, or a token has no row in one of the models.
    """
    if dict(teacher_tokens) != dict(student_tokens):
        differing = sorted(
            token
            for token in teacher_tokens.keys() | student_tokens.keys()
            if teacher_tokens.get(token) != student_tokens.get(token)
        )
        raise LLMCompressError(
            f"teacher {teacher} and student {student} have different tokenizers: {len(teacher_tokens)} tokens against "
            f"{len(student_tokens)}, {len(differing)} differ ({differing[0]!r} first)",
            "predictions can be compared over one vocabulary only: cut the student from the teacher (--keep 0.5), or "
            "choose a teacher of the student's family",
        )
    size = min(teacher_rows, student_rows)
    needed = max(teacher_tokens.values(), default=-1) + 1
    if size < needed:
        short, rows = (teacher, teacher_rows) if teacher_rows < student_rows else (student, student_rows)
        raise LLMCompressError(
            f"{short}: has {rows} rows of logits, and its tokenizer has ids up to {needed - 1}",
            "the checkpoint and its tokenizer do not belong together",
        )
    if teacher_rows == student_rows:
        return SharedVocabulary(size, None)
    whose = "teacher" if teacher_rows > student_rows else "student"
    note = (
        f"teacher and student have {teacher_rows} and {student_rows} rows of logits for the same {len(teacher_tokens)} "
        f"tokens; the {abs(teacher_rows - student_rows)} rows that only the {whose} has are padding and were left out"
    )
    return SharedVocabulary(size, note)
