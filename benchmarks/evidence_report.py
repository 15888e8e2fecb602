"""RESULTS.md and its pictures, from the rows of evidence.jsonl: see evidence.py.

What is compared is named by (variant, mode): ("mlpo", "three:1") is SFT + MLPO's leader with its
team of three, T = 1. `measured` holds the rows by that name: {(variant, mode): {seed: row}}.
"""

import math
from pathlib import Path

import numpy as np
from evidence_plan import TEAM_SIZES, VARIANTS
from matplotlib.figure import Figure
from scipy import stats

import runs

LABELS = {"untrained": "untrained"} | {name: label for name, (label, _) in VARIANTS.items()}
TEAMS = {
    "three": "its team",
    "shuffled": "shuffled seats",
    "unseen": "a team it never saw",
    "trusting": "agents always convinced",
    "same": "agent1 three times",
    "finals": "final answers only",
}
NO_LEADER = ("agent 1", "agent 2", "agent 3", "majority of 3", "any")
WITH_TEAM = ("mlpo", "three:1")
NOTE = """Shares of right answers in % of the test questions (by default 200; 66 of each official
file); differences (*d*) in points, over the seeds that both have (a share is over all seeds of its
own). `±` is half of a 95% interval in which both seeds and questions vary: the variance is that of
the seeds' means / seeds + that of the questions' means / questions, which counts the rest twice and
so errs on the careful side; p is that of a paired t-test with it (degrees of freedom after
Satterthwaite), without a correction for the number of tests. Tokens are those read and written:
beside an answer for this answer, beside a training in MLPO or GRPO (thousands; without the agents'
proposals). Nothing was chosen on these questions or by these leaders. The commands are in the rows
of `evidence.jsonl`."""
WORDS = """**Any**: is at least one agent right? **Debate**: no leader; in each round every agent
refines its response, given another's, then they vote. **T**: how often the leader answers; in
between the agents refine. **K**: how many agents; from the fourth on the leader never saw them.
**Seats**: the order of the responses. **Votes**: the most frequent answer of several samples."""


# ------------------------------------------------------------------------------------- statistics


def estimate(values):
    """(mean, half of its 95% interval, p of a mean of 0) of a (seeds, questions) matrix, in which
    NaN is what is left out. From one seed: over its questions alone."""
    there = np.isfinite(values)
    measured_seeds = there.any(1)
    measured_questions = there.any(0)
    values = values[measured_seeds][:, measured_questions]
    there = there[measured_seeds][:, measured_questions]
    mean = float(values[there].mean())
    rest = np.where(there, values - mean, 0)
    parts = []  # (variance, degrees of freedom)
    for sums in (rest.sum(1), rest.sum(0)):  # of each seed, of each question
        n = len(sums)
        if n > 1:  # with nothing left out: the variance of their means / n
            parts.append(((sums**2).sum() * n / (n - 1) / there.sum() ** 2, n - 1))
    variance = sum(v for v, _ in parts)
    if variance < 1e-12:
        return mean, 0.0, float(abs(mean) < 1e-12)
    freedom = variance**2 / sum(v**2 / df for v, df in parts)
    error = math.sqrt(variance)
    half = stats.t.isf(0.025, freedom) * error
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    return mean, float(half), float(p)


def matrix(measured, one, other=None, mask=None):
    """(seeds, questions): 1 where `one` is right, less 1 where `other` is; of the seeds that both
    have. mask: {seed: which questions}; the others become NaN."""
    ours = measured.get(one, {})
    theirs = measured.get(other or one, {})
    lines = []
    for seed in sorted(set(ours) & set(theirs) & set(ours if mask is None else mask)):
        values = right_or_wrong(ours[seed])
        if other:
            values = values - right_or_wrong(theirs[seed])
        if mask is not None:
            values = np.where(mask[seed], values, np.nan)
        lines.append(values)
    return np.array(lines)


def in_points(measured, one, other=None, mask=None):
    """(mean, half of its interval, both in points, p) of that matrix. None if it is empty."""
    values = matrix(measured, one, other, mask)
    if not np.isfinite(values).any():
        return None
    mean, half, p = estimate(values)
    return 100 * mean, 100 * half, p


def right_or_wrong(row):
    """(questions,) of 1.0 and 0.0."""
    return np.array(list(row["correct"]), float)


def nobody_right(measured):
    """A mask: the questions on which no agent is right."""
    any_right = measured.get(("three", "any"), {})
    return {seed: right_or_wrong(row) == 0 for seed, row in any_right.items()}


