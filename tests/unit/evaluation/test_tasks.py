"""Scoring of answers."""

from __future__ import annotations

import pytest

from foretune.errors import UserError
from foretune.evaluation.tasks import check_documents, check_tasks, exact_match, final_number, gsm8k, score_answers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 eggs.\n#### 7", 7.0),
        ("#### 1,234", 1234.0),
        ("#### $1,234.50", 1234.5),
        ("#### -5", -5.0),
        ("That makes 12 of 40.", 40.0),
        ("The answer is 18.", 18.0),
        ("#### 9 because 4 + 5", 9.0),
        ("nothing at all", None),
        ("", None),
        ("12 apples ####", 12.0),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_gsm8k_wants_the_number_and_not_the_words() -> None:
    assert gsm8k("so 3 * 4 = 12\n#### 12", "I think it is 12.00") == 1.0
    assert gsm8k("#### 12", "#### 13, not 12") == 0.0
    assert gsm8k("#### 12", "no idea") == 0.0


def test_exact_match_forgives_white_space_only() -> None:
    assert exact_match('{"a": 1}', ' {"a":\n 1} ') == 1.0
    assert exact_match("Yes", "yes") == 0.0


def test_scores_are_paired() -> None:
    references = ["1", "2", "3", "4"]
    scores = score_answers(["exact_match"], references, base=["1", "x", "x", "x"], tuned=["1", "2", "3", "x"])
    found = scores["exact_match"]
    assert (found["base"], found["tuned"], found["difference"], found["documents"]) == (0.25, 0.75, 0.5, 4.0)
    assert 0.0 <= found["difference_low"] <= 0.5 <= found["difference_high"] <= 1.0
    alone = score_answers(["exact_match"], references, base=None, tuned=["1", "2", "3", "x"])
    assert set(alone["exact_match"]) == {"tuned", "documents"}


def test_unknown_tasks_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        check_tasks(["gsm8k", "mmlu"])
    assert caught.value.field == "evaluate.tasks"
    assert caught.value.value == "mmlu"
    assert "exact_match, gsm8k" in caught.value.mend


def test_tasks_need_answers() -> None:
    check_documents([], [], [])
    with pytest.raises(UserError, match="with a prompt and an answer"):
        check_documents(["exact_match"], [], [])
