"""The built-in laboratory: puzzles without end, in splits that do not overlap.

They are worded like five subtasks of BIG-Bench Hard, so that a model trained here can be tested on
the official files. Beside the right solution come those of solvers who hold a plausible
*misconception* ("ignores not"). tiny_models/make.py trains four small models on them.
A puzzle is (question, {solver: (worked solution, answer)}); "right" is always a solver.

The wording of the questions is that of BIG-Bench Hard, github.com/suzgunmirac/BIG-Bench-Hard:
MIT License, Copyright (c) 2022 suzgunmirac (the whole notice: tiny_models/LICENSE-BIG-BENCH-HARD).
"""

import hashlib
import itertools
import random
import re
from pathlib import Path

# ---------------------------------------------------------------------------------- the puzzles

KINDS = {
    "fruit": "apple banana blackberry grape nectarine orange peach plum raspberry strawberry",
    "vegetable": "cabbage carrot cauliflower garlic onion potato yam lettuce_head"
    " head_of_broccoli stalk_of_celery",
    "animal": "bear cat chicken cow dog donkey duck fish frog goat mouse pig rabbit snail snake",
    "musical instrument": "accordion clarinet drum flute piano trombone trumpet violin",
    "object": "bed car chair couch fridge lamp microwave oven stove table toaster",
}
PLURALS = {"mouse": "mice", "fish": "fish", "rry": "rries", "ch": "ches", "to": "toes"}  # by ending
PLURALS |= {"head_of_broccoli": "heads_of_broccoli", "stalk_of_celery": "stalks_of_celery", "": "s"}
NAMES = """Alejandro Alexis Amberly Andree Antwan Audrie Bernita Christie Conception Crista Dallas
Delbert Delfina Elanor Fidel Fletcher Gwenn Helene Inga Jamey Jaymie Jerry Jim Ka Kandi Kristian
Leda Lorine Maybelle Michael Michaela Millicent Millie Osvaldo Phoebe Rashida Raymond Ryan Sal
Shalonda Shaunda Shenna Sherrie Sima Tamika Teressa Vernell Vina Willian Yoland""".split()
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def boolean_expressions(rng):
    """`not ( True ) and ( True ) is`: rewritten, a kind of step at a time, until a word is left."""
    rules = [  # the kinds of step: what, and how often at a time (0: wherever it stands)
        (r"not (True|False)|\( (True|False) \)", 0),
        (r"(True|False) and (True|False)", 1),
        (r"(?<!and )(True|False) or (True|False)(?! and)", 1),
    ]

    def expression(n):
        if n == 1:
            return rng.choice(["True", "False"])
        form = rng.random()
        if n == 2 or form < 0.3:
            return f"not {expression(n - 1)}"
        if form < 0.47:
            return f"( {expression(n - 2)} )"
        left = rng.randint(1, n - 2)
        return f"{expression(left)} {rng.choice(['and', 'or'])} {expression(n - 1 - left)}"

    def solve(text):
        steps = []
        while " " in text:
            pattern, times = next(rule for rule in rules if re.search(rule[0], text))
            text = re.sub(pattern, lambda piece: str(eval(piece[0])), text, count=times)
            steps.append(text)
        return " = ".join(steps), text

    question = expression(rng.choice([7, 8, 8, 9, 10]))  # 8 words in BBH, all of them
    swapped = question.replace("and", "AND").replace("or", "and").replace("AND", "or")
    wrong = {"ignores not": solve(question.replace("not ", "")), "mixes up and/or": solve(swapped)}
    return f"{question} is", {"right": solve(question), **wrong}


def navigate(rng):
    """Do the steps lead back to the start? The position after every instruction: east, north."""
    wanted = rng.choices(["Yes", "No"], [44, 56])[0]  # as in BBH; by chance few walks lead back
    tempting = wanted == "No" and rng.random() < 0.5  # lead back if only the moves are counted
    ahead = rng.random() < 0.5  # always facing north, or with turns
    points = ["north", "east", "south", "west"]
    quarters = {"": 0, "forward": 0, "right": 1, "around": 2, "backward": 2, "left": 3}  # clockwise

    def instruction():  # (word, steps): a turn has no steps
        if not ahead and rng.random() >= 0.6:
            return rng.choice(["right", "around", "left"]), 0
        side = rng.choice(["forward", "right", "backward", "left"]) if ahead else ""
        return side, rng.randint(1, 10)

    def solve(turning=True, cap=10):
        x = y = facing = 0
        steps = []
        for word, n in moves:
            way = (facing + turning * quarters[word]) % 4
            x += min(n, cap) * (0, 1, 0, -1)[way]
            y += min(n, cap) * (1, 0, -1, 0)[way]
            steps.append(f"{points[way]} {n} : {x} {y}" if n else f"turn {points[way]}")
            facing = facing if n else way
        return " , ".join(steps) + " .", "Yes" if x == y == 0 else "No"

    while True:
        moves = [instruction() for _ in range(rng.randint(2 if ahead else 3, 8))]
        if sum(n > 0 for _, n in moves) > 1 and solve()[1] == wanted:
            if not tempting or solve(cap=1)[1] == "Yes":
                break
    say = ["Always face forward."] * ahead
    for word, n in moves:
        say.append(f"Take {n} step{'s' * (n > 1)} {word}".strip() + "." if n else f"Turn {word}.")
    head = "If you follow these instructions, do you return to the starting point?"
    wrong = {"never turns": solve(turning=False), "counts moves, not steps": solve(cap=1)}
    return f"{head} {' '.join(say)}\nOptions:\n- Yes\n- No", {"right": solve(), **wrong}


