"""The built-in laboratory: puzzles without end, in splits that do not overlap.

They are worded like four subtasks of BIG-Bench Hard, so that a model trained here can be tested on
the official files. Each task has three *misconceptions* that a person could hold ("counts a group
as one"). Each spoils one kind of step; most puzzles need all three kinds, so that whoever holds one
misconception is wrong, and yet does most steps right. tiny_models/make.py trains a leader and three
agents on these puzzles.

A puzzle is (question, solve): `solve(held)` gives the worked solution and the answer of somebody
who holds these misconceptions, as (steps, answer); `solve([])` is right.

The wording of the questions is that of BIG-Bench Hard, github.com/suzgunmirac/BIG-Bench-Hard:
MIT License, Copyright (c) 2022 suzgunmirac (the whole notice: tiny_models/LICENSE-BIG-BENCH-HARD).
"""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

SWAPS = [
    "takes the first swap for the start",
    "lets one give and not take after Then",
    "stops before the last swap",
]
MISCONCEPTIONS = {  # the k-th of each task is that of the built-in agent k
    "object_counting": ["counts a group as one", "counts every kind", "leaves out the last item"],
    "dyck_languages": [
        "closes in the order of opening",
        "forgets all but the last two",
        "closes [ with }",
    ],
    "tracking_shuffled_objects_three_objects": SWAPS,
    "tracking_shuffled_objects_five_objects": SWAPS,
}

# ------------------------------------------------------------------------------ object_counting

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
        items.append((noun, n, written(noun, n)))

    def solve(held):
        total = 0
        steps = []
        for noun, n, text in items:
            counts = noun in asked or "counts every kind" in held
            if text == items[-1][2] and "leaves out the last item" in held:
                counts = False
            if counts:
                total += 1 if "counts a group as one" in held else n
            steps.append(f"{text} {total if counts else 'no'}")
        return " , ".join(steps) + " .", str(total)

    texts = [text for _, _, text in items]
    return f"I have {listed(texts)}. How many {kind}s do I have?", solve


def written(noun, n):
    """`three heads of broccoli`"""
    article = "an" if noun[0] in "aeiou" else "a"
    number = [article, "two", "three", "four", "five"][n - 1]
    if n > 1:
        ending = next(ending for ending in PLURALS if noun.endswith(ending))
        noun = noun.removesuffix(ending) + PLURALS[ending]
    return f"{number} {noun}".replace("_", " ")


# ------------------------------------------------------------------------------- dyck_languages

BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def dyck_languages(rng):
    """`< [ [` -> `] ] >`: the brackets still open, then each with its partner, the last first."""
    length = rng.randint(2, rng.choice([10, 30]))  # as in BBH: half of them are short
    still_open = rng.choice([1, 2, 2, 3, 3, 3])
    shown = []
    stack = []
    while len(shown) < length or len(stack) != still_open:
        if stack and (rng.random() < 0.5 or len(stack) > 6):
            shown.append(BRACKETS[stack.pop()])
        else:
            stack.append(rng.choice(list(BRACKETS)))
            shown.append(stack[-1])

    def solve(held):
        opened = stack[-2:] if "forgets all but the last two" in held else stack
        order = opened if "closes in the order of opening" in held else opened[::-1]
        partners = dict(BRACKETS)
        if "closes [ with }" in held:
            partners["["] = "}"
        pairs = [f"{bracket} {partners[bracket]}" for bracket in order]
        steps = f"{' '.join(opened)} : {' , '.join(pairs)} ."
        return steps, " ".join(partners[bracket] for bracket in order)

    head = "Complete the rest of the sequence, making sure that the parentheses are closed properly"
    return f"{head}. Input: {' '.join(shown)}", solve


# -------------------------------------------------------------------- tracking_shuffled_objects

PLAYERS = ["Alice", "Bob", "Claire", "Dave", "Eve"]


@dataclass
class Story:
    """The sentences of one setting; {} is a player or an object."""

    people: str
    start: str
    holding: str
    trades: str
    swap: str
    end: str
    objects: str


STORIES = [
    Story(
        people="are friends and avid readers who occasionally trade books.",
        start="At the start of the semester, they each buy one new book:",
        holding="{} gets {}",
        trades="As the semester proceeds, they start trading around the new books.",
        swap="{} and {} swap books.",
        end="At the end of the semester, {} has",
        objects="Ulysses, Frankenstein, Lolita, Hound of the Baskervilles, The Odyssey, "
        "Catch-22, Moby Dick, The Great Gatsby, The Fellowship of the Ring, The Pearl",
    ),
    Story(
        people="are dancers at a square dance.",
        start="At the start of a song, they each have a partner:",
        holding="{} is dancing with {}",
        trades="Throughout the song, the dancers often trade partners.",
        swap="{} and {} switch partners.",
        end="At the end of the dance, {} is dancing with",
        objects="Helga, Lola, Ophelia, Izzi, Melissa, Karl, Rodrigo, Jamie, Patrick, Sam",
    ),
    Story(
        people="are playing a game.",
        start="At the start of the game, they are each holding a ball:",
        holding="{} has a {}",
        trades="As the game progresses, pairs of players trade balls.",
        swap="{} and {} swap balls.",
        end="At the end of the game, {} has the",
        objects="brown ball, red ball, white ball, yellow ball, green ball, "
        "orange ball, blue ball, purple ball, pink ball, black ball",
    ),
    Story(
        people="are holding a white elephant gift exchange.",
        start="At the start of the event, they are each holding a present of a different color:",
        holding="{} has a {}",
        trades="As the event progresses, pairs of people swap gifts.",
        swap="{} and {} swap their gifts.",
        end="At the end of the event, {} has the",
        objects="red present, black ball, white present, orange ball, purple present, "
        "pink ball, blue present, yellow present, green present, brown present",
    ),
    Story(
        people="are on the same team in a soccer match.",
        start="At the start of the match, they are each assigned to a position:",
        holding="{} is playing {}",
        trades="As the game progresses, pairs of players occasionally swap positions.",
        swap="{} and {} trade positions.",
        end="At the end of the match, {} is playing",
        objects="goalkeeper, left winger, center midfielder, cheerleader, right winger, "
        "benchwarmer, right midfielder, striker, fullback, left midfielder",
    ),
]


