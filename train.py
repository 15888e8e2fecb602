"""MLPO: train one leader to read the answers of a team of frozen agents and write a better one.

    python train.py                                 # the built-in laboratory, on a laptop
    python train.py --agents none --out runs/grpo   # plain GRPO on the leader alone
    torchrun --standalone --nproc_per_node=2 train.py   # several GPUs, or processes

Read `main` and `train` first: they are the method. Then the proposals, the filter, SFT and the MLPO
loop; what they compute is in grpo.py, sampling.py and agents.py.
"""

import bisect
import copy
import itertools
import math
import os
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # waiting threads sleep soon: see docs/speed.md

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.hf_argparser import HfArgumentParser

import agents
import compare
import evaluate
import grpo
import report
import runs
import shared_prompt
from data import columns, load_tasks
from rewards import extract_agent_answer, is_correct, judge
from sampling import autocast, is_out_of_memory, tolerance

# ----------------------------------------------------------------------------------- arguments


def option(default, text):
    """A field of the arguments with its help text."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class WhatToTrain:
    _argument_group_name = "what to train"
    leader: str = option("tiny", "the leader: a folder or hub name; tiny is the built-in one")
    agents: list[str] = option(
        ["tiny"], "folders, hub names, http://server/v1#model, solver.py#Name; none: plain GRPO"
    )
    dataset: str = option(
        "tiny", "tiny, a .json, .jsonl, .csv or .parquet file, or a benchmark (see data.py)"
    )
    question_column: str = option("", "what the dataset calls it, where it is no usual name")
    answer_column: str = option("", "likewise")
    task_column: str = option("", "likewise; the table counts by task")
    chat_template_kwargs: str = option(
        "", "JSON for the chat templates, such as '{\"enable_thinking\": false}' for Qwen3"
    )
    out: str = option("runs/mlpo", "folder of the run")
    resume: bool = option(False, "go on with the unfinished run in --out")
    seed: int = option(0, "seed of everything random")


@dataclass
class Proposals:
    _argument_group_name = "proposals"
    questions: int = option(600, "training questions that the team answers beforehand")
    samples: int = option(4, "responses per agent and training question")
    proposals: str = option("", "another run's proposals.jsonl, used in place of new ones")
    temperature: float = option(1.0, "sampling temperature of agents and leader")
    max_new_tokens: int = option(120, "longest completion, of agents and leader")
    easy_threshold: float = option(0.75, "a question is easy with this share of right responses")
    easy_share: float = option(0.5, "share of the easy questions kept for MLPO (the paper: 0)")


@dataclass
class Sft:
    _argument_group_name = "SFT"
    sft_steps: int = option(10, "supervised steps before MLPO; 0 skips them")
    sft_questions: int = option(50, "questions whose right responses SFT may show")
    sft_lr: float = option(5e-4, "peak of SFT's learning rate; ten steps do not reach it")
    sft_batch: int = option(32, "examples per SFT step")
    backtrack: float = option(0.3, "share of SFT examples that turn back from an error")
    sft_alone: float = option(
        0.5, "share of SFT examples without the team: the form is to be learned for both prompts"
    )


@dataclass
class Mlpo:
    _argument_group_name = "MLPO"
    steps: int = option(100, "MLPO steps; 0 skips them")
    questions_per_step: int = option(16, "questions per step")
    group_size: int = option(8, "G, completions per question")
    updates: int = option(1, "gradient steps on each step's completions; with 1, --clip is idle")
    lr: float = option(2e-4, "learning rate of MLPO; about 1e-6 for models of 0.5B up")
    warmup: int = option(10, "steps of linear warm-up, of SFT too")
    team_dropout: float = option(0.33, "share of questions asked without the team")
    random_order: bool = option(
        True, "the responses in a random order for each prompt: the leader can learn no seats"
    )
    random_team: bool = option(False, "each prompt's team: only some of the agents")
    train_rounds: int = option(1, "train on this many of the first rounds (the paper: 1)")
    paper: bool = option(
        False, "the paper's: easy_share 0, team_dropout 0, no random_team, round 1 only"
    )
    clip: float = option(
        0.2, "epsilon of the clipped ratio; it acts from a batch's second update on (--updates)"
    )
    kl_coef: float = option(0.0, "weight of the KL to the leader as it was before MLPO")
    scale_rewards: bool = option(False, "divide advantages by the group's standard deviation")


@dataclass
class Evaluation:
    _argument_group_name = "evaluation"
    validate_every: int = option(25, "MLPO steps between looks at the validation questions")
    validation_questions: int = option(100, "how many of them")
    eval_questions: int = option(150, "test questions of the final evaluation; 0 skips it")
    rounds: int = option(3, "T, rounds of leader and team in the final evaluation")


@dataclass
class Machine:
    _argument_group_name = "machine"
    device: str = option("", "cuda, mps or cpu; by default the first of them that is there")
    tokens_per_batch: int = option(8192, "tokens in one forward pass: lower it if memory ends")
    sample_gb: float = option(0.0, "memory for sampling; 0: 1 GB of a CPU, a quarter of a GPU's")
    checkpointing: bool = option(False, "activations are made twice, not kept: slower, smaller")
    plain: bool = option(False, "without shared_prompt.py: a copy of the prompt per completion")
    save_steps: int = option(50, "steps between checkpoints")


GROUPS = (WhatToTrain, Proposals, Sft, Mlpo, Evaluation, Machine)


@dataclass
class Arguments(Machine, Evaluation, Mlpo, Sft, Proposals, WhatToTrain):
    """All of them in one object, in the order of --help."""


def parse(argv=None):
    """The command line as `Arguments`. A value that makes no sense is a ValueError of one line;
    what cannot be read at all ends the script, with one line too (`runs.fail`)."""
    parser = HfArgumentParser(GROUPS, allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.error = runs.fail
    args = Arguments(**vars(parser.parse_args(argv)))
    check_numbers(args)
    agents.template_settings(args.chat_template_kwargs)
    if args.proposals and not Path(args.proposals).is_file():
        raise ValueError(f"--proposals {args.proposals}: no such file; name a proposals.jsonl")
    if args.paper:  # round 0 of the whole team, on every hard question
        args.easy_share = 0.0
        args.team_dropout = 0.0
        args.random_team = False
        args.train_rounds = 1
    args.device = agents.choose_device(args.device)
    if not agents.team_names(args.agents):  # plain GRPO: nobody to listen to, or to learn from
        args.team_dropout = 1.0
        args.sft_alone = 1.0
        if not args.proposals:
            args.sft_steps = 0
    return args


def check_numbers(args):
    """ValueError, which names the argument, for a number that makes no sense."""
    may_be_zero = ("seed", "sft_steps", "steps", "warmup", "eval_questions")
    shares = ("easy_share", "backtrack", "sft_alone", "team_dropout")
    for name, value in asdict(args).items():
        if type(value) not in (int, float):
            continue
        if name == "group_size":
            fits, wanted = value >= 2, "at least 2: completions are compared with each other"
        elif name in may_be_zero:
            fits, wanted = value >= 0, "at least 0"
        elif name in shares:
            fits, wanted = 0 <= value <= 1, "a share, from 0 to 1"
        elif name in ("temperature", "lr", "sft_lr"):
            fits, wanted = 0 < value < float("inf"), "more than 0"
        elif type(value) is int:
            fits, wanted = value >= 1, "at least 1"
        else:  # easy_threshold, clip, kl_coef, sample_gb
            fits, wanted = 0 <= value < float("inf"), "at least 0"
        if not fits:
            raise ValueError(f"--{name} {value}: it must be {wanted}")


# ---------------------------------------------------------------------------------- the method


def main(argv=None):
    """The method: proposals, filter, SFT and MLPO (`train`), evaluation."""
    args = parse(argv)
    runs.join_processes(args)
    run = runs.claim_folder(args.out, asdict(args), asdict(Arguments()), args.resume)
    if not (run / "results.json").exists():  # else it is finished: just its table once more
        train(args, run)
    if runs.rank() == 0 and args.eval_questions:
        results = evaluate.measure(run)
        compare.print_table([results])


def train(args, run):
    """All phases that are not done yet; leaves `leader_sft/` and `leader/` in the run's folder."""
    leader, team, tasks, held_out_tasks = prepare(args, run)
    if args.proposals:
        proposals = proposals_of_another_run(args, team, tasks)
    runs.write_json(run / "config.json", asdict(args))  # from here on the folder is this run's
    if not args.proposals:
        proposals = ask_for_proposals(args, run / "proposals.jsonl", team, tasks, args.samples)
    held_out = ask_for_proposals(args, run / "validation.jsonl", team, held_out_tasks, 1)

    hard, kept = drop_easy(args, proposals)
    write_prompts(args, run, leader, kept)
    if args.sft_steps and not (run / "leader_sft").exists():
        sft(args, run, leader, hard, held_out)
    if not (run / "leader").exists():
        mlpo(args, run, leader, team, kept, held_out)


