"""steps.py and page.py: which steps are right, and the page of a run, in a real browser too."""

import itertools
import random

import pytest
from conftest import TEXT, for_all

import steps
import tiny
from tiny_models import make

# ------------------------------------------------------------------------------------- the steps


def marks_of(task, solve, held, written=make.said):
    """The marks on what somebody says who holds these misconceptions."""
    right, _ = solve([])
    text = written(solve(held))
    parts = steps.marked_steps(text, (task, right))
    assert "".join(part for part, _ in parts) == text
    return [mark for _, mark in parts if mark is not None]


@pytest.mark.parametrize("task", tiny.TASKS)
def test_right_solutions_have_right_steps_and_others_a_wrong_one(task):
    rng = random.Random(0)
    beliefs = tiny.MISCONCEPTIONS[task]
    for _ in range(200):
        _, solve = tiny.draw_puzzle(rng, "test", task)
        assert set(marks_of(task, solve, [])) == set(marks_of(task, solve, [], make.led)) == {True}
        _, answer = solve([])
        for n in (1, 2, 3):
            for held in itertools.combinations(beliefs, n):
                if solve(held)[1] != answer:
                    assert False in marks_of(task, solve, held)


def marks(text, task, right_steps):
    """Of the steps, in their order."""
    parts = steps.marked_steps(text, (task, right_steps))
    return [mark for _, mark in parts if mark is not None]


def test_only_the_error_itself_is_wrong():
    """Not the steps after it, which go on from it as they should."""
    right = "two dogs 2 , a cat 3 , a plum no ."
    said = "two dogs 1, a cat 2, a plum no. So the answer is 2."
    assert marks(said, "object_counting", right) == [False, True, True]
    right = "Alice Bob : B A C , Bob Claire : B C A . Bob : C ."
    said = "Alice Bob: A B C, Bob Claire: A C B. Bob: C. So the answer is (C)."
    three = "tracking_shuffled_objects_three_objects"
    assert marks(said, three, right) == [False, True, True]
    right = "( [ { : { } , [ ] , ( ) ."
    assert marks("( [ {: { }, [ }, ( ).", "dyck_languages", right) == [True, True, False, True]
    assert marks("[ {: { }, [ ].", "dyck_languages", right) == [False, True, True]


def test_a_step_too_many_is_wrong_and_a_missing_one_has_no_mark():
    right = "two dogs 2 , a cat 3 ."
    assert marks("two dogs 2, a cat 3, a plum no.", "object_counting", right) == [True, True, False]
    assert marks("two dogs 2. So the answer is 2.", "object_counting", right) == [True]


@pytest.mark.parametrize("task", tiny.TASKS)
def test_each_misconception_spoils_some_steps_and_not_all(task):
    rng = random.Random(1)
    for _ in range(100):
        _, solve = tiny.draw_puzzle(rng, "test", task, hard=1)
        for belief in tiny.MISCONCEPTIONS[task]:
            marks = marks_of(task, solve, [belief])
            assert 1 <= marks.count(False) < len(marks), (belief, solve([belief]))


def test_a_leader_that_turns_back_begins_anew(tokenizer):
    task = "object_counting"
    wrong = "two dogs 1 , a cat 2 . So the answer is 2."
    right = "two dogs 2 , a cat 3 . So the answer is 3."
    text = f"<think> {wrong} Wait, that is wrong. {right} </think> <answer> 3 </answer>"
    text = tokenizer.decode(tokenizer(text)["input_ids"])  # as it is read off the tokens
    parts = steps.marked_steps(text, (task, "two dogs 2 , a cat 3 ."))
    assert "".join(part for part, _ in parts) == text
    marked = [(part.strip(), mark) for part, mark in parts if mark is not None]
    assert marked == [
        ("two dogs 1,", False),
        ("a cat 2.", True),
        ("two dogs 2,", True),
        ("a cat 3.", True),
    ]


def test_other_text_has_no_marks():
    solution = ("object_counting", "two dogs 2 , a cat 3 .")
    text = "First I count the dogs. They are two, and there is a cat. So the answer is 3."
    assert {mark for _, mark in steps.marked_steps(text, solution)} == {None}
    assert steps.marked_steps("two dogs 2.") == [("two dogs 2.", None)]
    # a task whose steps nobody has described
    assert {mark for _, mark in steps.marked_steps("two dogs 2.", ("else", "a b 2"))} == {None}


@for_all(TEXT)
def test_any_text_can_be_marked_and_none_of_it_is_lost(text):
    for task in tiny.TASKS:
        _, solve = tiny.TASKS[task](random.Random(0))
        parts = steps.marked_steps(text, (task, solve([])[0]))
        assert "".join(part for part, _ in parts) == text


def test_right_steps_are_those_of_the_same_puzzles():
    rows = tiny.puzzles("test", 30, 5)
    known = tiny.right_steps("test", 30, 5)
    assert [row["question"] for row in rows] == list(known)
    for row in rows:
        task, right = known[row["question"]]
        assert task == row["task"] and right.endswith(".")