def object_counting(rng):
    """How many fruits do I have? A running total over the list; `no` for what is not asked for."""
    kind = rng.choice(list(KINDS))
    asked = KINDS[kind].split()
    nouns = rng.sample(asked, rng.randint(3, 8))
    if kind != "object":  # everything is an object; of the rest, some lists hold a second kind
        other = rng.choice([k for k in KINDS if k != kind])
        nouns += rng.sample(KINDS[other].split(), rng.randint(0, min(5, 10 - len(nouns))))
    rng.shuffle(nouns)
    items = []  # (noun, how many, as it is written)
    for noun in nouns:
        n = rng.choice([1, 1, 1, 1, 1, 1, 2, 2, 3, 4, 5])
        article = "an" if noun[0] in "aeiou" else "a"
        number = [article, "two", "three", "four", "five"][n - 1]
        ending = next(ending for ending in PLURALS if noun.endswith(ending))
        written = noun if n == 1 else noun.removesuffix(ending) + PLURALS[ending]
        items.append((noun, n, f"{number} {written}".replace("_", " ")))

    def solve(counted, cap=5):
        total, steps = 0, []
        for noun, n, text in items:
            total += min(n, cap) * (noun in counted)
            steps.append(f"{text} {total if noun in counted else 'no'}")
        return " , ".join(steps) + " .", str(total)

    *listed, last = [text for _, _, text in items]
    wrong = {"counts every kind": solve(nouns), "counts lines, not quantities": solve(asked, cap=1)}
    question = f"I have {', '.join(listed)}, and {last}. How many {kind}s do I have?"
    return question, {"right": solve(asked), **wrong}


def web_of_lies(rng):
    """`Vernell says Sherrie lies.` ... does the last one tell the truth? One person at a time."""
    people = rng.sample(NAMES, rng.choice([4, 5, 5, 5, 6]))
    claims = [rng.random() < 0.5 for _ in people]  # what each is said to be
    words = ["lies", "tells the truth"]
    say = [f"Question: {people[0]} {words[claims[0]]}."]
    say += [f"{b} says {a} {words[claim]}." for a, b, claim in zip(people, people[1:], claims[1:])]

    def solve(honest):
        steps = [f"{person} {words[truth]}" for person, truth in zip(people, honest)]
        return " . ".join(steps) + " .", "Yes" if honest[-1] else "No"

    right = list(itertools.accumulate(claims, lambda honest, claim: honest == claim))
    wary = list(itertools.accumulate(claims, lambda honest, claim: honest and claim))
    wrong = {"takes accusers for liars": solve(claims), "trusts nobody after a liar": solve(wary)}
    return f"{' '.join(say)} Does {people[-1]} tell the truth?", {"right": solve(right), **wrong}


def dyck_languages(rng):
    """`< [ [` -> `] ] >`: the brackets still open, then their partners in reverse."""
    length, still_open = rng.randint(2, 30), rng.choice([1, 1, 1, 2, 2, 2, 3, 3, 4])
    shown, stack = [], []
    while len(shown) < length or len(stack) != still_open:
        if stack and (rng.random() < 0.5 or len(stack) > 6):
            shown.append(BRACKETS[stack.pop()])
        else:
            stack.append(rng.choice(list(BRACKETS)))
            shown.append(stack[-1])
    opened = " ".join(stack) + " ."

    def closing(brackets):
        return " ".join(BRACKETS[bracket] for bracket in brackets)

    head = "Complete the rest of the sequence, making sure that the parentheses are closed properly"
    return f"{head}. Input: {' '.join(shown)}", {
        "right": (opened, closing(reversed(stack))),
        "closes in the order of opening": (opened, closing(stack)),
        "closes only the last bracket": (f"{stack[-1]} .", closing(stack[-1:])),
    }


PUZZLES = boolean_expressions, navigate, object_counting, web_of_lies, dyck_languages
TASKS = {puzzle.__name__: puzzle for puzzle in PUZZLES}


# ----------------------------------------------------------------------------------- the splits

# hashes of BBH's own questions, which are in no split (tiny_models/make.py --exclude)
OFFICIAL = Path(__file__).parent / "tiny_models" / "official_questions.txt"
official = set(OFFICIAL.read_text(encoding="utf-8").split()) if OFFICIAL.exists() else set()


def question_hash(question):
    """Questions that differ in white space only are the same question."""
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()


def split_of(question):
    """train, validation or test: decided by the question alone, so that they cannot overlap."""
    mark = question_hash(question)[:12]
    if mark in official:
        return "official"
    named = {"0": "test", "1": "test", "2": "validation"}
    return named.get(mark[0], "train")


def draw_puzzle(rng, split, task):
    """One puzzle of that split: (question, {solver: (steps, answer)})."""
    while True:
        question, solutions = TASKS[task](rng)
        if split_of(question) == split:
            return question, solutions


def puzzles(split, n, seed=0):
    """n different puzzles, tasks in turn: a list of {question, answer, task}."""
    rng = random.Random(f"{split} {seed}")
    names = list(TASKS)
    rows = {}
    for _ in range(20 * n + 1000):  # short expressions are not without end
        if len(rows) == n:
            return list(rows.values())
        task = names[len(rows) % len(names)]
        question, solutions = draw_puzzle(rng, split, task)
        _, answer = solutions["right"]
        rows[question] = {"question": question, "answer": answer, "task": task}
    raise ValueError(f"tiny has fewer than {n} different {split} questions: ask for less")
