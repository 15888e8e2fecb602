r"""How people write the same answer: tables, and what reads them. `rewards.is_correct` compares.

`\dfrac12` is `1/2`, `€5` is `5 euros`, `√5` is `\sqrt{5}`. New spellings go into the tables; units
are split off here, and what they mean for an answer stands in `units_agree`."""

import re
from fractions import Fraction

# ------------------------------------------------------------------------------ around an answer

DASHES_AND_QUOTES = str.maketrans("−–’‘“”", "--''\"\"")
# inside an answer and without a meaning, like the \! in 10,\!080 or the $ around a formula
DECORATION = re.compile(r",\\! *|\\?\$|\\[()\[\]!,;]|\\(?=%)|\{,}|\\(?:left|right)(?![a-z])")
# the content says it all, like \boxed{8}; several of them may stand in each other
INSIDE = r"((?:[^{}]|{(?:[^{}]|{(?:[^{}]|{[^{}]*})*})*})*)"  # with the braces in it closed
WRAPPING = re.compile(
    r"^\\(?:boxed|fbox|mbox|text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|boldsymbol|emph)"
    rf" ?{{{INSIDE}}}$"
)
DOLLARS = re.compile(r"^\\?\$ ?(?=[\d.])")  # a lone one before a number, and no pair around it
QUOTED = re.compile(r"""^(["'`])([^"'`]*)\1$""")
DEGREES = re.compile(r"\^ ?(?:\\circ|{ ?\\circ ?})|°")


def plain(text):
    """The text in lower case, without what some models put around an answer."""
    text = text.casefold().translate(DASHES_AND_QUOTES).strip(" *")
    if text.count("$") == 1:
        text = DOLLARS.sub("¤", text)  # which SIGN_BEFORE knows
    text = DECORATION.sub("", text).replace(r"\cfrac", r"\frac")
    for _ in range(4):  # as in **\boxed{\text{(B)}}.**
        text = QUOTED.sub(r"\2", text.strip(" *").removesuffix(".").rstrip())
        text = WRAPPING.sub(r"\1", text)
    return text


GREEK = "alpha beta gamma delta epsilon theta lambda mu pi sigma phi omega"
LETTERS = "|".join(name for name in GREEK.split() if name != "pi")
# `x = `, `x_1 = `, `x \in `; not where a letter alone follows, as in `A = (B)`: an option
VARIABLE = re.compile(
    rf"^((?:[a-z]|[α-ω]|\\?(?:{LETTERS}))(?:_{{?\d}}?)?) ?(?:=|\\in\b)(?! ?\(?[a-z]?\)?$) ?"
)


def without_variable(answer, gold):
    """Both without the `x =` before them, which one may have and the other not. It stays where it
    says something: in `x = 5` beside `y = 5`, in `A = (B)`, in an equation beside another."""
    of_answer = VARIABLE.match(answer)
    of_gold = VARIABLE.match(gold)
    if max(answer.count("="), gold.count("=")) > 1:  # a = 1, b = 2
        return answer, gold
    if of_answer and of_gold and of_answer[1] != of_gold[1]:
        return answer, gold
    if of_answer and (of_gold or "=" not in gold):
        answer = answer[of_answer.end() :]
    if of_gold and (of_answer or "=" not in answer):
        gold = gold[of_gold.end() :]
    return answer, gold


# --------------------------------------------------------------------------------------- numbers

FRACTION = re.compile(r"(?a)\\[dt]?frac ?(?:{ ?(-?\d+) ?}|(\d)) ?(?:{ ?(\d+) ?}|(\d))")
LONGEST_NUMBER = 2_000  # characters: Python refuses to read more than 4,300 digits
WHOLE = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"  # 1,000 or 1 000 or 1000
NUMBER = re.compile(
    rf"(?a)([-+]?) ?((?:{WHOLE})(?:\.\d*)?|\.\d+)(?: ?/ ?(0*[1-9]\d*))?"
    r"(?:e([-+]?\d{1,3})| ?(?:\\times|\\cdot|×|\*) ?10 ?\^ ?{? ?([-+]?\d{1,3}) ?}?)?"
)


