"""The evidence: every claim of the paper, and the open questions around it, on the laboratory.

    pip install -r requirements-dev.txt
    python benchmarks/evidence.py               # all of it, in runs/again; if stopped, it goes on
    python benchmarks/evidence.py --bbh bbh     # and the official files in bbh/
    python benchmarks/evidence.py --out . --report         # the tables and pictures of this folder

Read evidence_plan.py first: what is trained and measured, in which order. What a unit of the plan
finds are rows; all rows go to `evidence.jsonl`, from which evidence_report.py makes `RESULTS.md`
and the pictures. What is trained is trained by `train.py`, with the command that stands in the row.
A comparison is paired: all variants of a seed share the proposals, the test questions, the agents'
first responses to them and the random numbers of the later rounds.
"""

import argparse
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a worker is one thread, and so is its training

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny_models")]
import make
from evidence_plan import (
    COMMAND,
    EQUAL_TOKENS,
    LEADERS,
    MORE_AGENTS,
    QUESTIONS_SEED,
    SEEDS,
    TEAM,
    TEAM_SIZES,
    VARIANTS,
    WITH_PROPOSALS,
    plan,
)
from evidence_report import report

import agents
import data
import evaluate
import runs
import sampling
import shared_prompt
import tiny
from rewards import extract_agent_answer, extract_answer, is_correct
from train import gradient_step, learning_rate

SAMPLES = 14  # first responses of each agent to each question
LONGEST = 120  # new tokens
CONVINCED = make.CONVINCED  # of the built-in agents; `make_agent` changes it for others


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--report", action="store_true", help="no measurement: RESULTS.md and pictures anew")
    add("--seeds", type=int, default=5, help=f"how many seeds, from {SEEDS[0]} on")
    add("--steps", type=int, default=100, help="of MLPO and of GRPO")
    add("--sft_steps", type=int, default=10)
    add("--questions", type=int, default=200, help="test questions")
    add("--train_questions", type=int, default=600)
    add("--jobs", type=int, default=2, help="how much is done at the same time, a thread for each")
    add("--bbh", default="", help="a folder with official BBH files")
    add("--out", default="runs/again", help="for RESULTS.md, benchmarks/ and runs/evidence/")
    args = parser.parse_args(argv)
    if args.bbh:
        args.bbh = str(Path(args.bbh).resolve())
    if args.out != ".":
        args.out = str(Path(args.out).resolve())
    os.chdir(ROOT)
    args.work = f"{args.out}/runs/evidence".removeprefix("./")
    args.seed_list = list(SEEDS)[: args.seeds]
    path = Path(args.out) / "benchmarks" / "evidence.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.report:
        rows = runs.read_jsonl(path)
        if not rows:
            raise ValueError(f"{path}: nothing is measured there yet")
        return report(rows, args.out)
    check_size(args)
    rows = {}
    for part in plan(args.seed_list, args.bbh):
        for row in at_the_same_time(args, part):
            rows[row["variant"], row["seed"], row["mode"]] = row
        runs.write_jsonl(path, rows.values())
    report(list(rows.values()), args.out)


def check_size(args):
    """ValueError if what is in --out was made with other numbers of steps or questions."""
    names = ("steps", "sft_steps", "questions", "train_questions")
    size = {name: getattr(args, name) for name in names}
    path = Path(args.work) / "units" / "size.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and runs.read_json(path) != size:
        raise ValueError(f"{args.work} was made with {runs.read_json(path)}: another --out")
    runs.write_json(path, size)


def at_the_same_time(args, units):
    """The rows of these units, --jobs of them at a time."""
    rows = []
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(do, args, unit) for unit in units]):
                name, of_unit = done.result()
                print(name, flush=True)
                rows += of_unit
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waits for what has begun
            raise
    return sorted(rows, key=lambda row: (row["variant"], str(row["seed"]), row["mode"]))


def do(args, unit):
    """In a worker: (the unit's name, its rows): from its file, if it was done before."""
    function, *what = unit
    name = " ".join(map(str, unit))
    path = Path(args.work) / "units" / f"{re.sub('[^0-9A-Za-z_ ]', '-', name)}.json"
    if not path.exists():
        torch.set_num_threads(1)
        measure = globals()[function]  # the plan names a function of this file
        rows = measure(args, *what)
        if rows is None:  # it has made something, and measured nothing
            rows = []
        runs.write_json(path, rows)
    return name, runs.read_json(path)