def prepare(args, run):
    """(leader, team, training questions, validation questions), all of it checked: what is wrong
    shall be known now and not after hours."""
    tasks = questions_of(args, "train", args.questions)
    held_out_tasks = questions_of(args, "validation", args.validation_questions)
    sft_done = (run / "leader_sft").exists()  # a resumed run may be past this phase
    name = str(run / "leader_sft") if sft_done else args.leader
    leader, team = evaluate.load_leader_and_team(run, asdict(args), name)
    check_training(args, leader.model, name)
    tasks = evaluate.readable(leader, team, tasks, asdict(args))
    held_out_tasks = evaluate.readable(leader, team, held_out_tasks, asdict(args))
    if args.eval_questions:  # a question too long, or of unknown words, ends the run here
        evaluate.readable(leader, team, evaluate.drawn_questions(test_settings(args)), asdict(args))
    return leader, team, tasks, held_out_tasks


def test_settings(args):
    """What the evaluation will be told of its questions."""
    return {**asdict(args), "trained_on": args.dataset}


def questions_of(args, split, n):
    """n questions of that split: a list of {question, answer, task}."""
    return list(load_tasks(args.dataset, split, n, args.seed, **columns(asdict(args))))


def seed_everything(*key):
    """Random numbers of (seed, phase, step) alone, so that a resumed run is the same run."""
    rng = random.Random(repr(key))  # the same in all processes; torch's is another one in each
    torch.manual_seed(rng.getrandbits(62) + runs.rank())
    return rng


