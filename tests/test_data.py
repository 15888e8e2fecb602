"""data.py: every schema, disjoint and stable splits, and an understandable line for each mistake.

Offline: the hub is played by `datasets.load_dataset` replaced with small datasets of the real
schemas. The official samples are read where they lie beside the checkout.
"""

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import datasets
import pytest
from conftest import SHARED
from hypothesis import strategies as st
from test_rewards import for_all

import data
from data import SPLITS, load_tasks
from rewards import last_boxed

samples = pytest.mark.skipif(not SHARED.exists(), reason=f"no official samples in {SHARED}")
COLUMNS = ["question", "answer", "task"]


def write(path, records):
    """Write records in the format that the file's name asks for."""
    lines = "\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records)
    path.write_text(lines, encoding="utf-8")
    return path


def rows(n, word="question", task="a"):
    return [{"question": f"{word} {i}", "answer": f"{i}", "task": task} for i in range(n)]


def only_row(path, **options):
    loaded = load_tasks(path, "all", **options)
    assert loaded.column_names == COLUMNS and len(loaded) == 1
    return loaded[0]


def error(*arguments, **options):
    """The message of the ValueError, which must be one line of reasonable length."""
    with pytest.raises(ValueError) as caught:
        load_tasks(*arguments, **options)
    message = str(caught.value)
    assert type(caught.value) is ValueError and message
    assert len(message.splitlines()) == 1 and len(message) < 1500, message
    return message


def assert_disjoint(spec, **options):
    """All three splits of a spec, after checking that no question is in two of them."""
    parts = {split: load_tasks(spec, split, **options) for split in SPLITS}
    keys = [{" ".join(q.split()) for q in part["question"]} for part in parts.values()]
    assert sum(map(len, keys)) == len(set.union(*keys)) == sum(map(len, parts.values()))
    return parts


# ---------------------------------------------------------------------------------- local files


def test_our_own_columns(tmp_path):
    path = write(tmp_path / "mine.jsonl", rows(3))
    loaded = load_tasks(str(path), "all")
    assert loaded.column_names == COLUMNS
    assert all(feature == datasets.Value("string") for feature in loaded.features.values())
    assert sorted(loaded["question"]) == ["question 0", "question 1", "question 2"]
    assert load_tasks(write(tmp_path / "mine.json", rows(3)), "all")[:] == loaded[:]


