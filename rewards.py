r"""Rewards by rule: what did the model answer, is it right, is it in the form we asked for.

No text makes these functions raise or takes them more than linear time. A policy under training
finds every gap, so in doubt they say no: credit goes to *one* answer and nothing but the answer."""

import functools
import json
import os
import re
import sys
import threading
from dataclasses import dataclass
from fractions import Fraction
from subprocess import DEVNULL, PIPE, Popen

FORMAT_BONUS = 0.1  # our choice: far from the 1 for a right answer, but orders groups all wrong
LONGEST_ANSWER = 2_000  # characters; golds are far shorter, and a longer answer is a wrong one
LATEX_SECONDS = 5  # for one comparison: 9^{9^{9^9}} outlasts the limits of math-verify itself
WORKERS = {}  # by process id: a forked process must not share its parent's pipes
WORKER_LOCK = threading.Lock()


def is_visible(text):
    """Is there anything to see?"""
    return any(character.isprintable() for character in "".join(text.split()))


def extract_answer(text):
    """The content of the final `<answer>...</answer>` after the reasoning, or None.
    The same answer twice counts. Two different ones, an empty, nested or unclosed tag do not."""
    text = after_reasoning(text)
    answers = {inside.strip() for inside in TAGGED.findall(text)}
    rest = TAGGED.sub("", text)
    if len(answers) != 1 or "<answer>" in rest or "</answer>" in rest:
        return None
    answer = answers.pop()
    return answer if is_visible(answer) else None


# one answer in its tags, with no other of these tags inside
TAGGED = re.compile(r"(?s)<answer>((?:(?!</?answer>).)*)</answer>")