# ----------------------------------------------------------------------------------- proposals
# Every agent answers every training question n times, once and for all: the paper's cached
# responses. In the file: a row per agent and question. Here: a row per question, with
# `responses`, {agent's name: n texts}, and `right`, {agent's name: n times True or False}.


def ask_for_proposals(args, path, team, tasks, n):
    """The team's responses to these questions: those that are in the file, and new ones for what
    is missing. What another model, prompt or temperature made does not count."""
    cached = read_proposals(path, repair=True)
    for agent in team:
        mark = fingerprint_of(args, agent)
        done = answered(cached, agent.name, mark, n)
        parts = [tasks[i : i + 250] for i in range(0, len(tasks), 250)]
        for part in tqdm(runs.share(parts), f"proposals: {agent.name}", leave=False):
            questions = [task["question"] for task in part]
            if not done.issuperset(questions):  # then all of it, with the same random numbers
                seed_everything(args.seed, "propose", agent.name, questions[0])
                runs.append_jsonl(path, ask(args, agent, mark, questions, n))
    runs.wait_for_all()
    names = [agent.name for agent in team]
    return judge_responses(read_proposals(path, repair=True), names, tasks, n)


def proposals_of_another_run(args, team, tasks):
    """The responses in --proposals. ValueError if they are not this team's, or not enough. Without
    a team (plain GRPO): those of whoever is in that file."""
    cached = read_proposals(args.proposals, repair=False)  # it is not ours to repair
    marks = {agent.name: fingerprint_of(args, agent) for agent in team}
    if not marks:
        for name, question in sorted(cached):
            marks[name] = cached[name, question].get("made_by")
    for name, mark in marks.items():
        done = answered(cached, name, mark, args.samples)
        for task in tasks:
            if task["question"] not in done:
                same = "(same model, prompt, --temperature, --max_new_tokens, --dataset, --seed)"
                missing = f"not {args.samples} responses of {name} {same}"
                raise ValueError(f"--proposals: {missing} to {task['question'][:50]!r}")
    return judge_responses(cached, list(marks), tasks, args.samples)


def read_proposals(path, repair):
    """{(agent's name, question): row of the file}."""
    try:
        return {(row["agent"], row["question"]): row for row in runs.read_jsonl(path, repair)}
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not the proposals.jsonl of a run: agent, question...") from None


def fingerprint_of(args, agent):
    """What its responses depend on; it stands beside each of them as `made_by`."""
    return agent.fingerprint(prompt=agents.agent_messages(""), **sampling_settings(args))


def answered(cached, name, mark, n):
    """The questions to which this agent's n responses are there."""
    done = set()
    for (agent, question), row in cached.items():
        if agent == name and row.get("made_by") == mark and len(row["responses"]) >= n:
            done.add(question)
    return done


def ask(args, agent, mark, questions, n):
    """Rows for the file: n responses of this agent to each question."""
    prompts = [agents.agent_messages(question) for question in questions]
    answers = agent.answer(prompts, n=n, **sampling_settings(args))
    rows = []
    for question, completions in zip(questions, answers):
        row = {"agent": agent.name, "made_by": mark, "question": question}
        row["responses"] = [completion.text for completion in completions]
        rows.append(row)
    return rows


