"""Questions with known answers: built in, from a file, or from the Hugging Face hub.

`load_tasks(spec, split)` gives a `datasets.Dataset` of strings: question, answer, task. Specs:
    tiny                              the built-in puzzles, without end (tiny.py)
    bbh, bbh:navigate,web_of_lies     BIG-Bench Hard, all 27 tasks or some of them
    math, math:4,5                    MATH, all five levels or some of them, tested on MATH-500
    mmlu, mmlu:anatomy,astronomy      MMLU, all 57 subjects or some of them
    gsm8k                             openai/gsm8k (MIT): 7,473 to train, 1,319 to test
    my.jsonl, my.json, my/folder      an object per line; a list, or {"examples": [...]} as in BBH
    my.csv, my.parquet                the same columns as in a .jsonl file
    owner/name, owner/name:config     any dataset on the hub that needs no loading script
Splits never overlap: what is in test is dropped from the others. A missing validation split is
taken out of train; a source in one piece is divided 70 : 10 : 20 by a hash of the question.
Rows without a question or an answer are left out, and a line says how many and why.
"""

import json
import random
import re
from collections import defaultdict
from pathlib import Path

import datasets
import pandas
import pyarrow.parquet

import tiny
from rewards import last_boxed
from tiny import question_hash

SPLITS = ("train", "validation", "test")
BBH_TASKS = """boolean_expressions causal_judgement date_understanding disambiguation_qa
dyck_languages formal_fallacies geometric_shapes hyperbaton logical_deduction_five_objects
logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation
multistep_arithmetic_two navigate object_counting penguins_in_a_table ruin_names
reasoning_about_colored_objects salient_translation_error_detection snarks sports_understanding
temporal_sequences tracking_shuffled_objects_five_objects tracking_shuffled_objects_seven_objects
tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()


def parse_json(text):
    """Numbers stay as they are written: 1.50 is not 1.5."""
    return json.loads(text, parse_int=str, parse_float=str)


def load_tasks(spec, split, n=None, seed=0, question_column="", answer_column="", task_column=""):
    """The questions of `spec` in `split` (or in "all"), shuffled by `seed`, at most `n` of them.
    *_column: what the source calls it, where that is not one of the usual names (see to_row)."""
    spec = str(spec)
    if split not in SPLITS and (split != "all" or spec == "tiny"):
        raise ValueError(f"no split {split!r} in {spec!r}: train, validation, test (files: all)")
    if spec == "tiny":
        return datasets.Dataset.from_list(tiny.puzzles(split, n or 1000, seed))
    theirs = {"question": question_column, "answer": answer_column, "task": task_column}
    piles = defaultdict(list)
    problems = []
    for name, task, records in read_source(spec):
        for i, record in enumerate(records, 1):
            try:
                piles[name].append(to_row(record, task, theirs))
            except FromOne as error:  # then the others are one off, though they look right
                raise ValueError(f"row {i} of {name}: {error}") from None
            except (ValueError, RecursionError) as error:
                problems.append(f"row {i} of {name}: {error}")
    parts = divide(piles)
    rows = sum(parts.values(), []) if split == "all" else parts[split]
    random.Random(seed).shuffle(rows)
    if not rows[:n]:
        why = problems[0] if problems else "too few for a split of their own? 'all' takes them all"
        raise ValueError(f"{spec!r} has no questions in split {split!r}: {why}")
    if problems:
        print(f"{spec}: {len(problems)} rows left out: {problems[0]}")
    return datasets.Dataset.from_list(rows[:n])


def columns(config):
    """Of the settings of a run, or the options of a command, those for `load_tasks`."""
    names = ("question_column", "answer_column", "task_column")
    return {name: config.get(name, "") for name in names}


def split_by_hash(question):
    """The split of a question from a source in one piece: read off its hash, so it never moves."""
    share = int(question_hash(question)[:8], 16) / 16**8  # evenly spread over [0, 1)
    if share < 0.7:
        return "train"
    return "validation" if share < 0.8 else "test"


def divide(piles):
    """{name of a split in the source: rows} -> {train, validation, test: rows}, none twice."""
    if not piles.get("train") or not piles.get("test"):  # in one piece, or as good as that
        pieces = piles.values()
        piles = {name: [] for name in SPLITS}
        for piece in pieces:
            for row in piece:
                piles[split_by_hash(row["question"])].append(row)
    elif not piles.get("validation"):
        piles["validation"] = []
        for row in piles["train"]:  # they leave it below
            if split_by_hash(row["question"]) == "validation":
                piles["validation"].append(row)
    unused = [name for name in piles if name not in SPLITS]
    if unused:
        print(f"not used, beside train and test: {', '.join(unused)}")
    seen = set()
    kept = {}
    for name in reversed(SPLITS):  # the first to come keeps a question: test, validation, train
        kept[name] = []
        for row in piles[name]:
            mark = question_hash(row["question"])
            if mark not in seen:
                seen.add(mark)
                kept[name].append(row)
    return {name: kept[name] for name in SPLITS}


def read_source(spec):
    """Find out what a spec is: [(split or file, task of records that name none, records)]."""
    name, _, selection = spec.partition(":")
    path = Path(spec)
    files = [path] if path.suffix in READERS else []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
    if name in BENCHMARKS:  # so `bbh` is the benchmark, and a folder of that name is `./bbh`
        return BENCHMARKS[name]([part.strip() for part in selection.split(",") if part.strip()])
    if {"dataset_info.json", "dataset_dict.json"} & {file.name for file in files}:
        source = try_to_load(datasets.load_from_disk, spec)
    elif files and path.exists():
        return [(file.stem, file.stem, try_to_load(READERS[file.suffix], file)) for file in files]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not files:
        source = try_to_load(datasets.load_dataset, name, selection or None)
    else:
        known = f"tiny, {', '.join(BENCHMARKS)}, a file ({', '.join(READERS)}), a folder of these"
        raise ValueError(f"unknown dataset or file: {spec!r}: use {known}, or owner/name")
    source = source if isinstance(source, dict) else {"all": source}
    return [(split, name.split("/")[-1], rows) for split, rows in source.items()]


def bbh(tasks):
    """6,511 questions of suzgunmirac/BIG-Bench-Hard (MIT), all "test": so divided by hash."""
    for task in choose_parts("bbh", tasks, BBH_TASKS):
        yield "test", task, try_to_load(datasets.load_dataset, "SaylorTwift/bbh", task)["test"]


def math(levels):
    """7,500 problems to train on; of the 5,000 for testing, openai/prm800k's 500 (both MIT)."""
    levels = choose_parts("math", levels, "12345?")  # a few are of "Level ?"
    names = {"train": "DigitalLearningGmbH/MATH-lighteval", "test": "HuggingFaceH4/MATH-500"}
    for split, name in names.items():
        rows = try_to_load(datasets.load_dataset, name)[split]
        # "Level 4" in the one, 4 in the other
        yield split, "math", [row for row in rows if str(row["level"])[-1] in levels]