def test_everything_becomes_text(tmp_path):
    answers = {"1": "1", "1.50": "1.50", "1e3": "1e3", "true": "True", "false": "False"}
    answers |= {'" a "': "a", '"2015-01-02"': "2015-01-02", "9" * 9000: "9" * 9000, "NaN": "nan"}
    lines = [f'{{"question": {i}, "answer": {text}}}' for i, text in enumerate(answers)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    loaded = load_tasks(tmp_path / "x.jsonl", "all")
    assert {r["question"]: r["answer"] for r in loaded} == {
        str(i): text for i, text in enumerate(answers.values())
    }
    assert set(loaded["task"]) == {"x"}  # no column says it: the file's name does


def test_blank_lines_bom_and_windows_line_ends(tmp_path):
    lines = "\r\n".join(json.dumps(row) for row in rows(2)).replace("}\r\n", "}\r\n\r\n")
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n")
    assert len(load_tasks(tmp_path / "x.jsonl", "all")) == 2


def test_duplicate_questions_are_dropped(tmp_path):
    twice = [{"question": q, "answer": "1"} for q in ("a b", " a b\n", "a  b", "A b")]
    loaded = load_tasks(write(tmp_path / "x.jsonl", twice), "all")
    assert sorted(loaded["question"]) == ["A b", "a b"]


def test_bbh_file_and_folder(tmp_path):
    for task in ("navigate", "snarks"):
        examples = [{"input": f"{task} {i}", "target": "(A)"} for i in range(50)]
        write(tmp_path / f"{task}.json", {"canary": "...", "examples": examples})
    (tmp_path / "README.md").write_text("not data")
    row = load_tasks(tmp_path / "snarks.json", "all")[0]
    assert row["answer"] == "(A)" and row["task"] == "snarks"
    loaded = load_tasks(tmp_path, "all")
    assert Counter(loaded["task"]) == {"navigate": 50, "snarks": 50}
    assert_disjoint(tmp_path)


def test_folder_with_its_own_splits(tmp_path):
    write(tmp_path / "train.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(100)])
    write(tmp_path / "test.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(95, 110)])
    parts = assert_disjoint(tmp_path)
    assert set(parts["test"]["question"]) == {f"q{i}" for i in range(95, 110)}
    assert set(parts["train"]["question"]) < {f"q{i}" for i in range(95)}
    assert 2 < len(parts["validation"]) < 25


def test_column_mapping(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"frage": "1+1?", "lösung": 2, "fach": "Mathe"}])
    columns = {"question_column": "frage", "answer_column": "lösung", "task_column": "fach"}
    assert only_row(path, **columns) == {"question": "1+1?", "answer": "2", "task": "Mathe"}
    # a mapping wins over the usual names, and what is not mapped is found by them
    path = write(tmp_path / "y.jsonl", [{"question": "no", "input": "yes", "answer": "1"}])
    assert only_row(path, question_column="input")["question"] == "yes"
    for column in columns:
        message = error(path, "all", **{column: "nope"})
        assert "no text in nope; the columns are ['question'," in message


def test_columns_may_change_places(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"question": "the answer", "answer": "the question"}])
    row = only_row(path, question_column="answer", answer_column="question")
    assert (row["question"], row["answer"]) == ("the question", "the answer")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_read_like_lines(tmp_path, kind, capsys):
    rows = [{"question": f'a "quoted", {i}', "answer": str(i), "type": "t"} for i in range(3)]
    path = tmp_path / f"x.{kind}"
    getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(str(path))
    found = sorted(load_tasks(str(path), "all"), key=lambda row: row["answer"])
    assert [(row["question"], row["answer"], row["task"]) for row in found] == [
        tuple(row.values()) for row in rows
    ]
    assert len(load_tasks(str(tmp_path), "all")) == 3  # as one file of a folder
    capsys.readouterr()
    message = error(str(path), "all", question_column="nope")
    assert "no text in nope; the columns are ['question'," in message
    path.write_bytes(b"")
    assert "cannot load" in error(str(path), "all")
    assert capsys.readouterr() == ("", "")  # the error is all that is said


def test_a_table_of_text_stays_as_it_is_written(tmp_path):
    answers = ["007", "1.50", "1e3", "12345678901234567890", "NA", "None", "true", "2024-01-02", ""]
    path = tmp_path / "x.csv"
    path.write_text("question,answer\n" + "".join(f"of {a}?,{a}\n" for a in answers))
    found = load_tasks(str(path), "all")["answer"]
    assert sorted(found) == sorted(answers[:-1])


def test_more_than_ten_choices_are_all_shown(tmp_path):
    choices = [f"choice {number}" for number in range(12)]
    for answer in (11, "L"):
        record = {"question": "Which?", "choices": choices, "answer": answer}
        row = only_row(write(tmp_path / "x.jsonl", [record]))
        assert row["question"].endswith("(L) choice 11") and row["answer"] == "(L)"


def test_a_split_that_is_not_used_is_named(tmp_path, capsys):
    for split in ("train", "test", "dev"):
        write(tmp_path / f"{split}.jsonl", [{"question": f"of {split}", "answer": "1"}])
    assert load_tasks(str(tmp_path), "test")["question"][:] == ["of test"]
    assert "not used, beside train and test: dev" in capsys.readouterr().out


MATH = {"problem": "p", "level": "Level 5", "type": "Algebra", "solution": "so $\\boxed{7}$."}


@pytest.mark.parametrize(
    "record, answer, task",
    [
        ({"question": "p", "answer": "4 + 4 = 8\n#### 1,008"}, "1,008", "x"),  # GSM8K
        (MATH, "7", "Algebra"),
        (MATH | {"answer": "8", "subject": "Law", "type": None}, "8", "Law"),  # MATH-500 has both
        (MATH | {"task": "t"}, "7", "t"),
        ({"input": "p", "target": "True"}, "True", "x"),  # BBH
    ],
)
def test_the_schemas_of_the_benchmarks(tmp_path, record, answer, task):
    row = only_row(write(tmp_path / "x.jsonl", [record]))
    assert row == {"question": "p", "answer": answer, "task": task}


