"""What did training do? The leader alone and with its team, beside the team without a leader.

    python evaluate.py runs/mlpo                                # the table and the pictures
    python evaluate.py runs/mlpo --dataset my.jsonl --rounds 3  # on other questions
    python evaluate.py runs/seed5 runs/seed6 runs/seed7         # mean and spread over runs
    python evaluate.py runs/mlpo --ask "not ( True ) and ( True ) is"

Read `measure` first: it is the procedure. Comparisons are paired: all runs get the same questions,
none of them from training, and the agents' first responses are sampled once, for the vote, the
ceiling and every leader. T rounds with K agents are (K+1)T generations: the vote gets as many.
"""

import argparse
import math
import os
import random
from pathlib import Path
from statistics import fmean, pstdev, stdev
from textwrap import indent

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in train.py

import torch
from tqdm import tqdm

import agents
import data
import files
from rewards import extract_agent_answer, extract_answer, is_correct
from rewards import score as score_text

SEED = 0  # of the questions, the agents and the ties: constant, so that runs can be compared


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.error = files.fail
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a folder that train.py has filled")
    add("--dataset", help="other questions than the run's: a name or a file (see data.py)")
    for name in data.columns({}):
        add(f"--{name}", help="of another --dataset; the run's own is read as in training")
    add("--rounds", type=int, help="T, rounds of leader and team; by itself the run's (--ask: 1)")
    add("--eval_questions", type=int, help="how many questions; by itself the run's")
    add("--device", help="cuda, mps or cpu; by itself the run's")
    add("--ask", help="put this question to the leader, alone and with its team")
    options = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    runs = options.pop("runs")
    configs = [open_run(run, **options)[0] for run in runs]
    asked = {(config["dataset"], config["eval_questions"]) for config in configs}
    if "ask" in options:
        return ask(runs, options.pop("ask"), **options)
    if len(asked) > 1:
        what = ", ".join(f"{n} of {dataset}" for dataset, n in sorted(asked))
        raise ValueError(f"other questions in each ({what}): --dataset, --eval_questions")
    print_table([measure(run, **options) for run in runs])


def measure(run, **options):
    """What is in a run's `results.json`: measured, or read if no setting has changed since."""
    run, (config, stages) = Path(run), open_run(run, **options)
    dataset, rounds, tasks = config["dataset"], config["rounds"], test_questions(config)
    settings = config | {"fingerprint": data.fingerprint(repr(tasks))}  # all that matters
    suffix = f"-{Path(dataset).stem[:60]}" if dataset != config["trained_on"] else ""
    path = run / f"results{suffix}.json"
    if path.exists() and (saved := files.read_json(path)).get("settings") == settings:
        print(f"{path}: already evaluated, with these settings")
        return saved

    questions = [task["question"] for task in tasks]
    leader, team = load(run, config, config["leader"], questions)
    results = {"dataset": dataset, "questions": len(tasks), "settings": settings}
    ids = leader.tokenizer(questions, add_special_tokens=False)["input_ids"]
    results["unknown_words"] = fmean(i == leader.tokenizer.unk_token_id for row in ids for i in row)
    prompts = [agents.leader_messages(question) for question in questions]
    k, name, rows = len(team), config["leader"], []
    more = (k + 1) * rounds - k if team else 0  # what T rounds generate after the first responses
    total = len(tasks) * (2 * k + more + len(stages) * (1 + more))  # or up to K less for each

    with tqdm(desc=run.name, total=total, unit=" answers", leave=False) as bar:
        how = {key: config[key] for key in ("temperature", "max_new_tokens")} | {"bar": bar}
        first = ask_team(team, questions, k, SEED, how)  # round 0, for everyone
        votes = [[*a, *b] for a, b in zip(first, ask_team(team, questions, more, SEED + 1, how))]
        for j, agent in enumerate(team):
            rows.append(score(tasks, [said[j : j + 1] for said in first], "agent", agent.name))
        if team:
            rows.append(score(tasks, first, "majority", f"majority vote of {k}"))
            rows.append(score(tasks, votes, "majority", f"majority vote of {k + more}", prompts=k))
            rows.append(score(tasks, first, "any_right", "any agent right"))  # a selector's best
        for stage, folder in stages.items():
            if stage != "untrained":
                leader = None  # makes room for the next
                leader = agents.load(folder, config["device"])
            said = leader.answer(prompts, 1, 0, config["max_new_tokens"], bar)  # alone, greedy
            rows.append(score(tasks, said, "leader", name, stage, False, 1))
            if team:
                torch.manual_seed(SEED)  # the same luck for every leader
                turns = agents.deliberate(leader, team, questions, rounds, **how, responses=first)
                for t in sorted({1, rounds}):
                    said = [[c for x in ts[:t] for c in (*x.responses, x.output)] for ts in turns]
                    rows.append(score(tasks, said, "leader", name, stage, True, t))

    rows.sort(key=lambda row: (row["team"], row["rounds"]))  # so stages stand side by side
    results["rows"], texts = rows, {row["label"]: row.pop("texts") for row in rows}
    files.write_text(run / f"transcripts{suffix}.md", transcripts(results, tasks, texts))
    draw_results(results, run / f"results{suffix}.png")
    draw_curves(files.read_jsonl(run / "metrics.jsonl"), run / "curves.png")
    files.write_json(path, results)  # last: where it is, the others are
    return results