def mmlu(subjects):
    """14,042 to test (MIT). The 99,842 to train on have no subject: used whatever the subjects."""
    source = try_to_load(datasets.load_dataset, "cais/mmlu", "all")
    subjects = {"", *choose_parts("mmlu", subjects, sorted(set(source["test"]["subject"])))}
    for split in ("auxiliary_train", "validation", "test"):
        rows = [row for row in source[split] if row["subject"] in subjects]
        yield split.removeprefix("auxiliary_"), "mmlu", rows


def gsm8k(parts):
    """7,473 problems to train on, 1,319 to test (MIT)."""
    choose_parts("gsm8k", parts, ["main"])
    source = try_to_load(datasets.load_dataset, "openai/gsm8k", "main")
    for split, rows in source.items():
        yield split, "gsm8k", rows


BENCHMARKS = {"bbh": bbh, "gsm8k": gsm8k, "math": math, "mmlu": mmlu}


def choose_parts(name, chosen, known):
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise ValueError(f"{name} has no part {unknown[0]!r}: choose from {', '.join(known)}")
    return chosen if chosen else known


def try_to_load(function, name, *config):
    try:
        return function(name, *config)
    except Exception as error:  # of a dozen kinds, some a page long: one line will do
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"cannot load {str(name)!r}: {reason}") from error


