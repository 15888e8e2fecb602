"""RESULTS.md and its pictures, from the rows of evidence.jsonl: see evidence.py."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

import runs

LABELS = {
    "untrained": "untrained",
    "sft": "SFT",
    "mlpo": "SFT + MLPO",
    "mlpo_only": "MLPO, no SFT",
    "grpo": "GRPO, no SFT",
    "grpo_tokens": "GRPO, no SFT, as many tokens as MLPO",
    "grpo_sft": "SFT + GRPO",
    "grpo_sft_tokens": "SFT + GRPO, as many tokens as MLPO",
    "paper": "MLPO, never alone (--paper)",
    "sft30": "30 steps of SFT",
    "sft30_mlpo": "30 steps of SFT + MLPO",
    "sft120": "120 steps of SFT",
    "sft120_mlpo": "120 steps of SFT + MLPO",
    "easy0": "MLPO, easy questions dropped",
    "easy1": "MLPO, no question dropped",
    "scaled": "MLPO, advantages / std",
    "kl": "MLPO, with a KL term",
    "updates4": "MLPO, 4 updates a batch",
    "grpo_updates4": "GRPO, 4 updates a batch",
    "dropout0": "MLPO, always with the team",
    "fixed_order": "MLPO, responses in the team's order",
    "random_team": "MLPO, random teams",
    "rounds": "MLPO on two rounds",
    "same": "MLPO with agent1 three times",
    "finals": "MLPO reading final answers only",
    "half": "MLPO, half as wide",
    "sometimes_mlpo": "MLPO, leader sometimes right",
    "sometimes_grpo": "GRPO, leader sometimes right",
    "often_mlpo": "MLPO, leader often right",
    "often_grpo": "GRPO, leader often right",
}
TEAMS = {
    "three": "its team",
    "shuffled": "shuffled seats",
    "unseen": "a team it never saw",
    "trusting": "agents always convinced",
    "same": "agent1 three times",
    "finals": "final answers only",
}
NOTE = """Shares of right answers in %, differences (*d*) in points. `±` is half of a 95% interval
in which both seeds and questions vary: the variance is that of the seeds' means / seeds + that of
the questions' means / questions, which counts the rest twice and so errs on the careful side; p is
that of a paired t-test with it (degrees of freedom after Satterthwaite), without a correction for
the number of tests. Tokens: those read and written for an answer. Nothing was chosen on these
questions or by these leaders. The commands are in the rows of `evidence.jsonl`."""


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


# ------------------------------------------------------------------------------------------ cells


def rows_of(rows, variant, mode):
    """Those of one variant and mode: a row for each seed."""
    return [row for row in rows if (row["variant"], row["mode"]) == (variant, mode)]


def bits(rows, variant, mode):
    """{seed: its right and wrong answers as an array}."""
    found = {}
    for row in rows_of(rows, variant, mode):
        if "correct" in row:
            found[row["seed"]] = np.array(list(row["correct"]), float)
    return found


def matrix(rows, one, other=None, mask=None):
    """(seeds, questions) of what `one` = (variant, mode) has right, less what `other` has; of the
    seeds that both have. mask: {seed: which questions}; the others become NaN."""
    ours = bits(rows, *one)
    theirs = bits(rows, *other) if other else ours
    table = []
    for seed in sorted(set(ours) & set(theirs) & set(ours if mask is None else mask)):
        values = ours[seed] - theirs[seed] if other else ours[seed]
        table.append(values if mask is None else np.where(mask[seed], values, np.nan))
    return np.array(table)


def share(rows, one, mask=None):
    """`88.3 ± 2.1`, or nothing if there is no such row."""
    values = matrix(rows, one, mask=mask)
    if not np.isfinite(values).any():
        return ""
    mean, half, _ = estimate(values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def difference(rows, one, other, mask=None):
    values = matrix(rows, one, other, mask)
    if one == other or not np.isfinite(values).any():
        return ""
    mean, half, p = estimate(values)
    told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{100 * mean:+.1f} ± {100 * half:.1f}" + (f", {told}" if len(values) > 1 else "")


def table(head, lines):
    """A Markdown table; nothing if it has no lines."""
    if not lines:
        return ""
    text = ""
    for row in [head, ["---"] * len(head), *lines]:
        text += "| " + " | ".join(map(str, row)) + " |\n"
    return text + "\n"


def compared(rows, ones, versus, mask=None):
    """A table of what has been measured of `ones`, (label, (variant, mode)), each with its
    difference to `versus`, (variant, mode); nothing if that is all there is."""
    return table(COLUMNS, compared_lines(rows, ones, versus, mask))


COLUMNS = ["who", "seeds", "tokens", "right", "*d*"]


def compared_lines(rows, ones, versus, mask=None):
    """The lines of `compared`."""
    lines = []
    for label, one in ones:
        if bits(rows, *one):
            tokens = tokens_of(rows, one) if mask is None else ""  # they are of all questions
            line = [label, len(bits(rows, *one)), tokens]
            lines.append([*line, share(rows, one, mask), difference(rows, one, versus, mask)])
    return lines if len(lines) > 1 else []


def tokens_of(rows, one):
    """How many an answer takes, read and written, on the mean."""
    tokens = [row["tokens"] for row in rows_of(rows, *one)]
    return f"{np.mean(tokens):,.0f}"


def leaders(rows, names, versus):
    """A table of leaders, with the team and alone; each *d* is to the leader `versus`; nothing if
    that is all there is."""
    lines = []
    for name in names:
        if bits(rows, name, "three:1"):
            line = [LABELS[name], len(bits(rows, name, "three:1"))]
            for mode in ("three:1", "alone"):
                line += [share(rows, (name, mode)), difference(rows, (name, mode), (versus, mode))]
            lines.append(line)
    head = ["leader", "seeds", "its team, T=1", "*d*", "alone", "*d*"]
    return table(head, lines if len(lines) > 1 else [])


def picture(rows_told, what, name):
    """Its line on the page, behind the tables that it belongs to: nothing if there are none."""
    if not rows_told:
        return ""
    return f"![{what}](benchmarks/evidence_{name}.png)\n"


def title(mode):
    team, _, rounds = mode.rpartition("/")[2].partition(":")
    return "alone" if team == "alone" else f"{TEAMS.get(team, team)}, T={rounds}"


# --------------------------------------------------------------------------------------- sections

TEAM = ("mlpo", "three:1")
CLAIMS = [
    ("with the team: SFT + MLPO over SFT", TEAM, ("sft", "three:1")),
    ("the same without SFT, over untrained", ("mlpo_only", "three:1"), ("untrained", "three:1")),
    ("with the team, over any agent right", TEAM, ("three", "any")),
    ("with the team, over a leader trained only to pick", TEAM, ("picker", "three:1")),
    ("with the team, over a debate of one round", TEAM, ("three", "debate:1")),
    ("with the team, over a debate of two rounds", TEAM, ("three", "debate:2")),
    ("with the team, over a debate of three rounds", TEAM, ("three", "debate:3")),
    ("T = 2, over a debate of two rounds", ("mlpo", "three:2"), ("three", "debate:2")),
    ("with the team, over GRPO's leader with it", TEAM, ("grpo", "three:1")),
    ("with the team, over SFT + GRPO's leader with it", TEAM, ("grpo_sft", "three:1")),
    ("alone: MLPO over GRPO, equal steps", ("mlpo_only", "alone"), ("grpo", "alone")),
    ("alone: MLPO over GRPO, equal tokens", ("mlpo_only", "alone"), ("grpo_tokens", "alone")),
    ("alone: SFT + MLPO over SFT + GRPO", ("mlpo", "alone"), ("grpo_sft", "alone")),
    ("the same, equal tokens", ("mlpo", "alone"), ("grpo_sft_tokens", "alone")),
    ("alone, both with 4 updates a batch", ("updates4", "alone"), ("grpo_updates4", "alone")),
    ("alone, by --paper, over untrained", ("paper", "alone"), ("untrained", "alone")),
    ("T = 3 over T = 1", ("mlpo", "three:3"), TEAM),
    ("T = 5 over T = 1", ("mlpo", "three:5"), TEAM),
    ("a team that it never saw, against its own", ("mlpo", "unseen:1"), TEAM),
    ("shuffled seats, against the usual ones", ("mlpo", "shuffled:1"), TEAM),
]


def claims(rows):
    """What the method is for, each with what it is measured against."""
    lines = []
    for text, one, other in CLAIMS:
        told = difference(rows, one, other)
        if told:
            lines.append([text, len(matrix(rows, one, other)), told])
    told = share(rows, TEAM, nobody_right(rows))
    if told:
        lines.append(["with the team, right where no agent is", len(bits(rows, *TEAM)), told])
    text = table(["claim", "seeds", "measured"], lines)
    return text + picture(lines, "each claim with its interval", "claims")


def nobody_right(rows):
    """{seed: on which questions no agent is right}."""
    return {seed: right == 0 for seed, right in bits(rows, "three", "any").items()}


def parts(rows):
    """What each phase adds; *d* to SFT + MLPO. `SFT` has 10 steps: 0, 30 and 120 are its sweep."""
    names = ("untrained", "sft", "sft30", "sft120")
    names += ("mlpo_only", "mlpo", "sft30_mlpo", "sft120_mlpo")
    names += ("grpo", "grpo_tokens", "grpo_sft", "grpo_sft_tokens", "paper")
    text = leaders(rows, names, "mlpo")
    return text + picture(text, "what each phase adds", "parts")


def baselines(rows):
    """All of it on the same questions and first responses; *d* to SFT + MLPO with its team, T=1."""
    modes = [*AGENTS, "majority of 20", "majority of 40", "debate:1", "debate:2", "debate:3"]
    ones = [(mode, ("three", mode)) for mode in modes]
    ones += [("a leader trained only to pick", ("picker", "three:1"))]
    ones += [("GRPO's leader, with the team", ("grpo", "three:1"))]
    ones += [("SFT + GRPO's leader, with the team", ("grpo_sft", "three:1"))]
    for mode in ("votes of 5", "votes, as many tokens"):
        ones += [(f"SFT + MLPO alone, {mode}", ("mlpo", mode))]
    for t in (1, 2, 3):
        ones += [(f"SFT + MLPO, with the team, T={t}", ("mlpo", f"three:{t}"))]
    text = compared(rows, ones, TEAM)
    ones = [(LABELS[name], (name, "three:1")) for name in ("untrained", "sft", "mlpo", "mlpo_only")]
    of_these = compared(rows, ones, TEAM, mask=nobody_right(rows))
    if of_these:
        text += f"Only the questions on which no agent is right:\n\n{of_these}"
    ones = [(f"debate:{t}", ("trusting", f"debate:{t}")) for t in (1, 2, 3)]
    ones += [(f"SFT + MLPO, with them, T={t}", ("mlpo", f"trusting:{t}")) for t in (1, 2, 3)]
    of_trusting = compared(rows, ones, ("mlpo", "trusting:1"))
    if of_trusting:
        text += f"{TRUSTING}\n\n{of_trusting}"
    return text + picture(text, "by the number of agents that are right", "wrong")


TRUSTING = """Agents that another's step convinces always, and only where they are wrong themselves
(ours: half of the time). Such agents know where they err, and need no leader:"""
AGENTS = ("agent 1", "agent 2", "agent 3", "majority of 3", "any")


def when(rows):
    """A team helps where the leader seldom finds the right way alone. Three leaders, that follow
    each misconception alone with a probability of 0.9, 0.55 and 0.4, and two trainings of each,
    without SFT, of equal tokens. Before: how often it is right on the validation questions,
    untrained. *d*: MLPO over GRPO, both alone."""
    lines = []
    for how_often, (mlpo, grpo) in BEGINNERS.items():
        told = difference(rows, (mlpo, "alone"), (grpo, "alone"))
        if told:
            line = [f"{how_often} right", len(matrix(rows, (mlpo, "alone"), (grpo, "alone")))]
            line += [before_training(rows, grpo), share(rows, (mlpo, "alone"))]
            lines.append(
                [*line, share(rows, (grpo, "alone")), told, share(rows, (mlpo, "three:1"))]
            )
    if len(lines) < 2:
        return ""
    head = ["leader", "seeds", "before", "MLPO, alone", "GRPO, alone", "*d*", "MLPO, its team"]
    return table(head, lines) + picture(lines, "MLPO and GRPO over training", "when")


BEGINNERS = {  # how often a leader is right alone before training: (its MLPO, its GRPO)
    "seldom": ("mlpo_only", "grpo_tokens"),
    "sometimes": ("sometimes_mlpo", "sometimes_grpo"),
    "often": ("often_mlpo", "often_grpo"),
}


def before_training(rows, name):
    """How often this leader was right alone at its first look at the validation questions."""
    first = []
    for row in rows_of(rows, name, "curve alone"):
        if row["curve"]:
            _, right = row["curve"][0]
            first.append(right)
    return f"{100 * np.mean(first):.0f}" if first else ""


def settings(rows):
    """One change at a time; *d* to MLPO without SFT."""
    names = ("mlpo_only", "easy0", "easy1", "scaled", "kl", "updates4", "grpo_updates4")
    names += ("dropout0", "fixed_order", "random_team", "rounds", "half")
    return leaders(rows, names, "mlpo_only")


def teams(rows):
    """Other teams; *d* to the same leader with its own team."""
    lines = []
    for name, label in LABELS.items():
        modes = [f"{team}:1" for team in (*TEAMS, "K1", "K2", "K4", "K5", "K6")]
        ones = [(f"{label}: {title(mode)}", (name, mode)) for mode in modes]
        lines += compared_lines(rows, ones, (name, "three:1"))
    text = table(COLUMNS, lines)
    of_unseen = []
    for mode in AGENTS:
        right = share(rows, ("unseen", mode))
        if right:
            of_unseen.append(f"{mode} {right}")
    if of_unseen:
        text += f"The team that it never saw has right: {', '.join(of_unseen)}.\n"
    return text


def rounds(rows):
    """What more rounds do to a leader; *d* is that of T=5 to T=1."""
    lines = []
    for name, label in LABELS.items():
        if bits(rows, name, "three:5"):
            line = [label, len(bits(rows, name, "three:5"))]
            line += [share(rows, (name, f"three:{t}")) for t in (1, 2, 3, 5)]
            lines.append([*line, difference(rows, (name, "three:5"), (name, "three:1"))])
    text = table(["leader", "seeds", "T=1", "T=2", "T=3", "T=5", "*d*"], lines)
    return text + picture(text, "accuracy over T", "rounds")


def official(rows):
    """The official files of these tasks, of which no question was in any training."""
    ones = [(mode, ("three", f"bbh/{mode}")) for mode in AGENTS]
    for name, label in LABELS.items():
        ones += [
            (f"{label}, {title(mode)}", (name, f"bbh/{mode}")) for mode in ("alone", "three:1")
        ]
    return compared(rows, ones, ("mlpo", "bbh/three:1"))


SECTIONS = {
    "1. Claims": claims,
    "2. Parts": parts,
    "3. Baselines": baselines,
    "4. When does a team help?": when,
    "5. Settings": settings,
    "6. Teams": teams,
    "7. Rounds": rounds,
    "8. Official files": official,
}


def report(rows, out):
    """RESULTS.md and the pictures."""
    page = [
        "# Evidence\n",
        "Made by `python benchmarks/evidence.py` from `evidence.jsonl`.\n",
        NOTE,
    ]
    missing = []
    for heading, section in SECTIONS.items():
        told = section(rows)
        if told:
            page += [f"\n## {heading}\n", " ".join(section.__doc__.split()) + "\n", told.rstrip()]
        else:
            missing.append(heading)
    measured = {row["variant"] for row in rows}
    without = [name for name in LABELS if name not in measured]
    if without:
        names = ", ".join(LABELS[name] for name in without)
        page.append(f"\nNot measured yet, leaders: {names}.")
    if missing:
        page.append(f"\nNot measured yet, whole sections: {', '.join(missing)}.")
    page.append("")
    runs.write_text(Path(out) / "RESULTS.md", "\n".join(page))
    pictures = {
        "1. Claims": ("claims", draw_claims),
        "2. Parts": ("parts", draw_parts),
        "3. Baselines": ("wrong", draw_wrong),
        "4. When does a team help?": ("when", draw_when),
        "7. Rounds": ("rounds", draw_rounds),
    }
    for heading, (name, draw) in pictures.items():
        path = Path(out) / "benchmarks" / f"evidence_{name}.png"
        path.unlink(missing_ok=True)
        if heading not in missing:
            figure = Figure(figsize=(13 if name == "when" else 8, 4), layout="constrained")
            draw(rows, figure)
            figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------- pictures


def line(axis, rows, ones, xs, label, masks=None):
    """A curve with its 95% intervals, of what has been measured (of the questions in the masks)."""
    points = []
    for x, one, mask in zip(xs, ones, masks or [None] * len(ones)):
        values = matrix(rows, one, mask=mask)
        if np.isfinite(values).any():
            mean, half, _ = estimate(values)
            points.append((x, 100 * mean, 100 * half))
    if points:
        x, y, half = zip(*points)
        axis.errorbar(x, y, half, capsize=2, marker="o", label=label)


def finish(axis, **labels):
    axis.set(ylabel="right answers, %", **labels)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def draw_claims(rows, figure):
    """Each claim's difference with its interval."""
    axis = figure.subplots()
    for text, one, other in reversed(CLAIMS):
        values = matrix(rows, one, other)
        if values.size:
            mean, half, _ = estimate(values)
            axis.errorbar(100 * mean, text, xerr=100 * half, fmt="o", color="tab:blue", capsize=2)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_xlabel("difference in points")
    axis.tick_params(axis="y", labelsize="small")


