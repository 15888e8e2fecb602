"""The built-in laboratory: puzzles without end, in splits that do not overlap.

They are worded like five subtasks of BIG-Bench Hard (tiny_models/puzzles.py), so that a model
trained here can be tested on the official files. Beside the right solution come those of solvers
who hold a plausible *misconception* ("ignores not"). tiny_models/make.py trains four small models
on them. A puzzle is (question, {solver: (worked solution, answer)}); "right" is always a solver.
"""

import hashlib
import random
from pathlib import Path

from tiny_models.puzzles import PUZZLES

TASKS = {puzzle.__name__: puzzle for puzzle in PUZZLES}
# fingerprints of BBH's own questions, which are in no split (tiny_models/make.py --exclude)
OFFICIAL = Path(__file__).parent / "tiny_models" / "official_questions.txt"
official = set(OFFICIAL.read_text().split()) if OFFICIAL.exists() else set()


def fingerprint(question):
    """Questions that differ in white space only are the same question."""
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()


def split_of(question):
    """train, validation or test: decided by the question alone, so that they cannot overlap."""
    mark = fingerprint(question)[:12]
    named = {"0": "test", "1": "test", "2": "validation"}
    return "official" if mark in official else named.get(mark[0], "train")


def draw(rng, split, task):
    """One puzzle of that split: (question, {solver: (steps, answer)})."""
    while True:
        question, solutions = TASKS[task](rng)
        if split_of(question) == split:
            return question, solutions


def puzzles(split, n, seed=0):
    """n different puzzles, tasks in turn: a list of {question, answer, task}."""
    rng, rows = random.Random(f"{split} {seed}"), {}
    for _ in range(20 * n + 1000):  # short expressions are not without end
        if len(rows) == n:
            return list(rows.values())
        task = list(TASKS)[len(rows) % len(TASKS)]
        question, solutions = draw(rng, split, task)
        rows[question] = {"question": question, "answer": solutions["right"][1], "task": task}
    raise ValueError(f"tiny has fewer than {n} different {split} questions: ask for less")