def number(text):
    r"""The exact value of a number, or None: 1/2, 0.5, \frac12, 1,000, 1.5e3, 6.72 \times 10^{-5}.
    2\frac12 is none (it might be 21/2), and neither is a sum."""
    if len(text) > LONGEST_NUMBER:
        return None
    text = re.sub(r"^\( ?([^()]*)\)$", r"\1", text)
    match = NUMBER.fullmatch(FRACTION.sub(r" \1\2/\3\4 ", text).strip())
    if not match:
        return None
    sign, digits, denominator, exponent, power_of_ten = match.groups()
    if denominator and " " in digits:  # 1 123/125 is a mixed number
        return None
    value = Fraction(sign + re.sub("[, ]", "", digits)) / int(denominator or 1)
    return value * Fraction(10) ** int(exponent or power_of_ten or 0)


def numbers(text):
    """The values of at least two numbers in a row, `1, -2` or `1 and -2`, and the brackets around
    them, as in `(1/2, 3)` or `[3, 4)`; None if it is something else."""
    opening = text[:1] if text[:1] in "([" else ""
    closing = text[-1:] if text[-1:] in ")]" else ""
    if bool(opening) != bool(closing):
        return None
    inside = text[1:-1] if opening else text
    values = []
    for part in re.split(",| and ", inside):
        part = part.strip()
        values.append(None if re.match(r"-?0\d", part) else number(part))  # 10,000 is no list
    if len(values) < 2 or None in values:
        return None
    if not opening:
        values.sort()  # in any order
    return opening, values, closing


# ----------------------------------------------------------------------------------------- units

# a line for each unit, its first word for all of them
UNITS = """
unit units
dollar dollars usd ¤
cent cents ¢
euro euros €
pound pounds £
inch inches in
foot feet ft
yard yards yd
mile miles mi
mm millimeter millimeters millimetre millimetres
cm centimeter centimeters centimetre centimetres
m meter meters metre metres
km kilometer kilometers kilometre kilometres
mg milligram milligrams
g gram grams
kg kilogram kilograms
ml milliliter milliliters millilitre millilitres
liter liters litre litres l
second seconds sec s
minute minutes min
hour hours hr h
day days
week weeks
month months
year years
degree degrees
radian radians
pound-weight lb lbs
mph
"""
UNIT_LINES = UNITS.strip().splitlines()
UNITS = {}
for line in UNIT_LINES:
    UNITS |= dict.fromkeys(line.split(), line.split()[0])
UNITS |= {"square": "square", "sq": "square", "cubic": "cubic", "per": "per"}
# what follows a number and makes another one of it, or another thing: it must be in both
CHANGING = """
percent am pm dozen hundred thousand million billion trillion hundreds thousands millions billions
tenth tenths hundredth hundredths thousandth thousandths half halves third thirds quarter quarters
lakh crore bn ppm pct squared cubed factorial times plus minus or and not no false
""".split()
UNIT_AS_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm|textnormal|mathit) ?{ ?([a-z. ]+) ?}")
DIGIT_BEFORE_UNIT = re.compile(r"^(-?[\d.,]*\d)([a-z]{2,})$")  # 5kg
POWER = re.compile(r"([a-z]+) ?(?:\^ ?{? ?([23]) ?}?|([²³]))$")
FUNCTION = re.compile(r"(?<![a-z])(?:sin|cos|tan|cot|sec|csc)")  # of an angle
SIGN_BEFORE = re.compile(r"^([€£¤]) ?(.+)$")


