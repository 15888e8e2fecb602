"""steps.py and page.py: which steps are right, and the page of a run, in a real browser too."""

import itertools
import random
from html.parser import HTMLParser

import browser
import pytest
from conftest import TEXT, for_all

import evaluate
import page
import steps
import tiny
from sampling import Completion
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


# -------------------------------------------------------------------------------------- the page

QUESTIONS = 24
STAGES = ("untrained", "sft", "mlpo")
EVIL = "<script>window.hit = 1</script> {{ 7*7 }} </div><img src=x onerror='window.hit = 1'>"


def written_by(rng, task, solve, evil):
    """To one question, {who: the Completions of two rounds}: each agent holds its misconception in
    most cases, the leader the first of them or none, and in the second round the agents are right.
    evil: one of the texts is an attack."""
    beliefs = tiny.MISCONCEPTIONS[task["task"]]
    said = {}
    team = []
    for k in range(3):
        held = beliefs[k : k + 1] if rng.random() < 0.7 else []
        team.append(EVIL if evil and k == 1 else make.said(solve(held)))
        said[f"agent{k + 1}"] = team[k : k + 1]
    said["majority vote of 3"] = said["any agent right"] = team
    for stage in STAGES:
        said[stage, "alone"] = [make.led(solve(beliefs[:1]))]
        outputs = [make.led(solve(rng.choice([[], beliefs[:1]]))) for _ in range(2)]
        refined = [make.said(solve([]))] * 3
        said[stage, "team"] = [*team, outputs[0], *refined, outputs[1]]
    return {who: [Completion(text) for text in texts] for who, texts in said.items()}


@pytest.fixture(scope="module")
def content():
    """The arguments of page.page: the rows are those of a real evaluation, the texts made up."""
    rng = random.Random(1)
    tasks = tiny.puzzles("test", QUESTIONS)
    puzzles = tiny.draw_puzzles("test", QUESTIONS, 0)
    said = []
    for task in tasks:
        _, solve = puzzles[task["question"]]
        evil = len(said) == 4
        said.append(written_by(rng, task, solve, evil))
    rows = []
    roles = {"agent1": "agent", "agent2": "agent", "agent3": "agent"}
    roles |= {"majority vote of 3": "majority", "any agent right": "any_right"}
    for name, who in roles.items():
        rows.append(evaluate.result_row(tasks, [s[name] for s in said], who, name))
    for team, rounds in ((False, 1), (True, 1), (True, 2)):
        for stage in STAGES:
            written = [s[stage, "team" if team else "alone"][: 4 * rounds] for s in said]
            identity = {"name": "tiny", "stage": stage, "team": team, "rounds": rounds}
            rows.append(evaluate.result_row(tasks, written, "leader", **identity))
    texts = {row["label"]: row.pop("texts") for row in rows}
    return {
        "results": {"dataset": "tiny", "questions": QUESTIONS, "rows": rows},
        "tasks": tasks,
        "texts": texts,
        "solutions": tiny.right_steps("test", QUESTIONS),
        "samples": [sample_of(tasks[0], step) for step in (0, 9)],
    }


def sample_of(task, step):
    """A row of samples.jsonl."""
    completions = []
    for reward in (1.1, 0.1):
        completions.append(
            {"text": f"{EVIL} {reward}", "reward": reward, "advantage": reward - 0.6}
        )
    row = {"step": step, "question": task["question"], "answer": task["answer"]}
    return {**row, "prompt": f"Response 1: {EVIL}", "completions": completions}


