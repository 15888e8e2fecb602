"""What did training do? The leader alone and with its team, beside the team without a leader.

    python evaluate.py runs/mlpo                                # the table and the pictures
    python evaluate.py runs/mlpo --dataset my.jsonl --rounds 3  # on other questions
    python evaluate.py runs/seed5 runs/seed6 runs/seed7         # mean and spread over runs
    python evaluate.py runs/mlpo runs/grpo                      # A and B, and the gains of B over A
    python evaluate.py runs/mlpo --ask "I have a dog and two plums. How many fruits do I have?"

Read `measure` first: it is the procedure. Comparisons are paired: all runs get the same questions,
none of them from training, and the agents' first responses are sampled once, for the votes and
every leader. T rounds with K agents are (K+1)T generations: a vote gets as many, where that is as
often for each agent. Gains and tables are in compare.py, what is drawn and written of a run in
report.py and page.py.
"""

import argparse
import math
import os
import random
import re
from pathlib import Path
from statistics import fmean

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in train.py

import torch
from tqdm import tqdm

import agents
import compare
import data
import page
import report
import runs
import tiny
from rewards import extract_agent_answer, extract_answer, is_correct

SEED = 0  # of the questions, the agents and the ties: constant, so that runs can be compared


def main(argv=None):
    options = parse(argv)
    folders = options.pop("runs")
    configs = [read_run(folder, **options)[0] for folder in folders]  # checks the options too
    if "ask" in options:
        question = options.pop("ask")
        ask(folders, question, **options)
        return
    check_same_questions(configs)
    results = [measure(folder, **options) for folder in folders]
    groups = compare.group_runs(folders, configs, results)
    if len(groups) == 1:
        compare.print_table(results)
    else:
        compare.print_groups(groups)


def parse(argv):
    """The command line as a dict of what was given."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.error = runs.fail
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a folder that train.py has filled. Several runs that differ in nothing but their "
        "seed: one table of mean and spread. Runs of other settings: a table each (A, B, ...), and "
        "the gains over A, the settings of the first RUN, question by question",
    )
    add("--dataset", help="other questions than the run's: a name or a file (see data.py)")
    for name in data.columns({}):
        add(f"--{name}", help="of another --dataset; the run's own is read as in training")
    add("--rounds", type=int, help="T, rounds of leader and team; by default the run's (--ask: 1)")
    add("--eval_questions", type=int, help="how many questions; by default the run's")
    add("--device", help="cuda, mps or cpu; by default the run's, or what is there instead")
    add("--ask", help="put this question to the leader, alone and with its team")
    given = vars(parser.parse_args(argv))
    return {name: value for name, value in given.items() if value is not None}


# -------------------------------------------------------------------------------- the procedure


def measure(run, **options):
    """What is in a run's `results.json`: measured, or read if no setting has changed since."""
    run = Path(run)
    config, stages = read_run(run, **options)
    tasks = test_questions(config)
    suffix = ""
    if config["dataset"] != config["trained_on"]:
        # without what Windows refuses in the name of a file
        suffix = "-" + re.sub(r'[<>:"|?*]', "_", Path(config["dataset"]).stem)[:60]
    path = run / f"results{suffix}.json"
    settings = {**config, "questions_hash": data.question_hash(repr(tasks))}  # all that matters
    saved = runs.read_json(path) if path.exists() else {}
    if saved.get("settings") == settings:
        print(f"{path}: already evaluated, with these settings")
        return saved

    config = {**config, "device": device_here(run, config)}
    tasks, unknown, rows = measure_rows(run, config, stages, tasks)
    results = {
        "dataset": config["dataset"],
        "questions": len(tasks),
        "settings": settings,
        "device": config["device"],
        "question_ids": [data.question_hash(task["question"])[:16] for task in tasks],
        "unknown_words": unknown,
        "rows": rows,
    }
    texts = {}  # for transcripts and page: results.json has numbers only
    for row in results["rows"]:
        texts[row["label"]] = row.pop("texts")
    report.write_transcripts(results, tasks, texts, run / f"transcripts{suffix}.md")
    report.plot_results(results, run / f"results{suffix}.png")
    page.write_page(run, suffix, results, tasks, texts, right_steps(config))
    runs.write_json(path, results)  # last: where it is, the others are
    return results