# -------------------------------------------------------------------------------- what is trained


def train(args, variant, seed):
    """Train it with train.py unless that is done; goes on where it was stopped.
    (folder, rows: what it cost, and its curves)."""
    out = Path(f"{args.work}/{variant}-{seed}")
    words = words_of(args, variant, seed)
    command = [sys.executable, "train.py", *words]
    if not (out / "leader").exists():
        if (out / "config.json").exists():
            command.append("--resume")
        with open(f"{out}.log", "w") as log:
            status = subprocess.run(command, stdout=log, stderr=log).returncode
        if status:
            last = Path(f"{out}.log").read_text().strip().splitlines()[-1]
            raise ValueError(f"{out}.log: {last}")
    return out, rows_of_training(out, variant, seed, f"train.py {' '.join(words)}")


def words_of(args, variant, seed):
    """The command line of a variant."""
    out = f"{args.work}/{variant}-{seed}"
    known = {**vars(args), "seed": seed, "steps": steps_of(args, variant, seed), "out": out}
    words = f"{COMMAND} {VARIANTS[variant][1]}"
    return [word.format(**known) for word in words.split()]


def steps_of(args, variant, seed):
    """--steps; where tokens shall be equal, as many steps of GRPO as cost them."""
    if variant not in EQUAL_TOKENS:
        return args.steps
    spent = tokens_of_training(f"{args.work}/{EQUAL_TOKENS[variant]}-{seed}")
    if variant in WITH_PROPOSALS:
        spent += tokens_of_proposals(f"{args.work}/sft-{seed}")
    return round(args.steps * spent / tokens_of_training(f"{args.work}/grpo-{seed}"))


def tokens_of_training(run):
    """All that was read and written in MLPO or GRPO; the proposals are not of it."""
    steps = [row for row in runs.read_jsonl(Path(run) / "metrics.jsonl") if row["phase"] == "mlpo"]
    return sum(row["tokens"] for row in steps)


def tokens_of_proposals(run):
    """All that the agents wrote; each prompt is read once for all of an agent's responses to it."""
    tokenizer = agents.load_model(TEAM[0]).tokenizer  # the same for all built-in models
    count = 0
    for row in runs.read_jsonl(Path(run) / "proposals.jsonl"):
        count += len(agents.encode(tokenizer, agents.agent_messages(row["question"])))
        for response in row["responses"]:
            count += len(tokenizer(response)["input_ids"]) + 1  # and the end
    return count


def rows_of_training(out, variant, seed, command):
    """What it cost; and how often it was right on the validation questions meanwhile."""
    row = {"variant": variant, "seed": seed, "command": command}
    rows = [{**row, "mode": "training", "tokens": tokens_of_training(out)}]
    metrics = runs.read_jsonl(out / "metrics.jsonl")
    for who in ("alone", "team"):
        looks = [m for m in metrics if m["during"] == "mlpo" and who in m]
        curve = [[look["step"], look[who]] for look in looks]
        rows.append({**row, "mode": f"curve {who}", "curve": curve})
    return rows


def make_agent(args, name):
    """An agent with the misconceptions of MORE_AGENTS, taught like the built-in ones, but from the
    first one's weights."""
    agent = agents.load_model("tiny/agent1")
    work = Path(args.work) / "making"
    work.mkdir(exist_ok=True)
    make.BELIEFS[name] = dict(zip(tiny.TASKS, MORE_AGENTS[name]))
    make.CONVINCED = 1.0 if name.startswith("trusting") else CONVINCED
    make.study(name, agent.model, agent.tokenizer, work, min(500, 5 * args.steps), decay=0.6)
    runs.save_model(Path(args.work) / name, agent)