def judge_responses(cached, names, tasks, n):
    """The questions with the n responses of each agent, and which of these are right."""
    rows = []
    for task in tasks:
        question = task["question"]
        responses = {}
        right = {}
        for name in names:
            texts = cached[name, question]["responses"][:n]
            answers = [extract_agent_answer(text, question) for text in texts]
            responses[name] = texts
            right[name] = [is_correct(answer, task["answer"], question) for answer in answers]
        rows.append({**task, "responses": responses, "right": right})
    return rows


def drop_easy(args, rows):
    """(hard questions, the same and a share of the easy ones). Easy is what the team answers
    already; MLPO on the hard ones alone may learn what they have in common: docs/decisions.md."""
    rng = random.Random(args.seed)
    hard = []
    kept = []
    everything = []
    for row in rows:
        right = []
        for of_agent in row["right"].values():
            right += of_agent
        everything += right
        if right and fmean(right) >= args.easy_threshold:
            if rng.random() < args.easy_share:
                kept.append(row)
        else:
            hard.append(row)
            kept.append(row)
    share = fmean(everything) if everything else 0.0
    found = f"{len(hard)} of {len(rows)} questions hard for the team"
    runs.say(f"proposals: {share:.0%} right; {found}")
    if not hard:
        raise ValueError("every question is easy for this team: another --easy_threshold and --out")
    return hard, kept


def pick_responses(rng, row, args):
    """{agent's name: one of its proposals}; or nobody's, so that the leader practises alone."""
    if rng.random() < args.team_dropout:
        return {}
    team = [(name, rng.choice(texts)) for name, texts in row["responses"].items()]
    return dict(some_of(rng, team, args))


def some_of(rng, team, args):
    """The team of one prompt, as --random_team and --random_order have it."""
    size = rng.randint(1, len(team)) if args.random_team else len(team)
    chosen = rng.sample(team, size)
    if not args.random_order:
        chosen.sort(key=team.index)
    return chosen


def write_prompts(args, run, leader, rows):
    """The leader's prompts as a dataset for TRL: see docs/servers-and-trl.md."""
    rng = random.Random(args.seed)
    lines = []
    for row in rows:
        responses = pick_responses(rng, row, args)
        messages = agents.leader_messages(row["question"], responses.values(), responses)
        prompt = agents.defuse(leader.tokenizer, messages)
        line = {"prompt": prompt, "answer": row["answer"], "task": row["task"]}
        lines.append({**line, "question": row["question"]})
    runs.write_jsonl(run / "prompts.jsonl", lines)


# ------------------------------------------------------------------------------ phase 1: SFT


@dataclass
class Example:
    """One supervised example, as token ids: what is given, what is said after it, and for each
    token of the latter whether it is learned (the loss is on these)."""

    prompt: list
    target: list
    learned: list


def sft(args, run, leader, rows, held_out):
    """Supervised steps on the team's own responses. Leaves `leader_sft/`."""
    rows = [row for row in rows if anybody_right(row)]
    rows = rows[: args.sft_questions]
    if not rows:
        raise ValueError("SFT needs right responses and there are none: use --sft_steps 0")
    optimizer = make_optimizer(args, leader.model, args.sft_lr)
    phase = runs.Phase(run, "sft", args.sft_steps, args.save_steps, leader.model, optimizer)
    with phase:
        for step in phase.steps():
            if step == 0:
                look_at_validation(args, run, phase, leader, held_out)
            rng = seed_everything(args.seed, "sft", step)
            batch = []
            for row in rng.choices(rows, k=args.sft_batch):
                messages, parts = sft_example(rng, row, args)
                batch.append(encode_example(leader.tokenizer, messages, parts))
            loss = sft_gradient(args, leader.model, batch)
            rate = learning_rate(step, args.sft_steps, args.sft_lr, args.warmup)
            norm = gradient_step(leader.model, optimizer, rate)
            phase.check_gradient(norm)
            phase.log(loss=loss, grad_norm=norm, lr=rate)
    runs.save_model(run / "leader_sft", leader)


def anybody_right(row):
    """Is any of the team's responses to this question right?"""
    return any(True in of_agent for of_agent in row["right"].values())


