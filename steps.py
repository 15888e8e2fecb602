"""Which steps of a response are right? In the laboratory that is known: its puzzles have worked
solutions, and its models write in their form.

A step is right if it does right what it does, given the steps before it. `two dogs 1, a cat 2`
counts a group as one and then adds one cat, as it should: only the first of them is wrong. So what
is marked as wrong is the error itself, and not all that follows from it.
"""

import re

from tiny import BRACKETS, PLAYERS

# the steps of one attempt: an SFT example may turn back from an error and begin anew
BEGIN = r"^\s*(?:<think>)?\s*|Wait, that is wrong\.\s*"
END = r"So the answer is|Wait, that is wrong|</think>|<answer>|\Z"
ATTEMPT = re.compile(rf"(?s)({BEGIN})(.*?)(?={END})")


def marked_steps(text, solution=None):
    """The text in parts, [(part, is it right)]: None for what is no step, or nobody knows.
    solution: what `tiny.right_steps` has of the question, if it is one of the laboratory's."""
    if solution is None:
        return [(text, None)]
    task, right_steps = solution
    parts = []
    end = 0
    for attempt in ATTEMPT.finditer(text):
        parts.append((text[end : attempt.start(2)], None))
        parts += marked_attempt(task, attempt[2], right_steps)
        end = attempt.end()
    parts.append((text[end:], None))
    return [(part, mark) for part, mark in parts if part]


def marked_attempt(task, text, right_steps):
    """[(part, is it right)]: each step is compared with the one at its place in the right
    solution."""
    check = CHECKS.get(task)
    right = [words_of(part) for part in cut(task, right_steps) if is_step(words_of(part))]
    said = []  # the steps so far
    parts = []
    for part in cut(task, text):
        words = words_of(part)
        mark = None
        if check and is_step(words):
            i = len(said)
            mark = i < len(right) and check(words, right[i], said, right[:i])
            said.append(words)
        parts.append((part, mark))
    return parts


def cut(task, text):
    """The text in steps, each with the sign that ends it, and what is between them."""
    signs = ",.:" if task == "dyck_languages" else ",."
    return re.findall(rf"\s+|[{signs}]|[^\s{signs}][^{signs}]*[{signs}]?", text)


def words_of(step):
    return re.findall(r"\w+|[^\w\s,.:]", step)


def is_step(words):
    """Does it look like one: `two cars 7`, `a plum no`, names, letters or brackets? Not prose."""
    known = {*PLAYERS, *"ABCDE", *BRACKETS, *BRACKETS.values()}
    if not words:
        return False
    return words[-1] == "no" or is_number(words[-1]) or known.issuperset(words)


def is_number(word):
    return bool(re.fullmatch("[0-9]{1,4}", word))


# ------------------------------------------------------------- one step, as lists of words
# said, right: the step and the one at its place in the right solution; before them: the others


def adds_right(said, right, said_before, right_before):
    """`two cars 7`: the same item, and it adds as much to the total; `no` for nothing."""
    same_item = said[:-1] == right[:-1]
    return same_item and added(said, said_before) == added(right, right_before)


def added(step, before):
    """What this step adds to the last total before it; `no` if that is what it says."""
    if not is_number(step[-1]):
        return step[-1]
    totals = [int(words[-1]) for words in before if words and is_number(words[-1])]
    last = totals[-1] if totals else 0
    return int(step[-1]) - last


def same_brackets(said, right, said_before, right_before):
    """`( [` that are open, then pairs like `[ ]`, the last first."""
    return said == right


def swaps_right(said, right, said_before, right_before):
    """`Alice Bob : B A C`: the same two, and they have swapped what each had before; at the end
    `Bob : A`, what Bob has."""
    first_step = [*right_before, right][0]
    letters = "ABCDE"
    if said_before:
        letters = said_before[-1][2:]
    has = dict(zip(PLAYERS[: len(first_step) - 2], letters))
    one, other = right[:2]
    if len(right) == 2:
        return said == [one, has.get(one)]
    has[one], has[other] = has.get(other), has.get(one)
    return said == [one, other, *has.values()]


CHECKS = {
    "object_counting": adds_right,
    "dyck_languages": same_brackets,
    "tracking_shuffled_objects_three_objects": swaps_right,
    "tracking_shuffled_objects_five_objects": swaps_right,
}
