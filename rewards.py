r"""Rewards by rule: what did the model answer, is it right, is it in the form we asked for.

No text makes these functions raise or takes them more than linear time. A policy under training
finds every gap, so in doubt they say no: credit goes to *one* answer and nothing but the answer."""

import re
from dataclasses import dataclass

from formulas import same_formula
from notation import (
    CHANGING,
    DEGREES,
    as_latex,
    is_formula,
    number,
    numbers,
    plain,
    split_unit,
    units_agree,
    without_variable,
)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # of the form that the leader learns
FORMAT_BONUS = 0.1  # our choice: far from the 1 for a right answer, but orders groups all wrong
LONGEST_ANSWER = 2_000  # characters; golds are far shorter, and a longer answer is a wrong one


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


def extract_agent_answer(text, question=""):
    r"""An agent's answer, as a person would read it: in tags, else in its last `\boxed{}`, else
    what it states last ("the answer is X", "Answer: X", "#### X"), else what it commits to. None if
    that is nothing, or two options: two letters, or a letter with the text that another option has
    in the question. One that uses our tags is held to them. Not for the leader, which is trained to
    use them."""
    text = after_reasoning(text)
    if "<answer>" in text:
        return extract_answer(text)
    boxed = last_boxed(text)
    if is_visible(boxed):
        return boxed.strip()
    answer = stated(text)
    if not is_visible(answer):
        return commitment(text, question)
    letters = letters_in(answer, question)
    if letters:
        return f"({letters[0]})" if len(letters) == 1 else None
    word = re.match(WORD.pattern + r"[,;](?! or\b)", answer)  # no, because ...
    if word:
        return word[1]
    sum_of_numbers = re.fullmatch(r"[\d\s.,+*/x×÷()-]+=\s*(\S.*)", answer)  # 3 * 4 = 12
    return without_unit(sum_of_numbers[1] if sum_of_numbers else answer)


# up to the end of the line or sentence, but not to the full stop in 3.5 or Dr. Smith or U.S. Army
TITLES = "".join(
    rf"(?<!\b{title})" for title in ("dr", "mr", "mrs", "ms", "st", "mt", "prof", "vs")
)
END = rf"(?:\n|{TITLES}(?<!\.[a-z])\.[*_]*(?!\S)|,? (?:which|because|since)\b|$)"
STATED = re.compile(
    rf"(?is).*\bthe (?:\w+ )?(?:answer|option|choice)"
    rf"(?: to [\w ]{{1,40}})? is\b(?! (?:not|correct|incorrect|wrong)\b)[\s:]*(.*?){END}"
)
LABELLED = re.compile(rf"(?is).*(?:\banswer\b[*_ ]*:|####)[*_\s]*(.*?){END}")
AROUND = " \t*_`,\"'“”‘’"


def stated(text):
    """The last thing that is called the answer, or ""."""
    found = [match for match in (STATED.match(text), LABELLED.match(text)) if match]
    found.sort(key=lambda match: match.start(1))
    return found[-1][1].strip(AROUND) if found else ""


# an option: (B); B. Tuesday; A, Ana; option B; B is correct; it is B
LETTER = re.compile(
    r"(?<=(?<!\w)\()[A-Z](?=\))|^[A-Z](?=[.):]|$)|^[A-HJ-Z](?=, (?!or\b)\w\w)"
    r"|(?<=\b[Oo]ption )[A-Z]\b|\b[A-Z](?= is (?:the )?(?:correct|right|answer)\b)"
    r"|(?<=\b(?:is|be) )[A-Z]$"
)
WORD = re.compile(r"(?i)\b(yes|no|true|false|valid|invalid)\b")
VALID = re.compile(r"(?i)(?:\b(?:is|be|not|deductively|logically)|n['’]t) ((?:in)?valid)\b")
OPPOSITE = {"true": "false", "false": "true", "valid": "invalid", "invalid": "valid"}
NOT = r"(?i)(?:\b(?:not|neither|cannot)|n['’]t)\b"
NEGATED = re.compile(rf"{NOT} (?:(?:think|believe) (?:\w+ ){{0,3}})?(?:\w+ ){{0,2}}\(?$")
NUMERAL = re.compile(r"(?a)(?<![\w./])[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?(?![\w/]|\.\w)")
FILLER = re.compile(r"(?i)(?:so )?this is the (?:\w+ )?answer\W*")


def commitment(text, question=""):
    """What a text without a stated answer commits to: the option or word of its last line, else an
    option or word that is its first line (`Yes`, and then why), else the last line's formula or
    last number. None if that is nothing, or two things."""
    lines = []
    for line in text.splitlines():
        if is_visible(line) and not FILLER.fullmatch(line.strip()):
            lines.append(line.strip(" *_`.!"))
    if not lines:
        return None
    first = lines[0][:LONGEST_ANSWER]
    last = lines[-1][-LONGEST_ANSWER:]
    found = choices_in(last, question)
    if not found and (re.match(r"\(?[A-Z](?:[).:]|$)", first) or WORD.fullmatch(first)):
        found = choices_in(first, question)
    if found:
        return found[0] if len(found) == 1 else None
    if re.search(NOT, last) or re.search(r"\d or \W?\d", last):
        return None
    formula = re.search(r"\$([^$]+)\$$", last)
    if formula:
        return formula[1].strip(" .")
    numbers = NUMERAL.findall(last)
    return numbers[-1].rstrip(",") if numbers else None