def sft_example(rng, row, args):
    """Messages, and the output to them in parts, (text, is it learned): a right response of the
    team as the leader's own reasoning, at times after a wrong one and a turn back. The wrong one is
    not learned: the leader learns to turn back from errors, not to make them."""
    cached = []  # (text, is it right) of all that the team said to this question
    team = []  # one of each agent
    for name, texts in row["responses"].items():
        pairs = list(zip(texts, row["right"][name]))
        cached += pairs
        team.append((name, rng.choice(pairs)))
    if rng.random() < args.sft_alone:
        team = []
    else:
        team = some_of(rng, team, args)
    shown = dict(team)

    right = pick_response(rng, shown.values(), cached, wanted=True)
    wrong = pick_response(rng, shown.values(), cached, wanted=False)

    end = f"{right} </think> <answer> {row['answer']} </answer>"
    parts = [("<think> ", True)]
    if wrong and rng.random() < args.backtrack:
        parts.append((f"{wrong} ", False))
        end = f"Wait, that is wrong. {end}"
    parts.append((end, True))
    texts = [text for text, _ in shown.values()]
    return agents.leader_messages(row["question"], texts, shown), parts


def pick_response(rng, shown, cached, wanted):
    """A right response (or a wrong one): of those in the prompt if there is one, else of all that
    were cached; "" if there is none at all."""
    for pairs in (shown, cached):
        fitting = [text for text, right in pairs if right == wanted]
        if fitting:
            return agents.quote(rng.choice(fitting))
    return ""


def encode_example(tokenizer, messages, parts):
    """The texts of `sft_example` as token ids, with the end of sequence: it is learned too.

    Prompt and output are encoded as one text, as the leader will read and write it: a tokenizer of
    subwords cuts a text otherwise when it gets it in pieces. Where the template has opened
    `<think>` itself, the output goes on behind it."""
    prompt = agents.render(tokenizer, messages)
    if prompt.rstrip().endswith("<think>"):
        parts = parts[1:]
    text = prompt
    ends = []  # of each part, in the text
    for part, _ in parts:
        text += part
        ends.append(len(text))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    example = Example([], [], [])
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        if start < len(prompt):
            example.prompt.append(token)
        else:
            part = bisect.bisect_left(ends, end)  # in which the token ends
            example.target.append(token)
            example.learned.append(parts[part][1])
    example.target.append(tokenizer.eos_token_id)
    example.learned.append(True)
    return example


def sft_gradient(args, model, batch):
    """Add up the gradient of the mean loss per learned token, in parts; returns that loss."""
    tokens = sum(sum(example.learned) for example in batch)  # one denominator for the step
    total = 0.0
    for part in micro_batches(runs.share(batch), args.tokens_per_batch, length_of_example):
        prompts = [example.prompt for example in part]
        targets = [[example.target] for example in part]
        logprobs, _ = completion_logprobs(args, model, prompts, targets)  # (examples, R)
        learned = [torch.tensor(example.learned) for example in part]
        learned = pad_sequence(learned, batch_first=True).to(logprobs.device)  # (examples, R)
        loss = -(logprobs * learned).sum() / tokens
        loss.backward()
        total += loss.item()
    return sum(runs.gather([total]))


def length_of_example(example):
    return len(example.prompt) + len(example.target)


# ----------------------------------------------------------------------------- phase 2: MLPO


@dataclass
class Group:
    """One question's G completions of one prompt, which compete with each other."""

    completions: list  # G Completions
    verdicts: list  # G Verdicts
    advantages: torch.Tensor  # (G,)


def mlpo(args, run, leader, team, rows, held_out):
    """GRPO on the leader, with the team's cached responses in its prompt. Leaves `leader/`."""
    policy = leader.model  # trained in place: what the leader writes below is the policy's
    # before `Phase`, which puts a resumed run's later policy in place
    reference = frozen_copy(policy) if args.kl_coef else None
    optimizer = make_optimizer(args, policy, args.lr)
    phase = runs.Phase(run, "mlpo", args.steps, args.save_steps, policy, optimizer)
    drop_later_samples(run, phase.step)
    batches = question_batches(rows, args.questions_per_step, args.seed, phase.step)
    with phase:
        for step, rows_of_step in zip(phase.steps(), batches):
            if step % args.validate_every == 0:
                look_at_validation(args, run, phase, leader, held_out)
            rng = seed_everything(args.seed, "mlpo", step)
            clock = Stopwatch()

            questions = runs.share(rows_of_step)  # this process's, if there are several
            # drawn for the whole step; what comes back is for this process's questions
            responses, refine_tokens = choose_responses(args, rng, leader, team, rows_of_step)
            prompts = leader_prompts(questions, responses)
            completions = leader.answer(prompts, n=args.group_size, **sampling_settings(args))
            verdicts = judge_groups(questions, completions)
            rewards = rewards_of(verdicts)  # (questions, G)
            advantages = grpo.group_advantages(rewards, args.scale_rewards)  # (questions, G)
            groups = [Group(*parts) for parts in zip(completions, verdicts, advantages)]
            clock.lap("sampling")

            rate = learning_rate(step, args.steps, args.lr, args.warmup)
            logged = []
            for _ in range(args.updates):
                loss = loss_and_gradient(args, policy, reference, groups)  # numbers, for the log
                norm = gradient_step(policy, optimizer, rate)
                phase.check_gradient(norm)
                logged.append({**loss, "grad_norm": norm})
            clock.lap("training")

            log_step(phase, groups, logged, rate, refine_tokens, clock)
            keep_sample(args, run, step, leader, questions, prompts, groups)
    look_at_validation(args, run, phase, leader, held_out)
    runs.save_model(run / "leader", leader)