def read_json(path):
    """The records: the lines of a .jsonl, still to be parsed; a list, or {"examples": list}."""
    if path.suffix == ".jsonl":  # not splitlines: a text may contain exotic line separators
        return [line for line in path.read_bytes().split(b"\n") if line.strip()]
    records = parse_json(path.read_bytes())
    records = records.get("examples", records) if isinstance(records, dict) else records
    return records if isinstance(records, list) else [records]


def read_csv(path):
    """The records, all of them text: 007 is not 7, and None may be an answer. Empty is None."""
    records = []
    for row in pandas.read_csv(path, dtype=str, keep_default_na=False).to_dict("records"):
        records.append({name: value or None for name, value in row.items()})
    return records


def read_parquet(path):
    return pyarrow.parquet.read_table(path).to_pylist()


READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet}


def to_row(record, task, their_columns):
    """A record in the schema of any of these benchmarks as one in ours: all of it text."""
    record = parse_json(record) if isinstance(record, bytes) else record
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, not {record!r:.40}")
    # all are read before any is replaced: the source may use our names for other things
    record = record | {ours: text(record, name) for ours, name in their_columns.items() if name}
    if "solution" in record:  # MATH: the answer is in a box, after the reasoning
        record = {"answer": last_boxed(str(record["solution"]))} | record
    question = text(record, "question", "problem", "input")
    answer = text(record, "answer", "target")
    answer = answer.rpartition("####")[2].strip()  # GSM8K: it comes last
    if not answer:
        raise ValueError("no answer after ####")
    choices, first = choices_of(record)
    if choices:  # the answer is the number of a choice, or a letter
        letters = LETTERS[: len(choices)]
        numbers = [str(first + place) for place in range(len(choices))]
        if answer in numbers:
            answer = letters[numbers.index(answer)]
        if answer == str(len(choices)):
            raise FromOne(f"answer {answer} of {answer} choices: they count from 0: give letters")
        if answer not in list(letters):
            raise ValueError(f"answer {answer!r:.40} is not one of a list of choices")
        question += "".join(f"\n({a}) {choice}" for a, choice in zip(letters, choices))
        answer = f"({answer})"
    task = str(record.get("task") or record.get("type") or record.get("subject") or task)
    (question + answer + task).encode()  # JSON can hold half a surrogate pair: a ValueError
    return {"question": question, "answer": answer, "task": task}


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class FromOne(ValueError):
    """Of a dataset whose choices are counted from 1, also where a row does not show it."""


CHOICE_COLUMNS = [
    list(LETTERS),
    [f"option_{letter}" for letter in LETTERS.lower()],
    [f"option{number}" for number in range(1, len(LETTERS) + 1)],
]


def choices_of(record):
    """The choices of a record ([] if it has none) and the number of the first: a list `choices`
    (MMLU) or `options` (MMLU-Pro), counted from 0, or a column for each (K-MMLU's A, B, ...), from
    1. ValueError for a list of something else than texts."""
    choices = record.get("choices") or record.get("options")
    if choices:
        texts = isinstance(choices, list) and not any(isinstance(c, (dict, list)) for c in choices)
        if not texts or len(choices) > len(LETTERS):
            raise ValueError(f"expected a list of at most 26 texts as choices, not {choices!r:.40}")
        return choices, 0
    for names in CHOICE_COLUMNS:
        columns = []
        for name in names:
            if record.get(name) is None:
                break
            columns.append(record[name])
        if len(columns) > 1:
            return columns, 1
    return [], 0


def text(record, *names):
    """What is in the first of these columns that the record has, or a ValueError."""
    present = [record[name] for name in names if name in record]
    value = present[0] if present else None
    if value is None or isinstance(value, (list, dict)) or not str(value).strip():
        raise ValueError(f"no text in {' or '.join(names)}; the columns are {list(record)!r:.300}")
    return str(value).strip()