def draw_parts(rows, figure):
    """The parts of the method, alone and with the team."""
    axis = figure.subplots()
    names = (
        "untrained",
        "sft",
        "sft30",
        "sft120",
        "mlpo_only",
        "mlpo",
        "grpo",
        "grpo_sft",
        "paper",
    )
    names = [name for name in names if bits(rows, name, "three:1")]
    for shift, mode in ((-0.2, "alone"), (0.2, "three:1")):
        measured = [(i, matrix(rows, (name, mode))) for i, name in enumerate(names)]
        measured = [(i, *estimate(values)[:2]) for i, values in measured if values.size]
        for i, mean, half in measured:
            color = "tab:blue" if mode == "alone" else "tab:orange"
            label = title(mode) if i == measured[0][0] else None
            axis.bar(i + shift, 100 * mean, 0.38, yerr=100 * half, color=color, label=label)
    axis.set_xticks(range(len(names)), [LABELS[n].replace(", ", ",\n") for n in names], fontsize=7)
    finish(axis)


def draw_wrong(rows, figure):
    """Accuracy by the number of agents that are right."""
    axis = figure.subplots()
    right = {}
    for k in (1, 2, 3):
        for seed, correct in bits(rows, "three", f"agent {k}").items():
            right[seed] = right.get(seed, 0) + correct
    masks = [{seed: n == k for seed, n in right.items()} for k in range(4)]
    for name in ("untrained", "sft", "mlpo"):
        line(axis, rows, [(name, "three:1")] * 4, range(4), f"{LABELS[name]}, team", masks)
    line(axis, rows, [("mlpo", "alone")] * 4, range(4), f"{LABELS['mlpo']}, alone", masks)
    line(axis, rows, [("three", "majority of 3")] * 4, range(4), "majority of 3", masks)
    finish(axis, xlabel="agents that are right", xticks=range(4), ylim=(0, 102))