def open_run(run, **options):
    """The settings of a finished run, changed by `options`; {stage: where its leader is}."""
    run = Path(run)
    try:
        config = files.read_json(run / "config.json")
        trained = {"trained_on": config["dataset"], "trained_columns": data.columns(config)}
        other = options.get("dataset", config["dataset"]) != config["dataset"]
        config = {**config, **trained, **data.columns({} if other else config), **options}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{run} is no run: it has no config.json of train.py") from None
    if not (run / "leader").is_dir():  # what training writes last
        raise ValueError(f"{run} is unfinished: repeat its command with --resume added")
    if config["rounds"] < 1:
        raise ValueError(f"--rounds must be at least 1, not {config['rounds']}")
    stages = {"untrained": config["leader"]}
    if config["sft_steps"]:
        stages["sft"] = str(run / "leader_sft")
    if config["steps"]:
        stages["mlpo" if agents.team_names(config["agents"]) else "grpo"] = str(run / "leader")
    return config, stages


def test_questions(config):
    """The same questions for every run, less those that this run was trained on."""
    dataset, trained_on, n = config["dataset"], config["trained_on"], config["eval_questions"]
    if n < 1:  # a run may have been left unevaluated
        raise ValueError(f"--eval_questions must be at least 1, not {n}")
    # benchmarks have a test split, and so has what was trained on; a file of one's own is all test
    own = Path(dataset).exists() and dataset not in ("tiny", "gsm8k", *data.BENCHMARKS, trained_on)
    split, columns = "all" if own else "test", data.columns(config)
    tasks = list(data.load_tasks(dataset, split, n, SEED, **columns))
    n, columns = config["questions"], config["trained_columns"]
    train = data.load_tasks(trained_on, "train", n, config["seed"], **columns)
    seen = {data.fingerprint(question) for question in train["question"]}
    kept = [task for task in tasks if data.fingerprint(task["question"]) not in seen]
    if not kept:
        raise ValueError(f"all questions of {dataset} were in training: choose others")
    if len(kept) < len(tasks):
        print(f"{len(tasks) - len(kept)} of {len(tasks)} questions were in training: left out")
    return kept


def describe(step):
    """A training step's ((completions, question), rewards) in numbers: means over completions."""
    scores = [[score_text(c.text, row["answer"]) for c in group] for (group, row), _ in step]
    everyone = [c for (group, _), _ in step for c in group]
    return {
        "reward": fmean(r for _, of_group in step for r in of_group),
        "accuracy": fmean(right for group in scores for right, _ in group),
        "format": fmean(formatted for group in scores for _, formatted in group),
        "length": fmean(len(c.ids) for c in everyone),
        "truncated": fmean(not c.finished for c in everyone),
        "entropy": fmean(-sum(c.logprobs) / len(c.ids) for c in everyone),  # per token, estimated
        "flat": fmean(len({right for right, _ in group}) == 1 for group in scores),
        "tokens": sum(len(g[0].prompt_ids) + sum(len(c.ids) for c in g) for (g, _), _ in step),
    }


