"""The rewards: what is read as an answer, what counts as right, and what must never earn."""

import itertools
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import TEXT, for_all
from hypothesis import strategies as st

import formulas
import rewards
from agents import leader_messages
from rewards import extract_agent_answer, extract_answer, is_correct, judge, reward

# ----------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "text, right, formatted, points",
    [
        ("<think>a</think><answer>8</answer>", True, True, 1.1),
        ("<think>a</think><answer>9</answer>", False, True, 0.1),
        ("<answer>8</answer>", True, False, 1.0),
        ("the answer is 8", False, False, 0.0),
        ("", False, False, 0.0),
    ],
)
def test_a_verdict_has_all_that_is_said_of_a_completion(text, right, formatted, points):
    verdict = judge(text, "8")
    assert (verdict.right, verdict.formatted, verdict.reward) == (right, formatted, points)
    assert reward([text, [{"content": text}]], ["8", "8"]) == [points, points]


# -------------------------------------------------------------------------------- extraction

EXTRACTED = [
    ("<answer>8</answer>", "8"),
    ("<think>so 8</think><answer> 8 </answer>", "8"),
    ("so 8</think> <answer>8</answer>", "8"),  # a template wrote <think> into the prompt
    ("<answer>8</answer> that is, <answer> 8\n</answer>", "8"),  # the same twice
    ("<answer>8</answer><answer>9</answer>", None),
    ("<answer>8</answer><answer></answer>", None),
    ("<think><answer>9</answer></think><answer>8</answer>", "8"),
    ("a</think><answer>9</answer></think><answer>8</answer>", "8"),  # the last </think> counts
    ("<think>a <answer>8</answer></think>", None),  # inside the reasoning only
    ("<think>a <answer>8</answer>", None),  # reasoning that never ends
    ("<think>a</think><think><answer>8</answer>", None),
    ("<answer>8</answer><think>is it?", "8"),
    ("<answer>8", None),
    ("8</answer>", None),
    ("8</answer> <answer>8</answer>", None),
    ("<answer>8</answer></answer>", None),
    ("<answer></answer>", None),
    ("<answer> \n\t</answer>", None),
    ("<answer>\u200b\u202e\ufeff\x00</answer>", None),  # nothing to be seen
    ("<answer><answer>8</answer></answer>", None),
    ("<answer><answer>8</answer>", None),
    ("<answer>8</think></answer>", None),
    ("<answer>8<think></answer>", None),
    ("<answer>] ) ></answer>", "] ) >"),
    ("< answer > 8 < / answer >", None),
    ("the answer is 8", None),  # the leader has to use the tags
    (r"\boxed{8}", None),
    ("", None),
]


@pytest.mark.parametrize("text, answer", EXTRACTED)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