def choices_in(line, question):
    """The options of a line, else the usual word at its beginning or end; all of them, where it
    has more than one. "Not valid" is invalid."""
    letters = letters_in(line, question)
    if letters:
        return letters
    words = sorted({word.casefold() for word in WORD.findall(line)})
    first = re.match(WORD.pattern, line)  # no, it does not
    if len(words) > 1 or first:
        return words
    word = re.search(WORD.pattern + "$", line) or VALID.search(line)
    if not word:
        return []
    said = word[1].casefold()
    if NEGATED.search(line[: word.start(1)]):
        said = OPPOSITE.get(said)
    return [said] if said else []


def letters_in(line, question):
    """The options that a line names, by letter or by the text behind a letter; less those that it
    denies."""
    line = line[:LONGEST_ANSWER]
    options = options_of(question)
    named = set()
    for letter in LETTER.finditer(line):
        if NEGATED.search(line[: letter.start()]):
            continue
        named.add(letter[0])
        text = plain(one_line(line[letter.end() :].strip(" ).:,*_")))
        if text != options.get(letter[0].casefold()):
            named |= {other.upper() for other in options if options[other] == text}
    return sorted(named)


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


def without_unit(text):
    """`18 dollars per day` -> `18`: a number and one to four words that leave it as it is."""
    digits, _, rest = text.partition(" ")
    words = rest.rstrip(".").split()
    if number(digits) is None or not 0 < len(words) <= 4:
        return text
    for word in words:
        if not re.fullmatch("[a-z]{2,}", word) or word in CHANGING:
            return text
    return digits


def options_of(question):
    """{letter: text} of the options that a question lists, each on a line: `(A) Monday`."""
    found = re.findall(r"(?m)^[ \t]*\(?([A-Z])[).][ \t]+(.+?)[ \t]*$", question)
    return {letter.casefold(): plain(one_line(text)) for letter, text in found}


def is_correct(answer, gold, question=""):
    r"""Would a fair examiner, who has only the gold answer to compare with, accept this one?
    - Case, spacing, commas, bold type, a final stop, `$...$`, `\boxed{}` don't matter; brackets do.
    - If the gold is a letter, `(B)`, `B` and `b.` are the same, and so is the letter with the
      text that this option has in the question; nothing else counts.
    - If it is a number, the answer must be one of the same value, and no sum. If it is numbers in
      a row, so must the answer; their order matters in brackets.
    - A unit may be left out if it changes no value. Another one is wrong, and 50% is not 50.
    - If it is a formula, math-verify says whether the answer is the same one in another form.
    - Anything else must be the same words and signs.
    More text around it, several answers, or invisible characters are not accepted."""
    answer = one_line(answer)
    gold = one_line(gold)
    if answer == gold:
        return is_visible(gold)
    if max(len(answer), len(gold)) > LONGEST_ANSWER or not answer.isprintable():
        return False
    answer, gold = without_variable(plain(answer), plain(gold))
    if LETTER_ALONE.fullmatch(gold):
        return same_option(answer, gold, options_of(question))
    if words_and_signs(answer) == words_and_signs(gold):
        return words_and_signs(gold) != []
    answer, unit = split_unit(answer)
    gold, wanted_unit = split_unit(gold)
    if not units_agree(unit, wanted_unit):
        return False
    of_answer = number(answer)
    of_gold = number(gold)
    if of_answer is not None and of_gold is not None:
        return of_answer == of_gold
    if of_answer is None and numbers(gold) and numbers(gold) == numbers(answer):
        return True
    if of_gold is not None or not is_formula(gold):
        return False
    return same_mathematics(answer, gold)


def same_mathematics(answer, gold):
    """Is it the same formula? Or the same equations one by one, as in a = 1, b = 2?"""
    if len(DEGREES.findall(answer)) != len(DEGREES.findall(gold)):  # cos 20 is not cos 20°
        return False
    parts = gold.split(",") if gold.count("=") > 1 else [gold]
    of_answer = answer.split(",") if len(parts) > 1 else [answer]
    if len(parts) != len(of_answer):
        return False
    for one, wanted in zip(of_answer, parts):
        if not same_formula(as_latex(one.strip()), as_latex(wanted.strip())):
            return False
    return True


def one_line(text):
    """As one line of single spaces; None is no text."""
    return "" if text is None else " ".join(str(text).split())


LETTER_ALONE = re.compile(r"\(? ?([a-z]) ?\)?")


def same_option(answer, gold, options):
    """Is it that letter, alone or with the text of its option?"""
    wanted = LETTER_ALONE.fullmatch(gold)[1]
    letter = LETTER_ALONE.fullmatch(answer)
    if letter:
        return letter[1] == wanted
    with_text = re.fullmatch(r"\(? ?([a-z]) ?[).:]* (.+)", answer)
    return bool(with_text) and with_text[1] == wanted and options.get(wanted) == with_text[2]


def words_and_signs(text):
    """`])` is `] )`, but `12 3` is not `123`; commas between words do not matter."""
    return re.findall(r"\w+|[^\w\s,]", re.sub(r"\\([{}])", r"\1", text))


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