def validate(args, leader, rows):
    """While it trains: right answers to questions never trained on, alone and with the team."""
    accuracy, said = {}, [sum(row["responses"], []) for row in rows]  # one of each agent
    for mode, team in {"alone": [()] * len(rows), "team": said}.items():
        prompts = [agents.leader_messages(r["question"], texts) for r, texts in zip(rows, team)]
        if any(team) or mode == "alone":
            outputs = leader.answer(prompts, 1, 0, args.max_new_tokens)
            accuracy[mode] = fmean(is_right("leader", r, cs) for r, cs in zip(rows, outputs))
    return accuracy


def load(run, config, leader, questions):
    """The leader and its team. ValueError if a prompt, with what it quotes, may be too long."""
    leader, n = agents.load(leader, config["device"]), config["max_new_tokens"]
    served = lambda name: files.Server(name, Path(run, "server.jsonl"))
    team = agents.load_team(config["agents"], config["device"], served)
    quoted = max(2, len(team))  # a leader reads K responses, an agent two texts
    prompts = [agents.leader_messages(question, [""] * quoted) for question in questions]
    for speaker in (leader, *team):
        if not isinstance(speaker, files.Server):  # which says so itself
            room = getattr(speaker.model.config, "max_position_embeddings", None) or math.inf
            need = max(len(agents.encode(speaker.tokenizer, p)) for p in prompts) + (quoted + 1) * n
            if need > room:
                problem = f"{speaker.name} reads {room} tokens, not {need}"
                raise ValueError(f"lower --max_new_tokens: {problem}")
    return leader, team


