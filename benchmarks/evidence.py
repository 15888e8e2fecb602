"""The evidence: every claim of the paper, and the open questions around it, on the laboratory.

    pip install -r requirements-dev.txt
    python benchmarks/evidence.py --out runs/again            # all of it; if stopped, it goes on
    python benchmarks/evidence.py --out runs/again --quick    # two seeds, the main rows
    python benchmarks/evidence.py --out runs/again --bbh bbh  # and the official files in bbh/
    python benchmarks/evidence.py --report                   # tables and pictures, no measurement

Read `plan` first: what is trained and measured, in which order. Every measurement is a row of
`evidence.jsonl`; `RESULTS.md` and the pictures are made from these rows and nothing else. What is
trained is trained by `train.py`, with the command that the row names. A comparison is paired: all
variants of a seed share the proposals, the SFT leader, the test questions, the agents' first
responses to them and the random numbers of the later rounds.
"""

import argparse
import math
import os
import random
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a worker is one thread, and so is its training

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny_models")]
import make
from evidence_report import report

import agents
import data
import evaluate
import runs
import sampling
import shared_prompt
import tiny
from rewards import extract_agent_answer, extract_answer, is_correct

SEEDS = range(10, 15)  # fresh: 0 to 7 were used while the method was being built
SAMPLES = {"tiny": 14, "fresh": 5, "bbh": 5}  # first responses of each agent to each question
LONGEST, SEED = 120, evaluate.SEED

# name: (start, what is added to the command). Start: "sft", from the seed's SFT leader; "tiny",
# from the untrained one; "own", with an SFT phase of its own.
VARIANTS = {
    "sft": ("own", "--steps 0"),  # makes the seed's proposals as well
    "mlpo": ("sft", ""),
    "grpo": ("sft", "--agents none"),
    "mlpo_only": ("tiny", ""),
    "grpo_only": ("tiny", "--agents none"),
    "mlpo_150": ("sft", "--steps 150"),  # train.py's default: are they better when trained longer?
    "grpo_150": ("sft", "--steps 150 --agents none"),
    "grpo_only_150": ("tiny", "--steps 150 --agents none"),
    "easy0_150": ("sft", "--steps 150 --easy_share 0"),
    "grpo_tokens": ("sft", "--agents none"),  # with as many steps as make its tokens MLPO's
    "easy0": ("sft", "--easy_share 0"),
    "easy1": ("sft", "--easy_share 1"),
    "grpo_easy0": ("sft", "--agents none --easy_share 0"),
    "grpo_easy1": ("sft", "--agents none --easy_share 1"),
    "scaled": ("sft", "--scale_rewards"),
    "kl": ("sft", "--kl_coef 0.05"),
    "dropout0": ("sft", "--team_dropout 0"),
    "random": ("sft", "--random_team"),
    "random_sft": ("own", "--random_team --proposals {work}/sft-{seed}/proposals.jsonl"),
    "rounds": ("sft", "--train_rounds 2"),
    "random_rounds": ("sft", "--random_team --train_rounds 2"),
    "paper": ("sft", "--paper"),
    "same": ("own", "--agents tiny/agent3 tiny/agent3 tiny/agent3"),
    "finals": ("sft", "--proposals {work}/finals-{seed}.jsonl"),
    "finals_sft": ("own", "--proposals {work}/finals-{seed}.jsonl"),
    "unseen": ("own", "--agents {work}/agent4 {work}/agent5 {work}/agent6"),
    "three_tasks": ("own", "--dataset {work}/three-{seed}.jsonl"),
    "half": ("own", "--leader {work}/half --proposals {work}/sft-{seed}/proposals.jsonl"),
    "blank": ("own", "--leader {work}/blank --proposals {work}/sft-{seed}/proposals.jsonl"),
}
MORE_AGENTS = {  # other combinations of the misconceptions of the three that are there
    "agent4": ["ignores not", "never turns", "counts every kind"],
    "agent5": [
        "takes accusers for liars",
        "counts moves, not steps",
        "closes only the last bracket",
    ],
    "agent6": ["mixes up and/or", "trusts nobody after a liar", "closes in the order of opening"],
}
SIZES = " ".join(f"K{k}:1" for k in (1, 2, 4, 5, 6))  # K = 3 is the team of the other rows