def make_leader(args, name):
    """`sometimes` and `often` follow their misconceptions less than the built-in leader does, from
    whose weights they are taught; `half` is half as wide, from random weights."""
    leader = agents.load_model("tiny")
    steps = min(400, 4 * args.steps)
    alone = LEADERS.get(name, make.ALONE)
    if name == "half":
        torch.manual_seed(0)
        config = leader.model.config
        config.update({"hidden_size": 64, "intermediate_size": 192, "head_dim": 16})
        leader.model = type(leader.model)(config).float()
        steps = min(1500, 10 * args.steps)
    work = Path(args.work) / "making" / name
    work.mkdir(exist_ok=True, parents=True)
    make.study("leader", leader.model, leader.tokenizer, work, steps, decay=0.6, alone=alone)
    runs.save_model(Path(args.work) / name, leader)


def write_finals(args, seed):
    """The proposals of the seed, cut to their final sentence."""
    rows = runs.read_jsonl(f"{args.work}/sft-{seed}/proposals.jsonl")
    for row in rows:
        row["responses"] = [final_sentence(text) for text in row["responses"]]
    runs.write_jsonl(f"{args.work}/finals-{seed}.jsonl", rows)


def final_sentence(text):
    return f"So the answer is {extract_agent_answer(text) or ''}."


# ------------------------------------------------------------------------- what everyone is asked


