"""Results beside each other: gains paired by question, groups of runs, the tables on the screen."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev, stdev
from string import ascii_lowercase, ascii_uppercase
from textwrap import fill

import agents
import runs

Z = 1.959964  # 95% of a normal distribution lie within so many standard deviations


def label_of(name, stage, team, rounds):
    """What a row is called in tables and pictures."""
    if not stage:
        return name
    if team:
        return f"{stage} leader, team, T={rounds}"
    return f"{stage} leader, alone"


# ------------------------------------------------------------------------------------- the gains


@dataclass
class Gain:
    """A difference in points of accuracy, with half of its 95% interval; of several runs, in
    `mean_gains`, with their standard deviation."""

    points: float
    half: float


def paired_gain(differences):
    """differences: by question, from -1 to 1. Pairs need fewer questions than two shares would."""
    half = 100 * Z * pstdev(differences) / math.sqrt(len(differences))
    return Gain(100 * fmean(differences), half)


def comparisons(results, bits="correct"):
    """{what: Gain} within a run: the last leader over what else one could have used. bits: of the
    rows' right answers; `correct_as_read` has those of outputs read as agents' responses are."""
    rows = {row["label"]: row for row in results["rows"]}
    team = [row for row in results["rows"] if row["who"] == "agent"]
    last_stage = results["rows"][-1]["stage"]
    ours = label_of("", last_stage, team=True, rounds=1)
    majority = f"majority vote of {len(team)}"
    pairs = []
    if team:
        rows["best single agent"] = max(team, key=lambda row: row["accuracy"])
        for stage in ("untrained", "sft"):
            pairs.append((ours, label_of("", stage, team=True, rounds=1)))
        for other in (majority, "best single agent", "any agent right"):
            pairs.append((ours, other))
    ours_alone = label_of("", last_stage, team=False, rounds=1)
    for stage in ("untrained", "sft"):
        pairs.append((ours_alone, label_of("", stage, team=False, rounds=1)))
    found = {}
    for label, other in pairs:
        # without MLPO the last leader is one of the others, without SFT there is none after it
        if label != other and other in rows:
            differences = []
            of_row = rows[label].get(bits, rows[label]["correct"])  # older results have one of them
            of_other = rows[other].get(bits, rows[other]["correct"])
            for right, other_right in zip(of_row, of_other):
                differences.append(int(right) - int(other_right))
            found[f"{label} - {other}"] = paired_gain(differences)
    return found


@dataclass
class RunGroup:
    """Runs that differ in nothing but their seed (and where, and in how much memory, they ran).
    Two of the same seed are no repetitions: what differs, such as the code, is not in a setting."""

    name: str  # A, B, ...
    settings: dict
    folders: list
    seeds: list
    results: list


def group_runs(folders, configs, results):
    """The `RunGroup`s of these runs, in the order in which they are given."""
    letters = ascii_uppercase + ascii_lowercase
    groups = []
    for folder, config, of_run in zip(folders, configs, results):
        settings = settings_that_count(config)
        fitting = []
        for group in groups:
            if group.settings == settings and config["seed"] not in group.seeds:
                fitting.append(group)
        if fitting:
            group = fitting[0]
        else:
            group = RunGroup(letters[len(groups)], settings, [], [], [])
            groups.append(group)
        group.folders.append(str(folder))
        group.seeds.append(config["seed"])
        group.results.append(of_run)
    return groups


def settings_that_count(config):
    """Those in which two runs must agree to be repetitions of each other."""
    never = {"seed", *runs.WHERE, *runs.MEMORY_ONLY}
    settings = {name: value for name, value in config.items() if name not in never}
    if agents.team_names(config["agents"]):
        settings["proposals"] = ""  # whoever asked: train.py makes sure that they are this team's
    return settings


def differing_settings(groups):
    """The names of the settings in which not all groups agree."""
    names = {}  # a set that keeps its order
    for group in groups:
        names.update(dict.fromkeys(group.settings))
    first = groups[0].settings
    differing = []
    for name in names:
        if any(group.settings.get(name) != first.get(name) for group in groups):
            differing.append(name)
    return differing


def group_gains(before, after):
    """{what: Gain of the group `after` over the group `before`}, paired by question; None where
    not one answer differs. Where both have runs of the same seeds, of these alone."""
    shared = set(before.seeds) & set(after.seeds)
    runs_before = runs_of_seeds(before, shared)
    runs_after = runs_of_seeds(after, shared)
    questions = set.intersection(*(set(run["question_ids"]) for run in runs_before + runs_after))
    if not questions:
        raise ValueError(f"no question was put to all runs of {before.name} and {after.name}")
    gains = {}
    for label_before, label_after in comparable_labels(runs_before[0], runs_after[0]):
        shares_before = share_by_question(runs_before, label_before)
        shares_after = share_by_question(runs_after, label_after)
        differences = []
        for question in sorted(questions):
            differences.append(shares_after[question] - shares_before[question])
        what = f"{label_after} - {label_before}"
        if label_before == label_after:
            what = label_after
        gains[what] = paired_gain(differences) if any(differences) else None
    return gains


def runs_of_seeds(group, seeds):
    """The results of the group's runs with these seeds; of all, if there are no seeds."""
    found = []
    for seed, results in zip(group.seeds, group.results):
        if seed in seeds or not seeds:
            found.append(results)
    return found


def comparable_labels(before, after):
    """Pairs of labels: of the rows that both results have, and of the leaders at their best: a team
    of one run beside the plain GRPO of the other."""
    labels_after = {neutral_label(row): row["label"] for row in after["rows"]}
    pairs = []
    for row in before["rows"]:
        if neutral_label(row) in labels_after:
            pairs.append((row["label"], labels_after[neutral_label(row)]))
    last = (last_of_round_1(before), last_of_round_1(after))
    if last not in pairs:
        pairs.append(last)
    return pairs


