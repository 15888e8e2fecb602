"""RESULTS.md and its pictures, from the rows of evidence.jsonl: see evidence.py."""

import math
import re
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy import stats

import runs

PARTS = {  # of the first table
    "untrained": "untrained",
    "sft": "SFT only",
    "mlpo_only": "MLPO only",
    "mlpo": "SFT + MLPO",
    "grpo_only": "GRPO only",
    "grpo": "SFT + GRPO",
    "grpo_tokens": "SFT + GRPO, as many tokens as MLPO in this phase",
    "easy0": "MLPO, all easy questions dropped",
    "easy1": "MLPO, no question dropped",
    "grpo_easy0": "GRPO, all easy questions dropped",
    "grpo_easy1": "GRPO, no question dropped",
    "scaled": "MLPO, advantages / std",
    "kl": "MLPO, with a KL term",
    "dropout0": "MLPO, always with the team",
    "random": "MLPO, random teams",
    "random_sft": "SFT and MLPO, random teams",
    "rounds": "MLPO, on two rounds",
    "random_rounds": "MLPO, random teams, on two rounds",
    "paper": "MLPO, the paper's setting",
}
LONGER = {
    "mlpo_150": "SFT + MLPO, 150 steps",
    "easy0_150": "the same, all easy questions dropped",
    "grpo_150": "SFT + GRPO, 150 steps",
    "grpo_only_150": "GRPO only, 150 steps",
}
LABELS = {
    **PARTS,
    **LONGER,
    "same": "trained with agent3 three times",
    "finals": "MLPO reading final answers only",
    "finals_sft": "SFT and MLPO on final answers only: writes no reasoning either",
    "unseen": "trained with the other team itself",
    "three_tasks": "trained on three tasks",
    "half_untrained": "half as wide, untrained",
    "half_sft": "half as wide, SFT only",
    "half": "half as wide, SFT + MLPO",
    "blank_sft": "random weights, SFT only",
    "blank": "random weights, SFT + MLPO",
}
PICKERS = {
    "judge": "untrained leader picks a response",
    "picker": "leader trained only to pick",
    "picker_random": "trained only to pick, from shuffled responses",
}
NOTE = """An accuracy is the share of right answers, in %; *d* is the difference to the row that the
table names, in points. `±` is half of a 95% interval. Seeds and questions both vary: the variance
is that of the seeds' means / seeds + that of the questions' means / questions, which counts the
rest twice and so errs on the careful side; the p of a difference is that of a paired t-test with
this variance (degrees of freedom after Satterthwaite). No correction for the number of tests. From
one seed, an interval is over questions alone, and no p is given.

The test questions are those of the default run, which were looked at while the method was built:
what was decided by them is confirmed, at the end of 1, on twice as many others."""


# ------------------------------------------------------------------------------------- statistics


def estimate(values):
    """(mean, half of its 95% interval, p of a mean of 0) of a (seeds, questions) matrix, in which
    NaN is what is left out. From one seed: over its questions alone."""
    there = np.isfinite(values)
    values, there = values[there.any(1)][:, there.any(0)], there[there.any(1)][:, there.any(0)]
    mean = float(values[there].mean())
    rest, parts = np.where(there, values - mean, 0), []
    for sums in (rest.sum(1), rest.sum(0)):  # of each seed, of each question
        if (n := len(sums)) > 1:  # with nothing left out: the variance of their means / n
            parts.append(((sums**2).sum() * n / (n - 1) / there.sum() ** 2, n - 1))
    variance = sum(v for v, _ in parts)
    if variance < 1e-12:
        return mean, 0.0, float(abs(mean) < 1e-12)
    freedom = variance**2 / sum(v**2 / df for v, df in parts)
    error = math.sqrt(variance)
    half, p = stats.t.isf(0.025, freedom) * error, 2 * stats.t.sf(abs(mean) / error, freedom)
    return mean, float(half), float(p)


# ------------------------------------------------------------------------------------------ cells