AGENTS = [
    ("flute 1 piano 2 . So the answer is 8 .", "8"),
    ("So the answer is ] ) >.", "] ) >"),
    ("So the answer is ] ) > .", "] ) >"),
    ("The answer is (B). It cannot be (A).", "(B)"),
    ("THE ANSWER IS 3.5.", "3.5"),
    ("The answer is 3.5 meters. Or so.", "3.5"),
    ("The answer is: 8\nBye", "8"),
    ("The final answer is\n\n8", "8"),
    ("The correct answer is $1,234.", "$1,234"),
    ("The answer is 7. No, the answer is 8.", "8"),
    ("The answer is", None),
    ("The answer is .", None),
    ("the answer isn't 8", None),
    (r"first \boxed{7}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{\frac{\sqrt{x^{2}}}{2}} and {more}", r"\frac{\sqrt{x^{2}}}{2}"),
    (r"the answer is 7, \boxed{8}", "8"),
    (r"The answer is 7. \boxed{8", "7"),  # cut off
    (r"\boxed{} The answer is 7.", "7"),
    (r"\boxed{8}</think>", None),  # reasoning
    (r"<think>\boxed{7}</think> The answer is 8.", "8"),
    (r"<answer>8</answer> \boxed{7}. The answer is 6.", "8"),
    (r"<answer>8</answer><answer>9</answer> \boxed{7}", None),  # used the tags: held to them
    (r"<answer>8 \boxed{7}", None),
    ("I do not know.", None),
    ("", None),
    # a label instead of a sentence
    ("**Answer:** B", "(B)"),
    ("The answer is Mt. Everest. It is high.", "Mt. Everest"),
    ("The answer is the U.S. Army. It is large.", "the U.S. Army"),
    ("Answer: B", "(B)"),
    ("Final answer: 18", "18"),
    ("**Final Answer**: No.", "No"),
    ("9 + 9\n#### 18", "18"),
    ("Therefore, the correct option is (B).", "(B)"),
    # more than the answer in its place
    ("The correct answer is (E) 12/25/1937", "(E)"),
    ("the answer is (B) Antiparticles", "(B)"),
    ("The answer is: **18**", "18"),
    ("the answer is 18 dollars per day", "18"),
    ("the answer is 5 pm", "5 pm"),
    ("the answer is 5 million dollars", "5 million dollars"),
    ("The answer is Dr. Smith. He said so.", "Dr. Smith"),
    ("the answer is “Yes”", "Yes"),
    ("the answer is 'Yes'.", "Yes"),
    # nothing stated: the last line
    ("not ( True ) is\nFalse", "false"),
    ("Yes, it returns to where it began.", "yes"),
    ("So the statement is **false**.", "false"),
    ("It goes on.\n(B) Antiparticles", "B"),
    ("B. Antiparticles", "B"),
    ("So there are 54 ducks in total.", "54"),
    ("It makes $1,080.", "1,080"),
    # it contradicts itself, or commits to nothing
    ("It could be (A) or (B).", None),
    ("Is it true or false?", None),
    ("The number is not 8.", None),
    ("18 or 20", None),
    ("The correct answer is not (A).", None),
    ("The answer is (B) or (A).", None),
    ("The answer is yes, or no.", "yes, or no"),
    # negated: the opposite, or nothing
    ("The argument is not deductively valid.", "invalid"),
    ("It isn't valid.", "invalid"),
    ("So the statement is not true.", "false"),
    ("No, it is not the same.", "no"),
    ("So this is not a yes", None),
    ("If not, then true.", "true"),
    # an option called so
    ("Option B is correct.", "B"),
    ("So B is the answer.", "B"),
    ("The correct answer is option (B) Tuesday.", "(B)"),
    ("Answer: option B", "(B)"),
    ("(D) Name of one, not of many.", "D"),
    ("The smallest value of $c$ is $3.$", "3"),
    ("3 times 4 is 12. I hope this helps.", "12"),
    ("So the sum is 3/4.", "3/4"),
    (r"Thus $x = \frac{3}{4}$.", r"x = \frac{3}{4}"),
    ("The number is not $8$.", None),
    ("The temperature is −5.", "−5"),
    ("It was on 12/25/1937.", None),
    ("Therefore, P(A) = 0.5.", "0.5"),
    ("There are 3 valid solutions.", "3"),
    ("I do not think that the argument is valid.", "invalid"),
    ("I don't think it is true.", "false"),
    ("So it must be B.", "B"),
    ("So the answer is (B), Tuesday.", "(B)"),
    ("So the answer is Tuesday (B).", "(B)"),
    ("The answer is (B), not (A).", "(B)"),
    ("The answer is **(B)** Tuesday.", "(B)"),
    ("The answer is 3 * 4 = 12.", "12"),
    ("The answer is **5.** He has them.", "5"),
    # the last statement counts
    ("So the answer is 4.\nAnswer: 5", "5"),
    ("Answer: 5. So the answer is 4.", "4"),
    ("Answer: B\n\nThe answer is correct.", "(B)"),
    # the first line, where the last says nothing
    ("Yes\n\nThe man can be there at 5 pm.", "yes"),
    ("(B)\n\nI hope this helps.", "B"),
    ("B. Tuesday\n\nI hope this helps.", "B"),
    ("Yes\n\nI followed the instructions.", "yes"),
    ("B) tot gun\n\nThat is a joke.", "B"),
    ("Yes, it is.\n\nI followed the instructions.", None),
    ("Yes\n\nIs it yes or no?", None),
]


@pytest.mark.parametrize("text, answer", AGENTS)
def test_extract_agent_answer(text, answer):
    assert extract_agent_answer(text) == answer


@pytest.mark.parametrize("said", ["(B) {}", "B. {}", "The answer is (B) {}.", "Option B: {}"])
def test_an_agents_option_with_the_text_of_another_contradicts_itself(said):
    question = "Which day?\n(A) Monday\n(B) Tuesday"
    assert is_correct(extract_agent_answer(said.format("Tuesday"), question), "(B)", question)
    assert is_correct(extract_agent_answer(said.format("is it"), question), "(B)", question)
    assert extract_agent_answer(said.format("Monday"), question) is None