def neutral_label(row):
    """The label of a row, whatever the method that trained its leader."""
    stage = "trained" if row["stage"] in ("mlpo", "grpo") else row["stage"]
    return label_of(row["name"], stage, row["team"], row["rounds"])


def last_of_round_1(results):
    """The label of the last leader's row after one round: with its team, if it has one."""
    return [row["label"] for row in results["rows"] if row["rounds"] == 1][-1]


def share_by_question(results_of_runs, label):
    """{question's id: in which share of these runs the row with this label is right}."""
    bits = {}
    for results in results_of_runs:
        [row] = [row for row in results["rows"] if row["label"] == label]
        for question, bit in zip(results["question_ids"], row["correct"]):
            bits.setdefault(question, []).append(int(bit))
    return {question: fmean(of_question) for question, of_question in bits.items()}


# ------------------------------------------------------------------------------------- the screen


def print_table(results_of_runs):
    """The table, and the gains within each run; of several runs mean and spread."""
    print_rows(results_of_runs)
    print("\nGains in points, with 95% intervals (of several runs: mean ± sd); after the bar: with")
    print("the leader's outputs read as the agents' responses are, without its tags:")
    strict = mean_gains(results_of_runs, "correct")
    as_read = mean_gains(results_of_runs, "correct_as_read")
    for what, gain in strict.items():
        other = as_read.get(what)
        beside = f"{other.points:+6.1f} ±{other.half:4.1f}" if other else ""
        print(f"{gain.points:+6.1f} ±{gain.half:4.1f} |{beside:12}  {what}")


def mean_gains(results_of_runs, bits):
    """{what: Gain}; of several runs their mean, with their standard deviation."""
    gains = {}
    for results in results_of_runs:
        for what, gain in comparisons(results, bits).items():
            gains.setdefault(what, []).append(gain)
    means = {}
    for what, of_runs in gains.items():
        points = [gain.points for gain in of_runs]
        spread = stdev(points) if len(points) > 1 else of_runs[0].half
        means[what] = Gain(fmean(points), spread)
    return means


def print_gain(what, gain):
    print(f"{gain.points:+6.1f} ±{gain.half:4.1f}  {what}")


LINE = "{:28.27}{:>7}{:>7}{:>12}{:>6}{:>7}{:>7}"  # label, right, read, spread, calls, tokens
TASK = "{:>8}"


def print_rows(results_of_runs):
    """A line per row: right answers with their 95% interval, of several runs mean and spread."""
    first = results_of_runs[0]
    tasks = list(first["rows"][0]["per_task"])[:5]  # what fits; results.json has all
    print(f"\n{Path(first['dataset']).name}: {first['questions']} questions,", end=" ")
    print(f"{first['unknown_words']:.1%} of the words unknown (all tasks: results.json)\n")
    heads = [
        "calls, tokens: per question",
        "right %",
        "read",
        "95%, ± sd",
        "calls",
        "prompt",
        "output",
    ]
    heads += [short_name(task, tasks)[:7] for task in tasks]
    line = LINE + TASK * len(tasks)
    print(line.format(*heads))
    lines = {}  # what a line is about -> its row in each run
    for results in results_of_runs:
        for row in results["rows"]:
            lines.setdefault((row["label"], row["name"]), []).append(row)
    for (label, _), rows in lines.items():
        print(line.format(label[-27:], *cells_of(rows, tasks)))


def short_name(task, tasks):
    """The first of its words that no other task has: `three` of `tracking_three_objects`."""
    others = set()
    for other in tasks:
        if other != task:
            others.update(other.split("_"))
    words = task.split("_")
    own = [word for word in words if word not in others]
    return own[0] if own else words[0]


def cells_of(rows, tasks):
    """What stands in a line of the table, after its label: of the same row in each run."""
    right = [100 * row["accuracy"] for row in rows]
    as_read = [100 * row.get("accuracy_as_read", row["accuracy"]) for row in rows]
    if len(rows) > 1:
        spread = f"±{stdev(right):.1f}"
    else:
        low, high = rows[0]["ci"]
        spread = f"{100 * low:.1f}-{100 * high:.1f}"
    cells = [f"{fmean(right):.1f}", f"{fmean(as_read):.1f}", spread]
    for key in ("generations", "prompt_tokens", "generated_tokens"):
        cells.append(f"{fmean(row[key] for row in rows):.0f}")
    for task in tasks:
        cells.append(f"{fmean(100 * row['per_task'].get(task, math.nan) for row in rows):.0f}")
    return cells


def print_groups(groups):
    """A table for each group, headed by its settings, then the gains of the others over A."""
    differing = differing_settings(groups)
    for group in groups:
        values = [f"{name}={shown(group.settings.get(name))}" for name in differing]
        if not differing:
            values = ["no setting differs; another version of the code?"]
        print(f"\n{group.name}: {'; '.join(values)}  ({', '.join(group.folders)})")
        print_rows(group.results)
    first, *others = groups
    for group in others:
        what = f"Gains of {group.name} over {first.name} in points, paired by question"
        print(f"\n{what}, with 95% intervals over questions (not over seeds):")
        unchanged = []
        for label, gain in group_gains(first, group).items():
            if gain:
                print_gain(label, gain)
            else:
                unchanged.append(label)
        if unchanged:
            print(fill(f"The same in both: {'; '.join(unchanged)}", 100, subsequent_indent="  "))


def shown(value):
    """A setting's value as it is written in a heading."""
    if value is None:
        return "not set"  # by the version of train.py that made this run
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value) or '""'