def rows_of(rows, one):
    return [row for row in rows.values() if (row["variant"], row["mode"]) == one]


def bits(rows, variant, mode, field="correct"):
    """{seed: its right and wrong answers as an array}."""
    found = [row for row in rows_of(rows, (variant, mode)) if field in row]
    return {row["seed"]: np.array(list(row[field]), float) for row in found}


def matrix(rows, one, other=None, mask=None):
    """(seeds, questions) of what `one` = (variant, mode) has right, less what `other` has; of the
    seeds that both have. mask: {seed: which questions}; the others become NaN."""
    a, b = bits(rows, *one), bits(rows, *other) if other else None
    seeds = [s for s in sorted(a) if (b is None or s in b) and (mask is None or s in mask)]
    table = [a[s] - (b[s] if b else 0) for s in seeds]
    if mask is not None:
        table = [np.where(mask[s], x, np.nan) for s, x in zip(seeds, table)]
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
    told = "" if len(values) < 2 else ", p < 0.001" if p < 0.001 else f", p = {p:.3f}"
    return f"{100 * mean:+.1f} ± {100 * half:.1f}{told}"


def seeds_of(rows, *ones):
    """`5`, or aloud how few; of what has fewest, if it was measured at all."""
    n = min((len(found) for one in ones if (found := bits(rows, *one))), default=0)
    return str(n) if n >= 5 else f"**only {n}**"


def mean_of(rows, one, *fields):
    """Of these fields' sum, over seeds; of seconds the median."""
    found = [row for row in rows_of(rows, one) if row.get(fields[0]) is not None]
    sums = [sum(row[field] for field in fields) for row in found]
    middle = np.median if "seconds" in fields[0] else np.mean  # a busy machine: some are far out
    return float(middle(sums)) if sums else math.nan


def cost(rows, one):
    return mean_of(rows, one, "prompt_tokens", "generated_tokens")


def command(rows, variant, mode):
    """What was run, without what the commands have in common, and with S for the seed."""
    found = rows_of(rows, (variant, mode))
    if not found:
        return ""
    usual = "seed|out|questions|eval_questions|validation_questions|validate_every"
    text = re.sub(rf" --({usual}) \S+| --proposals \S*/sft-\S+", "", found[0]["command"])
    text = re.sub(rf"(sft|three|finals)-{found[0]['seed']}\b", r"\1-S", text)
    return f"`{text.removeprefix('python ').removeprefix('benchmarks/')}`"


def table(head, lines):
    """A Markdown table without its empty lines; or that it is still to be measured."""
    lines = [line for line in lines if any(line[1:])]
    if not lines:
        return f"({head[0]}: not measured yet.)\n"
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(map(str, x)) + " |" for x in (head, rule, *lines)) + "\n"


def leaders(rows, names, versus, modes=("alone", "three:1"), mask=None):
    """A table of leaders: right answers in these modes, each with the difference to `versus`."""
    head = ["leader", "command", "seeds"]
    for mode in modes:
        head += [title(mode), f"*d* to {LABELS[versus]}"]
    lines = []
    for name in names:
        line = [LABELS[name], command(rows, name, modes[0]) or command(rows, name, modes[-1])]
        line.append(seeds_of(rows, *((name, mode) for mode in modes)))
        for mode in modes:
            line.append(share(rows, (name, mode), mask))
            line.append(difference(rows, (name, mode), (versus, mode), mask))
        lines.append(line)
    return table(head, [line for line in lines if any(line[3:])])


def title(mode):
    team, _, rounds = mode.rpartition("/")[2].partition(":")
    names = {"three": "team", "unseen": "other team", "same": "agent3 x 3", "finals": "finals"}
    names["shuffled"] = "shuffled team"
    return "alone" if team == "alone" else f"{names.get(team, team)}, T={rounds}"


# --------------------------------------------------------------------------------------- sections