def tracking_shuffled_objects(rng, n):
    """Who has what after n swaps? The options' letters, as the n players hold them after each."""
    story = rng.choice(STORIES)
    players = PLAYERS[:n]
    things = rng.sample(story.objects.split(", "), n)
    swaps = [rng.sample(players, 2) for _ in players]
    asked = rng.choice(players)

    def solve(held):
        state, steps = swap_all(players, swaps, held)
        return f"{' , '.join(steps)} . {asked} : {state[asked]} .", f"({state[asked]})"

    told = []
    for number, pair in enumerate(swaps):
        word = {0: "First", n - 1: "Finally"}.get(number, "Then")
        told.append(f"{word}, {story.swap.format(*pair)}")
    at_first = listed([story.holding.format(*pair) for pair in zip(players, things)])
    lines = [
        f"{listed(players)} {story.people} {story.start} {at_first}.",
        f"{story.trades} {' '.join(told)} {story.end.format(asked)}",
        "Options:",
    ]
    lines += [f"({letter}) {thing}" for letter, thing in zip("ABCDE", things)]
    return "\n".join(lines), solve


def swap_all(players, swaps, held):
    """({player: letter of what he has in the end}, a step for each swap)."""
    state = dict(zip(players, "ABCDE"))
    steps = []
    for number, (one, other) in enumerate(swaps):
        is_first = number == 0
        is_last = number == len(swaps) - 1
        left_out = (is_first and "takes the first swap for the start" in held) or (
            is_last and "stops before the last swap" in held
        )
        one_sided = "lets one give and not take after Then" in held and not (is_first or is_last)
        had = dict(state)
        if not left_out:
            state[other] = had[one]
        if not left_out and not one_sided:
            state[one] = had[other]
        steps.append(f"{one} {other} : {' '.join(state.values())}")
    return state, steps


def listed(texts):
    """`Alice, Bob, and Claire`"""
    return f"{', '.join(texts[:-1])}, and {texts[-1]}"


def tracking_shuffled_objects_three_objects(rng):
    return tracking_shuffled_objects(rng, 3)


def tracking_shuffled_objects_five_objects(rng):
    return tracking_shuffled_objects(rng, 5)


PUZZLES = (
    object_counting,
    dyck_languages,
    tracking_shuffled_objects_three_objects,
    tracking_shuffled_objects_five_objects,
)
TASKS = {puzzle.__name__: puzzle for puzzle in PUZZLES}

# ----------------------------------------------------------------------------------- the splits

HARD = 0.6  # at least this share of the puzzles need all three kinds of step
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


def draw_puzzle(rng, split, task, hard=HARD):
    """One puzzle of that split, (question, solve): with probability `hard` one that needs all three
    kinds of step."""
    needs_all = rng.random() < hard
    while True:
        question, solve = TASKS[task](rng)
        if split_of(question) != split:
            continue
        if not needs_all or all(is_wrong(solve, belief) for belief in MISCONCEPTIONS[task]):
            return question, solve


def is_wrong(solve, belief):
    """Does this misconception alone change the answer?"""
    _, right = solve([])
    _, answer = solve([belief])
    return answer != right


def puzzles(split, n, seed=0):
    """n different puzzles, tasks in turn: a list of {question, answer, task}."""
    rows = []
    for question, (task, solve) in draw_puzzles(split, n, seed).items():
        _, answer = solve([])
        rows.append({"question": question, "answer": answer, "task": task})
    return rows


def right_steps(split, n, seed=0):
    """{question: (its task, the steps of its right solution)}, of the same puzzles."""
    steps_of = {}
    for question, (task, solve) in draw_puzzles(split, n, seed).items():
        steps, _ = solve([])
        steps_of[question] = (task, steps)
    return steps_of


def draw_puzzles(split, n, seed):
    """{question: (task, solve)}."""
    rng = random.Random(f"{split} {seed}")
    names = list(TASKS)
    found = {}
    for _ in range(20 * n + 1000):  # short sequences are not without end
        if len(found) == n:
            return found
        task = names[len(found) % len(names)]
        question, solve = draw_puzzle(rng, split, task)
        found[question] = (task, solve)
    raise ValueError(f"tiny has fewer than {n} different {split} questions: ask for less")