# ----------------------------------------------------------------------------------------- tables


def share(measured, one, mask=None):
    """`88.3 ± 2.1`, or nothing if it is not measured."""
    found = in_points(measured, one, mask=mask)
    if not found:
        return ""
    mean, half, _ = found
    return f"{mean:.1f} ± {half:.1f}"


def difference(measured, one, other, mask=None):
    """`+5.0 ± 2.1, p = 0.012`, or nothing if one of them is not measured."""
    found = in_points(measured, one, other, mask)
    if one == other or not found:
        return ""
    mean, half, p = found
    told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{mean:+.1f} ± {half:.1f}, {told}"


def table(head, lines):
    """A Markdown table of the lines in which anything is measured: a label, how many seeds, then
    what is measured. Nothing if there are no such lines."""
    lines = [line for line in lines if any(line[2:])]
    if not lines:
        return ""
    text = ""
    for line in [head, ["---"] * len(head), *lines]:
        text += "| " + " | ".join(map(str, line)) + " |\n"
    return text + "\n"


def compared(measured, ones, versus, mask=None):
    """A table of (label, (variant, mode)), each with its difference to `versus`."""
    lines = []
    for label, one in ones:
        line = [label, len(measured.get(one, {})), tokens(measured, one) if mask is None else ""]
        lines.append([*line, share(measured, one, mask), difference(measured, one, versus, mask)])
    return table(["who", "seeds", "tokens", "right", "*d*"], lines)


def tokens(measured, one, unit=1):
    """How many an answer or a training takes, read and written, on the mean."""
    counts = [row["tokens"] for row in measured.get(one, {}).values()]
    return f"{np.mean(counts) / unit:,.0f}" if any(counts) else ""


def leaders(measured, names, versus):
    """A table of leaders, with the team and alone; each *d* is to the leader `versus`."""
    lines = []
    for name in names:
        line = [LABELS[name], len(measured.get((name, "three:1"), {}))]
        line.append(tokens(measured, (name, "training"), 1000))
        for mode in ("three:1", "alone"):
            line.append(share(measured, (name, mode)))
            line.append(difference(measured, (name, mode), (versus, mode)))
        lines.append(line)
    head = ["leader", "seeds", "training tokens", "its team, T=1", "*d*", "alone", "*d*"]
    return table(head, lines)


# --------------------------------------------------------------------------------------- sections

CLAIMS = [
    ("with the team: SFT + MLPO over SFT", WITH_TEAM, ("sft", "three:1")),
    ("the same without SFT, over untrained", ("mlpo_only", "three:1"), ("untrained", "three:1")),
    ("with the team, over any agent right", WITH_TEAM, ("three", "any")),
    ("with the team, over a leader trained only to pick", WITH_TEAM, ("picker", "three:1")),
    ("with the team, over a debate of one round", WITH_TEAM, ("three", "debate:1")),
    ("with the team, over a debate of two rounds", WITH_TEAM, ("three", "debate:2")),
    ("with the team, over a debate of three rounds", WITH_TEAM, ("three", "debate:3")),
    ("T = 2, over a debate of two rounds", ("mlpo", "three:2"), ("three", "debate:2")),
    ("with the team, over GRPO's leader with it", WITH_TEAM, ("grpo", "three:1")),
    ("with the team, over SFT + GRPO's leader with it", WITH_TEAM, ("grpo_sft", "three:1")),
    ("alone: MLPO over GRPO, equal steps", ("mlpo_only", "alone"), ("grpo", "alone")),
    ("alone: MLPO over GRPO, equal tokens", ("mlpo_only", "alone"), ("grpo_tokens", "alone")),
    ("the same, tokens of the proposals too", ("mlpo_only", "alone"), ("grpo_all_tokens", "alone")),
    ("alone: SFT + MLPO over SFT + GRPO", ("mlpo", "alone"), ("grpo_sft", "alone")),
    ("the same, equal tokens", ("mlpo", "alone"), ("grpo_sft_tokens", "alone")),
    ("alone, both with 4 updates a batch", ("updates4", "alone"), ("grpo_updates4", "alone")),
    ("alone, by --paper, over untrained", ("paper", "alone"), ("untrained", "alone")),
    ("the same, with 4 updates a batch", ("paper_updates4", "alone"), ("untrained", "alone")),
    ("alone, by --paper, over GRPO, equal steps", ("paper", "alone"), ("grpo", "alone")),
    ("alone, by --paper, over GRPO, equal tokens", ("paper", "alone"), ("grpo_tokens", "alone")),
    ("T = 3 over T = 1", ("mlpo", "three:3"), WITH_TEAM),
    ("T = 5 over T = 1", ("mlpo", "three:5"), WITH_TEAM),
    ("a team that it never saw, against its own", ("mlpo", "unseen:1"), WITH_TEAM),
    ("shuffled seats, against the usual ones", ("mlpo", "shuffled:1"), WITH_TEAM),
    ("official files: over any agent right", ("mlpo", "bbh/three:1"), ("three", "bbh/any")),
]