def test_a_real_models_answers_are_read_as_a_person_reads_them():
    """The ends of responses of SmolLM2-135M-Instruct to questions of BBH, GSM8K, MATH and MMLU,
    each with what a person takes for its answer (null: it commits to nothing)."""
    lines = Path(__file__).with_name("agent_answers.jsonl").read_text(encoding="utf-8").splitlines()
    misread = []
    for row in map(json.loads, lines):
        found = extract_agent_answer(row["text"])
        same = is_correct(found, row["answer"]) if row["answer"] else found is None
        if not same:
            misread.append((row["text"], row["answer"], found))
    assert len(lines) >= 60 and len(misread) <= 0.05 * len(lines), misread


# ------------------------------------------------------------------------------- correctness

RIGHT = [  # answer, gold
    *itertools.product(["(B)", "B", "b", "b.", "B)", "**B**", r"\text{(B)}"], ["(B)", "B"]),
    *itertools.product(["Yes", "yes", " YES. ", '"yes"', r"$\text{Yes}$"], ["Yes", "yes"]),
    *itertools.product(
        ["1,234.0", "1234", "$1,234", r"\$1,234", "1234.", "+1234"], ["1234", "1,234"]
    ),
    *itertools.product(
        ["-5", "- 5", "−5", "-5.0", "$-5$", "x = -5", r"\boxed{-5}"], ["-5", "x=-5"]
    ),
    *itertools.product(["50%", "50 %", r"50\%", r"$50.0\%$"], ["50%", r"50\%"]),
    *itertools.product(
        ["1/2", "0.5", ".5", r"\frac{1}{2}", r"\dfrac12", "50/100"], ["0.5", r"\frac12"]
    ),
    *itertools.product(
        ["90", "90°", r"90^\circ", r"90^{\circ}", "$90.$", r"\boxed{90^\circ}"], ["90", r"90^\circ"]
    ),
    *itertools.product(["])", "] )", "  ]  ).", "`] )`"], ["] )", "])"]),
    *itertools.product(["a cat  sat", "a, cat, sat", "A\ncat sat."], ["a cat sat"]),
    (r"-\frac{35}{9}", r"\frac{-35}{9}"),
    (r"10,\!080", "10080"),
    (r"10{,}080", r"10,\!080"),
    (r"\frac{270}7", r"\frac{270}7\text{ degrees}"),
    (r"8 \text{ cm}^2", "8"),
    ("0", "-0"),
    ("Evelyn", r"\text{Evelyn}"),
    ("p-q", "p - q"),
    ("(6, 31, -1)", "(6,31,-1)"),
    ("dearth, wind, & fire", "dearth, wind, & fire"),
    ("o’connell", "o'connell"),
    ("A or B", "A or B"),  # the gold itself is always right
    ("8\u200b", "8\u200b"),
    (8, "8"),
    ("8", 8),
    ("0", 0),
    ("True", True),
]

WRONG = [
    (None, "8"),
    (None, "None"),
    ("", ""),
    ("\u200b", "\u200b"),
    (" ", "."),
    ("9", "8"),
    ("A", "(B)"),
    ("B", "8"),
    ("А", "A"),  # Cyrillic
    ("٣", "3"),
    ("2³", "23"),
    ("12 3", "123"),
    ("1 23", "123"),
    ("1,23", "123"),
    ("8.0000001", "8"),
    ("50%", "50"),
    ("50", "50%"),
    ("0.5", "50%"),
    (r"$50\%$", "$50$"),
    (") ]", "]"),
    (") ]", ") ] >"),
    ("] )", ") ]"),
    (")", "]"),
    ("cat a sat", "a cat sat"),
    ("acatsat", "a cat sat"),
    ("$cat, a$", "a, cat"),
    ("$on$", "No"),
    ("$neve$", r"\text{even}"),
    ("21/2", r"2\frac12"),
    ("1/0", "1"),
    (r"\frac{1}{0}", "1"),
    ("(B) red", "(B)"),
    ("not 8", "8"),
    ("the answer is 8", "8"),
    ("8 apples", "8"),
    ("A = (B)", "B"),
    ("A = B", "(B)"),
    ("x = ", "x"),
    ("x^2 t", "x^2"),
]