def tasks_of(args, which):
    """The test questions: of tiny, or a third as many of each of the official files (`bbh`)."""
    if which == "tiny":
        return list(data.load_tasks("tiny", "test", args.questions, QUESTIONS_SEED))
    tasks = []
    for task in tiny.TASKS:
        tasks += data.load_tasks(f"{args.bbh}/{task}.json", "all", args.questions // 3, 0)
    return tasks


def say(args, which, name):
    """An agent's first responses to the test questions, sampled once for everybody."""
    tasks = tasks_of(args, which)
    agent = agents.load_model(folder_of(args, name))
    prompts = [agents.agent_messages(task["question"]) for task in tasks]
    torch.manual_seed(0)
    said = []
    for completions in agent.answer(prompts, SAMPLES, max_new_tokens=LONGEST):
        said.append([[c.text, len(c.ids), len(c.prompt_ids)] for c in completions])
    runs.write_json(said_path(args, which, name), said)


def said_path(args, which, name):
    return Path(args.work) / f"said-{which}-{Path(name).name}.json"


def folder_of(args, name):
    return f"{args.work}/{name}" if name in MORE_AGENTS else name


def team_of(team):
    """The agents of a team. What those of `finals` say is cut to their answers; those of `shuffled`
    speak in an order that changes from question to question."""
    everybody = [*TEAM, *MORE_AGENTS]
    members = {"three": TEAM, "finals": TEAM, "shuffled": TEAM, "same": 3 * TEAM[:1]}
    members |= {"unseen": everybody[3:6], "trusting": everybody[6:]}
    for size in TEAM_SIZES:
        members[size] = everybody[: int(size[1:])]
    return members[team]


def first_responses(args, team, which, seed, n=0):
    """Per question n (or K) Completions, in which the agents take turns. Each seed begins with
    another sample of those that `say` has made."""
    names = team_of(team)
    said = [runs.read_json(said_path(args, which, name)) for name in names]
    rng = random.Random(seed)
    of_questions = []
    for q in range(len(said[0])):
        responses = []
        for i in range(n or len(names)):
            turn, k = divmod(i, len(names))
            twins = names[:k].count(names[k])  # the same model before: another of its samples
            text, written, read = said[k][q][(seed + 5 * twins + turn) % SAMPLES]
            if team == "finals":
                text = final_sentence(text)
            responses.append(sampling.Completion(text, [0] * written, [], True, [0] * read))
        if team == "shuffled":
            rng.shuffle(responses)
        of_questions.append(responses)
    return of_questions


# ------------------------------------------------------------------------------- what is measured


def new_row(variant, seed, mode, said, right, prompts_read=None, command=""):
    """said: per question all that was written for its answer, of which the first `prompts_read`
    (by default all) read a prompt. right: per question, is the answer right?"""
    tokens = []
    for completions in said:
        read = sum(len(completion.prompt_ids) for completion in completions[:prompts_read])
        tokens.append(read + sum(len(completion.ids) for completion in completions))
    return {
        "variant": variant,
        "seed": seed,
        "mode": mode,
        "accuracy": fmean(right),
        "correct": evaluate.bits(right),
        "tokens": fmean(tokens),
        "command": command or "benchmarks/evidence.py",
    }


def score(who, tasks, said):
    """Per question: is it right? who: leader, agent, majority or any_right, as in evaluate.py."""
    return [evaluate.is_right(who, task, completions) for task, completions in zip(tasks, said)]


def look(args, variant, looks, seed):
    """Train a leader unless that is done, then measure it: `alone`, and leading a team (`three:5`:
    for 1 to 5 rounds); `bbh/alone`: on the official files."""
    folder, rows = "tiny", []
    if variant != "untrained":
        run, rows = train(args, variant, seed)
        folder = str(run / "leader")
    command = rows[0]["command"] if rows else ""
    leader = agents.load_model(folder)
    for name in looks.split():
        until, _, rounds = name.partition(":")
        team = until.removeprefix("bbh/")
        which = "bbh" if until.startswith("bbh/") else "tiny"
        tasks = tasks_of(args, which)
        if team == "alone":
            prompts = [agents.leader_messages(task["question"]) for task in tasks]
            said_by_mode = {name: leader.answer(prompts, 1, 0, LONGEST)}
        else:
            history = lead(args, leader, tasks, team, int(rounds), which, seed)
            said_by_mode = {}
            for t in range(1, int(rounds) + 1):
                said_by_mode[f"{until}:{t}"] = [evaluate.all_written(past[:t]) for past in history]
        for mode, said in said_by_mode.items():
            right = score("leader", tasks, said)
            rows.append(new_row(variant, seed, mode, said, right, command=command))
    return rows


def lead(args, leader, tasks, team, rounds, which, seed):
    """Per question its rounds, as `agents.deliberate` gives them."""
    if rounds > 1 and team in ("finals", "shuffled"):
        raise ValueError(f"{team}:{rounds}: measured for one round only")
    speakers = []
    if rounds > 1:
        speakers = [agents.load_model(folder_of(args, name)) for name in team_of(team)]
    questions = [task["question"] for task in tasks]
    first = first_responses(args, team, which, seed)
    torch.manual_seed(seed)  # the same luck for every leader
    settings = {"max_new_tokens": LONGEST, "responses": first}
    return agents.deliberate(leader, speakers, questions, rounds, **settings)


# ---------------------------------------------------------------------------------- the baselines


def baselines(args, team, which, seed):
    """Each agent, votes of different size, and the share of questions on which any is right."""
    prefix = "" if which == "tiny" else f"{which}/"
    tasks = tasks_of(args, which)
    first = first_responses(args, team, which, seed)
    k = len(first[0])
    rows = []
    for j in range(k):
        said = [responses[j : j + 1] for responses in first]
        right = score("agent", tasks, said)
        rows.append(new_row(team, seed, f"{prefix}agent {j + 1}", said, right))
    for n in (k, 20, 40) if which == "tiny" else (k,):
        said = first_responses(args, team, which, seed, n)
        right = score("majority", tasks, said)
        rows.append(new_row(team, seed, f"{prefix}majority of {n}", said, right, prompts_read=k))
    right = score("any_right", tasks, first)
    return [*rows, new_row(team, seed, f"{prefix}any", first, right)]


def as_output(text):
    """An agent's response in the form of a leader's output."""
    answer = extract_agent_answer(text) or ""
    return f"<think> {agents.quote(text)} </think> <answer> {answer} </answer>"


def preferences(leader, prompt, texts):
    """Each response's mean log-probability as the leader's own output after this prompt, (K,)."""
    written = [as_output(text) for text in texts]
    outputs = leader.tokenizer(written, add_special_tokens=False)["input_ids"]
    logprobs, mask = shared_prompt.completion_logprobs(leader.model, [prompt], [outputs])
    return (logprobs * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def pick(args, variant, team, seed):
    """A leader that writes nothing, and is trained to pick: the response that it finds likeliest is
    its answer."""
    leader = train_to_pick(args, variant, seed)
    tasks = tasks_of(args, "tiny")
    first = first_responses(args, team, "tiny", seed)
    picked = []
    said = []
    for task, responses in zip(tasks, first):
        texts = [completion.text for completion in responses]
        prompt = agents.encode(leader.tokenizer, agents.leader_messages(task["question"], texts))
        scores = preferences(leader, prompt, texts)
        picked.append([responses[int(scores.argmax())]])
        # it reads, too (that it scores each response costs some more, which is not counted)
        said.append([*responses, sampling.Completion("", prompt_ids=prompt)])
    return [new_row(variant, seed, f"{team}:1", said, score("agent", tasks, picked))]


@torch.enable_grad()
def train_to_pick(args, variant, seed, batch=16, lr=5e-4):
    """Supervised, so that the softmax of its preferences is on the right responses, for as many
    steps as MLPO has, from the untrained leader. With MLPO's learning rate it would not be done."""
    leader = agents.load_model("tiny")
    rng = random.Random(seed)
    cached = {}
    for row in runs.read_jsonl(f"{args.work}/sft-{seed}/proposals.jsonl"):
        cached.setdefault(row["question"], []).append(row["responses"])
    tasks = list(data.load_tasks("tiny", "train", args.train_questions, seed))
    optimizer = torch.optim.AdamW(leader.model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(args.steps):
        losses = []
        while len(losses) < batch:
            task = rng.choice(tasks)
            texts = [rng.choice(of_agent) for of_agent in cached[task["question"]]]
            rng.shuffle(texts)
            answers = [extract_agent_answer(text) for text in texts]
            right = [is_correct(answer, task["answer"], task["question"]) for answer in answers]
            right = torch.tensor(right)
            if right.any() and not right.all():
                messages = agents.leader_messages(task["question"], texts)
                scores = preferences(leader, agents.encode(leader.tokenizer, messages), texts)
                losses.append(scores.logsumexp(0) - scores[right].logsumexp(0))
        torch.stack(losses).mean().backward()
        gradient_step(leader.model, optimizer, learning_rate(step, args.steps, lr, warmup=10))
    return leader


def debate(args, team, seed, rounds=3):
    """No leader: each agent refines, given the next one's response as advice, in the form in which
    it knows the leader's; then a vote."""
    speakers = [agents.load_model(folder_of(args, name)) for name in team_of(team)]
    tasks = tasks_of(args, "tiny")
    said = first_responses(args, team, "tiny", seed)
    everything = said
    torch.manual_seed(seed)
    rows = []
    for t in range(1, rounds + 1):
        refined = [[] for _ in tasks]
        for k, agent in enumerate(speakers):
            prompts = []
            for task, responses in zip(tasks, said):
                advice = as_output(responses[(k + 1) % len(responses)].text)
                prompts.append(agents.agent_messages(task["question"], responses[k].text, advice))
            answers = agent.answer(prompts, max_new_tokens=LONGEST)
            for of_question, [completion] in zip(refined, answers):
                of_question.append(completion)
        said = refined
        everything = [[*old, *new] for old, new in zip(everything, said)]
        right = score("majority", tasks, said)
        rows.append(new_row(team, seed, f"debate:{t}", everything, right))
    return rows


def self_consistency(args, variant, seed):
    """Votes of the leader alone: of as many samples as cost the tokens of its team."""
    tasks = tasks_of(args, "tiny")
    leader = agents.load_model(f"{args.work}/{variant}-{seed}/leader")
    prompts = [agents.leader_messages(task["question"]) for task in tasks]
    team = first_responses(args, "three", "tiny", seed)
    torch.manual_seed(seed)
    said = leader.answer(prompts, 20, 0.7, LONGEST)  # usual for votes; more than are needed
    written = sum(len(c.ids) for of_question in team for c in of_question)
    read = sum(len(c.prompt_ids) for of_question in team for c in of_question)
    own = sum(len(of_question[0].ids) for of_question in said)
    # the leader with its team writes once, and reads what the agents wrote
    equal = round((2 * written + read + own) / own)
    if equal > 20:
        raise ValueError(f"the tokens of its team are those of {equal} votes: sample more than 20")
    said = [of_question[:equal] for of_question in said]
    right = []
    for task, completions in zip(tasks, said):
        answers = [extract_answer(c.text) for c in completions]
        voted = evaluate.vote(answers, task["question"])
        right.append(is_correct(voted, task["answer"], task["question"]))
    return [new_row(variant, seed, "votes, as many tokens", said, right, prompts_read=1)]


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        runs.fail(error)
    except KeyboardInterrupt:
        runs.fail("stopped; what is done is saved: the same command goes on")