def claims(measured):
    """What the method is for, each with what it is measured against."""
    lines = []
    for text, one, other in CLAIMS:
        seeds = len(matrix(measured, one, other))
        lines.append([text, seeds, difference(measured, one, other)])
    mask = nobody_right(measured)
    seeds = len(matrix(measured, WITH_TEAM, mask=mask))
    lines.append(
        ["with the team, right where no agent is", seeds, share(measured, WITH_TEAM, mask)]
    )
    return table(["claim", "seeds", "measured"], lines)


def parts(measured):
    """What each phase adds; *d* to SFT + MLPO. `SFT` has 10 steps: 0, 30 and 120 are its sweep."""
    names = ["untrained", "sft", "sft30", "sft120"]
    names += ["mlpo_only", "mlpo", "sft30_mlpo", "sft120_mlpo"]
    names += ["grpo", "grpo_tokens", "grpo_all_tokens", "grpo_sft", "grpo_sft_tokens", "paper"]
    return leaders(measured, names, "mlpo")


def baselines(measured):
    """All of it on the same questions and first responses (a majority of 20 or 40 has nearly the
    same samples with every seed); *d* to SFT + MLPO with its team, T=1. GRPO's leaders have
    practised alone only, and never listened."""
    modes = [*NO_LEADER, "majority of 20", "majority of 40", "debate:1", "debate:2", "debate:3"]
    ones = [(mode, ("three", mode)) for mode in modes]
    ones += [("a leader trained only to pick", ("picker", "three:1"))]
    ones += [("GRPO's leader, with the team", ("grpo", "three:1"))]
    ones += [("SFT + GRPO's leader, with the team", ("grpo_sft", "three:1"))]
    ones += [("SFT + MLPO alone, votes, as many tokens", ("mlpo", "votes, as many tokens"))]
    for t in (1, 2, 3):
        ones += [(f"SFT + MLPO, with the team, T={t}", ("mlpo", f"three:{t}"))]
    return compared(measured, ones, WITH_TEAM)


def where_nobody_is_right(measured):
    """Only the questions on which no agent is right; *d* to SFT + MLPO."""
    names = ("untrained", "sft", "mlpo", "mlpo_only")
    ones = [(LABELS[name], (name, "three:1")) for name in names]
    return compared(measured, ones, WITH_TEAM, mask=nobody_right(measured))


def trusting(measured):
    """Agents that another's step convinces always, and only where they are wrong themselves (ours:
    half of the time). Such agents know where they err: is a debate of them as good as a leader? *d*
    to SFT + MLPO, T=1."""
    ones = [(f"debate:{t}", ("trusting", f"debate:{t}")) for t in (1, 2, 3)]
    ones += [(f"SFT + MLPO, with them, T={t}", ("mlpo", f"trusting:{t}")) for t in (1, 2, 3)]
    return compared(measured, ones, ("mlpo", "trusting:1"))


BEGINNERS = {  # how often a leader is right alone before training: (its MLPO, its GRPO)
    "seldom": ("mlpo_only", "grpo_tokens"),
    "sometimes": ("sometimes_mlpo", "sometimes_grpo"),
    "often": ("often_mlpo", "often_grpo"),
}


def when(measured):
    """Does a team help most where the leader seldom finds the right way alone? Three leaders, that
    follow each misconception alone with a probability of 0.9, 0.55 and 0.4, and two trainings of
    each, without SFT, of equal tokens. Before: how often it is right on the validation questions,
    untrained, by greedy sampling. *d*: MLPO over GRPO, both alone."""
    lines = []
    for how_often, (mlpo, grpo) in BEGINNERS.items():
        alone = [(mlpo, "alone"), (grpo, "alone")]
        line = [f"{how_often} right", len(matrix(measured, *alone))]
        line += [before_training(measured, grpo)]
        line += [share(measured, one) for one in alone]
        lines.append([*line, difference(measured, *alone), share(measured, (mlpo, "three:1"))])
    head = ["leader", "seeds", "before", "MLPO, alone", "GRPO, alone", "*d*", "MLPO, its team"]
    return table(head, lines)