class Elements(HTMLParser):
    """All elements of a page, as (tag, attributes), and the text inside those that matter."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.text = []
        self.styles = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements[-1:] and self.elements[-1][0] == "style":
            self.styles.append(data)
        self.text.append(data)


@pytest.fixture(scope="module")
def html(content):
    return page.page(**content)


def test_all_questions_with_who_said_what(html, content):
    found = Elements(html)
    ids = [attributes.get("id") for tag, attributes in found.elements if tag == "details"]
    numbers = range(1, QUESTIONS + 1)
    assert ids == ["step0", "step9", *(f"q{number}" for number in numbers)]
    links = [attributes["href"] for tag, attributes in found.elements if tag == "a"]
    assert {f"#q{number}" for number in numbers} <= set(links)
    whole = "".join(found.text)
    for task in content["tasks"]:
        assert task["question"] in whole
    for of_row in content["texts"].values():
        for said in of_row:
            assert all(text in whole for text in said)
    for row in content["results"]["rows"]:
        assert row["label"] in whole and f"{100 * row['accuracy']:.1f}" in whole
    assert "mlpo leader, team, T=1 - sft leader, team, T=1" in whole
    assert "+0.50" in whole and "-0.50" in whole  # the advantages of the groups


def test_what_is_said_stays_text(html):
    found = Elements(html)
    assert html.count("<script>") == 1 and "49" not in html.split("window.hit")[1][:40]
    assert not any("onerror" in attributes for _, attributes in found.elements)
    assert "".join(found.text).count(EVIL) == 1 + 2 * (1 + 2)  # a speech; prompts, completions


def test_nothing_is_loaded_from_anywhere(html, content):
    with_picture = page.page(**content, pictures=["data:image/png;base64,AAAA"])
    found = Elements(with_picture)
    addresses = []
    for tag, attributes in found.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "audio", "video")
        for name in ("src", "href", "srcset", "poster", "action", "background"):
            if name in attributes:
                addresses.append(attributes[name])
    assert "data:image/png;base64,AAAA" in addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    styles = "".join(found.styles)
    assert len(styles) > 500 and "url(" not in styles and "@import" not in styles
    assert "http://" not in html and "https://" not in html


def marks_on_the_page(content):
    """For each row that is a speech of the first round, whether the page has it right."""
    questions = page.questions_of(
        content["results"], STAGES, content["tasks"], content["texts"], content["solutions"]
    )
    found = {}
    for question in questions:
        for agent in question["rounds"][0]["agents"][0]:
            found.setdefault(agent["name"], []).append(agent["right"])
        for i, stage in enumerate(STAGES):
            found.setdefault(f"{stage} leader, alone", []).append(question["alone"][i]["right"])
            for t, of_round in enumerate(question["rounds"], start=1):
                label = f"{stage} leader, team, T={t}"
                found.setdefault(label, []).append(of_round["leaders"][i]["right"])
    return found


def test_the_page_finds_right_what_the_table_does(content):
    found = marks_on_the_page(content)
    for row in content["results"]["rows"]:
        if row["who"] in ("agent", "leader"):
            assert row["correct"] == evaluate.bits(found[row["label"]]), row["label"]


def test_without_a_team_or_known_steps(content):
    results = content["results"]
    alone = [row for row in results["rows"] if row["stage"] and not row["team"]]
    html = page.page({**results, "rows": alone}, content["tasks"], content["texts"], {})
    whole = "".join(Elements(html).text)
    assert "after MLPO" in whole and "majority" not in whole.split("Questions")[-1].split("<")[0]
    assert 'class="good"' not in html and "no agent right" not in html


# --------------------------------------------------------------------------------- in a browser

in_a_browser = pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING)
SHOWN = (
    "[...document.querySelectorAll('.question')].filter(q => q.checkVisibility()).map(q => q.id)"
)
FILTERS = ("all", "alone_right", "majority_wrong", "majority_wrong_leader_right")
FILTERS += ("better", "worse", "wrong")


@pytest.fixture(scope="module")
def tab(html, tmp_path_factory):
    """The page, open in a browser."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    with browser.browser() as tab:
        browser.visit(tab, path.as_uri())
        yield tab