def right_steps(config):
    """{question: its right steps} of the test and of training, where they are the laboratory's:
    elsewhere nobody knows them."""
    steps = {}
    if config["dataset"] == "tiny":
        steps |= tiny.right_steps("test", config["eval_questions"], SEED)
    if config["trained_on"] == "tiny":
        steps |= tiny.right_steps("train", config["questions"], config["seed"])
    return steps


def measure_rows(run, config, stages, tasks):
    """(the questions that all can read, the share of unknown words, rows: of the team, then of each
    leader alone, then with it). One leader is in memory at a time."""
    leader, team = load_leader_and_team(run, config, config["leader"])  # the untrained one
    tasks = readable(leader, team, tasks, config)
    questions = [task["question"] for task in tasks]
    rounds = config["rounds"]
    alone = [agents.encode(leader.tokenizer, agents.leader_messages(q)) for q in questions]
    unknown = agents.unknown_share(leader.tokenizer, alone)
    total = len(tasks) * generations_per_question(len(team), rounds, len(stages))
    with tqdm(desc=run.name, total=total, unit=" answers", leave=False) as bar:
        settings = {key: config[key] for key in ("temperature", "max_new_tokens")}
        settings["bar"] = bar
        first = ask_team(team, questions, 1, SEED, settings)  # round 0, for everyone
        rows = team_rows(tasks, team, first, rounds, settings)
        for stage, folder in stages.items():
            if stage != "untrained":
                leader = None  # makes room for the next
                leader = load_leader(folder, config)
            identity = {"name": config["leader"], "stage": stage}
            rows.append(alone_row(tasks, leader, settings, identity))
            if team:
                rows += with_team_rows(tasks, leader, team, first, rounds, settings, identity)
    rows.sort(key=lambda row: (row["team"], row["rounds"]))  # so stages stand side by side
    return tasks, unknown, rows