def before_training(measured, name):
    """How often this leader was right alone at its first look at the validation questions, in %."""
    first = [row["curve"][0][1] for row in curves(measured, name, "alone")]
    return f"{100 * np.mean(first):.0f}" if first else ""


def curves(measured, name, who):
    """The rows of its looks at the validation questions: `alone` or with the `team`."""
    return [row for row in measured.get((name, f"curve {who}"), {}).values() if row["curve"]]


def settings(measured):
    """One change at a time, and two at once where four updates go with GRPO or never alone; *d* to
    MLPO without SFT."""
    names = ["mlpo_only", "easy0", "easy1", "scaled", "kl", "updates4", "grpo_updates4"]
    names += ["paper_updates4", "dropout0", "fixed_order", "random_team", "rounds", "half"]
    return leaders(measured, names, "mlpo_only")


def teams(measured):
    """Other teams, T=1; *d* to the same leader with the team that it was trained with, but where it
    was trained with these itself (agent1 three times, final answers only): to MLPO, no SFT."""
    lines = []
    for name in LABELS:
        for team in (*TEAMS, *TEAM_SIZES):
            one = (name, f"{team}:1")
            trained_so = name == team  # `same` and `finals`
            versus = difference(measured, one, ("mlpo_only" if trained_so else name, "three:1"))
            if versus:
                line = [f"{LABELS[name]}: {TEAMS.get(team, team)}", len(measured[one])]
                lines.append([*line, tokens(measured, one), share(measured, one), versus])
    one = ("unseen", "any")
    line = ["any agent of the team it never saw", len(measured.get(one, {}))]
    lines.append([*line, tokens(measured, one), share(measured, one), ""])
    return table(["leader: team", "seeds", "tokens", "right", "*d*"], lines)


def rounds(measured):
    """What more rounds do to a leader; *d* is that of T=5 to T=1."""
    lines = []
    for name in LABELS:
        line = [LABELS[name], len(measured.get((name, "three:5"), {}))]
        if line[1]:
            line += [share(measured, (name, f"three:{t}")) for t in (1, 2, 3, 5)]
            line.append(difference(measured, (name, "three:5"), (name, "three:1")))
            lines.append(line)
    return table(["leader", "seeds", "T=1", "T=2", "T=3", "T=5", "*d*"], lines)


def official(measured):
    """The official files of these tasks, of which no question was in any training; *d* to SFT +
    MLPO with its team."""
    ones = [(mode, ("three", f"bbh/{mode}")) for mode in NO_LEADER]
    for name in LABELS:
        ones.append((f"{LABELS[name]}, alone", (name, "bbh/alone")))
        ones.append((f"{LABELS[name]}, its team, T=1", (name, "bbh/three:1")))
    return compared(measured, ones, ("mlpo", "bbh/three:1"))


# --------------------------------------------------------------------------------------- pictures


def errorbar(axis, measured, ones, xs, name, masks=None):
    """A curve with its 95% intervals, of what has been measured (of the questions in the masks)."""
    points = []
    for x, one, mask in zip(xs, ones, masks or [None] * len(ones)):
        found = in_points(measured, one, mask=mask)
        if found:
            points.append((x, *found[:2]))
    if points:
        x, y, half = zip(*points)
        axis.errorbar(x, y, half, capsize=2, marker="o", label=name)


def draw_claims(measured, figure):
    """each claim with its interval"""
    axis = figure.subplots()
    for text, one, other in reversed(CLAIMS):
        found = in_points(measured, one, other)
        if found:
            mean, half, _ = found
            axis.errorbar(mean, text, xerr=half, fmt="o", color="tab:blue", capsize=2)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_xlabel("difference in points")
    axis.tick_params(axis="y", labelsize="small")


def draw_wrong(measured, figure):
    """right answers by the number of agents that are right"""
    axis = figure.subplots()
    right = {}  # of each seed: by how many agents, per question
    for k in (1, 2, 3):
        for seed, row in measured.get(("three", f"agent {k}"), {}).items():
            right[seed] = right.get(seed, 0) + right_or_wrong(row)
    masks = [{seed: n == k for seed, n in right.items()} for k in range(4)]
    told = {f"{LABELS[name]}, team": (name, "three:1") for name in ("untrained", "sft", "mlpo")}
    told |= {"SFT + MLPO, alone": ("mlpo", "alone"), "majority of 3": ("three", "majority of 3")}
    for name, one in told.items():
        errorbar(axis, measured, [one] * 4, range(4), name, masks)
    axis.set(xlabel="agents that are right", xticks=range(4), ylim=(0, 102))
    axis.set_ylabel("right answers, %")
    axis.legend(fontsize="small")


