r"""Rewards by rule: what did the model answer, is it right, is it in the form we asked for.

No text makes these functions raise or takes them more than linear time. A policy under training
finds every gap, so in doubt they say no: credit goes to *one* answer and nothing but the answer."""

import functools
import json
import os
import re
import resource
import sys
import threading
import time
from fractions import Fraction
from subprocess import DEVNULL, PIPE, Popen

FORMAT_BONUS = 0.1  # our choice: far from the 1 for a right answer, but orders groups all wrong
LONGEST_ANSWER = 2_000  # characters; golds are far shorter, and a longer answer is a wrong one
LATEX_SECONDS = 2  # for one comparison: 9^{9^{9^9}} outlasts the limits of math-verify itself
WORKERS = {}  # by process id: a forked process must not share its parent's pipes
WORKER_LOCK = threading.Lock()
visible = lambda text: any(map(str.isprintable, "".join(text.split())))  # anything to see?


def extract_answer(text):
    """The content of the final `<answer>...</answer>` after the reasoning, or None.
    The same answer twice counts. Two different ones, an empty, nested or unclosed tag do not."""
    # what follows the last </think>, or all of it; a <think> left open swallows the rest
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    pieces = re.split("(</?answer>)", text)  # text, tag, text, tag, ..., text
    paired = pieces[1::2] == ["<answer>", "</answer>"] * (len(pieces) // 4)
    answers = {inside.strip() for inside in pieces[2::4]}
    return answers.pop() if paired and len(answers) == 1 and visible(*answers) else None


def extract_agent_answer(text):
    r"""An agent's answer: in tags, else in its last `\boxed{}`, else its last "the answer is X".
    One that uses our tags is held to them. Not for the leader, which is trained to use them."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    if "<answer>" in text:
        return extract_answer(text)
    # up to the end of the line or sentence, but not to the full stop in 3.5
    match = re.match(r"(?is).*\bthe (?:\w+ )?answer is\b[\s:]*(.*?)(?:\n|\.(?!\S)|$)", text)
    said = [a.strip() for a in (last_boxed(text), match[1] if match else "") if visible(a)]
    return said[0] if said else None


def last_boxed(text):
    r"""The content of the last `\boxed{...}`; "" if there is none or it has no end."""
    inside, depth = text.rpartition("\\boxed{")[2] if "\\boxed{" in text else "", 1
    for match in re.finditer(r"\\.|[{}]", inside[:LONGEST_ANSWER]):  # \{ and \} are not braces
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return inside[: match.start()]
    return ""


# around an answer, or inside like the \! in 10,\!080, and without a meaning
DECORATION = re.compile(r"\\?\$|\\[()\[\]!,]|\\(?=%)|\{,}|\^ ?(?:\\circ|{ ?\\circ ?})|°")
WRAPPING = re.compile(r"^\\(?:boxed|text|textbf|mathrm) ?{(.*)}$")
VARIABLE = re.compile(r"^[a-z] ?(?:=|\\in\b)(?! ?\(?[a-z]?\)?$) ?")  # in y = 2x, not in A = (B)
FRACTION = re.compile(r"(?a)\\[dt]?frac ?(?:{ ?(-?\d+) ?}|(\d)) ?(?:{ ?(\d+) ?}|(\d))")
UNIT = re.compile(r" ?\\(?:text|mbox|mathrm) ?{ ?[a-z]+\.? ?}(?:\^{?\d}?)?$")  # \text{ cm}^2
NUMBER = re.compile(r"(?a)([-+]?) ?(\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?: ?/ ?(0*[1-9]\d*))? ?(%?)")
# Too much for math-verify: to it 9 = 8 is 8, 52_9 is 52_8, and a word is any anagram.
SIGNS = re.compile(r"(=|\\(?:in|equiv|approx)\b|%)|_[ {]*(\w*)")
NO_FORMULA = re.compile(r"\\(?:boxed|text|mbox|mathrm)|(?<![\\{a-z])[a-z]{3}|^[a-z]+$")


def is_correct(answer, gold):
    r"""Would a fair examiner, who has only the gold answer to compare with, accept this one?
    - Case, spacing, commas, bold type, a final stop, `$...$`, `\boxed{}` don't matter; brackets do.
    - If the gold is a letter, `(B)`, `B` and `b.` are the same, and nothing else counts.
    - If it is a number, the answer must be one of the same value (50% is not 50), and no sum.
    - Anything else is compared by math-verify as well, if the gold or the answer is LaTeX.
    More text around it, several answers, or invisible characters are not accepted."""
    answer, gold = ("" if t is None else " ".join(str(t).split()) for t in (answer, gold))
    if answer == gold:
        return visible(gold)
    if max(len(answer), len(gold)) > LONGEST_ANSWER or not answer.isprintable():
        return False
    latex = re.search(r"[\\^]|_[0-9{]|\$.*\$", answer + "\n" + gold)
    answer, gold = plain(answer), plain(gold)
    same = value(answer) == value(gold)
    if latex and not same and isinstance(value(gold), list):
        return same_latex(answer, gold)
    return same and value(gold) != []


def plain(text):
    """The text in lower case, without what some models put around an answer."""
    text = DECORATION.sub("", text.casefold().replace("−", "-").replace("’", "'"))
    for _ in range(4):  # as in **\boxed{\text{(B)}}.**
        text = WRAPPING.sub(r"\1", text.strip(' *`"').removesuffix(".").rstrip())
    return VARIABLE.sub("", text)


def value(text):
    r"""What is compared: a letter, a number (2\frac12 is not 21/2), or all the words and signs."""
    text = re.sub(r"^\(?([a-z])\)?$", r"\1", text)  # (B) is B
    if match := NUMBER.fullmatch(FRACTION.sub(r" \1\2/\3\4 ", UNIT.sub("", text)).strip()):
        return Fraction(match[1] + match[2].replace(",", "")) / int(match[3] or 1), match[4]
    return re.findall(r"\w+|[^\w\s,]", text)  # `])` is `] )`, but `12 3` is not `123`


@functools.lru_cache(maxsize=10_000)
def same_latex(answer, gold):
    """Does math-verify find them equal, in whatever form? (So an answer may echo the question.)"""
    if SIGNS.findall(answer) != SIGNS.findall(gold) or any(map(NO_FORMULA.search, (answer, gold))):
        return False
    with WORKER_LOCK:
        worker = WORKERS.pop(os.getpid(), None)
        if worker is None or worker.poll() is not None:
            command = [sys.executable, __file__]
            worker = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)
            if worker.stdout.readline() != "ready\n":
                raise RuntimeError("LaTeX answers need math-verify: pip install math-verify")
        print(json.dumps([answer, gold]), file=worker.stdin, flush=True)
        if reply := worker.stdout.readline():  # there is none if its time was up
            WORKERS[os.getpid()] = worker
    return reply == "True\n"


def score(text, gold):
    """(is it right, is it in the right form): the two parts of the reward. The form is: reasoning,
    `</think>`, one answer in tags, nothing else. The prompt may have opened the `<think>`."""
    answer = extract_answer(text)
    reasoning, _, rest = text.partition("</think>")
    reasoning = reasoning.strip().removeprefix("<think>")
    inside = rest.strip().removeprefix("<answer>").removesuffix("</answer>").strip()
    formatted = inside == answer and visible(reasoning) and "<think>" not in reasoning
    return is_correct(answer, gold), formatted


def reward(completions, answer, **kwargs):
    """1 for a right answer, plus FORMAT_BONUS for the right form; one number per completion.
    As TRL's GRPOTrainer calls it: completions are strings or lists of messages, `answer` golds."""
    texts = [c if isinstance(c, str) else c and c[-1]["content"] for c in completions]
    scores = [score(text or "", gold) for text, gold in zip(texts, answer, strict=True)]
    return [right + FORMAT_BONUS * formatted for right, formatted in scores]


if __name__ == "__main__":  # the worker: a pair of formulas on a line, a reply on a line
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # this parser evaluates no Python; math-verify's other one, for plain sums, calls eval
    style = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    target = [LatexExtractionConfig(normalization_config=style)]
    print("ready", flush=True)
    for line in sys.stdin:
        # then the system ends it, even in a long multiplication; a busy machine changes nothing
        end = int(time.process_time()) + LATEX_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        answer, gold = [parse(f"${t}$", target, parsing_timeout=None) for t in json.loads(line)]
        # with its default of 6 decimals, 0.0000001 would be 0.0000002
        print(verify(gold, answer, float_rounding=12, timeout_seconds=None), flush=True)
