r"""One answer in many spellings, kind by kind: what is the same, and what only looks like it."""

import pytest

from rewards import is_correct

SAME = {  # kind: [(answer, gold)]
    "numbers that differ little": [
        ("10^{-20}", r"\frac{1}{10^{20}}"),
        (r"\sqrt{2}\sqrt{3}", r"\sqrt{6}"),
        (r"\frac{2}{2007!}", r"\frac{1}{2006! \cdot 2007/2}"),
        ("1, 10^{-20}", "10^{-20}, 1"),
    ],
    "mathematics by its gold": [
        ("9i+6", "6+9i"),
        ("(b+2)(a+5)", "(a+5)(b+2)"),
        ("1, -2", "-2,1"),
        ("(1/2, 3)", "(0.5, 3)"),
        ("2ba+1", "2ab+1"),
    ],
    "numbers in other forms": [
        ("11111111100", r"11,\! 111,\! 111,\! 100"),
        ("121, 242", "121,242"),
        ("242, 121", "121,242"),
        ("121242", "121,242"),
        (r"6.72 \times 10^{-5}", ".0000672"),
        ("6.72e-5", ".0000672"),
        ("6.72*10^-5", ".0000672"),
        ("1 000", "1000"),
        (r"1\,000", "1000"),
        ("1.5e3", "1500"),
    ],
    "units": [
        (r"3\sqrt{13}\text{ units}", r"3\sqrt{13}"),
        (r"12\text{ square units}", "12"),
        ("64 square feet", "64"),
        ("64 ft^2", "64 square feet"),
        ("18 dollars", "18"),
        ("18", "18 dollars"),
        ("€5", "5"),
        ("€5", "5 euros"),
        ("5.4 cents", r"5.4 \text{ cents}"),
        ("5.4", r"5.4 \text{ cents}"),
        ("90 degrees", r"90^\circ"),
        ("50 percent", r"50\%"),
        (r"3\text{ centimeters}", r"3\text{ cm}"),
        ("7 am", r"7\text{ am}"),
        ("5 million", r"5\text{ million}"),
        (r"3 \mathrm{cm}^3", "3 cubic centimeters"),
        ("60 miles per hour", "60 miles/hour"),
    ],
    "mathematics as it is typed": [
        ("10 - 2√5", r"10-2\sqrt{5}"),
        ("(5, ∞)", r"(5,\infty)"),
        ("x² + 1", "x^2+1"),
        ("x**2 + 1", "x^2+1"),
        ("sqrt(51)", r"\sqrt{51}"),
        ("3*sqrt(13)", r"3\sqrt{13}"),
        ("18+2pi", r"18+2\pi"),
        ("pi/6", r"\frac{\pi}{6}"),
        ("π/6", r"\frac{\pi}{6}"),
        ("x >= 5", r"x \ge 5"),
        ("x ≥ 5", r"x \geq 5"),
        ("(-inf, 2]", r"(-\infty, 2]"),
        ("1331 and 1728", "1331, 1728"),
        ("2 sin(x)", r"2\sin x"),
        ("x^(n+1)", "x^{n+1}"),
    ],
    "wrappers": [
        (r"\mbox{even}", "even"),
        (r"\fbox{8}", "8"),
        (r"\textit{even}", "even"),
        (r"\textrm{even}", "even"),
        (r"\textnormal{even}", "even"),
        (r"\mathbf{8}", "8"),
        (r"\cfrac{1}{3}", r"\frac13"),
        (r"\left( \frac{1}{3} \right)", r"\frac{1}{3}"),
        (r"\boxed{\textbf{(B)}}", "(B)"),
    ],
    "equations": [
        ("2x-y+3=0", "y=2x+3"),
        ("y = 3 + 2x", "y=2x+3"),
        (r"\theta = 5", "5"),
        ("n = 5", "5"),
        ("5", "n = 5"),
        ("x = 5", "x=5.0"),
    ],
    "quotation marks and escaped braces": [
        ("“Yes”", "Yes"),
        ("'Yes'", "Yes"),
        ("‘Yes.’", "Yes"),
        (r"] \}", "] }"),
    ],
}
OTHER = {
    "numbers that differ little": [
        ("10^{-20}", "10^{-30}"),
        ("10^{-20} x", "10^{-30} x"),
        ("10^{-20}, 1", "10^{-30}, 1"),
        (r"(10^{-20}, \pi)", r"(10^{-30}, \pi)"),
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
        (r"\frac{1}{3 \cdot 2^{2006}}", r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}"),
        ("0^1", r"\frac{1}{2^{99}}"),
        ("0", r"\frac{1}{2^{99}}"),
        (r"\frac{1}{2^{99}}", "0"),
        (
            r"\begin{pmatrix} 10^{-20} \\ 1 \end{pmatrix}",
            r"\begin{pmatrix} 10^{-30} \\ 1 \end{pmatrix}",
        ),
        ("x = 10^{-20}", "x = 10^{-30}"),
        (r"x < 10^{-20}", "x < 10^{-30}"),
    ],
    "mathematics by its gold": [
        ("(3, 0.5)", "(0.5, 3)"),
        ("(5, 1)", "(7, 2)"),
        (r"(\pi, 1)", r"(2\pi, 1)"),
        ("(1, -2)", "-2,1"),
        ("1, -2, 3", "-2, 1"),
        ("1, 1", "1, 2"),
        ("2", "3-1"),
        ("2-0", "3-1"),
        ("2015", "2021-05-01"),
        ("b or a", "a or b"),
        ("a cat", "cat, a"),
        ("7 ma", "7 am"),
    ],
    "numbers in other forms": [
        ("121, 242", "121242"),
        ("1 00", "100"),
        ("1, 000", "1000"),
        ("850, 0", "850,000"),
        ("850,0000", "850,000"),
        ("10 00", "1000"),
        ("1.5e3", "1.5"),
        ("1e999999", "1"),
        ("10^3", "1000"),  # the question may have been: what is 10^3?
    ],
    "units": [
        (r"5\text{ million}", "5"),
        ("5", r"5\text{ million}"),
        (r"3\text{ cm}", r"3\text{ m}"),
        ("3 cm", "3 square cm"),
        (r"7\text{ pm}", r"7\text{ am}"),
        (r"50\text{ percent}", "50"),
        ("50", "50 percent"),
        ("€5", "$5 dollars"),
        ("18 dollars or 19 dollars", "18"),
        ("18 not", "18"),
        ("cm", "m"),
        ("18 apples", "18"),
    ],
    "mathematics as it is typed": [
        ("10 - 2√6", r"10-2\sqrt{5}"),
        ("x³ + 1", "x^2+1"),
        ("x > 5", r"x \ge 5"),
        ("x <= 5", r"x \ge 5"),
        ("2³", "23"),
        ("1331 and 1729", "1331, 1728"),
    ],
    "wrappers": [(r"\mbox{odd}", "even"), (r"\fbox{9}", "8"), (r"\mathbf{9}", "8")],
    "equations": [
        ("x=5", "y=5"),
        ("2x-y+4=0", "y=2x+3"),
        ("0=0", "y=2x+3"),
        ("y=y", "y=2x+3"),
        ("x = 5 = 6", "5"),
        ("x = 6", "5"),
        ("2x=10", "5"),
    ],
    "quotation marks and escaped braces": [("“No”", "Yes"), (r"\} ]", "] }")],
    "still refused": [
        ("2021", r"\pm 2021"),
        ("1:00", "12:00"),
        ("52", "52_8"),
        ("(3,4]", "[3,4]"),
        ("8, 9", "8"),
        ("8 and 9", "8"),
        ("8 and 8", "8"),
    ],
}