def split_unit(text):
    r"""(`18`, [`dollar`, `per`, `day`]) of `18 dollars per day`; (`8`, [`square`, `cm`]) of
    `8\text{ cm}^2`; the unit is [] where there is none."""
    if DEGREES.search(text[-8:]) and not FUNCTION.search(text):
        text = DEGREES.sub(" degree", text)
    text = re.sub(r"\bper ?cent\b|%", " percent", text)
    text = SIGN_BEFORE.sub(r"\2 \1", text)
    text = DIGIT_BEFORE_UNIT.sub(r"\1 \2", text)
    text = re.sub("(?<=[a-z]) ?/ ?(?=[a-z]{2})", " per ", text)
    marked = UNIT_AS_TEXT.search(text)
    text = UNIT_AS_TEXT.sub(r" \1 ", text).strip()
    power = POWER.search(text)
    if power and power[1] in UNITS:
        words = {"2": "square", "²": "square", "3": "cubic", "³": "cubic"}[power[2] or power[3]]
        text = f"{text[: power.start()]} {words} {power[1]}"
    words = text.split()
    unit = []
    while len(words) > 1:
        word = words[-1].rstrip(".")
        known = word in UNITS or word in CHANGING or (marked and word.isalpha() and len(word) > 1)
        if not known:
            break
        if (
            len(word) == 1
            and word.isalpha()
            and not marked
            and number(" ".join(words[:-1])) is None
        ):
            break  # a variable: \pi r^2 h
        unit.insert(0, UNITS.get(word, word))
        words.pop()
    return (" ".join(words), unit) if unit else (text, [])


def units_agree(of_answer, of_gold):
    """Two units must be the same. The answer may leave one out that changes no value, and may have
    one that the gold has not, of those in the tables: 5 \\text{ myriads} is not 5."""
    if of_answer and of_gold:
        return of_answer == of_gold
    if any(word in CHANGING for word in of_answer + of_gold):
        return False
    return all(word in UNITS.values() for word in of_answer)


# -------------------------------------------------------------------------------------- formulas

GREEK_LETTERS = dict(zip("αβγδεθλμπσφω", GREEK.split()))
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
NAMES = "sin|cos|tan|cot|sec|csc|log|ln|exp|theta|pi"
AS_LATEX = [  # in this order
    (r"\*\*", "^"),
    (r"[⁰¹²³⁴-⁹⁻]+", lambda match: "^{" + match[0].translate(RAISED) + "}"),
    ("[αβγδεθλμπσφω]", lambda match: rf"\{GREEK_LETTERS[match[0]]} "),
    (r"\\mbox|\\textrm|\\textnormal|\\textit", r"\\text"),
    (r"(?:√|(?<![\\a-z])sqrt) ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"√ ?(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"\^ ?\(([^()]*)\)", r"^{\1}"),
    (r"∞|(?<![\\a-z])(?:infinity|inf)(?![a-z])", r"\\infty "),
    (rf"(?<![\\a-z])({NAMES})(?![a-z])", r"\\\1 "),
    (r"≤|<=", r" \\le "),
    (r"≥|>=", r" \\ge "),
    (r"≠|!=", r" \\ne "),
    ("±", r" \\pm "),
    ("∪", r" \\cup "),
    ("∈", r" \\in "),
    (r"×|·|\*", r" \\cdot "),
    (r" and ", ", "),
]


def as_latex(text):
    r"""A formula as people type it, in LaTeX: `3*sqrt(13)` is `3 \cdot \sqrt{13}`."""
    text = DEGREES.sub("", text)
    for pattern, replacement in AS_LATEX:
        text = re.sub(pattern, replacement, text)
    return text


# short words of English; other letters that stand together are a product, as in 2ab + 1
WORDS = "or and not is no if in on of to am pm by at as it be an us we he me my so up do go".split()


def is_formula(text):
    r"""Is this gold mathematics, to be compared as such? LaTeX, or what has no words, a variable or
    a sign of mathematics, and an operator: `6+9i`, `(a+5)(b+2)`, `x >= 5`. Not `3-1` or `1/2/2021`,
    which may be a score and a date."""
    if re.search(r"[\\^]|_[0-9{]", as_latex(text)):
        return True
    letters = re.findall("[a-z]+", text)
    if not re.search(r"\d", text) and not re.search(r"[-+*/=<>|!]", text):
        return False  # a list of letters or names: T, F, T
    if any(len(word) > 2 or word in WORDS for word in letters):
        return False
    if re.search(r"[^-\w\s+*/=<>(),.|!]", text):  # a colon, a bracket of another kind
        return False
    return bool(letters) and bool(re.search("[-+*/=<>(,|!]", text))