def question_batches(rows, size, seed, first_step=0):
    """Endless batches of questions, a new order every epoch. What a step gets depends on its number
    alone, so that a resumed run goes on with the same questions."""
    skipped = first_step * size
    batch = []
    for epoch in itertools.count(skipped // len(rows)):
        order = random.Random(f"{seed} {epoch}").sample(rows, len(rows))
        for row in order[skipped % len(rows) :]:
            batch.append(row)
            if len(batch) == size:
                yield batch
                batch = []
        skipped = 0


def sampling_settings(args):
    return {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}


def choose_responses(args, rng, leader, team, rows_of_step):
    """For each question of this process's share {agent's name: its response}, refined some times
    with --train_rounds; and how many tokens were read and written in refining."""
    # drawn for the whole step, so that every process draws the same
    responses = [pick_responses(rng, row, args) for row in rows_of_step]
    refinements = [rng.randrange(args.train_rounds) for _ in rows_of_step]
    responses, written = agents.refine(
        leader,
        team,
        [row["question"] for row in runs.share(rows_of_step)],
        runs.share(responses),
        runs.share(refinements),
        **sampling_settings(args),
    )
    tokens = sum(len(c.prompt_ids) + len(c.ids) for c in written)
    return responses, tokens


def leader_prompts(questions, responses):
    """What the leader reads: a question and the agents' responses to it."""
    prompts = []
    for row, of_team in zip(questions, responses):
        prompts.append(agents.leader_messages(row["question"], of_team.values(), of_team))
    return prompts


def judge_groups(questions, completions):
    """For each question the verdicts on its G completions."""
    verdicts = []
    for row, group in zip(questions, completions):
        texts = [completion.text for completion in group]
        verdicts.append([judge(text, row["answer"], row["question"]) for text in texts])
    return verdicts


def rewards_of(verdicts):
    """(questions, G)."""
    rewards = []
    for group in verdicts:
        rewards.append([verdict.reward for verdict in group])
    return torch.tensor(rewards, dtype=torch.float32)


def loss_and_gradient(args, policy, reference, groups):
    """Add up the gradient of grpo.grpo_loss over the step's `Group`s, some of them at a time.
    Returns the loss and, per token that was trained on, the KL and the share that was clipped."""
    # a flat group has nothing to compare: only the KL term could still pull on it
    groups = [group for group in groups if group.advantages.any() or args.kl_coef]
    # one denominator for the step, however it is cut, and whichever process has a share of it
    normalizer = args.questions_per_step * args.group_size * args.max_new_tokens
    sums = {"loss": 0.0, "clipped": 0.0, "kl": 0.0, "tokens": 0.0}
    for part in micro_batches(groups, args.tokens_per_batch, length_of_group(args)):
        loss, counts = part_loss(args, policy, reference, part, normalizer)
        loss.backward()
        for name, value in counts.items():
            sums[name] += value
    totals = dict.fromkeys(sums, 0.0)
    for of_process in runs.gather([sums]):
        for name, value in of_process.items():
            totals[name] += value
    tokens = max(1.0, totals["tokens"])
    return {
        "loss": totals["loss"],
        "kl": totals["kl"] / tokens,
        "clipped": totals["clipped"] / tokens,
    }


def part_loss(args, policy, reference, groups, normalizer):
    """The loss of these groups, with gradient, and what is counted: sums over their tokens."""
    prompts = [group.completions[0].prompt_ids for group in groups]
    completions = []
    old_logprobs = []
    for group in groups:
        completions.append([c.ids for c in group.completions])
        old_logprobs += [torch.tensor(c.logprobs) for c in group.completions]
    logprobs, mask = completion_logprobs(args, policy, prompts, completions, args.temperature)
    old_logprobs = pad_sequence(old_logprobs, batch_first=True).to(logprobs)  # (completions, R)
    advantages = torch.cat([group.advantages for group in groups]).to(logprobs)  # (completions,)
    reference_logprobs = logprobs.detach()  # without a reference: a KL of 0 in the log
    if reference is not None:
        with torch.no_grad():
            reference_logprobs, _ = completion_logprobs(
                args, reference, prompts, completions, args.temperature
            )
    loss = grpo.grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        args.clip,
        reference_logprobs,
        args.kl_coef,
        normalizer,
    )
    with torch.no_grad():
        ratio = (logprobs - old_logprobs).exp()
        too_likely = (advantages[:, None] > 0) & (ratio > 1 + args.clip)
        too_unlikely = (advantages[:, None] < 0) & (ratio < 1 - args.clip)
        clipped = too_likely | too_unlikely  # these tokens have no gradient
        kl = grpo.k3(logprobs, reference_logprobs)
        counts = {
            "loss": loss.item(),
            "clipped": (clipped * mask).sum().item(),
            "kl": (kl * mask).sum().item(),
            "tokens": mask.sum().item(),
        }
    return loss, counts


