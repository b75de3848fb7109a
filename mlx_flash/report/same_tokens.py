"""Compares the token ids of answers to the same prompt, within different budgets, cold and warm."""

from __future__ import annotations

from collections.abc import Sequence

from .form import SameText


def compared(answers: Sequence[tuple[int, str, list[int]]]) -> list[SameText]:
    """answers: (prompt tokens, name of the budget, token ids).

    An answer that the time cut short is compared as far as it goes. Prompts with a single answer are left out: there
    is nothing to compare it with.
    """
    found = []
    for prompt in dict.fromkeys(prompt for prompt, _, _ in answers):
        budgets, ids = zip(*((budget, each) for of, budget, each in answers if of == prompt), strict=True)
        if len(ids) < 2:
            continue
        differs = next((at for at, tokens in enumerate(zip(*ids, strict=False)) if len({*tokens}) > 1), None)
        found.append(
            SameText(
                prompt_tokens=prompt,
                budgets=len({*budgets}),
                answers=len(ids),
                tokens=min(map(len, ids)),
                same=differs is None,
                first_difference=differs,
            )
        )
    return found