def parts(rows):
    """Compare the first four rows: what each phase adds, alone and with the team. Then what GRPO on
    the leader alone makes of the same start, and what each setting changes. Where the second phase
    has more or fewer steps than are named above, the command says so."""
    mlpo, grpo = (mean_of(rows, (name, "training"), "tokens") for name in ("mlpo", "grpo"))
    text = leaders(rows, PARTS, "mlpo")
    if not math.isnan(mlpo + grpo):
        more = f"{100 * (grpo / mlpo - 1):+.1f}%"
        text += f"\nIn as many steps GRPO reads and writes {more} tokens compared to MLPO.\n"
    text += "\nThe longer runs, with each other:\n\n"
    text += leaders(rows, (*LONGER, "sft"), "mlpo_150")
    text += "\nOn other test questions, twice as many:\n\n"
    who = ("untrained", "sft", "mlpo", "paper", "grpo", *LONGER)
    return text + leaders(rows, who, "sft", ("fresh/alone", "fresh/three:1"))


def baselines(rows):
    """Everything that could be done instead, on the same questions. Tokens: read and written per
    question; a prompt that is sampled from many times is read once."""
    ours = ("mlpo", "three:1")
    team = [("three", mode) for mode in ("agent 1", "agent 2", "agent 3")]
    votes = [("three", f"majority of {n}") for n in (3, 20, 40)]
    lines = [(f"{mode}", (who, mode)) for who, mode in [*team, *votes]]
    lines += [("debate of the agents, then a vote", ("three", "debate:2"))]
    lines += [(PICKERS[name], (name, "three:picks")) for name in PICKERS]
    lines += [("SFT + MLPO leader, alone", ("mlpo", "alone"))]
    for t in (1, 5):
        votes = ("mlpo", f"votes, tokens of T={t}")
        lines += [(f"... its votes, at the tokens of team, T={t}", votes)]
        lines += [(f"SFT + MLPO leader, team, T={t}", ("mlpo", f"three:{t}"))]
    lines += [("any agent right (what picking could reach)", ("three", "any"))]
    head = ["who", "command", "seeds", "right", "*d* to SFT + MLPO, team, T=1"]
    head += ["answers", "tokens"]
    found = [
        [label, command(rows, *one), seeds_of(rows, one), share(rows, one)]
        + [difference(rows, one, ours), f"{mean_of(rows, one, 'generations'):.0f}"]
        + [f"{cost(rows, one):.0f}"]
        for label, one in lines
        if share(rows, one)
    ]
    return table(head, found)


def costs(rows):
    """The picture has the methods of 2 and the leaders that were measured at several T or K; down
    and to the right is worse. Seconds are those of one thread that answers all questions in large
    batches: throughput, not the wait for one answer. The table: what training costs. Steps, tokens
    (read and written) and seconds are those of the second phase; the seconds in all include loading
    and, where they are made anew, proposals and SFT. One thread, on a machine that was at times
    busy with other things: medians over seeds. Memory: an upper bound, since a process inherits
    the mark of the one that started it."""
    read, written = (
        mean_of(rows, ("three", "majority of 3"), f"{kind}_tokens")
        for kind in ("prompt", "generated")
    )
    head = ["what was trained", "command", "seeds", "steps", "tokens", "seconds", "s in all"]
    lines = []
    for name in [*LABELS, *PICKERS]:
        one = (name, "training")
        if found := rows_of(rows, one):
            line = [{**LABELS, **PICKERS}[name], command(rows, *one), len(found)]
            fields = ("steps", "tokens", "seconds", "wall_seconds", "peak_mb")
            values = [mean_of(rows, one, field) for field in fields]
            lines.append([*line, *(f"{x:,.0f}" if x > 0 else "" for x in values)])
    text = "\n![accuracy over cost](benchmarks/evidence_cost.png)\n\n"
    if not math.isnan(read):
        n = next(iter(rows.values()))["size"]["train_questions"]
        text += f"The proposals, 4 of each agent to each of {n:,} questions, are about "
        text += f"{n * (read + 4 * written):,.0f} tokens more.\n\n"
    return text + table([*head, "peak MB"], lines)