def completion_logprobs(args, model, prompts, completions, temperature=1.0):
    """The plain way (grpo.py) or the fast one (shared_prompt.py)."""
    if copies_prompts(args):
        return grpo.completion_logprobs(model, prompts, completions, temperature)
    return shared_prompt.completion_logprobs(model, prompts, completions, temperature)


def copies_prompts(args):
    """Whether each completion is run behind its own copy of its prompt, the plain way: the fast one
    needs the cache that activation checkpointing switches off."""
    return args.plain or args.checkpointing


@torch.no_grad()
def check_training(args, model, name):
    """ValueError if the log-probabilities that training sees are not those of the model's own
    forward pass: it may make its logits in a way that grpo.logits_of does not know."""
    prompt = list(range(1, 12))  # any tokens: what is compared is arithmetic
    completions = [list(range(2, 8)), list(range(7, 11))]
    worst = math.inf
    try:
        logprobs, _ = completion_logprobs(args, model, [prompt], [completions])
        gaps = []
        for ours, said in zip(logprobs, completions):
            with autocast(model):
                logits = model(torch.tensor([prompt + said], device=model.device)).logits[0]
            own = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
            targets = torch.tensor(said, device=model.device)[:, None]
            gaps.append((ours[: len(said)] - own.gather(1, targets)[:, 0]).abs().max().item())
        worst = max(gaps)
        if any(math.isnan(gap) for gap in gaps):  # max() may pass over it
            worst = math.inf
    except RuntimeError as error:  # its hidden states have no such shape
        if is_out_of_memory(error):
            raise
    if worst > tolerance(model):
        raise ValueError(
            f"--leader {name}: {model.config.model_type} makes its logits in a way that"
            " grpo.logits_of does not know: choose another leader (as an agent it works)"
        )


def length_of_group(args):
    """A function: how many tokens a group's forward pass has."""
    copies = args.group_size if copies_prompts(args) else 1  # of the prompt

    def length(group):
        written = sum(len(c.ids) for c in group.completions)
        return copies * len(group.completions[0].prompt_ids) + written

    return length


def micro_batches(items, budget, length):
    """Parts of like length, of up to `budget` tokens as if all were as long as the longest (or of
    one item). What is padded inside a group does not count."""
    left = sorted(items, key=length)
    while left:
        size = 1
        while size < len(left) and (size + 1) * length(left[size]) <= budget:
            size += 1
        yield left[:size]
        left = left[size:]


# --------------------------------------------------------------------------- the gradient step


def make_optimizer(args, model, lr):
    """AdamW on all weights. With --checkpointing, activations are made anew in the backward pass,
    for which transformers wants training mode, and so there must be no dropout."""
    if args.checkpointing:
        model.activation_checkpointing_enable()
        for name, value in model.config.to_dict().items():
            if "drop" in name and value:
                raise ValueError(f"--checkpointing trains without dropout: {name} must be 0")
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def learning_rate(step, steps, peak, warmup):
    """It rises to its peak in the warm-up, and falls to 0 in the second half."""
    warm = (step + 1) / (warmup + 1)
    left = 1 - step / steps
    return peak * min(1, warm, 2 * left)


