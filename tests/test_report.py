"""report.py: transcripts of any text, and pictures."""

import pytest
from matplotlib.colors import to_rgb

import report

TASKS = [
    {"question": "q1", "answer": "1", "task": "sums"},
    {"question": "q2", "answer": "2", "task": "sums"},
    {"question": "q3", "answer": "3", "task": "even_odd"},
]


def row(who, label, correct, stage=None, team=False, rounds=0):
    """A row of results.json, as far as it is drawn."""
    accuracy = correct.count("1") / len(correct)
    return {
        "who": who,
        "label": label,
        "stage": stage,
        "team": team,
        "rounds": rounds,
        "accuracy": accuracy,
        "ci": [max(0, accuracy - 0.2), min(1, accuracy + 0.2)],
        "correct": correct,
    }


@pytest.fixture
def results():
    rows = [
        row("agent", "a", "100"),
        row("any_right", "any agent right", "110"),
        row("leader", "untrained leader, alone", "000", "untrained", False, 1),
        row("leader", "mlpo leader, alone", "010", "mlpo", False, 1),
        row("leader", "untrained leader, team, T=1", "100", "untrained", True, 1),
        row("leader", "mlpo leader, team, T=1", "101", "mlpo", True, 1),
        row("leader", "untrained leader, team, T=3", "101", "untrained", True, 3),
        row("leader", "mlpo leader, team, T=3", "111", "mlpo", True, 3),
    ]
    return {"dataset": "some/where.jsonl", "questions": 3, "rows": rows}


@pytest.fixture
def texts(results):
    labels = [row["label"] for row in results["rows"]]
    return {label: [[f"{label} says {i}"] for i in range(3)] for label in labels}


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved."""
    saved = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: saved.append(figure))
    return saved


# --------------------------------------------------------------------------------- transcripts


def test_transcripts_begin_with_what_training_changed(results, texts):
    page = report.transcripts(results, TASKS, texts)
    parts = page.split("\n## ")[1:]
    # with the team, after one round: 100 before and 101 after
    assert [part.split("\n")[2].strip() for part in parts] == ["q3", "q1", "q2"]
    assert [part.split("\n")[0] for part in parts] == ["even_odd", "sums", "sums"]
    first = parts[0]
    assert "    a says 2\n" in first and "**a: WRONG**" in first
    assert "**untrained leader, team, T=1: WRONG**" in first
    assert "**mlpo leader, team, T=1: right**" in first
    assert "T=3" not in page and "any agent right" not in page


def test_transcripts_of_an_untrained_leader_alone(results, texts):
    results["rows"] = [results["rows"][2]]
    page = report.transcripts(results, TASKS, texts)
    assert page.count("untrained leader, alone: WRONG") == 3


def test_transcripts_hold_any_text(results, texts, tmp_path):
    texts["a"] = [["````\n# not a heading\n```\n</details>"]] * 3
    report.write_transcripts(results, TASKS, texts, tmp_path / "transcripts.md")
    page = (tmp_path / "transcripts.md").read_text(encoding="utf-8")
    outside = [line for line in page.split("\n") if not line.startswith("    ")]  # no code
    assert [line[:2] for line in outside if line.startswith("#")] == ["# ", *["##"] * 3]
    assert not any("not a heading" in line for line in outside)


def test_at_most_a_dozen_questions():
    tasks = [{"question": f"q{i}", "answer": "1", "task": "sums"} for i in range(30)]
    rows = [row("leader", "untrained leader, alone", "1" * 30, "untrained", False, 1)]
    results = {"dataset": "d", "questions": 30, "rows": rows}
    page = report.transcripts(results, tasks, {"untrained leader, alone": [["said"]] * 30})
    assert page.count("\n## ") == 12


def test_what_changed_comes_first():
    assert report.changed_first("0110", "0011") == [1, 3, 0, 2]


# ------------------------------------------------------------------------------------- pictures


def test_bars_and_a_legend_of_their_colours(results, figures):
    report.plot_results(results, "unused.png")
    [figure] = figures
    [axis] = figure.axes
    colors = [to_rgb(bar.get_facecolor()) for bar in axis.patches]
    gray, blue, orange = to_rgb("tab:gray"), to_rgb("tab:blue"), to_rgb("tab:orange")
    assert colors == [gray, blue, blue, orange, orange, orange, orange]
    widths = [round(bar.get_width()) for bar in axis.patches]
    assert widths == [33, 0, 33, 33, 67, 67, 100]
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["agents and votes", "leader alone", "leader with its team"]
    assert [to_rgb(patch.get_facecolor()) for patch in legend.get_patches()] == [gray, blue, orange]
    assert "where.jsonl" in axis.get_title() and "the best that picking can do: 67" in [
        t.get_text() for t in axis.texts
    ]


def test_the_legend_names_only_what_is_there(results, figures):
    results["rows"] = results["rows"][2:4]
    report.plot_results(results, "unused.png")
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["leader alone"]


def test_curves(figures):
    before = {"phase": "validation", "during": "sft", "step": 0, "alone": 0.1, "team": 0.2}
    metrics = [before]
    for step in range(4):
        metrics.append({"phase": "sft", "step": step, "loss": 2.0})
    for step in range(20):
        if step % 10 == 0:
            look = {"phase": "validation", "during": "mlpo", "step": step}
            metrics.append({**look, "alone": 0.1, "team": step / 20})
        metrics.append({"phase": "mlpo", "step": step, "reward": float(step)})
    report.plot_curves(metrics, "unused.png")
    left, right = figures[0].axes
    rewards, means = left.lines
    assert list(rewards.get_ydata()) == list(range(20))
    assert means.get_ydata()[10] == 10 and means.get_ydata()[0] == 2.5  # of steps 0 to 5
    alone, team = right.lines
    assert list(alone.get_ydata()) == [10, 10, 10] and list(team.get_ydata()) == [20, 0, 50]
    assert list(team.get_xdata()) == [-4, 0, 10]  # four steps of SFT end at 0
    assert [text.get_text() for text in right.get_legend().get_texts()] == [
        "SFT",
        "leader, alone",
        "leader, team",
    ]


@pytest.mark.filterwarnings("error")
def test_pictures_are_whole_png_files(results, tmp_path):
    report.plot_results(results, tmp_path / "results.png")
    report.plot_curves([], tmp_path / "curves.png")  # a run without MLPO steps
    for name in ("results.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "results.png"]