RIGHT += [
    ("(x+1)^2", "x^2+2x+1"),
    ("$2(k+1)$", "2k+2"),
    ("$-q + p$", "p - q"),
    ("y = 2x^2+3", "2x^2+3"),
    ("2x^2+3", "y=2x^2+3"),
    (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"x \in (2,\infty)", r"(2,\infty)"),
    (r"1-\sqrt{19}, 1+\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"\[ \boxed{11\sqrt2} \]", r"11\sqrt{2}"),
    (r"\frac{4}{3}\pi", r"\frac{4\pi}{3}"),
    ("4210_5", "4210_{5}"),
    ("$9i+6$", "6+9i"),
    ("$-2, 1$", "1,-2"),
    (r"$-5x+7y-11z-4=0$", "5x - 7y + 11z + 4 = 0"),
    (r"\begin{pmatrix}-\frac13\\0.5\end{pmatrix}", r"\begin{pmatrix} -1/3 \\ 1/2 \end{pmatrix}"),
]

WRONG += [
    ("x^3", "x^2"),
    (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"),
    ("52_9", "52_8"),
    ("3_{x^2}x", "3x"),
    ("52", "52_8"),
    (r"0.0000002", r"1 \times 10^{-7}"),
    ("(3,4)", "$(3,4]$"),
    (r"\%x^2", "x^2"),
    ("x^2", ""),
    ("x^{", "x^2"),
    ("2 + 6", "8"),  # the question may have been: what is 2 + 6?
    ("$2^3$", "8"),
    ("3 = 8", "8"),
    *((template, gold) for gold in [r"\sqrt{2}", "8", r"\{1,2\}"] for template in [
        rf"9 \equiv {gold}", rf"{gold} \approx 9", rf"9 = {gold}", rf"x = 9 = {gold}",
        rf"9 \in {gold}", rf"{gold} \text{{ or }} 9 \text{{ }}", rf"\boxed{{{gold}}}, \boxed{{9}}",
        rf"${gold}$ or $9$", rf"\{{{gold}, 9\}}", rf"{gold}; 9", rf"{gold} \ne 9",
    ]),
]  # fmt: skip


@pytest.mark.parametrize("answer, gold", RIGHT)
def test_right(answer, gold):
    assert is_correct(answer, gold) is True


@pytest.mark.parametrize("answer, gold", WRONG)
def test_wrong(answer, gold):
    assert is_correct(answer, gold) is False


def fresh_worker():
    """Without a cached reply, and with whatever worker there was given up."""
    formulas.same_formula.cache_clear()
    for worker in formulas.WORKERS.values():
        worker.kill()
        worker.wait()


OPTIONS = "When?\nOptions:\n(A) Monday\n(B) Tuesday"


@pytest.mark.parametrize(
    "answer, right",
    [
        ("(B)", True),
        ("(B) Tuesday", True),
        ("( B )", True),
        ("( B ) Tuesday", True),
        ("( A )", False),
        ("B. tuesday", True),
        ("(B) Monday", False),
        ("(A) Tuesday", False),
        ("(B) Tuesday or Monday", False),
        ("Tuesday", False),
    ],
)
def test_an_option_may_stand_with_its_own_text(answer, right):
    assert is_correct(answer, "(B)", OPTIONS) is right
    assert judge(f"<think>a</think><answer>{answer}</answer>", "(B)", OPTIONS).right is right
    assert is_correct(answer, "(B)") is (answer in ("(B)", "( B )"))  # without the question


@pytest.mark.parametrize("unit", ["dollars", "dollars per day", "square feet", "units"])
def test_a_unit_may_follow_a_number(unit):
    assert is_correct(f"18 {unit}", "18") and not is_correct(f"18 {unit}", "19")
    assert not is_correct(f"18 million {unit}", "18")
    assert not is_correct(f"18 {unit}", r"18\text{ cm}")  # the gold has another one


@pytest.mark.parametrize("bomb", ["9^{9^{9^9}}", pytest.param("{" * 900, marks=pytest.mark.slow)])
def test_latex_that_takes_for_ever_is_ended_also_in_a_thread(bomb, monkeypatch):
    """The machine may be busy: what must hold is that it ends, is wrong, and that a new worker goes
    on."""
    formulas.same_formula.cache_clear()
    is_correct("x^4", "x^{2+2}")  # the worker has started
    monkeypatch.setattr(formulas, "SECONDS", 0.5)
    [before] = formulas.WORKERS.values()
    replies = []

    def compare():
        replies.append(is_correct(bomb + "^2", "x^2"))
        monkeypatch.setattr(formulas, "SECONDS", 60)
        replies.append(is_correct("$2(k+1)$", "2k + 2"))

    formulas.same_formula.cache_clear()
    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert replies == [False, True]
    if "9" in bomb:  # this one does take for ever
        assert before.poll() is not None and before not in formulas.WORKERS.values()


def test_a_worker_that_dies_between_two_comparisons_is_replaced():
    fresh_worker()
    assert is_correct("$x^2 x^3$", "x^5") is True
    [worker] = formulas.WORKERS.values()
    worker.kill()
    worker.wait()
    assert is_correct("$x^2 x^4$", "x^6") is True


def test_latex_in_many_threads_at_once():
    fresh_worker()
    pairs = [(f"$x^{{{i}}}x^{j}$", f"x^{{{i + 2}}}") for i in range(10, 16) for j in (1, 2, 3)]
    replies = {}

    def compare(pair):
        replies[pair] = is_correct(*pair)

    threads = [threading.Thread(target=compare, args=[pair]) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {(answer, gold): answer.endswith("x^2$") for answer, gold in pairs}


def test_latex_runs_no_code(tmp_path):
    trace = tmp_path / "trace"
    for code in [f"__import__('os').mkdir('{trace}')", f"open('{trace}','w')", f"print('{trace}')"]:
        for answer in [f"${code}$", rf"\frac{{{code}}}{{2}}", rf"\operatorname{{{code}}}^2"]:
            assert is_correct(answer, "x^2") is False
            assert formulas.NO_FORMULA.search(answer) or not formulas.same_formula(answer, "x^2")
    assert not trace.exists()


def test_without_math_verify_latex_is_an_error_and_not_a_wrong_answer(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fresh_worker()
    with pytest.raises(RuntimeError, match="pip install math-verify"):
        is_correct("(x+1)^2", "x^2+2x+1")
    assert is_correct("x^2", "x^2") and is_correct("B", "(B)")  # nothing else needs it
    assert "math_verify" not in sys.modules


# ------------------------------------------------------- earning without being right

# (gold, a wrong answer of its kind)
GOLDS = [("(B)", "(A)"), ("8", "9"), ("Yes", "No"), ("] )", ">"), ("50%", "40%"), ("-1.5", "3"),
         ("cat dog", "pig"), (r"\frac{3}{4}", "2"), ("x^2", "x^3"), (r"\text{even}", "odd"),
         (r"3\sqrt{13}", r"\pi"), ("1,-2", "5"), ("True", "False")]  # fmt: skip

HEDGES = ["{gold} or {other}", "{other} or {gold}", "{gold}, {other}", "{other}, {gold}",
          "{gold} and {other}", "{gold} {other}", "{other} {gold}", "{gold}\n{other}",
          "{gold}/{other}", "{gold} | {other}", "{gold}; {other}", "[{gold}, {other}]",
          "not {other}, but {gold}", "It is {gold}", "{gold} I think", "({gold}) ({other})",
          "**{gold}** **{other}**", "${gold}$, ${other}$", r"\boxed{{{gold}}} \boxed{{{other}}}",
          r"\text{{{gold}}}\text{{{other}}}", r"{gold} \text{{ or }} {other} \text{{ }}",
          r"{gold} \text{{ or not}}", r"{other} = {gold}", r"{gold} \approx {other}"]  # fmt: skip


@pytest.mark.parametrize("gold, other", GOLDS)
def test_hedging_earns_nothing(gold, other):
    assert is_correct(gold, gold) and is_correct(f"**{gold}**.", gold)
    for hedge in HEDGES:
        answer = hedge.format(gold=gold, other=other)
        assert not is_correct(answer, gold), answer
        assert not judge(f"a</think><answer>{answer}</answer>", gold).right


@for_all(st.sampled_from(GOLDS), TEXT)
def test_two_answers_whatever_stands_between_them_earn_nothing(golds, text):
    gold, other = golds
    assert not is_correct(f"{gold} or {text}{other}", gold)
    text = text.replace("<think>", "").replace("</think>", "")
    assert not judge(f"<answer>{gold}</answer>{text}<answer>{other}</answer>", gold).right


@for_all(
    st.sampled_from(GOLDS),
    st.lists(st.sampled_from([other for _, other in GOLDS]), min_size=1, max_size=3),
    st.sampled_from([" or ", ", ", " ", "\n", "/", "; ", " and ", " | ", "\\quad ", ","]),
    st.randoms(use_true_random=False),
)
def test_the_right_answer_in_a_list_earns_nothing(golds, others, comma, random):
    answers = [golds[0], golds[1], *others]
    random.shuffle(answers)
    text = comma.join(answers)
    assert not is_correct(text, golds[0])
    assert not is_correct(f"[{text}]", golds[0])
    assert not judge(f"a</think><answer>{text}</answer>", golds[0]).right


@for_all(st.sampled_from(GOLDS), TEXT)
def test_an_echo_of_the_prompt_earns_nothing(golds, text):
    gold, other = golds
    question = re.sub("</?(think|answer)>", "", text) + f"What is right, {other} or {gold}?"
    responses = [
        f"{text}<answer>{gold}</answer>",
        f"So the answer is {gold}.",
        f"\\boxed{{{gold}}}",
    ]
    system, user = (m["content"] for m in leader_messages(question, responses))
    for echo in (question, user, f"{system}\n{user}"):
        assert not judge(echo, gold).right
        assert not judge(f"{echo}</think>{echo}", gold).right
        assert not judge(f"a</think><answer>{echo}</answer>", gold).right


INVISIBLE = st.characters(categories=["C"]).filter(lambda c: not c.isspace())  # not seen, no space
OTHERS = "\u3164\ufe0f\u034f"  # not seen either, though of other categories


@for_all(
    st.sampled_from(GOLDS), st.text(INVISIBLE | st.sampled_from(OTHERS), min_size=1), st.data()
)
def test_invisible_characters_earn_nothing(golds, unseen, data):
    gold, _ = golds
    place = data.draw(st.integers(0, len(gold)))
    for text in (gold[:place] + unseen + gold[place:], unseen):
        assert not is_correct(text, gold)
        assert not judge(f"a</think><answer>{text}</answer>", gold).right


def test_answers_in_several_places_earn_nothing():
    other = "<answer>9</answer>"
    right = "<answer>8</answer>"
    for text in [other + right, right + other, f"a{right}</think>{other}", f"{right}</think>",
                 f"<think>{right}", f"<think>{right}</think> 8", f"{right}<answer>",
                 f"{right}</answer>", f"<answer>{right}</answer>"]:  # fmt: skip
        assert judge(f"<think>a</think>{text}", "8").right is False
        assert reward([text], ["8"])[0] < 0.2


# ------------------------------------------------------------------------------------ reward

FORMATTED = [
    ("<think>a</think><answer>8</answer>", True),
    (" <think>\na\n</think>\n\n<answer>\n8\n</answer>\n", True),
    ("a</think><answer>8</answer>", True),
    ("<think>a <answer>9</answer></think><answer>8</answer>", True),
    ("<think></think><answer>8</answer>", False),
    ("</think><answer>8</answer>", False),
    ("<think>\u200b \n</think><answer>8</answer>", False),
    ("<answer>8</answer>", False),
    ("<think>a</think><answer></answer>", False),
    ("<think>a</think><answer>\u200b</answer>", False),
    ("<think>a</think>8", False),
    ("<think>a</think><answer>8", False),
    ("<think>a</think><answer>8</answer>.", False),
    ("<think>a</think>So <answer>8</answer>", False),
    ("<think>a</think><answer>8</answer><answer>8</answer>", False),
    ("<think>a</think>b</think><answer>8</answer>", False),
    ("<think>a<think>b</think><answer>8</answer>", False),
    ("b<think>a</think><answer>8</answer>", False),
    ("<think>a</think><answer>8</think></answer>", False),
    ("<think>a</think><answer></answer></think><answer>8</answer>", False),
    ("", False),
]


@pytest.mark.parametrize("text, formatted", FORMATTED)
def test_has_format(text, formatted):
    assert judge(text, "8").formatted is formatted


def test_reward_adds_a_small_term_for_the_form():
    texts = [
        "a</think><answer>8</answer>",
        "<answer>8</answer>",
        "a</think><answer>9</answer>",
        "8",
    ]
    assert reward(texts, ["8"] * 4) == [1.1, 1.0, 0.1, 0.0]
    assert rewards.FORMAT_BONUS < 0.5


def test_reward_takes_what_trl_hands_over():
    messages = [
        [{"role": "assistant", "content": "a</think><answer>B</answer>"}],
        [{"role": "user", "content": "<answer>B</answer>"}, {"role": "assistant", "content": "no"}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    columns = {"prompts": ["?"] * 4, "completion_ids": [[1]] * 4, "task": ["t"] * 4}
    assert reward(completions=messages, answer=["(B)"] * 4, **columns) == [1.1, 0, 0, 0]
    assert reward(completions=[None, "<answer>8</answer>"], answer=["8", "8"]) == [0, 1]
    assert reward([], []) == []
    with pytest.raises(ValueError):  # a column of another length is a bug of the caller
        reward(["a"], ["8", "8"])


# ------------------------------------------------------------------------------- any text

GOLD = st.sampled_from([gold for gold, _ in GOLDS]) | TEXT


@for_all(TEXT)
def test_extraction_gives_none_or_a_stripped_text(text):
    tagged, lenient = extract_answer(text), extract_agent_answer(text)
    for answer in (tagged, lenient):
        assert answer is None or (answer and answer == answer.strip() and answer in text)
    assert tagged is None or lenient == tagged
    assert tagged is None or tagged in text.rpartition("</think>")[2]


@for_all(TEXT, GOLD)
def test_correctness_is_a_boolean_and_the_gold_is_right(text, gold):
    assert is_correct(text, gold) in (True, False)
    assert is_correct(gold, gold) is rewards.is_visible(gold)


@for_all(TEXT, GOLD)
def test_the_reward_is_one_of_four_numbers(text, gold):
    assert reward([text], [gold])[0] in (0, 0.1, 1, 1.1)
    assert reward([[{"role": "assistant", "content": text}]], [gold]) == reward([text], [gold])


@for_all(TEXT)
def test_what_the_reasoning_says_or_echoes_changes_nothing(text):
    assert judge(f"{text}</think><answer>8</answer>", "8").right
    assert not judge(f"{text}</think><answer>9</answer>", "8").right
    assert not judge(f"{text}<answer>8</answer></think>", "8").right
    assert not judge(f"</think><think>{text.replace('</think>', '')}<answer>8</answer>", "8").right


MEGABYTE = 1_000_000
REPEATED = ["<answer>", "</answer>", "<answer>8</answer>", "<answer>8", "<think>", "</think>",
            "<think></think>", " ", "\n", "\u200b", "\\boxed{", "{", "}", "\\boxed{}", "8", ".",
            "the answer is ", "The Final Answer Is: ", "the final ", "1,234", "\\text{", "$", "-",
            "^ {", "(a)", "(A)", "not ", "\\", "x=", "* ", "İ", "a\u0315\u0300", "8．"]  # fmt: skip


@pytest.mark.parametrize("repeated", REPEATED, ids=ascii)
def test_a_megabyte_takes_linear_time(repeated):
    """2 s of this process's own time: it takes 0.1; what is quadratic takes hours."""
    bomb = (repeated * (MEGABYTE // len(repeated) + 1))[:MEGABYTE]
    # what is read as LaTeX has its own limit
    for text in [bomb, f"<answer>{bomb}</answer>", f"<think>{bomb}</think><answer>8</answer>",
                 f"the answer is {bomb}", f"\\boxed{{{bomb}}}"]:  # fmt: skip
        for function in (extract_answer, extract_agent_answer,
                         lambda text: is_correct(text, "8"), lambda text: is_correct("8", text),
                         lambda text: reward([text], ["(B)"])):  # fmt: skip
            start = time.process_time()  # of this process: the machine may be busy
            function(text)
            assert time.process_time() - start < 2, (text[:40], function)


@pytest.mark.parametrize("repeated", REPEATED, ids=ascii)
def test_an_answer_as_long_as_allowed_is_fast_too(repeated):
    text = (repeated * rewards.LONGEST_ANSWER)[: rewards.LONGEST_ANSWER]
    start = time.process_time()
    assert not any(is_correct(text, gold) for gold in ("8", "(B)", "Yes", "cat dog"))
    assert time.process_time() - start < 2