@pytest.mark.parametrize("gold", [2, "2", "C", 4, -1, "E", "ABC", "x", ""])
def test_choices(tmp_path, gold):
    record = {"question": "q?", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": gold}
    path = write(tmp_path / "x.jsonl", [record])
    if gold in (2, "2", "C"):
        question = "q?\n(A) w\n(B) x\n(C) y\n(D) z"
        assert only_row(path) == {"question": question, "answer": "(C)", "task": "law"}
    else:
        said = "is not one of a list of choices" if gold else "no text"
        assert ("4 of 4 choices" if gold == 4 else said) in error(path, "all")


@pytest.mark.parametrize(
    "record, shown, answer",
    [
        ({"options": ["w", "x"], "answer": "B"}, "\n(A) w\n(B) x", "(B)"),  # MMLU-Pro
        ({"options": list("abcdefghijkl"), "answer": 11}, "\n(L) l", "(L)"),
        ({"A": "w", "B": "x", "C": "y", "answer": 3}, "\n(A) w\n(B) x\n(C) y", "(C)"),  # K-MMLU
        ({"A": "w", "B": "x", "answer": "A"}, "\n(A) w\n(B) x", "(A)"),
        ({"A": "an article", "answer": "A"}, "", "A"),  # no options
        ({"A": "w", "B": "x", "C": None, "answer": "A"}, "\n(A) w\n(B) x", "(A)"),
        ({"option_a": "w", "option_b": "x", "answer": "B"}, "\n(A) w\n(B) x", "(B)"),
        ({"option1": "w", "option2": "x", "answer": "2"}, "\n(A) w\n(B) x", "(B)"),
    ],
)
def test_options_wherever_they_are(tmp_path, record, shown, answer):
    row = only_row(write(tmp_path / "x.jsonl", [{"question": "q?", **record}]))
    assert row["question"].endswith(shown) and row["answer"] == answer
    assert shown or row["question"] == "q?"


def test_choices_that_are_counted_from_1_are_refused_as_a_whole(tmp_path):
    """Of the other rows nobody would see that each is one off."""
    choices = ["w", "x", "y", "z"]
    rows = [{"question": f"q{i}", "choices": choices, "answer": i} for i in (1, 2, 3, 4)]
    message = error(write(tmp_path / "x.jsonl", rows), "all")
    assert "row 4 of x: answer 4 of 4 choices: they count from 0: give letters" in message


@pytest.mark.parametrize(
    "solution, answer",
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{1}, then $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\}", "a\\\\"),
        (r"\boxed{\boxed{3}}", "3"),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{5", ""),
        ("no box, {5}", ""),
        ("", ""),
        ("\\boxed", ""),
    ],
)
def test_boxed(solution, answer):
    assert last_boxed(solution) == answer


@for_all(st.text(alphabet="ab{}\\$ \n", max_size=30))
def test_boxed_never_raises_and_balances(text):
    answer = last_boxed("\\boxed{" + text)
    if "\\" not in text:
        assert answer.count("{") == answer.count("}")


question_text = st.text(min_size=1).filter(lambda t: t.strip())


@for_all(st.dictionaries(question_text, question_text.filter(lambda t: "####" not in t)))
def test_any_text_survives_the_round_trip(answers):
    with tempfile.TemporaryDirectory() as folder:
        path, kept = Path(folder) / "x.jsonl", {}
        for question, answer in answers.items():
            kept.setdefault(" ".join(question.split()), (question.strip(), answer.strip()))
        lines = [{"question": q, "answer": a, "task": "t"} for q, a in answers.items()]
        text = "\n".join(json.dumps(line, ensure_ascii=len(answers) % 2 == 0) for line in lines)
        path.write_bytes(text.encode())
        if not kept:
            assert "no questions" in error(path, "all")
            return
        loaded = load_tasks(path, "all")
        assert {(r["question"], r["answer"]) for r in loaded} == set(kept.values())


names = st.sampled_from(
    ["question", "problem", "answer", "solution", "choices", "task", "examples"]
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(), inner),
    max_leaves=6,
)


