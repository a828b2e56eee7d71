"""Tasks: an answer that the model writes is held against the one in the data.

documents with an answer ──prompt──▶ greedy answers of base and tuned ──score each 0 to 1──▶ means, paired interval
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from foretune.errors import UserError
from foretune.evaluation.bootstrap import interval, resampled_means
from foretune.evaluation.documents import Document

#: Scores an answer against the reference: 0 (wrong) to 1 (right).
Score = Callable[[str, str], float]

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def exact_match(reference: str, answer: str) -> float:
    """Whether the answer is the reference, white space aside."""
    return float(" ".join(reference.split()) == " ".join(answer.split()))


def gsm8k(reference: str, answer: str) -> float:
    """Whether the final number is right (Cobbe et al. 2021): what follows ``####``, else the last number."""
    expected, found = final_number(reference), final_number(answer)
    return float(expected is not None and found is not None and math.isclose(expected, found, rel_tol=1e-9))


def final_number(text: str) -> float | None:
    """The number that an answer ends with; None if it holds none. ``#### 1,234`` is 1234."""
    marked = text.rpartition("####")[2] if "####" in text else ""
    numbers = _NUMBER.findall(marked) or _NUMBER.findall(text)
    if not numbers:
        return None
    number = numbers[0] if _NUMBER.search(marked) else numbers[-1]
    return float(number.replace(",", "").replace("$", ""))


TASKS: dict[str, Score] = {"exact_match": exact_match, "gsm8k": gsm8k}


def check_tasks(names: Sequence[str]) -> None:
    """Refuse a task that does not exist, before anything is loaded."""
    for name in names:
        if name not in TASKS:
            raise UserError(
                "evaluate.tasks", name, "there is no such task", f"the tasks are {', '.join(sorted(TASKS))}"
            )


def check_documents(names: Sequence[str], documents: Sequence[Document], references: Sequence[str]) -> None:
    """Refuse tasks that these documents can't be used for."""
    if not names:
        return
    if not documents:
        problem = "needs documents with a prompt and an answer that leave room for an answer in the model's context"
        raise UserError("evaluate.tasks", ", ".join(names), problem, "leave the tasks out, or evaluate on other --data")
    if "gsm8k" in names and not all(final_number(reference) is not None for reference in references):
        problem = "needs answers that end with a number, and some of these hold none"
        raise UserError("evaluate.tasks", "gsm8k", problem, "leave the task out, or evaluate on other --data")


def score_answers(
    names: Sequence[str], references: Sequence[str], *, base: Sequence[str] | None, tuned: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Per task: mean score of base and tuned, and their difference with its 95 % interval, paired by document."""
    found = {}
    for name in names:
        score = TASKS[name]
        of_tuned = np.array([score(*pair) for pair in zip(references, tuned, strict=True)])
        values = {"documents": float(len(references))}
        if base is not None:
            of_base = np.array([score(*pair) for pair in zip(references, base, strict=True)])
            values["base"] = float(of_base.mean())
        values["tuned"] = float(of_tuned.mean())
        if base is not None:
            means = resampled_means((of_tuned - of_base)[None], np.ones(len(references)))
            low, high = interval(means[0])
            difference = float((of_tuned - of_base).mean())
            values |= {"difference": difference, "difference_low": low, "difference_high": high}
        found[name] = values
    return found