def plan(args):
    """What is done, as parts of units (function, its arguments). The units of a part can be done
    at the same time; the next part builds on them."""
    seeds, first, brief = args.seed_list, "alone three:5", "alone three:1"

    def each(*units):
        in_turns = []
        for seed in seeds:
            in_turns += [(function, what, seed, *more) for function, what, *more in units]
        return in_turns

    def look(looks, *names):
        return [(look_at, name, looks) for name in names]

    def said(which, *names):
        return [(say, which, name) for name in names]

    three, others = agents.team_names(["tiny"]), [f"{args.work}/{name}" for name in MORE_AGENTS]
    pickers = ("judge", "picker", "picker_random")
    parts = [
        said("tiny", *three),
        each(*look(first, "sft")),
        each(*look(first, "mlpo", "untrained"), *look(brief, "grpo", "mlpo_only")),
        each(*look(brief, "grpo_only"), (baselines, "three", "tiny")),
        each(*[(pick, name, "three") for name in pickers], (debate, "three")),
        each((self_consistency, "mlpo")),
    ]
    if not args.quick:
        changed = "easy0", "easy1", "grpo_easy0", "grpo_easy1", "scaled", "kl", "grpo_tokens"
        rounds = "mlpo_150", "random", "rounds", "random_rounds"
        again = each(*look(first, *rounds), *look(brief, "grpo_150", "paper"))
        made = [(make_agent, name) for name in MORE_AGENTS]
        made += [(make_leader, name) for name in ("half", "blank")]
        final = "mlpo", "grpo", "paper", "mlpo_150", "easy0_150", "grpo_150", "grpo_only_150"
        fresh = look("fresh/alone fresh/three:1", "untrained", "sft", *final)
        fresh += [(baselines, "three", "fresh")]
        parts += [again, each(*look(brief, *changed)), said("fresh", *three)]
        if args.bbh:
            bbh = look("bbh/alone bbh/three:1", "untrained", "sft", "mlpo", "grpo", "random")
            parts += [said("bbh", *three), each((baselines, "three", "bbh"), *bbh)]
        cut = each((write_finals, "finals"), (write_three_tasks, "three_tasks"))
        parts += [made, said("tiny", *others) + cut]
        teams = "unseen:1 shuffled:1 same:1 " + SIZES
        new_teams = [team for team in teams.replace(":1", "").split() if team != "shuffled"]
        parts += [
            each(
                *[(baselines, team, "tiny") for team in new_teams],
                *[(pick, name, "shuffled unseen") for name in pickers],
                *look(teams, "untrained", "mlpo", "random"),
                *look("unseen:1 shuffled:1", "sft", "random_rounds", "paper"),
                *look("finals:1", "mlpo"),
            ),
            each(
                *look(f"{brief} unseen:1 shuffled:1", "random_sft", "unseen"),
                *look(f"{brief} same:1", "same"),
                *look(brief, "three_tasks", "half"),
                *look(f"{brief} finals:1", "finals"),
            ),
            each(*look(brief, "easy0_150", "grpo_only_150", "dropout0")),
            each(*fresh),
            each(*look(f"{brief} finals:1", "finals_sft"), *look(brief, "blank")),
            each(*look(brief, "half_untrained", "half_sft", "blank_sft")),
        ]
    always = (say, make_agent, make_leader, write_finals, write_three_tasks)  # others need these

    def kept(unit):
        return not args.only or unit[0] in always or unit[1] in args.only

    return [list(filter(kept, part)) for part in parts]


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="two seeds, and the main rows only")
    add("--report", action="store_true", help="no measurement: RESULTS.md and pictures anew")
    add("--seeds", type=int, default=5, help=f"how many seeds, from {SEEDS[0]} on")
    add("--steps", type=int, default=60, help="steps of MLPO and of GRPO")
    add("--sft_steps", type=int, default=120, help="steps of SFT, and of the deferral leader")
    add("--questions", type=int, default=200, help="test questions")
    add("--train_questions", type=int, default=1000, help="questions with proposals")
    add("--jobs", type=int, default=2, help="how much is done at the same time, a thread for each")
    add("--bbh", default="", help="a folder with official BBH files: measure on them as well")
    add("--only", nargs="+", default=[], help="only these variants and teams (see plan)")
    add("--out", default=".", help="where RESULTS.md, benchmarks/ and runs/evidence/ are")
    args = parser.parse_args(argv)
    args.bbh = args.bbh and str(Path(args.bbh).resolve())
    args.out = "." if args.out == "." else str(Path(args.out).resolve())
    os.chdir(ROOT)  # so that the commands in the rows hold no folder of this machine
    args.work, path = f"{args.out}/runs/evidence".removeprefix("./"), rows_path(args.out)
    args.seed_list = list(range(SEEDS[0], SEEDS[0] + (2 if args.quick else args.seeds)))
    for folder in (Path(args.work), path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    rows = {row["key"]: row for row in runs.read_jsonl(path)}
    size = {k: getattr(args, k) for k in ("steps", "sft_steps", "questions", "train_questions")}
    if not args.report:
        made = Path(args.work) / "size.jsonl"  # of what was trained and said there
        known = runs.read_jsonl(made)
        if rows and not known:
            raise ValueError(
                f"{path} holds rows, {args.work} no leaders: --report, or another --out"
            )
        if any(other != size for other in [*known, *(row["size"] for row in rows.values())]):
            raise ValueError(f"{path} holds rows of other --steps or --questions: another --out")
        runs.write_jsonl(made, [size])
    for part in [] if args.report else plan(args):
        for new in at_the_same_time(args, rows, part):
            new = [{**row, "size": size} for row in new if row["key"] not in rows]
            runs.append_jsonl(path, new)  # here alone: workers read and write no rows
            rows |= {row["key"]: row for row in new}
            for row in new:
                print(f"{row['key']:40} {100 * row.get('accuracy', math.nan):5.1f}", flush=True)
        report(rows, args.out)
    report(rows, args.out)


def rows_path(out):
    return Path(out) / "benchmarks" / "evidence.jsonl"


def at_the_same_time(args, rows, units):
    """The new rows of each unit, as it is done, --jobs of them at a time."""
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        try:
            futures = [pool.submit(do, args, rows, unit) for unit in units]
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has begun is finished, and found next time
            raise


def do(args, rows, unit):
    """In a worker: the unit's new rows."""
    function, *what = unit
    torch.set_num_threads(1)
    return function(args, rows, *what) or []


# -------------------------------------------------------------------------------- what is trained


def run(args, variant, seed, steps=None):
    """Train it with train.py unless that is done; goes on where it was stopped. (run, its row)"""
    start, words = VARIANTS[variant]
    out, shared = Path(f"{args.work}/{variant}-{seed}"), f"{args.work}/sft-{seed}"
    told = f"{words} --seed {seed} --questions {args.train_questions} --eval_questions 0"
    told += " --validation_questions 10 --validate_every 1000"  # few: they are not needed here
    told += f" --steps {steps or args.steps}" * ("--steps" not in words)
    if start == "own":
        told += f" --sft_steps {args.sft_steps}"
    else:
        told += " --sft_steps 0" + f" --leader {shared}/leader" * (start == "sft")
        told += f" --proposals {shared}/proposals.jsonl" * ("--proposals" not in words)
    told = told.format(work=args.work, seed=seed).split() + ["--out", str(out)]
    return out, trained(variant, seed, told, out)


def trained(variant, seed, told, out):
    """The row of a training command: what it cost. Runs the command if that is not done yet."""
    saved = Path(f"{out}.json")
    if not saved.exists():
        began, old = time.time(), out.exists()
        going = (out / "config.json").exists() and not (out / "leader").exists()
        command = [sys.executable, "train.py", *told, *(["--resume"] if going else [])]
        with open(f"{out}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)  # with the memory it needed
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = Path(f"{out}.log").read_text().strip().splitlines()[-1]
            raise ValueError(f"{out}.log: {last}")
        steps = [r for r in runs.read_jsonl(out / "metrics.jsonl") if r["phase"] == "mlpo"]
        row = {"key": f"{variant}/{seed}/training", "variant": variant, "seed": seed}
        row |= {"mode": "training", "steps": len(steps), "tokens": sum(r["tokens"] for r in steps)}
        row |= {"seconds": round(sum(r["sampling"] + r["training"] for r in steps), 1)}
        wall = None if old else round(time.time() - began, 1)  # else not all of it was now
        row |= {"wall_seconds": wall, "peak_mb": peak_mb(usage)}
        runs.write_json(saved, row | {"command": f"python train.py {' '.join(told)}"})
    return runs.read_json(saved)


def peak_mb(usage=None):
    """Of a process that has ended, or of this one."""
    most = (usage or resource.getrusage(resource.RUSAGE_SELF)).ru_maxrss
    return round(most / (2**20 if sys.platform == "darwin" else 2**10))


def write_finals(args, rows, _, seed):
    """The proposals of the seed, cut to their final sentence."""
    rows = runs.read_jsonl(f"{args.work}/sft-{seed}/proposals.jsonl")
    rows = [{**row, "responses": [cut(text) for text in row["responses"]]} for row in rows]
    runs.write_jsonl(f"{args.work}/finals-{seed}.jsonl", rows)


def cut(text):
    return f"So the answer is {extract_agent_answer(text) or ''}."


def write_three_tasks(args, rows, _, seed):
    """Training puzzles of three of the five tasks; train.py takes 70% of a file for training."""
    rows = tiny.puzzles("train", 5 * args.train_questions // 2, seed)
    seen = ("boolean_expressions", "object_counting", "dyck_languages")
    runs.write_jsonl(f"{args.work}/three-{seed}.jsonl", [r for r in rows if r["task"] in seen])


def make_agent(args, rows, name):
    """An agent with other misconceptions, taught like the others, from the first one's weights."""
    folder, agent = Path(args.work) / name, agents.load_model("tiny/agent1")
    if not folder.exists():
        torch.manual_seed(0)
        make.AGENTS[name] = MORE_AGENTS[name]
        work = Path(args.work) / "making"
        work.mkdir(exist_ok=True)
        make.study(name, agent.model, agent.tokenizer, work, min(400, 5 * args.steps), decay=0.6)
        runs.save_model(folder, agent)


def make_leader(args, rows, name):
    """`half`: half as wide as the built-in leader, and less practised; `blank`: random weights."""
    folder, usual = Path(args.work) / name, agents.load_model("tiny")
    if not folder.exists():
        torch.manual_seed(0)
        config = usual.model.config
        if name == "half":
            config.update({"hidden_size": 64, "intermediate_size": 192, "head_dim": 16})
        usual.model = type(usual.model)(config).float()
        if name == "half":
            work = Path(args.work) / "making" / name
            work.mkdir(exist_ok=True, parents=True)
            steps = min(600, 8 * args.steps)
            make.study("leader", usual.model, usual.tokenizer, work, steps, decay=0.6)
        runs.save_model(folder, usual)


# ------------------------------------------------------------------------- what everyone is asked


def tasks_of(args, which):
    """The test questions: 200 of tiny's, twice as many others that were looked at when all was
    decided (`fresh`), or 100 of each of the official files of its tasks (`bbh`)."""
    if which == "tiny":
        return list(data.load_tasks("tiny", "test", args.questions, SEED))
    if which == "fresh":
        seen = {task["question"] for task in tasks_of(args, "tiny")}
        rows = data.load_tasks("tiny", "test", 3 * args.questions, SEED + 1)
        return [row for row in rows if row["question"] not in seen][: 2 * args.questions]
    paths = [f"{args.bbh}/{task}.json" for task in tiny.TASKS]
    return [row for p in paths for row in data.load_tasks(p, "all", args.questions // 2, SEED)]


def say(args, rows, which, name):
    """An agent's first responses to the test questions, sampled once for everybody."""
    path = Path(args.work) / f"said-{which}-{Path(name).name}.json"
    if not path.exists():
        tasks, agent = tasks_of(args, which), agents.load_model(name)
        prompts = [agents.agent_messages(task["question"]) for task in tasks]
        torch.manual_seed(SEED)
        began = time.time()
        said = agent.answer(prompts, SAMPLES[which], max_new_tokens=LONGEST)
        seconds = (time.time() - began) / len(tasks) / SAMPLES[which]
        lengths = [[[c.text, len(c.ids), len(c.prompt_ids)] for c in group] for group in said]
        runs.write_json(path, {"seconds": seconds, "said": lengths})
    tasks = [task["task"] for task in tasks_of(args, which)]
    row = {"variant": which, "seed": None, "mode": "tasks", "tasks": tasks}
    return [row | {"key": f"{which}/tasks"}]


def team_of(args, team):
    """`three`, the built-in agents; `finals`, their answers only; `shuffled`, in an order that
    changes from question to question; `same`, one of them three times; `unseen`; `K1` to `K6`."""

    def agent(k):
        return f"tiny/agent{k}" if k <= 3 else f"{args.work}/agent{k}"

    known = {"same": (3, 3, 3), "unseen": (4, 5, 6)}
    known |= dict.fromkeys(("three", "finals", "shuffled"), (1, 2, 3))
    return [agent(k) for k in known.get(team) or range(1, int(team[1:]) + 1)]


def first_responses(args, team, which, seed, n=0):
    """Per question n (or K) responses, in which the agents take turns, and seconds per question.
    Each seed begins with another sample of those that `say` has made."""
    names = team_of(args, team)
    paths = [Path(args.work) / f"said-{which}-{Path(name).name}.json" for name in names]
    cached, out, seconds = [runs.read_json(path) for path in paths], [], 0.0
    for i in range(n or len(names)):
        j, turn = i % len(names), i // len(names)
        twin = names[:j].count(names[j])  # the same model twice: another of its samples
        said = [group[(seed + 5 * twin + turn) % len(group)] for group in cached[j]["said"]]
        shown = cut if team == "finals" else str
        out.append([sampling.Completion(shown(t), [0] * a, [], True, [0] * b) for t, a, b in said])
        seconds += cached[j]["seconds"]
    said, rng = list(zip(*out)), random.Random(seed)
    if team == "shuffled":
        said = [tuple(rng.sample(responses, len(responses))) for responses in said]
    return said, seconds


# ------------------------------------------------------------------------------- what is measured


def new_row(variant, seed, mode, said, right, seconds, prompts=None, **more):
    """said: per question all that was written for it; the first `prompts` (or all) of it read a
    prompt; right: per question. Tokens and seconds are per question, seconds of one thread."""
    row = {"key": f"{variant}/{seed}/{mode}", "variant": variant, "seed": seed, "mode": mode}
    row |= {"accuracy": fmean(right), "correct": "".join("01"[bool(ok)] for ok in right)}
    row |= {"generations": fmean(map(len, said)), "seconds": float(f"{seconds:.3g}")}
    row["prompt_tokens"] = fmean(sum(len(c.prompt_ids) for c in cs[:prompts]) for cs in said)
    row["generated_tokens"] = fmean(sum(len(c.ids) for c in cs) for cs in said)
    return {**row, "command": "python benchmarks/evidence.py", **more}


def look_at(args, rows, variant, seed, looks):
    """Train a leader, then measure it: `alone`, and leading a team (`three:5`: for 1 to 5 rounds);
    `bbh/alone`: on the official files; `fresh/alone`: on other test questions."""

    def last(look):  # the mode of what is measured last
        return f"{variant}/{seed}/{look}"

    looks = [look for look in looks.split() if last(look) not in rows]
    found = find_leader(args, rows, variant, seed) if looks else None
    if not found:
        return []
    folder, new = found
    leader, how = agents.load_model(str(folder)), {"command": new[0]["command"]} if new else {}
    for look in looks:
        which, _, how_led = look.rpartition("/")
        which, (team, _, rounds) = which or "tiny", how_led.partition(":")
        tasks = tasks_of(args, which)
        if team == "alone":
            prompts = [agents.leader_messages(task["question"]) for task in tasks]
            began = time.time()
            said = leader.answer(prompts, 1, 0, LONGEST)
            seconds = (time.time() - began) / len(tasks)
            right = score("leader", tasks, said)
            new.append(new_row(variant, seed, look, said, right, seconds, **how))
            continue
        for t, (said, seconds) in enumerate(lead(args, leader, team, which, seed, int(rounds)), 1):
            mode = f"{look.rpartition(':')[0]}:{t}"
            more = {**how, "agrees": agreement(args, team, which, seed, said)}
            right = score("leader", tasks, said)
            new.append(new_row(variant, seed, mode, said, right, seconds, **more))
    return new


def score(who, tasks, said):
    """Per question: is what was said right, as evaluate.py sees it?"""
    return [evaluate.is_right(who, task, completions) for task, completions in zip(tasks, said)]


def find_leader(args, rows, variant, seed):
    """(its folder, [the row of its training, if it is trained]); None if there is none to train."""
    name, _, stage = variant.partition("_")
    if variant == "untrained":
        return "tiny", []
    if stage == "untrained":
        return f"{args.work}/{name}", []
    if variant not in VARIANTS:  # half_sft: the run `half` after its first phase
        return run(args, name, seed)[0] / "leader_sft", []
    steps = args.steps
    if variant == "grpo_tokens":
        tokens = [rows[f"{name}/{seed}/training"]["tokens"] for name in ("mlpo", "grpo")]
        steps = round(args.steps * tokens[0] / tokens[1])
        if abs(steps / args.steps - 1) <= 0.05:
            return None  # they are within 5% already
    out, row = run(args, variant, seed, steps)
    return out / "leader", [row]


def lead(args, leader, team, which, seed, rounds):
    """For T = 1, 2, ...: (what was written, per question; seconds per question)."""
    first, seconds = first_responses(args, team, which, seed)
    speakers = [agents.load_model(x) for x in team_of(args, team)] if rounds > 1 else []
    clock, questions = [], [task["question"] for task in tasks_of(args, which)]
    for speaker in (leader, *speakers):
        speaker.answer = timed(type(speaker).answer.__get__(speaker), clock)
    torch.manual_seed(SEED + seed)  # the same luck for every leader
    how = {"max_new_tokens": LONGEST, "responses": first}
    turns = agents.deliberate(leader, speakers, questions, rounds, **how)
    for t in range(1, rounds + 1):
        said = [[c for x in ts[:t] for c in (*x.responses, x.output)] for ts in turns]
        calls = 1 + (t - 1) * (len(speakers) + 1)  # each round: the agents', then the leader's
        yield said, seconds + sum(clock[:calls]) / len(questions)


def timed(answer, clock):
    """`answer`, whose calls leave their seconds in `clock`."""

    def wrapped(*words, **named):
        began = time.time()
        said = answer(*words, **named)
        clock.append(time.time() - began)
        return said

    return wrapped


def agreement(args, team, which, seed, said):
    """Bits: is the leader's answer that of the first responses' majority?"""
    votes = majority(tasks_of(args, which), first_responses(args, team, which, seed)[0])
    pairs = zip((extract_answer(cs[-1].text) for cs in said), votes)
    return "".join("01"[is_correct(answer, vote)] for answer, vote in pairs)


def majority(tasks, said, extract=extract_agent_answer):
    answers = [[extract(c.text) for c in cs] for cs in said]
    return [evaluate.vote(found, task["question"]) for found, task in zip(answers, tasks)]


# ---------------------------------------------------------------------------------- the baselines


def baselines(args, rows, team, seed, which):
    """Each agent, votes of different size, and the share of questions on which any is right."""
    prefix = f"{which}/" * (which != "tiny")
    if f"{team}/{seed}/{prefix}any" in rows:
        return []
    tasks, names = tasks_of(args, which), team_of(args, team)
    k, most = len(names), len(names) * SAMPLES[which]
    first, seconds = first_responses(args, team, which, seed)
    new = []
    for j in range(k):
        said = [cs[j : j + 1] for cs in first]
        right, mode = score("agent", tasks, said), f"{prefix}agent {j + 1}"
        new.append(new_row(team, seed, mode, said, right, seconds / k))
    sizes = {k} if team != "three" or prefix else {k * n for n in range(1, 9)} | {20, 40}
    for n in sorted(n for n in sizes if n <= most):
        said, seconds = first_responses(args, team, which, seed, n)
        right, mode = score("majority", tasks, said), f"{prefix}majority of {n}"
        more = {"prompts": k, "two_agree": two_agree(tasks, said)}
        new.append(new_row(team, seed, mode, said, right, seconds, **more))
    right = score("any_right", tasks, first)
    return [*new, new_row(team, seed, f"{prefix}any", first, right, seconds)]


def two_agree(tasks, said):
    """Bits: did two or more agents give the vote's answer? If not, it was a draw among all."""
    answers = [[extract_agent_answer(c.text) for c in cs] for cs in said]
    pairs = zip(answers, majority(tasks, said))
    return "".join("01"[sum(is_correct(a, vote) for a in found) > 1] for found, vote in pairs)


def as_output(text):
    """An agent's response in the form of a leader's output."""
    answer = extract_agent_answer(text)
    return f"<think> {agents.quote(text)} </think> <answer> {answer} </answer>"


def preferences(leader, question, texts):
    """Each response's mean log-probability as the leader's own output, (K,), where the prompt holds
    all of them; and the token ids of prompt and outputs."""
    prompt = agents.encode(leader.tokenizer, agents.leader_messages(question, texts))
    written = [as_output(text) for text in texts]
    outputs = leader.tokenizer(written, add_special_tokens=False)["input_ids"]
    logprobs, mask = shared_prompt.completion_logprobs(leader.model, [prompt], [outputs])
    return (logprobs * mask).sum(1) / mask.sum(1), prompt + sum(outputs, [])


def pick(args, rows, variant, seed, teams):
    """Leaders that write nothing: the response that they find likeliest is their answer. `judge` is
    the untrained one, the others are trained to pick."""
    teams = [team for team in teams.split() if f"{variant}/{seed}/{team}:picks" not in rows]
    leader, new = agents.load_model("tiny"), []
    if teams and variant != "judge":
        leader, cost = train_to_pick(args, variant, seed)
        new.append(cost)
    for team in teams:
        tasks, (first, seconds) = tasks_of(args, "tiny"), first_responses(args, team, "tiny", seed)
        began, right, said = time.time(), [], []
        for task, cs in zip(tasks, first):
            with torch.no_grad():
                scores, read = preferences(leader, task["question"], [c.text for c in cs])
            right.append(evaluate.is_right("agent", task, [cs[int(scores.argmax())]]))
            said.append([*cs, sampling.Completion("", [], [], True, read)])
        seconds += (time.time() - began) / len(tasks)
        new.append(new_row(variant, seed, f"{team}:picks", said, right, seconds))
    return new


def train_to_pick(args, variant, seed, batch=16, lr=5e-4):
    """(leader, row of costs): supervised, so that the softmax of its preferences is on the right
    responses. `picker_random` reads them in random order, and so cannot learn whose they are. The
    learning rate is SFT's; with MLPO's, 1e-4, it is still far from done after as many steps."""
    folder, saved = (
        Path(f"{args.work}/{variant}-{seed}"),
        Path(f"{args.work}/{variant}-{seed}.json"),
    )
    if folder.exists() and saved.exists():
        return agents.load_model(str(folder)), runs.read_json(saved)
    leader, rng, names = agents.load_model("tiny"), random.Random(seed), team_of(args, "three")
    tasks = list(data.load_tasks("tiny", "train", args.train_questions, seed))
    cached = runs.read_jsonl(f"{args.work}/sft-{seed}/proposals.jsonl")
    said = {(row["agent"], row["question"]): row["responses"] for row in cached}
    optimizer = torch.optim.AdamW(leader.model.parameters(), lr=lr, weight_decay=0.0)
    began, tokens = time.time(), 0
    for step in range(args.sft_steps):
        loss = 0.0
        for task in rng.sample(tasks, min(batch, len(tasks))):
            texts = [rng.choice(said[name, task["question"]]) for name in names]
            texts = rng.sample(texts, len(texts)) if variant == "picker_random" else texts
            right = [is_correct(extract_agent_answer(text), task["answer"]) for text in texts]
            if any(right) and not all(right):
                scores, read = preferences(leader, task["question"], texts)
                loss += scores.logsumexp(0) - scores[torch.tensor(right)].logsumexp(0)
                tokens += len(read)
        rate = min(1, (step + 1) / 11, 2 - 2 * step / args.sft_steps)  # train.py's schedule
        optimizer.param_groups[0]["lr"] = lr * rate
        optimizer.zero_grad()
        if torch.is_tensor(loss):
            (loss / batch).backward()
            torch.nn.utils.clip_grad_norm_(leader.model.parameters(), 1.0)
            optimizer.step()
    row = {"key": f"{variant}/{seed}/training", "variant": variant, "seed": seed}
    row |= {"mode": "training", "steps": args.sft_steps, "tokens": tokens}
    row |= dict.fromkeys(("seconds", "wall_seconds"), round(time.time() - began, 1))
    row |= {"peak_mb": peak_mb(), "command": "python benchmarks/evidence.py"}
    runs.save_model(folder, leader)
    runs.write_json(saved, row)
    return leader, row


def debate(args, rows, team, seed, rounds=2):
    """No leader: each agent refines, given the next one's response as advice, in the form in which
    it knows the leader's; then a vote."""
    if f"{team}/{seed}/debate:{rounds}" in rows:
        return []
    speakers = [agents.load_model(name) for name in team_of(args, team)]
    tasks, (first, seconds) = tasks_of(args, "tiny"), first_responses(args, team, "tiny", seed)
    began, said, everything = time.time(), first, [list(cs) for cs in first]
    torch.manual_seed(SEED + seed)
    for _ in range(rounds):
        columns = []
        for j, agent in enumerate(speakers):
            texts = [(cs[j].text, as_output(cs[(j + 1) % len(cs)].text)) for cs in said]
            prompts = [agents.agent_messages(t["question"], *x) for t, x in zip(tasks, texts)]
            columns.append([c for [c] in agent.answer(prompts, max_new_tokens=LONGEST)])
        said = list(zip(*columns))
        everything = [[*old, *new] for old, new in zip(everything, said)]
    right = score("majority", tasks, said)
    seconds += (time.time() - began) / len(tasks)
    return [new_row(team, seed, f"debate:{rounds}", everything, right, seconds)]


def self_consistency(args, rows, variant, seed):
    """The leader alone: votes of 1 to 8 samples, and of as many as cost the tokens of its team."""
    if f"{variant}/{seed}/votes, tokens of T=5" in rows:
        return []
    alone, tasks = rows[f"{variant}/{seed}/alone"], tasks_of(args, "tiny")
    sizes = {f"votes of {n}": n for n in range(1, 9)}
    for t in (1, 5):  # the prompt is read once, whatever the number of samples
        row = rows[f"{variant}/{seed}/three:{t}"]
        budget = row["prompt_tokens"] + row["generated_tokens"] - alone["prompt_tokens"]
        sizes[f"votes, tokens of T={t}"] = max(1, round(budget / alone["generated_tokens"]))
    leader = agents.load_model(f"{args.work}/{variant}-{seed}/leader")
    prompts = [agents.leader_messages(task["question"]) for task in tasks]
    most = max(sizes.values())
    torch.manual_seed(SEED + seed)
    began = time.time()
    said = leader.answer(prompts, most, 0.7, LONGEST)  # usual for votes; at 1 they are worse
    seconds, new = (time.time() - began) / len(tasks) / most, []
    for mode, n in sizes.items():
        some = [cs[:n] for cs in said]
        votes = majority(tasks, some, extract_answer)
        right = [is_correct(vote, task["answer"]) for vote, task in zip(votes, tasks)]
        new.append(new_row(variant, seed, mode, some, right, seconds * n, prompts=1))
    return new


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        runs.fail(error)
    except KeyboardInterrupt:
        runs.fail("stopped; what is done is saved: the same command goes on")