@for_all(junk | st.lists(st.dictionaries(names, junk)), st.sampled_from([".json", ".jsonl"]))
def test_any_file_gives_rows_of_text_or_one_clear_line(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x" + suffix)
        records = content if isinstance(content, list) and suffix == ".jsonl" else [content]
        path.write_text("\n".join(map(json.dumps, records)))
        try:
            loaded = load_tasks(path, "all")
        except ValueError:
            assert str(path) in error(path, "all")
        else:
            assert len(loaded) and all(text.strip() for row in loaded for text in row.values())


# --------------------------------------------------------------------------------------- splits


def test_one_file_is_divided_and_stays_divided(tmp_path):
    path = write(tmp_path / "x.jsonl", rows(1000))
    parts = assert_disjoint(path)
    sizes = [len(parts[split]) for split in SPLITS]
    assert sum(sizes) == len(load_tasks(path, "all")) == 1000
    assert 650 < sizes[0] < 750 and 70 < sizes[1] < 130 and 150 < sizes[2] < 250
    # neither the seed, nor the order, nor more questions move one to another split
    more = write(tmp_path / "more.json", rows(1200)[::-1])
    for split in SPLITS:
        other = set(load_tasks(path, split, seed=7)["question"])
        assert other == set(parts[split]["question"])
        assert other <= set(load_tasks(more, split)["question"])


def test_the_hash_is_the_same_on_every_machine():
    homes = ["train", "train", "validation", "test", "train", "train", "test", "test"]
    assert [data.split_by_hash(f"question {i}") for i in range(8)] == homes
    assert data.split_by_hash("a  b\n") == data.split_by_hash("a b")


def test_n_and_seed(tmp_path):
    path = write(tmp_path / "x.jsonl", rows(300))
    one, two = load_tasks(path, "train", n=20), load_tasks(path, "train", n=20, seed=1)
    assert len(one) == len(two) == 20 and one[:] != two[:]
    assert load_tasks(path, "train", n=20)[:] == one[:]
    assert load_tasks(path, "train", n=10)["question"][:] == one["question"][:10]
    assert len(load_tasks(path, "all", n=10_000)) == 300


def test_divide():
    def divide(**piles):
        piles = {k: [{"question": q} for q in v.split()] for k, v in piles.items()}
        return {k: " ".join(r["question"] for r in v) for k, v in data.divide(piles).items()}

    assert divide(train="a b c", validation="b d", test="c d", dev="x") == {
        "train": "a",
        "validation": "b",
        "test": "c d",
    }
    numbers = " ".join(map(str, range(100)))
    parts = divide(train=numbers, test="1 2", dev="x")  # validation is taken out of train
    assert parts["test"] == "1 2" and parts["validation"] and "x" not in parts.values()
    # nothing to train on, or nothing to test on: one pile
    for piles in ({"test": numbers}, {"train": numbers}, {"dev": numbers}, {"test": numbers * 2}):
        parts = divide(**piles)
        assert all(parts.values())
    assert divide(validation="1", test="1") == divide(a="1")


# -------------------------------------------------------------------- the hub, and saved folders


def mmlu_rows(n, subject, word):
    choices = ["w", "x", "y", "z"]
    return [
        {"question": f"{word} {i}", "subject": subject, "choices": choices, "answer": i % 4}
        for i in range(n)
    ]


def math_rows(n, word):
    """The schema of MATH's own files; "Level ?" occurs there."""
    return [
        {
            "problem": f"{word} {i}",
            "level": f"Level {'12345?'[i % 6]}",
            "type": ["Algebra", "Geometry"][i % 2],
            "solution": f"It is $\\boxed{{{i}}}$.",
        }
        for i in range(n)
    ]


def math_500_rows(n, word):
    """With the answer beside the solution, and the level as a number."""
    rows = [{"answer": f"{i}", "subject": "Algebra", "level": 1 + i % 5} for i in range(n)]
    solved = "It is $\\boxed{{{answer}}}$.".format
    return [r | {"problem": f"{word} {r['answer']}", "solution": solved(**r)} for r in rows]


def gsm8k_rows(n, word):
    return [{"question": f"{word} {i}", "answer": f"so {i}\n#### {i}"} for i in range(n)]


MMLU_FEATURES = datasets.Features(
    question=datasets.Value("string"),
    subject=datasets.Value("string"),
    choices=datasets.List(datasets.Value("string")),
    answer=datasets.ClassLabel(names=["A", "B", "C", "D"]),
)
HUB = {
    ("SaylorTwift/bbh", task): {
        "test": [{"input": f"{task} {i}", "target": "Yes"} for i in range(10)]
    }
    for task in data.BBH_TASKS
}
HUB["DigitalLearningGmbH/MATH-lighteval", None] = {
    "train": math_rows(120, "train") + math_rows(3, "leak"),
    "test": math_rows(60, "test"),
}
HUB["HuggingFaceH4/MATH-500", None] = {"test": math_500_rows(20, "test") + math_500_rows(2, "leak")}
HUB["openai/gsm8k", "main"] = {
    "train": gsm8k_rows(100, "train") + gsm8k_rows(1, "test"),
    "test": gsm8k_rows(20, "test"),
}
HUB["cais/mmlu", "all"] = {
    "auxiliary_train": mmlu_rows(30, "", "other exam") + mmlu_rows(1, "", "law test"),
    "dev": mmlu_rows(5, "law", "shot"),
    "validation": mmlu_rows(8, "law", "law validation") + mmlu_rows(8, "art", "art validation"),
    "test": mmlu_rows(12, "law", "law test") + mmlu_rows(12, "art", "art test"),
}


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` on a hub that holds small datasets of the real names and schemas."""
    asked = []

    def load_dataset(name, config=None):
        asked.append((name, config))
        if (name, config) not in HUB:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\nmore")
        features = MMLU_FEATURES if "mmlu" in name else None
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list(records, features=features)
                for split, records in HUB[name, config].items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tempfile.gettempdir())  # no folder here is called openai/gsm8k
    return asked


def test_bbh(hub):
    assert len(data.BBH_TASKS) == len(set(data.BBH_TASKS)) == 27
    parts = assert_disjoint("bbh")
    assert sum(map(len, parts.values())) == len(load_tasks("bbh", "all")) == 270
    assert set(parts["train"]["task"]) == set(data.BBH_TASKS)
    hub.clear()
    some = load_tasks("bbh:navigate, web_of_lies", "all")
    assert Counter(some["task"]) == {"navigate": 10, "web_of_lies": 10}
    assert hub == [("SaylorTwift/bbh", "navigate"), ("SaylorTwift/bbh", "web_of_lies")]
    message = error("bbh:navigate,fly", "train")
    assert "'fly'" in message and "web_of_lies" in message


def test_math(hub):
    parts = assert_disjoint("math")
    assert len(parts["test"]) == 22 and set(parts["test"]["task"]) == {"Algebra"}
    learned = {*parts["train"]["question"], *parts["validation"]["question"]}
    assert len(learned) == 121 and 100 < len(parts["train"]) < 120
    assert not learned & {"test 0", "leak 0", "leak 1"}  # neither MATH's test split nor MATH-500
    assert all(q.split()[-1] == a for part in parts.values() for q, a, _ in map(dict.values, part))
    hard = assert_disjoint("math:4,5")
    assert len(hard["test"]) == 8 and len(hard["train"]) + len(hard["validation"]) == 40
    assert "'6'" in error("math:6", "train") and "'Level 4'" in error("math:Level 4", "train")


def test_mmlu(hub):
    parts = assert_disjoint("mmlu")
    assert [len(parts[split]) for split in SPLITS] == [30, 16, 24]  # law test 0 is not for training
    assert set(parts["train"]["task"]) == {"mmlu"} and set(parts["test"]["task"]) == {"art", "law"}
    row = parts["test"][0]
    number = int(re.match(r"\w+ test (\d+)\n\(A\) w\n\(B\) x", row["question"])[1])
    assert row["answer"] == ["(A)", "(B)", "(C)", "(D)"][number % 4]
    parts = assert_disjoint("mmlu:law")
    assert [len(parts[split]) for split in SPLITS] == [30, 8, 12]
    assert set(parts["test"]["task"]) == {"law"}
    message = error("mmlu:law,lore", "test")
    assert "'lore'" in message and "art, law" in message


def test_gsm8k_by_either_name(hub):
    parts = assert_disjoint("gsm8k")
    assert len(parts["test"]) == 20 and len(parts["train"]) + len(parts["validation"]) == 100
    assert parts["test"]["answer"][:] == [q.split()[1] for q in parts["test"]["question"]]
    assert set(parts["test"]["task"]) == {"gsm8k"}
    assert load_tasks("openai/gsm8k:main", "test")[:] == parts["test"][:]
    assert "gsm8k has no part 'easy'" in error("gsm8k:easy", "test")


def test_any_hub_dataset(hub, monkeypatch):
    questions = [{"q": f"q{i}", "a": i, "unused": None} for i in range(50)]
    monkeypatch.setitem(HUB, ("me/mine", None), {"train": questions})
    options = {"question_column": "q", "answer_column": "a"}
    parts = assert_disjoint("me/mine", **options)
    assert set(parts["test"]["task"]) == {"mine"}
    assert "the columns are ['q', 'a', 'unused']" in error("me/mine", "test")
    assert "nope" in error("me/mine", "test", **options, task_column="nope")
    assert hub[-1] == ("me/mine", None)


def test_rows_without_an_answer_are_left_out(hub, monkeypatch, capsys):
    """Many datasets keep the answers of their test split to themselves: it is then divided."""
    asked = [{"question": f"q{i}", "answer": "1"} for i in range(40)]
    hidden = [{"question": f"hidden {i}", "answer": None} for i in range(5)]
    splits = {"train": asked[:30] + hidden[:1], "validation": asked[30:], "test": hidden}
    monkeypatch.setitem(HUB, ("me/hidden", None), splits)
    parts = assert_disjoint("me/hidden")
    assert all(parts.values()) and sum(map(len, parts.values())) == 40
    line = "me/hidden: 6 rows left out: row 31 of train: no text in answer or target; the columns"
    assert capsys.readouterr().out.count(line) == 3
    monkeypatch.setitem(HUB, ("me/empty", None), {"test": hidden})
    assert "row 1 of test: no text in answer" in error("me/empty", "test")


def test_hub_errors_are_one_line(hub, monkeypatch):
    message = error("who/what", "test")
    assert "'who/what'" in message and "Dataset 'who/what' doesn't exist" in message
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: (_ for _ in ()).throw(OSError()))
    assert "OSError" in error("gsm8k", "test")


def test_hub_offline(tmp_path, monkeypatch):
    """The real load_dataset, told that there is no network: a clear line at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    message = error("nobody/nothing-of-this-name", "test")
    assert "nobody/nothing-of-this-name" in message and "Offline" in message


def test_saved_folders(tmp_path):
    """A folder made by `save_to_disk` works like the name it was loaded from."""
    whole = datasets.Dataset.from_list(gsm8k_rows(60, "q"))
    whole.save_to_disk(tmp_path / "whole")
    parts = assert_disjoint(tmp_path / "whole")
    assert sum(map(len, parts.values())) == 60 and set(parts["train"]["task"]) == {"whole"}
    split = datasets.DatasetDict(
        train=datasets.Dataset.from_list(mmlu_rows(40, "law", "a"), features=MMLU_FEATURES),
        test=datasets.Dataset.from_list(mmlu_rows(10, "law", "b"), features=MMLU_FEATURES),
    )
    split.save_to_disk(tmp_path / "split")
    parts = assert_disjoint(str(tmp_path / "split"))
    assert len(parts["test"]) == 10 and parts["test"][0]["question"].endswith("(D) z")
    (tmp_path / "whole" / "state.json").write_text("{")
    assert "whole" in error(tmp_path / "whole", "all")


# ----------------------------------------------------------------------------- official samples


@samples
def test_official_bbh():
    folder = SHARED / "bbh"
    parts = assert_disjoint(folder)
    total = sum(len(json.loads(f.read_text())["examples"]) for f in folder.glob("*.json"))
    assert sum(map(len, parts.values())) == len(load_tasks(folder, "all")) == total
    assert set(parts["test"]["task"]) == set(data.BBH_TASKS)
    assert set(load_tasks(folder / "navigate.json", "all")["answer"]) == {"Yes", "No"}


@samples
def test_official_gsm8k():
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        for answer in load_tasks(SHARED / name, "all")["answer"]:
            assert re.fullmatch(r"-?[\d,.]+", answer), answer


@samples
def test_official_math():
    loaded = load_tasks(SHARED / "math500_test.jsonl", "all")
    assert len(loaded) == 200 and "Counting & Probability" in loaded["task"][:]
    for line in (SHARED / "math500_test.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert last_boxed(record["solution"]).strip() == record["answer"]


@samples
def test_official_mmlu():
    loaded = load_tasks(SHARED / "mmlu_stem_test.jsonl", "all")
    assert len(loaded) == 400 and len(set(loaded["task"])) == 3
    for row in loaded:
        assert "\n(A) " in row["question"] and row["answer"] in ("(A)", "(B)", "(C)", "(D)")


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "spec", ["nope", "", "bhb", "/no/such/folder", "a/b/c", "tiny:easy", ".", "no/such.jsonl"]
)
def test_unknown_dataset(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("question,answer\n1,2")
    message = error(spec, "train")
    assert "unknown dataset or file" in message and repr(spec) in message
    assert all(name in message for name in ("tiny", "bbh", "math", "mmlu", "gsm8k", ".jsonl"))
    assert "unknown dataset or file" in error("x.txt", "train")


def test_wrong_split_and_no_questions(tmp_path):
    path = write(tmp_path / "x.jsonl", rows(3))
    for split in ("dev", "", None, "Train"):
        assert "train, validation, test" in error(path, split)
    assert "no split 'all'" in error("tiny", "all") and "no questions" in error(path, "all", n=0)


BAD_FILES = [  # name, content, what the message says
    ("x.jsonl", "", "no questions"),
    ("x.jsonl", "\n\n", "no questions"),
    ("x.json", "[]", "no questions"),
    ("x.json", '{"examples": []}', "no questions"),
    ("x.json", "", "cannot load"),
    ("x.json", '[\n{"question": 1,\n"answer" 2}]', "line 3"),
    ("x.json", '{"question": 1}\n{"question": 2}', "line 2"),
    ("x.json", "[" * 100_000, "cannot load"),
    ("x.jsonl", "[" * 100_000, "row 1"),
    ("x.jsonl", '{"question": 1, "answer": 2', "row 1"),
    ("x.jsonl", '{"question": "é", "answer": 1}'.encode("latin-1"), "row 1"),
    ("x.json", '{"data": []}', "the columns are ['data']"),
    ("x.json", '"text"', "expected an object, not 'text'"),
    ("x.json", "[3]", "expected an object, not '3'"),
    ("x.jsonl", "[1, 2]", "expected an object, not ['1', '2']"),
    ("x.jsonl", '{"frage": 1, "answer": 2}', "no text in question or problem or input; the col"),
    ("x.jsonl", '{"question": 1}', "no text in answer or target; the columns are ['question']"),
    ("x.json", '{"examples": [{"input": 1}]}', "no text in answer or target"),
    ("x.jsonl", '{"question": null, "answer": 2}', "no text in question"),
    ("x.jsonl", '{"question": " \\n ", "answer": 2}', "no text in question"),
    ("x.jsonl", '{"question": "a", "answer": [2]}', "no text in answer"),
    ("x.jsonl", '{"question": "a", "answer": {}}', "no text in answer"),
    ("x.jsonl", '{"question": "a", "answer": ""}', "no text in answer"),
    ("x.jsonl", '{"question": "a", "answer": "b #### "}', "no answer after ####"),
    ("x.jsonl", '{"problem": "a", "solution": "no box"}', "no text in answer"),
    ("x.jsonl", '{"question": "a", "answer": 0, "choices": true}', "choices"),
    ("x.jsonl", '{"question": "a", "answer": "A", "choices": {"text": ["b"]}}', "choices"),
    ("x.jsonl", '{"question": "a", "answer": "\\ud800"}', "surrogates"),
]


@pytest.mark.parametrize("name, content, expected", BAD_FILES)
def test_bad_files(tmp_path, name, content, expected, capsys):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = error(path, "all")
    assert str(path) in message and expected in message, message
    if name == "x.jsonl" and content.strip():  # among good rows it is left out, aloud
        path.write_bytes(b'{"input": 1, "target": 2}\n' + path.read_bytes())
        assert only_row(path) == {"question": "1", "answer": "2", "task": "x"}
        assert f"{path}: 1 rows left out: row 2 of x: " in capsys.readouterr().out


def test_empty_split(tmp_path):
    path = write(tmp_path / "x.jsonl", [rows(1)[0]])
    here = data.split_by_hash("question 0")
    for split in set(SPLITS) - {here}:
        message = error(path, split)
        assert f"split {split!r}" in message and "'all'" in message
    assert len(load_tasks(path, here)) == len(load_tasks(path, "all")) == 1
