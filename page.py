"""A run as one page for a browser, report.html: the table and the pictures, every test question
with who said what, and a few groups of the training. It is one file and needs no network.

evaluate.py writes it. Here its content is put together, as plain lists and dicts; what it looks
like is in page.html, a jinja2 template. Whatever a model or a dataset says stays text there: that
is what autoescape does.
"""

import base64
from pathlib import Path

from jinja2 import Environment, StrictUndefined

import compare
import runs
from rewards import extract_agent_answer, extract_answer, is_correct
from steps import marked_steps

TEMPLATE = Path(__file__).parent / "page.html"
STAGES = {"untrained": "untrained", "sft": "after SFT", "mlpo": "after MLPO", "grpo": "after GRPO"}


def write_page(run, suffix, results, tasks, texts, solutions):
    """The page of these results, in the run's folder, where the pictures are already."""
    pictures = []
    for name in (f"results{suffix}.png", "curves.png"):
        if (run / name).exists():
            pictures.append(data_uri(run / name))
    samples = runs.read_jsonl(run / "samples.jsonl", repair=False)
    html = page(results, tasks, texts, solutions, pictures, samples)
    runs.write_text(run / f"report{suffix}.html", html)


def data_uri(path):
    """A picture as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def page(results, tasks, texts, solutions, pictures=(), samples=()):
    """The page as HTML. tasks: the questions; texts: {label of a row: per question all that was
    written}; solutions: {question: its right steps} where they are known (tiny.right_steps);
    samples: the rows of samples.jsonl."""
    stages = stages_of(results)
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        dataset=Path(results["dataset"]).name,
        table=table(results),
        gains=gains(results),
        pictures=pictures,
        stages=[STAGES[stage] for stage in stages],
        rounds=rounds_of(results),
        tasks=sorted({task["task"] for task in tasks}),
        questions=questions_of(results, stages, tasks, texts, solutions),
        groups=[group_of(sample, solutions) for sample in samples],
        steps_known=bool(solutions),
    )


# --------------------------------------------------------------------------- the table, the gains


def table(results):
    """{"heads", "lines": [{label, cells, last}]}, as on the screen but with all tasks."""
    last_stage = results["rows"][-1]["stage"]
    tasks = list(results["rows"][0]["per_task"])
    heads = ["right %", "read", "95%", "calls", "prompt", "output"]
    heads += [compare.short_name(task, tasks) for task in tasks]
    lines = []
    for row in results["rows"]:
        line = {"label": row["label"], "cells": compare.cells_of([row], tasks)}
        lines.append({**line, "last": row["stage"] == last_stage})
    return {"heads": heads, "lines": lines}


def gains(results):
    """[(what, gain, the same with the outputs read as the agents' are)], as on the screen."""
    as_read = compare.comparisons(results, "correct_as_read")
    found = []
    for what, gain in compare.comparisons(results).items():
        found.append((what, points(gain), points(as_read[what])))
    return found


def points(gain):
    return f"{gain.points:+.1f} ± {gain.half:.1f}"


def stages_of(results):
    """The stages of the leader, in order."""
    found = {}  # a set that keeps its order
    for row in results["rows"]:
        if row["who"] == "leader":
            found[row["stage"]] = True
    return list(found)


def rounds_of(results):
    """How many rounds of leader and team there were; 0 without a team."""
    return max(row["rounds"] if row["team"] else 0 for row in results["rows"])


# ----------------------------------------------------------------------------------- who said what


def questions_of(results, stages, tasks, texts, solutions):
    """A dict for each question: what is asked, and who says what in each round."""
    names = [row["name"] for row in results["rows"] if row["who"] == "agent"]
    votes = [row["correct"] for row in results["rows"] if row["who"] == "majority"]
    rounds = rounds_of(results)
    found = []
    for i, task in enumerate(tasks):
        solution = solutions.get(task["question"])
        said = {label: of_row[i] for label, of_row in texts.items()}
        alone = []
        for stage in stages:
            [text] = said[compare.label_of("", stage, team=False, rounds=1)]
            alone.append(speech("leader", f"leader, {STAGES[stage]}", text, task, solution))
        with_team = []
        for t in range(rounds):
            with_team.append(one_round(t, rounds, stages, names, said, task, solution))
        question = {
            **task,
            "number": i + 1,
            "solution": solution[1] if solution else "",
            "alone": alone,
            "rounds": with_team,
            "majority": votes[0][i] == "1" if votes else False,
        }
        found.append({**question, **leader_bits(question)})
    return found


def one_round(t, rounds, stages, names, said, task, solution):
    """Round t: {"agents": a list of speeches for each stage, "leaders": a speech for each}. In the
    first round the agents say the same to every leader: there "agents" has one list."""
    agents = []
    leaders = []
    for stage in stages:
        written = said[compare.label_of("", stage, team=True, rounds=rounds)]
        start = t * (len(names) + 1)  # in each round the agents write, then the leader
        of_agents = []
        for name, text in zip(names, written[start:]):
            of_agents.append(speech("agent", name, text, task, solution))
        agents.append(of_agents)
        text = written[start + len(names)]
        leaders.append(speech("leader", f"leader, {STAGES[stage]}", text, task, solution))
    return {"agents": agents[:1] if t == 0 else agents, "leaders": leaders}


def speech(who, name, text, task, solution):
    """One text: whose, whether its answer is right, and its steps."""
    question = task["question"]
    answer = extract_answer(text) if who == "leader" else extract_agent_answer(text, question)
    right = is_correct(answer, task["answer"], question)
    return {"name": name, "right": right, "parts": marked_steps(text, solution)}


def leader_bits(question):
    """What the filters ask: is any agent right at first, and the leader in each round, before and
    after training? Without a team: the leader alone."""
    leaders = [of_round["leaders"] for of_round in question["rounds"]] or [question["alone"]]
    agents = question["rounds"][0]["agents"][0] if question["rounds"] else []
    return {
        "any_right": any(agent["right"] for agent in agents),
        "before": "".join("1" if of_round[0]["right"] else "0" for of_round in leaders),
        "after": "".join("1" if of_round[-1]["right"] else "0" for of_round in leaders),
    }


# ------------------------------------------------------------------------------ groups of training


def group_of(sample, solutions):
    """A row of samples.jsonl, with the steps of its completions."""
    completions = []
    for completion in sample["completions"]:
        parts = marked_steps(completion["text"], solutions.get(sample["question"]))
        completions.append({**completion, "parts": parts})
    return {**sample, "completions": completions}