SAME |= {
    "infinity": [("∞", r"\infty"), ("-∞", r"-\infty")],
    "wrappers in a formula": [(r"\mathbf{b}+\mathbf{a}", r"\mathbf{a}+\mathbf{b}")],
    "units, again": [("5kg", "5 kg"), ("5 lbs", "5 lb"), (r"\$5", "5 dollars"), ("5", r"\$5")],
    "variables, again": [("θ = 5", "5"), ("theta = 5", "5"), ("x_1 = 5", "5"), ("x=5", "5=x")],
    "per cent": [("50 per cent", r"50\%")],
    "letters that are variables": [(r"\frac{1}{2} m v", r"\frac{1}{2}v m")],
}
OTHER |= {
    "infinity": [
        ("∞", r"2\pi"),
        (r"\infty", r"\frac{3\pi}{4}"),
        ("1/0", r"\sqrt{2}"),
        (r"1, \infty", r"1, \pi"),
        ("5", r"\infty"),
        ("-∞", r"\infty"),
    ],
    "large and near": [
        ("2^{64}", "2^{64}-1"),
        ("10^{20}+1", "10^{20}"),
        ("1", r"1-\frac{1}{2^{99}}"),
        (r"1-\frac{1}{2^{99}}", r"1-\frac{1}{2^{98}}"),
    ],
    "the question said again": [("2x+3=13", "x=5"), ("x+3=8", "x=5"), ("2x=10", "x=5")],
    "variables that look like units": [
        (r"\pi r^2", r"\pi r^2 h"),
        ("n^2+1", "n^2+1 m"),
        ("2^n m", "2^n"),
    ],
    "words that change a number": [
        (r"5\text{ thousandths}", "5"),
        (r"5\text{ lakh}", "5"),
        (r"5\text{ plus one}", "5"),
        (r"5\text{ is wrong}", "5"),
        ("50 per cent", "50"),
    ],
    "dollars": [("$5", "€5"), ("$5", "5 euros"), ("$5", "5 cents"), (r"\$5", "£5")],
    "one number and several": [
        ("242,121", "121,242"),
        ("456,123", "123,456"),
        ("2,100", "100, 2"),
        ("100,200,300", "300,200,100"),
        ("1 123/125", "1123/125"),
        ("1123/125", "1 123/125"),
    ],
    "letters and names in a row": [
        ("B, A", "A, B"),
        ("T, F, T", "T, T, F"),
        ("Al, Bo", "Bo, Al"),
        ("a=2, b=1", "a=1, b=2"),
    ],
    "primes and feet": [("A'", "A"), ("A", "A'"), ("f'(x)", "f(x)"), ("5'", '5"')],
    "degrees in a formula": [(r"\cos(20)", r"\cos 20^\circ")],
}


def pairs(of_kinds):
    return [(kind, *pair) for kind, of_kind in of_kinds.items() for pair in of_kind]


@pytest.mark.parametrize("kind, answer, gold", pairs(SAME))
def test_same(kind, answer, gold):
    assert is_correct(answer, gold) is True


@pytest.mark.parametrize("kind, answer, gold", pairs(OTHER))
def test_other(kind, answer, gold):
    assert is_correct(answer, gold) is False