def team_rows(tasks, team, first, rounds, settings):
    """Rows without a leader: each agent, the votes, and the best of picking: is any agent right?
    first: per question K Completions, one of each agent."""
    rows = []
    for k, agent in enumerate(team):
        own = [responses[k : k + 1] for responses in first]
        rows.append(result_row(tasks, own, "agent", agent.name))
    if not team:
        return rows
    rows.append(result_row(tasks, first, "majority", f"majority vote of {len(team)}"))
    extra = extra_votes(len(team), rounds)
    if extra:
        questions = [task["question"] for task in tasks]
        later = ask_team(team, questions, extra // len(team), SEED + 1, settings)
        votes = [[*responses, *more] for responses, more in zip(first, later)]
        name = f"majority vote of {len(team) + extra}"
        # a prompt is read once, however many responses are sampled from it
        rows.append(result_row(tasks, votes, "majority", name, prompts_read=len(team)))
    rows.append(result_row(tasks, first, "any_right", "any agent right"))  # a selector's best
    return rows


def alone_row(tasks, leader, settings, identity):
    """The leader without a team, greedy."""
    prompts = [agents.leader_messages(task["question"]) for task in tasks]
    outputs = leader.answer(prompts, n=1, **{**settings, "temperature": 0})
    return result_row(tasks, outputs, "leader", **identity, rounds=1)


def with_team_rows(tasks, leader, team, first, rounds, settings, identity):
    """The leader with its team: after one round, and after all of them."""
    torch.manual_seed(SEED)  # the same luck for every leader
    questions = [task["question"] for task in tasks]
    history = agents.deliberate(leader, team, questions, rounds, responses=first, **settings)
    rows = []
    for t in sorted({1, rounds}):
        written = [all_written(past[:t]) for past in history]
        rows.append(result_row(tasks, written, "leader", **identity, team=True, rounds=t))
    return rows


def all_written(past):
    """The Completions of these rounds on one question, the leader's last output last."""
    written = []
    for round_ in past:
        written += [*round_.responses, round_.output]
    return written


def ask_team(team, questions, each, seed, settings):
    """Per question `each` Completions of every agent; the agents take turns."""
    torch.manual_seed(seed)
    prompts = [agents.agent_messages(question) for question in questions]
    answers = [agent.answer(prompts, n=each, **settings) for agent in team]  # (K, questions, each)
    in_turns = []
    for q in range(len(questions)):
        completions = []
        for i in range(each):
            completions += [of_agent[q][i] for of_agent in answers]
        in_turns.append(completions)
    return in_turns


def extra_votes(k, rounds):
    """How many more responses than its first k a team needs for a vote of as many generations as
    the rounds take; 0 if some agents would then be asked oftener than others."""
    generations = (k + 1) * rounds
    if k == 0 or generations % k:
        return 0
    return generations - k


def generations_per_question(k, rounds, stages):
    """What the progress bar counts up to, for each question."""
    alone = stages
    if k == 0:
        return alone
    after_first = (k + 1) * rounds - k  # the rounds without the first responses
    return k + extra_votes(k, rounds) + alone + stages * after_first


# ------------------------------------------------------------------------- the run and its models


def read_run(run, **options):
    """The settings of a finished run, changed by `options`; {stage: where its leader is}.
    ValueError if it is no run, is unfinished, or an option makes no sense."""
    run = Path(run)
    try:
        config = runs.with_later_arguments(runs.read_json(run / "config.json"))
        config["trained_on"] = config["dataset"]
        config["trained_columns"] = data.columns(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{run} is no run: it has no config.json of train.py") from None
    if not (run / "leader").is_dir():  # what training writes last
        raise ValueError(f"{run} is unfinished: repeat its command with --resume added")
    if options.get("dataset", config["dataset"]) != config["dataset"]:
        config |= data.columns({})  # those of the other dataset are among the options
    config |= options
    if config["rounds"] < 1:
        raise ValueError(f"--rounds must be at least 1, not {config['rounds']}")
    if "device" in options:
        config["device"] = agents.choose_device(options["device"])
    stages = {"untrained": config["leader"]}
    if config["sft_steps"]:
        stages["sft"] = str(run / "leader_sft")
    if config["steps"]:
        trained = "mlpo" if agents.team_names(config["agents"]) else "grpo"
        stages[trained] = str(run / "leader")
    return config, stages


def device_here(run, config):
    """The run's device; if this machine lacks it, its best one, and a line that says so."""
    try:
        return agents.choose_device(config["device"])
    except ValueError:
        device = agents.choose_device("")
        missing = f"{run} was trained on {config['device']}, which is not here"
        print(f"{missing}: evaluated on {device}")
        return device


def drawn_questions(config):
    """The same questions for every run: a list of {question, answer, task}."""
    dataset, trained_on = config["dataset"], config["trained_on"]
    n = config["eval_questions"]
    if n < 1:  # a run may have been left unevaluated
        raise ValueError(f"--eval_questions must be at least 1, not {n}")
    # benchmarks have a test split, and so has what was trained on; a file of one's own is all test
    with_splits = ("tiny", *data.BENCHMARKS, trained_on)
    own_file = Path(dataset).exists() and dataset not in with_splits
    split = "all" if own_file else "test"
    return list(data.load_tasks(dataset, split, n, SEED, **data.columns(config)))


def test_questions(config):
    """The questions for this run: those drawn, less those that it was trained on."""
    drawn = drawn_questions(config)
    seen = set()
    for question in data.load_tasks(
        config["trained_on"],
        "train",
        config["questions"],
        config["seed"],
        **config["trained_columns"],
    )["question"]:
        seen.add(data.question_hash(question))
    kept = [task for task in drawn if data.question_hash(task["question"]) not in seen]
    if not kept:
        raise ValueError(f"all questions of {config['dataset']} were in training: choose others")
    if len(kept) < len(drawn):
        print(f"{len(drawn) - len(kept)} of {len(drawn)} questions were in training: left out")
    return kept


def check_same_questions(configs):
    """ValueError, before anything long starts, if the runs would be tested on other questions."""
    if len(configs) == 1:
        return
    descriptions = set()
    hashes = set()
    for config in configs:
        tasks = drawn_questions(config)
        descriptions.add(f"{len(tasks)} of {config['dataset']}")
        hashes.add(data.question_hash(repr(tasks)))
    if len(hashes) > 1:
        what = ", ".join(sorted(descriptions))
        advice = "give all the same --dataset and --eval_questions"
        raise ValueError(f"the runs have other questions in each ({what}): {advice}")


def load_leader(folder, config):
    """The leader of that folder, on the run's device."""
    return agents.load_model(folder, config["device"], **options_of_models(config))


def options_of_models(config):
    """Of a run's settings those of `agents.load_model`; an older run may lack them."""
    names = ("plain", "sample_gb", "chat_template_kwargs")
    return {name: config[name] for name in names if name in config}


def load_leader_and_team(run, config, leader):
    leader = load_leader(leader, config)
    team = agents.load_team(
        config["agents"],
        config["device"],
        journal=Path(run, "server.jsonl"),
        **options_of_models(config),
    )
    return leader, team


def readable(leader, team, tasks, config):
    """The tasks that every local model can read, with what may be quoted and written beside them; a
    line says how many are left out, and why. ValueError if none is left, or if a model does not
    know the words."""
    quoted = max(2, len(team))  # a leader reads K responses, an agent two texts
    names = [agent.name for agent in team]
    names += [""] * (quoted - len(team))
    prompts = []
    for task in tasks:
        prompts.append(agents.leader_messages(task["question"], [""] * quoted, names))
    more_tokens = (quoted + 1) * config["max_new_tokens"]  # the quoted texts and one's own
    problems = {}  # index of a task: what is wrong with it
    refines = max(config["rounds"], config["train_rounds"]) > 1
    for model in (leader, *team):
        if hasattr(model, "tokenizer"):  # others, such as a server, say it themselves
            if refines and model is not leader:  # not every template has turns of an assistant
                agents.encode(model.tokenizer, agents.agent_messages("", "", ""))
            for index, need in agents.check_prompts(model, prompts, more_tokens).items():
                room = agents.room_of(model)
                problems.setdefault(index, f"{model.name} reads {room} tokens, not {need}")
    if not problems:
        return tasks
    index, problem = min(problems.items())
    problem = f"question {index + 1}, {tasks[index]['question'][:40]!r}: {problem}"
    if len(problems) == len(tasks):
        advice = "train with a lower --max_new_tokens"
        raise ValueError(f"every question is too long, {advice}: {problem}")
    runs.say(f"{len(problems)} of {len(tasks)} questions are too long and left out: {problem}")
    return [task for index, task in enumerate(tasks) if index not in problems]


def ask(folders, question, rounds=1, **options):
    """The reader's own question: who says what. Loads the last leader and its team, no more."""
    if len(folders) > 1 or not question.strip():
        raise ValueError("--ask needs a question, and one RUN to answer it")
    [run] = folders
    config, stages = read_run(run, **options)
    config["device"] = device_here(run, config)
    last_leader = list(stages.values())[-1]
    leader, team = load_leader_and_team(run, config, last_leader)
    readable(leader, team, [{"question": question}], config)
    n_tokens = config["max_new_tokens"]
    prompt = agents.leader_messages(question)
    [[alone]] = leader.answer([prompt], n=1, temperature=0, max_new_tokens=n_tokens)
    print(f"[the leader alone]\n{alone.text}")
    if not team:
        return
    torch.manual_seed(SEED)
    [history] = agents.deliberate(leader, team, [question], rounds, config["temperature"], n_tokens)
    names = [agent.name for agent in team]
    for t, round_ in enumerate(history, start=1):
        for name, response in zip(names, round_.responses):
            print(f"\n[{name}, round {t}]\n{response.text}")
        print(f"\n[the leader, round {t}]\n{round_.output.text}")


# -------------------------------------------------------------------------- what training looks at


def validate(args, leader, rows):
    """While it trains: the share of right answers to questions never trained on, alone and with
    the team. rows: {question, answer, responses: {agent's name: [its text]}}."""
    alone = []
    with_team = []
    for row in rows:
        names = []
        texts = []
        for name, of_agent in row["responses"].items():
            names += [name] * len(of_agent)
            texts += of_agent
        alone.append(agents.leader_messages(row["question"]))
        with_team.append(agents.leader_messages(row["question"], texts, names))
    accuracy = {"alone": share_right(args, leader, rows, alone)}
    if any(row["responses"] for row in rows):
        accuracy["team"] = share_right(args, leader, rows, with_team)
    return accuracy


def share_right(args, leader, rows, prompts):
    """Which share of the leader's greedy outputs for these prompts is right."""
    outputs = leader.answer(prompts, n=1, temperature=0, max_new_tokens=args.max_new_tokens)
    return fmean(is_right("leader", row, said) for row, said in zip(rows, outputs))


# ------------------------------------------------------------------------------- rows of results


def result_row(tasks, completions, who, name, stage=None, team=False, rounds=0, prompts_read=None):
    """A row of the results: shares from 0 to 1 with 95% intervals, tokens per question.

    completions: per question all that was generated for its answer, of which the first
    `prompts_read` (by default all) read a prompt. who: agent, majority, any_right or leader.
    A leader is held to its tags, as in training; `..._as_read` is what it knows: its output read
    as an agent's response is.
    """
    correct = []
    correct_as_read = []
    read = []
    written = []
    texts = []
    for task, of_task in zip(tasks, completions):
        correct.append(is_right(who, task, of_task))
        as_read = is_right("agent", task, of_task[-1:]) if who == "leader" else correct[-1]
        correct_as_read.append(as_read)
        read.append(sum(len(completion.prompt_ids) for completion in of_task[:prompts_read]))
        written.append(sum(len(completion.ids) for completion in of_task))
        texts.append([completion.text for completion in of_task])
    by_task = split_by_task(tasks, correct)
    return {
        "who": who,
        "name": name,
        "stage": stage,
        "team": team,
        "rounds": rounds,
        "label": compare.label_of(name, stage, team, rounds),
        "generations": len(completions[0]),
        "accuracy": fmean(correct),
        "ci": wilson(correct),
        "accuracy_as_read": fmean(correct_as_read),
        "prompt_tokens": fmean(read),
        "generated_tokens": fmean(written),
        "per_task": {task: fmean(rights) for task, rights in by_task.items()},
        "per_task_ci": {task: wilson(rights) for task, rights in by_task.items()},
        "correct": bits(correct),  # to compare in pairs
        "correct_as_read": bits(correct_as_read),
        "texts": texts,
    }


def bits(correct):
    return "".join("1" if right else "0" for right in correct)


def split_by_task(tasks, correct):
    """{task: which of its questions are right}, in alphabetical order."""
    of_task = {}
    for task, right in zip(tasks, correct):
        of_task.setdefault(task["task"], []).append(right)
    return dict(sorted(of_task.items()))


def is_right(who, task, completions):
    """By any agent's answer; by the majority's; by the leader's last, which is held to its tags."""
    question = task["question"]
    if who == "leader":
        answers = [extract_answer(completions[-1].text)]
    else:
        answers = [extract_agent_answer(completion.text, question) for completion in completions]
    if who == "majority":
        answers = [vote(answers, question)]
    return any(is_correct(answer, task["answer"], question) for answer in answers)


def vote(answers, question):
    """One of the most frequent answers, drawn by lot. `(B)` and `b.` are votes for the same, None
    is no vote."""
    votes = []
    for answer in answers:
        votes.append(sum(is_correct(other, answer, question) for other in answers))
    most = [answer for answer, n in zip(answers, votes) if n == max(votes)]
    return random.Random(f"{SEED} {question}").choice(most)


def wilson(correct, z=compare.Z):
    """95% interval of a share, after Wilson: right for few questions and near 0 and 1 as well."""
    share = fmean(correct)
    n = len(correct)
    middle = share + z**2 / n / 2
    half = z * math.sqrt(share * (1 - share) / n + z**2 / n**2 / 4)
    low = (middle - half) / (1 + z**2 / n)
    high = (middle + half) / (1 + z**2 / n)
    return [round(max(0.0, low), 4), round(min(1.0, high), 4)]


if __name__ == "__main__":
    runs.run_script(main)