def agents_right(rows):
    """{seed: how many agents have each question right}; empty if not all are measured."""
    votes = [bits(rows, "three", f"agent {k}") for k in (1, 2, 3)]
    return {s: votes[0][s] + votes[1][s] + votes[2][s] for s in votes[0]} if all(votes) else {}


def when_wrong(rows):
    """Questions sorted by how many agents are right in their first response. Where no two agents
    agree, the vote is a draw among their answers. Below: how often the leader's answer is another
    than that of two or three agents that agree, where that is right and where it is wrong."""
    right = agents_right(rows)
    if not right:
        return "Not measured yet.\n"
    everyone = [("majority of 3", ("three", "majority of 3"))]
    names = ("untrained", "sft", "mlpo", "mlpo_150", "grpo", "random", "paper")
    everyone += [(f"{LABELS[n]}, team, T=1", (n, "three:1")) for n in names]
    everyone += [(f"{LABELS[n]}, alone", (n, "alone")) for n in ("sft", "mlpo")]
    head, lines = ["agents right"] + [str(k) for k in range(4)], []
    counts = [f"{np.mean([(right[s] == k).sum() for s in right]):.1f}" for k in range(4)]
    lines.append(["questions (mean over seeds)", *counts])
    for label, one in everyone:
        cells = [share(rows, one, {s: right[s] == k for s in right}) for k in range(4)]
        lines.append([label, *cells])
    text = table(head, lines) + "\n![by right agents](benchmarks/evidence_wrong.png)\n\n"
    vote, agree = (bits(rows, "three", "majority of 3", f) for f in ("correct", "two_agree"))
    lines = []
    for name in names:
        same, ok = bits(rows, name, "three:1", "agrees"), bits(rows, name, "three:1")
        if seeds := sorted(agree.keys() & same.keys()):
            a, o, v, m = (np.concatenate([x[s] for s in seeds]) for x in (same, ok, vote, agree))

            def of(x, among):
                return f"{100 * x[among].mean():.1f}%" if among.any() else ""

            right_one, wrong_one = (m == 1) & (v == 1), (m == 1) & (v == 0)
            shares = of(1 - a, right_one), of(1 - a, wrong_one), of(o, wrong_one), of(o, m == 0)
            lines.append([LABELS[name], len(seeds), *shares])
    head = ["leader, team, T=1", "seeds", "overrides a right majority", "overrides a wrong one"]
    head += ["is right where the majority is wrong", "is right where no two agree"]
    return text + table(head, lines)


def teams(rows):
    """First: three different agents against the best one three times, each leader with its own team
    and with the other. Then what the agents' reasoning is worth. Then the size of the team; with it
    changes who is in it: K = 1 is agent 1, K = 2 agents 1 and 2, and 4 to 6 are agents that no
    leader was trained with."""
    head = ["leader, team", "command", "seeds", "right", "*d* to SFT + MLPO, team, T=1"]
    ours, pairs = ("mlpo", "three:1"), [("mlpo", "three:1"), ("same", "same:1")]
    pairs += [("mlpo", "same:1"), ("same", "three:1"), ("untrained", "same:1")]

    def of(pairs):
        lines = []
        for n, m in pairs:
            if share(rows, (n, m)):
                line = [f"{LABELS[n]}; {title(m)}", command(rows, n, m), seeds_of(rows, (n, m))]
                lines.append([*line, share(rows, (n, m)), difference(rows, (n, m), ours)])
        return lines

    text = table(head, of(pairs))
    pairs = [("mlpo", "three:1"), ("finals", "finals:1"), ("finals_sft", "finals:1")]
    pairs += [("mlpo", "finals:1"), ("finals", "three:1"), ("finals_sft", "three:1")]
    text += "\n" + table(head, of(pairs)) + "\n"
    lines = []
    for name, label in [("any", "any agent right"), ("majority", "majority vote")]:
        modes = [(size(k), name if name == "any" else f"majority of {k}") for k in range(1, 7)]
        lines.append([label, *(share(rows, one) for one in modes)])
    for name in ("untrained", "mlpo", "random"):
        lines.append([LABELS[name], *(share(rows, (name, f"{size(k)}:1")) for k in range(1, 7))])
    text += table(["T=1"] + [f"K={k}" for k in range(1, 7)], lines)
    return text + "\n![accuracy over K](benchmarks/evidence_teams.png)\n"