def choose(tab, name, value):
    """As a person does in that list."""
    element = f"document.getElementById('{name}')"
    browser.script(tab, f"{element}.value = '{value}'")
    browser.script(tab, f"{element}.dispatchEvent(new Event('change'))")


def expected(content, which, task, t):
    """The questions that this filter should show, by the rows of the results."""
    bits = {row["label"]: row["correct"] for row in content["results"]["rows"]}
    ids = []
    for i, row in enumerate(content["tasks"]):
        any_right = bits["any agent right"][i] == "1"
        majority = bits["majority vote of 3"][i] == "1"
        before = bits[f"untrained leader, team, T={t}"][i] == "1"
        after = bits[f"mlpo leader, team, T={t}"][i] == "1"
        fits = {
            "all": True,
            "alone_right": not any_right and after,
            "majority_wrong": not majority,
            "majority_wrong_leader_right": not majority and after,
            "better": not before and after,
            "worse": before and not after,
            "wrong": not after,
        }
        if fits[which] and task in ("", row["task"]):
            ids.append(f"q{i + 1}")
    return ids


@in_a_browser
def test_each_filter_shows_the_questions_it_should(tab, content):
    sizes = set()
    for which in FILTERS:
        choose(tab, "which", which)
        for task in ("", *tiny.TASKS):
            choose(tab, "task", task)
            for value, t in (("1", 1), ("2", 2), ("all", 2)):
                choose(tab, "round", value)
                wanted = expected(content, which, task, t)
                assert browser.script(tab, SHOWN) == wanted, (which, task, value)
                count = browser.script(tab, "document.getElementById('count').textContent")
                assert count == f"{len(wanted)} of {QUESTIONS}"
                sizes.add(len(wanted))
    options = "[...document.getElementById('which').options].map(o => o.value)"
    assert browser.script(tab, options) == list(FILTERS)
    assert len(sizes) > 5  # the questions are no special case


@in_a_browser
def test_a_question_opens_by_a_click_or_its_address_and_shows_the_chosen_round(tab):
    for name, value in (("which", "all"), ("task", ""), ("round", "2")):
        choose(tab, name, value)
    is_open = "document.getElementById('q3').open"
    assert not browser.script(tab, is_open)
    browser.press(tab, "#q3 .start")
    assert browser.script(tab, is_open)
    rounds = "[...document.querySelectorAll('#q3 div.round')].map(r => r.checkVisibility())"
    assert browser.script(tab, rounds) == [False, True]
    choose(tab, "round", "all")
    assert browser.script(tab, rounds) == [True, True]
    choose(tab, "which", "worse")
    browser.script(tab, "location.hash = '#q7'; dispatchEvent(new Event('hashchange'))")
    assert browser.script(tab, "document.getElementById('q7').open")
    assert browser.script(tab, SHOWN)[6] == "q7"  # the filter has made way
    browser.press(tab, "#open")
    count = "document.querySelectorAll('.question[open]').length"
    assert browser.script(tab, count) == QUESTIONS
    browser.press(tab, "#fold")
    assert browser.script(tab, count) == 0


@in_a_browser
def test_wrong_steps_are_red_and_right_ones_green(tab):
    color = "getComputedStyle(document.querySelector('.question .{}')).backgroundColor"
    red, green, _ = rgb(browser.script(tab, color.format("good")))
    assert green > red
    red, green, _ = rgb(browser.script(tab, color.format("bad")))
    assert red > green


def rgb(color):
    return map(int, color.removeprefix("rgb(").removesuffix(")").split(","))


@in_a_browser
def test_no_script_of_a_text_runs_and_nothing_is_asked_of_the_network(tab):
    address = browser.script(tab, "location.href.split('#')[0]")
    tab.requests.clear()
    browser.visit(tab, f"{address}#q5")
    assert browser.script(tab, "window.hit === undefined")
    assert browser.script(tab, "document.getElementById('q5').open")
    assert tab.errors == []
    assert set(tab.requests) - {"about:blank"} == {address}
