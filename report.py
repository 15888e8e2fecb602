"""A run to look at: who said what, how right they were, and how the training went.

evaluate.py writes these beside the numbers: transcripts.md, results.png and curves.png. The page
report.html, with all questions, is made by page.py.
"""

from pathlib import Path
from statistics import fmean
from textwrap import indent

import runs

GRAY = "tab:gray"
BLUE = "tab:blue"
ORANGE = "tab:orange"
SHOWN = 12  # questions in the transcripts
SMOOTHED = 5  # steps before and after, in the curve of the reward


# --------------------------------------------------------------------------------- transcripts


def write_transcripts(results, tasks, texts, path):
    """`transcripts` as a file."""
    runs.write_text(path, transcripts(results, tasks, texts))


def transcripts(results, tasks, texts):
    """A dozen questions as Markdown, first those on which training changed whether the leader is
    right. tasks: the questions; texts: {label of a row: per question all that was written}."""
    last_stage = results["rows"][-1]["stage"]
    agents = [row for row in results["rows"] if row["who"] == "agent"]
    leaders = []
    for row in results["rows"]:
        if row["stage"] in ("untrained", last_stage) and row["rounds"] == 1:
            leaders.append(row)
    with_team = any(row["team"] for row in leaders)
    compared = [row for row in leaders if row["team"] == with_team]
    before = compared[0]
    after = compared[-1]  # the same row where nothing was trained
    page = [f"# Who said what: {results['dataset']}\n"]
    for i in changed_first(before["correct"], after["correct"])[:SHOWN]:
        page.append(f"## {tasks[i]['task']}\n\n{block(tasks[i]['question'])}")
        page.append(f"Right answer:\n\n{block(tasks[i]['answer'])}")
        for row in agents + leaders:
            mark = "right" if row["correct"][i] == "1" else "WRONG"
            page.append(f"**{row['label']}: {mark}**\n\n{block(texts[row['label']][i][-1])}")
    return "\n".join(page)


def changed_first(before, after):
    """The numbers of the questions: those whose bit has changed, then the others."""
    numbers = range(len(before))
    return sorted(numbers, key=lambda i: before[i] == after[i])


def block(text):
    """Text in Markdown, shown as it is, whatever is in it."""
    return indent(text, "    ") + "\n"


# ------------------------------------------------------------------------------------- pictures


def plot_results(results, path):
    """A bar per row with its 95% interval; a dashed line where any agent was right."""
    from matplotlib.figure import Figure  # here: only those who draw need it

    figure = Figure(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    places = []
    labels = []
    for i, row in enumerate(results["rows"]):
        place = i + row["team"] + (row["rounds"] > 1)  # with gaps between the groups of bars
        places.append(place)
        labels.append(row["label"])
        if row["who"] == "any_right":
            plot_best_pick(axis, place, row)
        else:
            plot_bar(axis, place, row)
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    dataset = Path(results["dataset"]).name
    title = f"Right answers to {results['questions']} questions of {dataset}"
    axis.set(xlim=(0, 105), title=title, xlabel="%, with 95% intervals")
    bars, names = axis.get_legend_handles_labels()
    by_name = dict(zip(names, bars))  # each colour once
    figure.legend(by_name.values(), by_name.keys(), loc="outside lower center", ncols=3)
    save_figure(figure, path)


def plot_best_pick(axis, place, row):
    """The share of questions to which any agent's response is right: the most that whoever only
    picks a response can have."""
    share = 100 * row["accuracy"]
    axis.axvline(share, color="black", linestyle="--")
    left = share > 50
    where = share - 1 if left else share + 1
    text = f"the best that picking can do: {share:.0f}"
    axis.text(where, place, text, ha="right" if left else "left", va="center")


def plot_bar(axis, place, row):
    """A row's share of right answers, its interval, its number."""
    if row["team"]:
        color, name = ORANGE, "leader with its team"
    elif row["stage"]:
        color, name = BLUE, "leader alone"
    else:
        color, name = GRAY, "agents and votes"
    share = 100 * row["accuracy"]
    low, high = (100 * end for end in row["ci"])
    axis.barh(place, share, color=color, alpha=0.6, label=name)
    axis.plot((low, high), (place, place), color="black", linewidth=1)
    axis.text(high + 1, place, f"{share:.0f}", va="center")


def plot_curves(metrics, path):
    """The reward of the sampled completions; the accuracy on questions never trained on.
    metrics: the rows of a run's metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in metrics if row["phase"] == "mlpo"]
    steps = [row["step"] for row in rows]
    rewards = [row["reward"] for row in rows]
    if rewards:
        left.plot(steps, rewards, color="silver", label="each step")
        mean = f"mean of {2 * SMOOTHED + 1} steps"
        left.plot(steps, smooth(rewards), color="black", label=mean)
    left.set(title="Mean reward of samples")
    sft_steps = sum(row["phase"] == "sft" for row in metrics)
    if sft_steps:
        right.axvspan(-sft_steps, 0, color=GRAY, alpha=0.2, linewidth=0, label="SFT")
    for mode, color in (("alone", BLUE), ("team", ORANGE)):
        looks = [row for row in metrics if mode in row]
        steps = []
        for row in looks:
            before = sft_steps if row["during"] == "sft" else 0
            steps.append(row["step"] - before)
        shares = [100 * row[mode] for row in looks]
        if looks:
            right.plot(steps, shares, "o-", color=color, label=f"leader, {mode}")
    right.set(title="Validation questions right, %")
    for axis in (left, right):
        axis.set(xlabel="training step", ylim=(0, None))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="lower right")
    save_figure(figure, path)


def smooth(values):
    """The mean of each value and its neighbours: fewer of them at both ends."""
    means = []
    for i in range(len(values)):
        means.append(fmean(values[max(0, i - SMOOTHED) : i + SMOOTHED + 1]))
    return means


def save_figure(figure, path):
    runs.write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