def size(k):
    return "three" if k == 3 else f"K{k}"


def transfer(rows):
    """First the team in an order that changes from question to question, and a team of three other
    agents that only the last leader was trained with: what a leader knows about its agents, beyond
    what they write, is worth nothing there. Then two tasks that one leader was not trained on; then
    the official BBH runs."""
    team = [(f"agent {k + 3}", ("unseen", f"agent {k}")) for k in (1, 2, 3)]
    team += [("majority of 3", ("unseen", "majority of 3")), ("any right", ("unseen", "any"))]
    tasks = tasks_of(rows)
    names = sorted(set(tasks))
    lines = []
    for label, one in team:
        masks = [{s: tasks == t for s in bits(rows, *one)} for t in names]
        lines.append([label, share(rows, one), *(share(rows, one, mask) for mask in masks)])
    text = table(["the other team", "right", *names], lines) + "\n"
    who = ("untrained", "sft", "mlpo", "random", "random_sft", "random_rounds", "paper", "unseen")
    text += leaders(rows, who, "mlpo", ("three:1", "shuffled:1", "unseen:1")) + "\n"
    lines = [
        [PICKERS[name], seeds_of(rows, (name, "three:picks"))]
        + [share(rows, (name, f"{team}:picks")) for team in ("three", "shuffled", "unseen")]
        for name in PICKERS
        if share(rows, (name, "three:picks"))
    ]
    text += table(["who", "seeds", "team", "shuffled team", "other team"], lines) + "\n"
    left_out = np.isin(tasks, ["navigate", "web_of_lies"])
    mask = {s: left_out for s in bits(rows, "mlpo", "alone")}
    text += "Only the questions of the two tasks left out (navigate, web_of_lies):\n\n"
    text += leaders(rows, ("untrained", "mlpo", "three_tasks"), "mlpo", mask=mask) + "\n"
    modes, who = ("bbh/alone", "bbh/three:1"), ("untrained", "sft", "mlpo", "grpo", "random")
    bbh = [(label, ("three", f"bbh/{mode}")) for label, mode in BBH]
    lines = [[label, seeds_of(rows, one), share(rows, one)] for label, one in bbh]
    lines = [line for line in lines if line[2]]
    text += "The official files of the five tasks:\n\n" + table(["team", "seeds", "right"], lines)
    return text + "\n" + leaders(rows, who, "mlpo", modes)


BBH = [(f"agent {k}", f"agent {k}") for k in (1, 2, 3)]
BBH += [("majority of 3", "majority of 3"), ("any agent right", "any")]


def rounds(rows):
    """Read along a row: what more rounds do to a leader. Read down: what training on two rounds, or
    on random teams, changes."""
    head = ["leader", "command", "seeds"] + [f"T={t}" for t in range(1, 6)] + ["*d*, T=5 - T=1"]
    lines = []
    for name in ROUNDS:
        line = [LABELS[name], command(rows, name, "three:5"), seeds_of(rows, (name, "three:5"))]
        line += [share(rows, (name, f"three:{t}")) for t in range(1, 6)]
        if line[-1]:
            lines.append([*line, difference(rows, (name, "three:5"), (name, "three:1"))])
    text = table(head, lines) + "\n" + leaders(rows, ROUNDS, "mlpo", ("three:1", "three:5"))
    return text + "\n![accuracy over T](benchmarks/evidence_rounds.png)\n"


ROUNDS = ("untrained", "sft", "mlpo", "mlpo_150", "rounds", "random", "random_rounds")