def ask_team(team, questions, n, seed, how):
    """Per question n Completions, in which the agents take turns."""
    torch.manual_seed(seed)
    k, prompts = len(team), [agents.agent_messages(question) for question in questions]
    said = [agent.answer(prompts, math.ceil(n / k), **how) for agent in team]  # (K, questions, n/K)
    return [[said[i % k][q][i // k] for i in range(n)] for q in range(len(questions))]


def ask(runs, question, rounds=1, **options):
    """The reader's own question: who says what. Loads the last leader and its team, no more."""
    if len(runs) > 1 or not question.strip():
        raise ValueError("--ask needs a question, and one RUN to answer it")
    config, stages = open_run(runs[0], **options)
    leader, team = load(runs[0], config, list(stages.values())[-1], [question])
    how = {key: config[key] for key in ("temperature", "max_new_tokens")}
    [[alone]] = leader.answer([agents.leader_messages(question)], **how | {"temperature": 0})
    print(f"[the leader alone]\n{alone.text}")
    torch.manual_seed(SEED)
    [turns] = agents.deliberate(leader, team, [question], rounds, **how) if team else [[]]
    names = [*(agent.name for agent in team), "the leader"]
    for t, turn in enumerate(turns, start=1):
        for name, said in zip(names, [*turn.responses, turn.output]):
            print(f"\n[{name}, round {t}]\n{said.text}")


def score(tasks, said, who, name, stage=None, team=False, rounds=0, prompts=None):
    """A row of the results: shares from 0 to 1 with 95% intervals, tokens per question.
    said: per question its Completions, of which the first `prompts` (or all) read a prompt."""
    correct, by_task = [is_right(who, task, cs) for task, cs in zip(tasks, said)], {}
    for task, ok in sorted(zip((task["task"] for task in tasks), correct)):
        by_task.setdefault(task, []).append(ok)
    row = {"who": who, "name": name, "stage": stage, "team": team, "rounds": rounds}
    row["label"] = f"{stage} leader, {f'team, T={rounds}' if team else 'alone'}" if stage else name
    row |= {"generations": len(said[0]), "accuracy": fmean(correct), "ci": wilson(correct)}
    row["prompt_tokens"] = fmean(sum(len(c.prompt_ids) for c in cs[:prompts]) for cs in said)
    row["generated_tokens"] = fmean(sum(len(c.ids) for c in cs) for cs in said)
    row["per_task"] = {task: fmean(oks) for task, oks in by_task.items()}
    row["per_task_ci"] = {task: wilson(oks) for task, oks in by_task.items()}
    row["correct"] = "".join("01"[ok] for ok in correct)  # for paired comparisons
    return row | {"texts": [cs[-1].text for cs in said]}


def is_right(who, task, said):
    """By any agent's answer; by the majority's; by the leader's last, which is held to its tags."""
    answers = [extract_agent_answer(completion.text) for completion in said]
    if who == "majority":
        answers = [vote(answers, task["question"])]
    if who == "leader":
        answers = [extract_answer(said[-1].text)]
    return any(is_correct(answer, task["answer"]) for answer in answers)


def vote(answers, seed):
    """One of the most frequent answers; `(B)` and `b.` are votes for the same, None is no vote."""
    votes = [sum(is_correct(other, answer) for other in answers) for answer in answers]
    most = [answer for answer, n in zip(answers, votes) if n == max(votes)]
    return random.Random(f"{SEED} {seed}").choice(most)


def wilson(correct, z=1.959964):
    """95% interval of a share, after Wilson: right for few questions and near 0 and 1 as well."""
    p, n = fmean(correct), len(correct)
    middle, half = p + z**2 / n / 2, z * math.sqrt(p * (1 - p) / n + z**2 / n**2 / 4)
    return [round(max(0.0, end / (1 + z**2 / n)), 4) for end in (middle - half, middle + half)]


def comparisons(results):
    """{what: (gain in points, half of its 95% interval)}, paired: of differences by question."""
    rows, found = {row["label"]: row for row in results["rows"]}, {}
    team, stage = [r for r in results["rows"] if r["who"] == "agent"], results["rows"][-1]["stage"]
    rows["best single agent"] = max(team, key=lambda row: row["accuracy"], default=None)
    ours, majority = f"{stage} leader, team, T=1", f"majority vote of {len(team)}"
    pairs = [(ours, x) for x in ("untrained leader, team, T=1", majority, "best single agent")]
    for a, b in [*pairs, (f"{stage} leader, alone", "untrained leader, alone")]:
        if a in rows and a != b:  # some have no team, and some no training
            gains = [int(x) - int(y) for x, y in zip(rows[a]["correct"], rows[b]["correct"])]
            found[f"{a} - {b}"] = 100 * fmean(gains), 196 * pstdev(gains) / math.sqrt(len(gains))
    if team and (gap := rows["any agent right"]["accuracy"] - rows[majority]["accuracy"]):
        closed = tuple(points / gap for points in found[f"{ours} - {majority}"])
        found["% of the way from the majority to any agent right"] = closed
    return found


def print_table(runs):
    """A line per row: right answers with their 95% interval, of several runs mean and spread."""
    first, same = runs[0], {}  # what a line is about -> its row in each run
    for row in (row for results in runs for row in results["rows"]):
        same.setdefault((row["label"], row["name"]), []).append(row)
    tasks = list(first["rows"][0]["per_task"])[:5]  # what fits; results.json has all
    print(f"\n{Path(first['dataset']).name}: {first['questions']} questions,", end=" ")
    print(f"{first['unknown_words']:.1%} of the words unknown (all tasks: results.json)\n")
    line = "{:28.27}{:>8}{:>14}" + "{:>7}" * 3 + "{:>9}" * len(tasks)
    heads = ["calls", "prompt", "output", *(task.split("_")[0][:8] for task in tasks)]
    print(line.format("calls, tokens: per question", "right %", "95% or ± sd", *heads))
    for (label, _), rows in same.items():
        right, (low, high) = [100 * row["accuracy"] for row in rows], rows[0]["ci"]
        spread = f"±{stdev(right):.1f}" if rows[1:] else f"{100 * low:.1f}-{100 * high:.1f}"
        costs = [[r["generations"], r["prompt_tokens"], r["generated_tokens"]] for r in rows]
        shares = [[100 * row["per_task"].get(task, math.nan) for task in tasks] for row in rows]
        cells = [f"{fmean(column):.0f}" for column in (*zip(*costs), *zip(*shares))]
        print(line.format(label[-27:], f"{fmean(right):.1f}", spread, *cells))
    print("\nGains in points, with 95% intervals (of several runs: mean ± sd):")
    compared = [comparisons(results) for results in runs]
    for what in dict.fromkeys(what for found in compared for what in found):
        values, halves = zip(*(found[what] for found in compared if what in found))
        print(f"{fmean(values):+6.1f} ±{stdev(values) if values[1:] else halves[0]:4.1f}  {what}")


def transcripts(results, tasks, texts):
    """A dozen questions, first those on which training changed whether the leader is right."""
    rows, last = results["rows"], results["rows"][-1]["stage"]
    leaders = [row for row in rows if row["stage"] in ("untrained", last) and row["rounds"] == 1]
    before, after = leaders[-2:][0]["correct"], leaders[-1]["correct"]
    block = lambda text: indent(text, "    ") + "\n"  # shown as it is, whatever is in it
    page = [f"# Who said what: {results['dataset']}\n"]
    for i in sorted(range(len(tasks)), key=lambda i: before[i] == after[i])[:12]:
        page.append(f"## {tasks[i]['task']}\n\n{block(tasks[i]['question'])}")
        page.append(f"Right answer:\n\n{block(tasks[i]['answer'])}")
        for row in [row for row in rows if row["who"] == "agent"] + leaders:
            mark = "right" if row["correct"][i] == "1" else "WRONG"
            page.append(f"**{row['label']}: {mark}**\n\n{block(texts[row['label']][i])}")
    return "\n".join(page)


def draw_results(results, path):
    """A bar per row with its 95% interval; a dashed line where any agent was right."""
    from matplotlib.figure import Figure  # here: only those who draw need it

    axis, rows = Figure(figsize=(8, 6), layout="constrained").subplots(), results["rows"]
    places = [i + row["team"] + (row["rounds"] > 1) for i, row in enumerate(rows)]  # with gaps
    for y, row in zip(places, rows):
        share, (low, high) = 100 * row["accuracy"], (100 * end for end in row["ci"])
        if row["who"] == "any_right":
            axis.axvline(share, color="black", linestyle="--")
            axis.text(share - 1, y, f"ceiling: {share:.0f}", ha="right", va="center")
            continue
        color = "tab:orange" if row["team"] else "tab:blue" if row["stage"] else "tab:gray"
        axis.barh(y, share, color=color, alpha=0.6)
        axis.plot((low, high), (y, y), color="black", linewidth=1)
        axis.text(high + 1, y, f"{share:.0f}", va="center")
    axis.set_yticks(places, [row["label"] for row in rows])
    axis.invert_yaxis()
    title = f"Right answers to {results['questions']} questions of {Path(results['dataset']).name}"
    axis.set(xlim=(0, 105), title=title, xlabel="%, with 95% intervals")
    files.write(path, lambda temporary: axis.figure.savefig(temporary, format="png", dpi=150))


def draw_curves(metrics, path):
    """The reward of the sampled completions; the accuracy on questions never trained on."""
    from matplotlib.figure import Figure

    left, right = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
    rewards = [row["reward"] for row in metrics if row["phase"] == "mlpo"]
    smooth = [fmean(rewards[max(0, i - 5) : i + 6]) for i in range(len(rewards))]
    left.plot(rewards, color="silver", label="each step")
    left.plot(smooth, color="black", label="mean of 11 steps")
    for mode, color in (("alone", "tab:blue"), ("team", "tab:orange")):
        looks = [row for row in metrics if mode in row]
        shares, label = [100 * row[mode] for row in looks], f"leader, {mode}" if looks else None
        right.plot([row["step"] for row in looks], shares, "o-", color=color, label=label)
    for axis, title in ((left, "Mean reward of samples"), (right, "Validation questions right, %")):
        axis.set(title=title, xlabel="training step", ylim=(0, None))
        axis.legend(loc="lower right")
    files.write(path, lambda temporary: axis.figure.savefig(temporary, format="png", dpi=150))


if __name__ == "__main__":
    files.run_script(main)