def gradient_step(model, optimizer, rate):
    """One AdamW step on the gradient added up so far, clipped at norm 1. Returns its norm; where it
    is not finite, the step is skipped."""
    runs.add_up_gradients(model)
    optimizer.param_groups[0]["lr"] = rate
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # with a gradient of 0 AdamW would still move, by the momentum of earlier steps
    if norm.isfinite() and norm > 0:
        optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def frozen_copy(model):
    """The leader as it is now: the reference of the KL term."""
    reference = copy.deepcopy(model).requires_grad_(False)
    if reference.is_activation_checkpointing:
        reference.activation_checkpointing_disable()  # it has no gradient
    return reference


# ------------------------------------------------------------------------------------- the log

SAMPLES = 12  # groups that a run keeps to be read


class Stopwatch:
    """Seconds of each part of a step."""

    def __init__(self):
        self.laps = {}
        self.began = self.last = time.time()

    def lap(self, name):
        now = time.time()
        self.laps[name] = now - self.last
        self.last = now


def look_at_validation(args, run, phase, leader, held_out):
    """How many of the validation questions the leader has right, logged, and the curves so far."""
    phase.log("validation", **evaluate.validate(args, leader, held_out))
    if runs.rank() == 0:
        report.plot_curves(runs.read_jsonl(run / "metrics.jsonl"), run / "curves.png")


def log_step(phase, groups, logged, rate, refine_tokens, clock):
    """A row of metrics.jsonl. `logged`: loss, kl, clipped and grad_norm of each gradient step, of
    which the mean counts; `refine_tokens`: those of further rounds."""
    means = {}
    for name in logged[0]:
        means[name] = fmean(update[name] for update in logged)
    numbers = describe_step(runs.gather(groups))
    numbers["tokens"] += sum(runs.gather([refine_tokens]))
    speed = numbers["tokens"] / (time.time() - clock.began)
    phase.log(**means, lr=rate, **clock.laps, **numbers, tokens_per_s=speed)


def keep_sample(args, run, step, leader, questions, prompts, groups):
    """At some of the steps, one of the step's groups as a row of samples.jsonl, to be read: the
    first that has something to learn from, if there is one."""
    every = math.ceil(args.steps / SAMPLES)
    if step % every or runs.rank() != 0:
        return
    unequal = [i for i, group in enumerate(groups) if group.advantages.any()]
    chosen = unequal[0] if unequal else 0
    group = groups[chosen]
    completions = []
    for completion, verdict, advantage in zip(group.completions, group.verdicts, group.advantages):
        completions.append(
            {"text": completion.text, "reward": verdict.reward, "advantage": advantage.item()}
        )
    row = {
        "step": step,
        "question": questions[chosen]["question"],
        "answer": questions[chosen]["answer"],
        "prompt": agents.render(leader.tokenizer, prompts[chosen]),
        "completions": completions,
    }
    runs.append_jsonl(run / "samples.jsonl", [row])


def drop_later_samples(run, step):
    """Those of this step and after it: a resumed run is going to make them again."""
    rows = runs.read_jsonl(run / "samples.jsonl")
    runs.write_jsonl(run / "samples.jsonl", [row for row in rows if row["step"] < step])


def describe_step(groups):
    """A training step in numbers: means over its completions, shares of its groups, and `tokens`,
    all that was read and written. groups: objects with G `completions`, G `verdicts` on them
    (rewards.Verdict) and G `advantages`."""
    completions = []
    verdicts = []
    tokens = 0
    for group in groups:
        completions += group.completions
        verdicts += group.verdicts
        tokens += len(group.completions[0].prompt_ids)
    tokens += sum(len(completion.ids) for completion in completions)
    right = [sum(verdict.right for verdict in group.verdicts) for group in groups]
    return {
        "reward": fmean(verdict.reward for verdict in verdicts),
        "accuracy": fmean(verdict.right for verdict in verdicts),
        "format": fmean(verdict.formatted for verdict in verdicts),
        "length": fmean(len(completion.ids) for completion in completions),
        "truncated": fmean(not completion.finished for completion in completions),
        "entropy": fmean(entropy(completion) for completion in completions),
        # groups from which nothing is learned, and why
        "no_gradient": fmean(not group.advantages.any() for group in groups),
        "all_right": fmean(n == len(group.verdicts) for n, group in zip(right, groups)),
        "all_wrong": fmean(n == 0 for n in right),
        "tokens": tokens,
    }


def entropy(completion):
    """Per token, estimated from the tokens that were drawn; 0 if there are none."""
    return -sum(completion.logprobs) / max(1, len(completion.ids))


if __name__ == "__main__":
    runs.run_script(main)