def weak(rows):
    """Does a leader that is worse than its agents become better than the best of them?"""
    agents = [("three", f"agent {k}") for k in (1, 2, 3)]
    best = max(agents, key=lambda one: np.mean(matrix(rows, one)) if share(rows, one) else 0)
    head = ["leader", "command", "seeds", "alone", "team, T=1", "*d* to the best agent, T=1"]
    names = ("half_untrained", "half_sft", "half", "blank_sft", "blank", "untrained", "mlpo")
    lines = []
    for name in names:
        one = (name, "three:1")
        line = [LABELS[name], command(rows, name, "alone"), seeds_of(rows, one)]
        line += [share(rows, (name, "alone")), share(rows, one), difference(rows, one, best)]
        lines += [line] if line[4] else []
    return f"The best agent: {best[1]}, {share(rows, best)}.\n\n" + table(head, lines)


SECTIONS = {
    "1. Parts": parts,
    "2. Baselines": baselines,
    "3. Cost": costs,
    "4. When the team is wrong": when_wrong,
    "5. Team": teams,
    "6. Transfer": transfer,
    "7. Rounds": rounds,
    "8. A weak leader": weak,
}


def tasks_of(rows):
    return np.array(next((r["tasks"] for r in rows.values() if r["key"] == "tiny/tasks"), []))


def report(rows, out):
    """RESULTS.md and the pictures."""
    seeds = sorted({r["seed"] for r in rows.values() if r["seed"] is not None})
    size = next((r["size"] for r in rows.values()), {})
    told = ", ".join(f"{value} {name}" for name, value in size.items())
    page = ["# Evidence\n", "Made by `python benchmarks/evidence.py` from the rows of"]
    page += [f"`benchmarks/evidence.jsonl` ({told}; seeds {', '.join(map(str, seeds))}).\n"]
    page += [NOTE + "\n", COMMANDS + "\n"]
    for heading, section in SECTIONS.items():
        about = " ".join(section.__doc__.split())
        page += [f"## {heading}\n", f"{about}\n", section(rows)]
    runs.write_text(Path(out) / "RESULTS.md", "\n".join(page))
    folder = Path(out) / "benchmarks"
    for draw in (draw_cost, draw_wrong, draw_teams, draw_rounds, draw_parts):
        figure = Figure(figsize=(10, 4.5) if draw is draw_cost else (7, 4.5), layout="constrained")
        draw(rows, figure)
        path = folder / f"evidence_{draw.__name__.removeprefix('draw_')}.png"
        runs.write_file(path, lambda to, f=figure: f.savefig(to, format="png", dpi=120))


COMMANDS = """Every command gets `--seed S`, the seed's proposals, and settings that only save time:
no evaluation of its own, ten validation questions. Where it begins from an SFT leader
(`--leader .../sft-S/leader --sft_steps 0`), that is the one of the row *SFT only*: the same for all
variants of a seed. `evidence.py` in a table is what that script measures itself. The whole command
is in each row of `evidence.jsonl`."""


# --------------------------------------------------------------------------------------- pictures


def line(axis, rows, ones, xs, label, masks=None, **style):
    """A curve with its 95% intervals, of what has been measured (of the questions in the masks)."""
    every = zip(xs, ones, masks or [None] * len(ones))
    found = [(x, matrix(rows, one, mask=mask)) for x, one, mask in every]
    found = [(x, *estimate(values)[:2]) for x, values in found if np.isfinite(values).any()]
    if found:
        x, y, half = (np.array(column) for column in zip(*found))
        axis.errorbar(x, 100 * y, 100 * half, capsize=2, label=label, **{"marker": "o", **style})