def draw_when(rows, figure):
    """Validation questions over training steps: MLPO and GRPO from three leaders; and what MLPO
    gains over GRPO on the test questions, over how often the leader was right before."""
    measured = [name for name, (_, grpo) in BEGINNERS.items() if bits(rows, grpo, "alone")]
    [axes] = figure.subplots(1, len(measured) + 1, squeeze=False)
    gains = axes[-1]
    for axis, how_often in zip(axes, measured):
        mlpo, grpo = BEGINNERS[how_often]
        mean, half, _ = estimate(matrix(rows, (mlpo, "alone"), (grpo, "alone")))
        before = float(before_training(rows, grpo))
        gains.errorbar(before, 100 * mean, 100 * half, fmt="o", color="tab:blue", capsize=2)
        for who, style in (("team", "--"), ("alone", "-")):
            draw_curve(axis, rows, (mlpo, f"curve {who}"), style, "tab:orange", f"MLPO, {who}")
        draw_curve(axis, rows, (grpo, "curve alone"), "-", "tab:blue", "GRPO, alone")
        axis.set_title(f"alone {how_often} right")
        finish(axis, xlabel="steps", ylim=(0, 102))
    gains.axhline(0, color="gray", linewidth=0.8)
    gains.set(title="MLPO over GRPO, alone", ylabel="points")
    gains.set_xlabel("right alone before training, %")


def draw_curve(axis, rows, one, style, color, label):
    """The mean over seeds of a leader's looks at the validation questions."""
    curves = [row["curve"] for row in rows_of(rows, *one) if row["curve"]]
    if curves:
        steps, accuracy = np.array(curves).mean(0).T
        axis.plot(steps, 100 * accuracy, style, color=color, label=label)


def draw_rounds(rows, figure):
    """Accuracy over the number of rounds."""
    axis = figure.subplots()
    for name in ("untrained", "sft", "mlpo", "mlpo_only", "rounds"):
        line(axis, rows, [(name, f"three:{t}") for t in range(1, 6)], range(1, 6), LABELS[name])
    finish(axis, xlabel="rounds, T", xticks=range(1, 6))
