"""Compares the token ids of answers to the same prompt, within different budgets, cold and warm."""

from __future__ import annotations

from collections.abc import Sequence

from .form import SameText


def compared(answers: Sequence[tuple[int, list[int]]]) -> list[SameText]:
    """answers: (prompt tokens, token ids). An answer that the time cut short is compared as far as it goes.

    Prompts with a single answer are left out: there is nothing to compare it with.
    """
    found = []
    for prompt in dict.fromkeys(prompt for prompt, _ in answers):
        ids = [each for of, each in answers if of == prompt]
        if len(ids) < 2:
            continue
        shortest = min(map(len, ids))
        differs = next((at for at, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1), None)
        found.append(
            SameText(
                prompt_tokens=prompt, answers=len(ids), tokens=shortest, same=differs is None, first_difference=differs
            )
        )
    return found