def legend(axis, **labels):
    axis.set(ylabel="right answers, %", **labels)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def draw_cost(rows, figure):
    """All methods: accuracy over tokens and over seconds per question."""
    axes = figure.subplots(1, 2, sharey=True)
    sizes = [3, 6, 9, 12, 15, 18, 20, 21, 24, 40]
    curves = {"agents' vote, 3 to 40": [("three", f"majority of {n}") for n in sizes]}
    curves["leader alone, votes of 1 to 8"] = [("mlpo", f"votes of {n}") for n in range(1, 9)]
    for name in ("untrained", "sft", "mlpo", "rounds", "random"):
        curves[f"{LABELS[name]}, team, T=1 to 5"] = [(name, f"three:{t}") for t in range(1, 6)]
    for name in ("mlpo", "random"):
        curves[f"{LABELS[name]}, K=1 to 6"] = [(name, f"{size(k)}:1") for k in range(1, 7)]
    points = {"SFT + MLPO, alone": ("mlpo", "alone"), "SFT + GRPO, alone": ("grpo", "alone")}
    points |= {"untrained, alone": ("untrained", "alone"), "debate": ("three", "debate:2")}
    points |= {PICKERS[name]: (name, "three:picks") for name in PICKERS}
    curves |= {label: [one] for label, one in points.items()}
    for axis, fields in zip(axes, (("prompt_tokens", "generated_tokens"), ("seconds",))):
        for i, (label, ones) in enumerate(curves.items()):
            style = {"marker": "osD^v"[i // 5 % 5], "color": colormaps["tab20"](i), "markersize": 4}
            ones = [one for one in ones if matrix(rows, one).size]
            x = [mean_of(rows, one, *fields) for one in ones]
            axis.plot(x, [100 * matrix(rows, one).mean() for one in ones], label=label, **style)
        axis.set(xscale="log", xlabel=f"{'tokens' if len(fields) > 1 else 'seconds'} per question")
    axes[0].set_ylabel("right answers, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize="x-small")


def draw_wrong(rows, figure):
    """Accuracy by the number of agents that are right."""
    axis, right = figure.subplots(), agents_right(rows)
    everyone = {"majority of 3": ("three", "majority of 3")}
    everyone |= {f"{LABELS[n]}, team": (n, "three:1") for n in ("untrained", "sft", "mlpo")}
    everyone |= {f"{LABELS['mlpo']}, alone": ("mlpo", "alone")}
    masks = [{s: right[s] == k for s in right} for k in range(4)]
    for label, one in everyone.items():
        line(axis, rows, [one] * 4, range(4), label, masks)
    legend(axis, xlabel="agents that are right", xticks=range(4))


def draw_teams(rows, figure):
    """Accuracy over the size of the team."""
    axis, ks = figure.subplots(), range(1, 7)
    line(axis, rows, [(size(k), "any") for k in ks], ks, "any agent right", color="black")
    votes = [(size(k), f"majority of {k}") for k in ks]
    line(axis, rows, votes, ks, "majority vote", color="gray")
    for name in ("untrained", "mlpo", "random"):
        line(axis, rows, [(name, f"{size(k)}:1") for k in ks], ks, LABELS[name])
    legend(axis, xlabel="agents in the team, T=1; 4 to 6: unknown to the leader", xticks=ks)


def draw_rounds(rows, figure):
    """Accuracy over the number of rounds."""
    axis = figure.subplots()
    for name in ROUNDS:
        line(axis, rows, [(name, f"three:{t}") for t in range(1, 6)], range(1, 6), LABELS[name])
    legend(axis, xlabel="rounds, T", xticks=range(1, 6))


def draw_parts(rows, figure):
    """The parts of the method, alone and with the team."""
    axis, names = figure.subplots(), ["untrained", "sft", "mlpo_only", "mlpo", "mlpo_150"]
    names += ["grpo_only", "grpo", "grpo_150"]
    for shift, mode, color in ((-0.2, "alone", "tab:blue"), (0.2, "three:1", "tab:orange")):
        for i, name in enumerate(names):
            values = matrix(rows, (name, mode))
            if values.size:
                mean, half, _ = estimate(values)
                label = title(mode) if i == 0 else None
                axis.barh(i + shift, 100 * mean, 0.38, xerr=100 * half, color=color, label=label)
    axis.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axis.invert_yaxis()
    axis.set(xlabel="right answers, %", xlim=(0, 100))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower left")