def draw_when(measured, figure):
    """MLPO and GRPO over training, and what MLPO gains over GRPO alone"""
    there = [name for name, (_, grpo) in BEGINNERS.items() if (grpo, "alone") in measured]
    [axes] = figure.subplots(1, len(there) + 1, squeeze=False)
    gains = axes[-1]
    for axis, how_often in zip(axes, there):
        mlpo, grpo = BEGINNERS[how_often]
        draw_curve(axis, measured, mlpo, "team", "--", "tab:orange", "MLPO, team")
        draw_curve(axis, measured, mlpo, "alone", "-", "tab:orange", "MLPO, alone")
        draw_curve(axis, measured, grpo, "alone", "-", "tab:blue", "GRPO, alone")
        axis.set(title=f"alone {how_often} right", xlabel="steps", ylim=(0, 102))
        axis.set_ylabel("right answers, %")
        axis.legend(fontsize="small")
        mean, half, _ = in_points(measured, (mlpo, "alone"), (grpo, "alone"))
        before = float(before_training(measured, grpo))
        gains.errorbar(before, mean, half, fmt="o", color="tab:blue", capsize=2)
    gains.axhline(0, color="gray", linewidth=0.8)
    gains.set(title="MLPO over GRPO, alone", ylabel="points")
    gains.set_xlabel("right alone before training, %")


def draw_curve(axis, measured, name, who, style, color, told):
    """The mean over seeds of a leader's looks at the validation questions, to the end of the
    shortest training."""
    of_seeds = [row["curve"] for row in curves(measured, name, who)]
    shortest = min(len(curve) for curve in of_seeds)
    steps, accuracy = np.array([curve[:shortest] for curve in of_seeds]).mean(0).T
    axis.plot(steps, 100 * accuracy, style, color=color, label=told)


def draw_rounds(measured, figure):
    """right answers over T"""
    axis = figure.subplots()
    for name in ("untrained", "sft", "mlpo", "mlpo_only", "rounds"):
        ones = [(name, f"three:{t}") for t in range(1, 6)]
        errorbar(axis, measured, ones, range(1, 6), LABELS[name])
    axis.set(xlabel="rounds, T", xticks=range(1, 6), ylabel="right answers, %")
    axis.legend(fontsize="small")


# ------------------------------------------------------------------------------------------- page

SECTIONS = {  # heading: (its tables, its picture)
    "1. Claims": ([claims], draw_claims),
    "2. Parts": ([parts], None),
    "3. Baselines": ([baselines, where_nobody_is_right, trusting], draw_wrong),
    "4. When does a team help?": ([when], draw_when),
    "5. Settings": ([settings], None),
    "6. Teams": ([teams], None),
    "7. Rounds": ([rounds], draw_rounds),
    "8. Official files": ([official], None),
}


def report(rows, out):
    """RESULTS.md and the pictures."""
    measured = {}
    for row in rows:
        measured.setdefault((row["variant"], row["mode"]), {})[row["seed"]] = row
    page = "# Evidence\n\nMade by `python benchmarks/evidence.py` from `evidence.jsonl`.\n\n"
    page += f"{one_line(NOTE)}\n\n{one_line(WORDS)}\n\n"
    for heading, (sections, draw) in SECTIONS.items():
        text = ""
        for section in sections:
            told = section(measured)
            if told:
                text += f"{one_line(section.__doc__)}\n\n{told}"
        if text:
            page += f"## {heading}\n\n{text}"
            if draw:
                page += save_picture(measured, draw, out)
    there = {variant for variant, _ in measured}
    missing = [LABELS[name] for name in LABELS if name not in there]
    if missing:
        page += f"Not measured yet: {'; '.join(missing)}.\n"
    runs.write_text(Path(out) / "RESULTS.md", page.rstrip() + "\n")


def one_line(text):
    return " ".join(text.split())


def save_picture(measured, draw, out):
    """Draw it and save it. Its line on the page."""
    path = f"benchmarks/{draw.__name__.replace('draw', 'evidence')}.png"
    figure = Figure(figsize=(13 if draw is draw_when else 8, 4), layout="constrained")
    draw(measured, figure)
    figure.savefig(Path(out) / path, dpi=110)
    return f"![{draw.__doc__}]({path})\n\n"
