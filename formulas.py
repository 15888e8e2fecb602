r"""Are two formulas the same? math-verify says so, in a process that is ended if it takes too long:
`9^{9^{9^9}}` outlasts the limits of math-verify itself. `python formulas.py` is that process."""

import functools
import json
import os
import re
import sys
import threading
from subprocess import DEVNULL, PIPE, Popen

SECONDS = 5  # for one comparison
WORKERS = {}  # by process id: a forked process must not share its parent's pipes
WORKER_LOCK = threading.Lock()
CLOSE = 1e-12  # relative to their size, a decimal and another number are equal
SURELY = 1e-45  # likewise two numbers without a decimal, to 60 digits

# Too much for math-verify: to it 9 = 8 is 8, 52_9 is 52_8, and a word is any anagram.
SIGNS = re.compile(r"(=|\\(?:in|equiv|approx)\b|%)|_[ {]*(\w*)")
NO_FORMULA = re.compile(r"\\(?:boxed|text|mbox|mathrm)|(?<![\\{a-z])[a-z]{3}|^[a-z]+$")


@functools.lru_cache(maxsize=10_000)
def same_formula(answer, gold):
    """Does math-verify find them equal, in whatever form? (So an answer may echo the question.)"""
    if SIGNS.findall(answer) != SIGNS.findall(gold) or any(map(NO_FORMULA.search, (answer, gold))):
        return False
    with WORKER_LOCK:
        worker = latex_worker()
        # ended from outside, which works on every system: it may be deep in one multiplication
        timer = threading.Timer(SECONDS, worker.terminate)
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


# ------------------------------------------------------------------------- what the process does


def main():
    """A pair of formulas on a line, a reply on a line."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # this parser evaluates no Python; math-verify's other one, for plain sums, calls eval
    style = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    target = [LatexExtractionConfig(normalization_config=style)]
    print("ready", flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        answer = parse(f"${answer}$", target, parsing_timeout=None)
        gold = parse(f"${gold}$", target, parsing_timeout=None)
        print(bool(answer and gold) and equal(answer[0], gold[0]), flush=True)


def equal(answer, gold):
    """Of two sympy expressions. Numbers and equations are compared here: math-verify rounds, and to
    it all numbers below 10^-12 are the same."""
    import sympy
    from math_verify import verify

    several = (sympy.FiniteSet, sympy.Tuple)
    if isinstance(answer, several) and isinstance(gold, several):
        if type(answer) is not type(gold) or len(answer) != len(gold):
            return False
        if isinstance(gold, sympy.Tuple):
            return all(map(equal, answer, gold))
        rest = list(answer)
        for wanted in gold:
            found = [index for index, one in enumerate(rest) if equal(one, wanted)]
            if not found:
                return False
            rest.pop(found[0])
        return True
    if getattr(answer, "is_number", False) and getattr(gold, "is_number", False):
        return equal_numbers(answer, gold)
    if isinstance(answer, sympy.Equality) and isinstance(gold, sympy.Equality):
        if is_solved(gold) and not is_solved(answer):
            return False  # 2x + 3 = 13 is the question, and x = 5 was asked for
        try:
            ratio = sympy.simplify((answer.lhs - answer.rhs) / (gold.lhs - gold.rhs))
        except TypeError:  # x = (2, 3) is parsed as an equation
            return verify(gold, answer, timeout_seconds=None)
        return bool(ratio.is_number and ratio.is_finite and ratio != 0)
    return verify(gold, answer, float_rounding=12, numeric_precision=100, timeout_seconds=None)


def equal_numbers(answer, gold):
    """Of two sympy numbers: rationals exactly, others to many digits."""
    import sympy

    difference = sympy.N(answer - gold, 60)
    if not (difference.is_finite and answer.is_finite and gold.is_finite):
        return bool(answer == gold) and answer is not sympy.nan
    if answer.is_Rational and gold.is_Rational:
        return bool(answer == gold)
    size = max(abs(sympy.N(answer, 60)), abs(sympy.N(gold, 60)))
    has_decimal = answer.has(sympy.Float) or gold.has(sympy.Float)
    if abs(difference) <= (CLOSE if has_decimal else SURELY) * size:
        return True
    return bool(sympy.simplify(answer - gold) == 0)


def is_solved(equation):
    """`x = 5` or `5 = x`."""
    left, right = equation.lhs, equation.rhs
    return (left.is_Symbol and right.is_number) or (right.is_Symbol and left.is_number)


if __name__ == "__main__":
    main()