def after_reasoning(text):
    """What follows the last </think>, or all of it; a <think> left open swallows the rest."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def extract_agent_answer(text):
    r"""An agent's answer, as a person would read it: in tags, else in its last `\boxed{}`, else
    what it states last ("the answer is X", "Answer: X", "#### X"), else what its last line commits
    to. None if it commits to nothing, or to two things. One that uses our tags is held to them.
    Not for the leader, which is trained to use them."""
    text = after_reasoning(text)
    if "<answer>" in text:
        return extract_answer(text)
    boxed = last_boxed(text)
    if is_visible(boxed):
        return boxed.strip()
    stated = STATED.match(text) or LABELLED.match(text)
    answer = stated[1].strip(' \t*_`,"“”') if stated else ""
    if is_visible(answer):
        word = re.match(WORD.pattern + "[,;]", answer)  # no, because ...
        if word:
            return word[1]
        option = OPTION.match(answer)
        return f"({option[1]})" if option else without_unit(answer)
    return commitment(text)


# the last of them, up to the end of the line or sentence, but not to the full stop in 3.5
END = r"(?:\n|\.(?!\S)|,? (?:which|because|since)\b|$)"
STATED = re.compile(
    rf"(?is).*\bthe (?:\w+ )?(?:answer|option|choice)"
    rf"(?: to [\w ]{{1,40}})? is\b(?! not\b)[\s:]*(.*?){END}"
)
LABELLED = re.compile(rf"(?is).*(?:\banswer\b[*_ ]*:|####)[*_\s]*(.*?){END}")
OPTION = re.compile(r"\(?([A-Z])(?:\)\s+\w|, \w\w)")  # (E) 12/25/1937; A, Ana
# what a last line can commit to
LETTER = re.compile(r"\(([A-Z])\)|^([A-Z])(?:[.):]|$)")
WORD = re.compile(r"(?i)\b(yes|no|true|false|valid|invalid)\b")
FILLER = re.compile(r"(?i)(?:so )?this is the (?:\w+ )?answer\W*")
NUMERAL = re.compile(r"(?a)-?\d[\d,]*(?:\.\d+)?%?(?![\w.])")


def commitment(text):
    """What the last line of a text without a stated answer commits to: one option, else one of the
    usual words at its beginning or end, else the last number; None if that is none, or two."""
    lines = []
    for line in text[-LONGEST_ANSWER:].splitlines():
        if is_visible(line) and not FILLER.fullmatch(line.strip()):
            lines.append(line)
    line = lines[-1].strip(" *_`.!") if lines else ""
    letters = {inside or leading for inside, leading in LETTER.findall(line)}
    if letters:
        return letters.pop() if len(letters) == 1 else None
    words = {word.casefold() for word in WORD.findall(line)}
    if len(words) > 1:
        return None
    word = re.match(WORD.pattern, line) or re.search(WORD.pattern + "$", line)
    word = word or re.search(r"(?i)\b(in)?valid\b", line)  # in prose too; a "no" there is no answer
    if word:
        return word[0]
    numbers = [] if re.search(r"n't\b|\bnot\b", line) else NUMERAL.findall(line)
    return numbers[-1].rstrip(",") if numbers else None


def last_boxed(text):
    r"""The content of the last `\boxed{...}`; "" if there is none or it has no end."""
    if "\\boxed{" not in text:
        return ""
    inside = text.rpartition("\\boxed{")[2]
    depth = 1
    for match in re.finditer(r"\\.|[{}]", inside[:LONGEST_ANSWER]):  # \{ and \} are not braces
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
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


# words that may follow a number without changing it
UNITS = """dollar dollars cent cents euro euros pound pounds unit units square cubic foot feet inch
inches yard yards mile miles meter meters metre metres centimeters km cm mm kg gram grams liter
liters second seconds minute minutes hour hours day days week weeks month months year years degree
degrees per""".split()
# words that make another number or another thing of it
COUNTING = "hundred thousand million billion trillion dozen half percent am pm or and not".split()


def without_unit(text, units=None):
    """`18 dollars per day` -> `18`: a number in front of at most four plain words; of these
    `units`, or (None) of any that do not change its value."""
    number, _, rest = text.partition(" ")
    words = rest.rstrip(".").split()
    if not NUMBER.fullmatch(number) or not 0 < len(words) <= 4:
        return text
    for word in words:
        fits = word in units if units else re.fullmatch("[a-z]{2,}", word) and word not in COUNTING
        if not fits:
            return text
    return number


def options_of(question):
    """{letter: text} of the options that a question lists, each on a line: `(A) Monday`."""
    found = re.findall(r"(?m)^[ \t]*\(?([A-Z])[).][ \t]+(.+?)[ \t]*$", question)
    return {letter.casefold(): plain(one_line(text)) for letter, text in found}


def is_correct(answer, gold, question=""):
    r"""Would a fair examiner, who has only the gold answer to compare with, accept this one?
    - Case, spacing, commas, bold type, a final stop, `$...$`, `\boxed{}` don't matter; brackets do.
    - If the gold is a letter, `(B)`, `B` and `b.` are the same, and so is the letter with the
      text that this option has in the question; nothing else counts.
    - If it is a number, the answer must be one of the same value (50% is not 50), and no sum; a
      unit in plain words may follow it where the gold has none.
    - Anything else is compared by math-verify as well, if the gold or the answer is LaTeX.
    More text around it, several answers, or invisible characters are not accepted."""
    answer = one_line(answer)
    gold = one_line(gold)
    if answer == gold:
        return is_visible(gold)
    if max(len(answer), len(gold)) > LONGEST_ANSWER or not answer.isprintable():
        return False
    latex = re.search(r"[\\^]|_[0-9{]|\$.*\$", answer + "\n" + gold)
    answer = plain(answer)
    gold = plain(gold)
    wanted = value(gold)
    if NUMBER.fullmatch(gold):  # a gold with a unit of its own allows no other
        answer = without_unit(answer, UNITS)
    elif re.fullmatch(r"\(?[a-z]\)?", gold):
        option = re.fullmatch(r"\(?([a-z])[).:]* (.+)", answer)
        if option and options_of(question).get(option[1]) == option[2]:
            answer = option[1]
    same = value(answer) == wanted
    if latex and not same and isinstance(wanted, list):
        return same_latex(answer, gold)
    return same and wanted != []


def one_line(text):
    """As one line of single spaces; None is no text."""
    return "" if text is None else " ".join(str(text).split())


def plain(text):
    """The text in lower case, without what some models put around an answer."""
    text = DECORATION.sub("", text.casefold().replace("−", "-").replace("’", "'"))
    for _ in range(4):  # as in **\boxed{\text{(B)}}.**
        text = WRAPPING.sub(r"\1", text.strip(' *`"').removesuffix(".").rstrip())
    return VARIABLE.sub("", text)


def value(text):
    r"""What is compared: a letter, a number (2\frac12 is not 21/2), or all the words and signs."""
    text = re.sub(r"^\(?([a-z])\)?$", r"\1", text)  # (B) is B
    number = NUMBER.fullmatch(FRACTION.sub(r" \1\2/\3\4 ", UNIT.sub("", text)).strip())
    if number:
        sign, digits, denominator, percent = number.groups()
        return Fraction(sign + digits.replace(",", "")) / int(denominator or 1), percent
    return re.findall(r"\w+|[^\w\s,]", text)  # `])` is `] )`, but `12 3` is not `123`


@functools.lru_cache(maxsize=10_000)
def same_latex(answer, gold):
    """Does math-verify find them equal, in whatever form? (So an answer may echo the question.)"""
    if SIGNS.findall(answer) != SIGNS.findall(gold) or any(map(NO_FORMULA.search, (answer, gold))):
        return False
    with WORKER_LOCK:
        worker = latex_worker()
        # ended from outside, which works on every system: it may be deep in one multiplication
        timer = threading.Timer(LATEX_SECONDS, worker.terminate)
        timer.start()
        try:
            print(json.dumps([answer, gold]), file=worker.stdin, flush=True)
            reply = worker.stdout.readline()  # "" if its time was up
        except OSError:  # its time was up before it had read the question
            reply = ""
        finally:
            timer.cancel()
        if not reply:
            worker.terminate()
            worker.communicate()  # waits for it, and closes its pipes
            del WORKERS[os.getpid()]
    return reply == "True\n"


def latex_worker():
    """The process that compares for this one; a new one if there is none, or if it has ended."""
    worker = WORKERS.get(os.getpid())
    if worker is None or worker.poll() is not None:
        command = [sys.executable, __file__]
        worker = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, encoding="utf-8")
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError("LaTeX answers need math-verify: pip install math-verify")
        WORKERS[os.getpid()] = worker
    return worker


@dataclass
class Verdict:
    """What a rule says of one completion."""

    right: bool
    formatted: bool
    reward: float


def judge(text, gold, question=""):
    """The `Verdict` on a completion's text: 1 for a right answer, plus FORMAT_BONUS for the right
    form. The form is: reasoning, `</think>`, one answer in tags, nothing else. The prompt may have
    opened the `<think>`. For a reward of your own, change this function."""
    answer = extract_answer(text)
    right = is_correct(answer, gold, question)
    reasoning, _, rest = text.partition("</think>")
    reasoning = reasoning.strip().removeprefix("<think>")
    inside = rest.strip().removeprefix("<answer>").removesuffix("</answer>").strip()
    formatted = inside == answer and is_visible(reasoning) and "<think>" not in reasoning
    return Verdict(right, formatted, right + FORMAT_BONUS * formatted)


def reward(completions, answer, question=None, **kwargs):
    """The reward of each completion, as TRL's GRPOTrainer calls it: completions are strings or
    lists of messages, `answer` the right answers, `question` what was asked, if there is a column
    of it."""
    rewards = []
    questions = question or [""] * len(completions)
    for completion, gold, asked in zip(completions, answer, questions, strict=True):
        if isinstance(completion, str):
            text = completion
        else:
            text = completion[-1]["content"] if completion else ""
        rewards.append(judge(text or "", gold, asked).reward)
    return rewards


def compare_formulas():
    """The worker: a pair of formulas on a line, a reply on a line."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # this parser evaluates no Python; math-verify's other one, for plain sums, calls eval
    style = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    target = [LatexExtractionConfig(normalization_config=style)]
    print("ready", flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        answer = parse(f"${answer}$", target, parsing_timeout=None)
        gold = parse(f"${gold}$", target, parsing_timeout=None)
        # with its default of 6 decimals, 0.0000001 would be 0.0000002
        print(verify(gold, answer, float_rounding=12, timeout_seconds=None), flush=True)


if __name__ == "__main__":
    compare_formulas()
