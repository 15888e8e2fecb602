"""MLPO: train one leader to read the answers of a team of frozen agents and write a better one.

    python train.py                                 # the built-in laboratory, on a laptop
    python train.py --agents none --out runs/grpo   # plain GRPO on the leader alone
    torchrun --standalone --nproc_per_node=2 train.py   # several GPUs, or processes

Read `main` first: it is the method. Then the proposals, SFT, the MLPO step, GRPO's functions.
"""

import copy
import math
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait long for others shall sleep

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.modeling_outputs import MoeModelOutputWithPast

import agents
import evaluate
import files
from data import columns, load_tasks
from rewards import extract_agent_answer, is_correct, reward

option = lambda default, text: HfArg(default_factory=lambda: default, help=text)
# bounds of these numbers; by itself a whole number is at least 1, and any other not negative
LEAST = {"seed": 0, "sft_steps": 0, "steps": 0, "warmup": 0, "group_size": 2, "eval_questions": 0}
LEAST |= {"temperature": 1e-3, "lr": 1e-12, "sft_lr": 1e-12}
MOST = {"team_dropout": 1, "backtrack": 1, "easy_share": 1}


@dataclass
class Arguments:
    leader: str = option("tiny", "leader: a folder or hub name; tiny is the built-in one")
    agents: list[str] = option(["tiny"], "folders, hub names, http://server/v1#model; none: GRPO")
    dataset: str = option("tiny", "tiny, a .json/.jsonl file, or a benchmark (see data.py)")
    question_column: str = option("", "what the dataset calls it, where it is no usual name")
    answer_column: str = option("", "likewise")
    task_column: str = option("", "likewise; the table counts by task")
    out: str = option("runs/mlpo", "folder of the run")
    seed: int = option(0, "seed of everything random")
    device: str = option("", "cuda, mps or cpu; by itself the first of them that is there")
    max_new_tokens: int = option(120, "longest completion, of agents and leader")
    temperature: float = option(1.0, "sampling temperature of agents and leader")
    questions: int = option(1000, "training questions that the team answers beforehand")
    samples: int = option(4, "responses per agent and training question")
    proposals: str = option("", "another run's proposals.jsonl, used in place of new ones")
    easy_threshold: float = option(0.75, "a question is easy with this share of right responses")
    easy_share: float = option(0.5, "share of the easy questions kept for MLPO (the paper: 0)")
    sft_steps: int = option(120, "supervised steps before MLPO; 0 skips them")
    sft_lr: float = option(5e-4, "learning rate of SFT")
    sft_batch: int = option(32, "examples per SFT step")
    backtrack: float = option(0.3, "share of SFT examples that turn back from an error")
    steps: int = option(150, "MLPO steps; 0 skips them")
    questions_per_step: int = option(16, "questions per step")
    group_size: int = option(8, "G, completions per question")
    updates: int = option(1, "gradient steps on each step's completions")
    lr: float = option(1e-4, "learning rate of MLPO; about 1e-6 for models of 0.5B up")
    warmup: int = option(10, "steps of linear warm-up")
    team_dropout: float = option(0.33, "share of questions asked without the team")
    random_team: bool = option(False, "each prompt's team: some of the agents, in random order")
    train_rounds: int = option(1, "train on this many of the first rounds (the paper: 1)")
    paper: bool = option(False, "the paper's setting of the last three, and of easy_share")
    clip: float = option(0.2, "epsilon of the clipped probability ratio")
    kl_coef: float = option(0.0, "weight of the KL to the leader as it was before MLPO")
    scale_rewards: bool = option(False, "divide advantages by the group's standard deviation")
    tokens_per_batch: int = option(8192, "tokens in one forward pass: lower it if memory ends")
    checkpointing: bool = option(False, "activations are made twice, not kept: slower, smaller")
    save_steps: int = option(50, "steps between checkpoints")
    resume: bool = option(False, "go on with the unfinished run in --out")
    validate_every: int = option(25, "MLPO steps between looks at the validation questions")
    validation_questions: int = option(100, "how many of them")
    eval_questions: int = option(200, "test questions of the final evaluation; 0 skips it")
    rounds: int = option(5, "T, rounds of leader and team in the final evaluation")


def parse(argv=None):
    """The command line as `Arguments`; a ValueError of one line if something is off."""
    parser = HfArgumentParser(Arguments, allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.error = files.fail
    args = Arguments(**vars(parser.parse_args(argv)))
    for name, value in asdict(args).items():
        least, most = LEAST.get(name, int(type(value) is int)), MOST.get(name, math.inf)
        if type(value) in (int, float) and not (least <= value <= most and value < math.inf):
            raise ValueError(f"--{name} must be from {least} to {most}, not {value}")
    if args.proposals and not Path(args.proposals).is_file():
        raise ValueError(f"--proposals {args.proposals}: no such file; name a proposals.jsonl")
    if args.paper:  # round 0 of the whole team, in its order, on every hard question
        args.easy_share, args.team_dropout, args.random_team, args.train_rounds = 0.0, 0.0, False, 1
    gpu = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps or None
    args.device = args.device or str(gpu or "cpu")
    if not agents.team_names(args.agents):  # plain GRPO: nobody to listen to, or to learn from
        args.team_dropout, args.sft_steps = 1.0, args.sft_steps if args.proposals else 0
    return args


def main(argv=None):
    """The method: proposals, filter, SFT, MLPO, evaluation."""
    args = parse(argv)
    files.start_processes(args)
    run = files.open_run(args.out, asdict(args), args.resume)
    if not (run / "results.json").exists():  # else it is finished: just its table once more
        part = lambda name, n: load_tasks(args.dataset, name, n, args.seed, **columns(vars(args)))
        tasks = list(part("train", args.questions))
        held = list(part("validation", args.validation_questions))
        sft_done = (run / "leader_sft").exists()  # a resumed run may be past this phase
        name = str(run / "leader_sft") if sft_done else args.leader
        leader, team = evaluate.load(run, vars(args), name, [t["question"] for t in tasks + held])
        rows = args.proposals and propose(args, args.proposals, team, tasks, args.samples)
        files.write_json(run / "config.json", asdict(args))  # from here on the folder is this run's
        rows = rows or propose(args, run / "proposals.jsonl", team, tasks, args.samples)
        held_out = propose(args, run / "validation.jsonl", team, held, 1)
        hard, kept = drop_easy(args, rows)
        write_prompts(args, run, leader, kept)
        if args.sft_steps and not sft_done:
            sft(args, run, leader, hard)
        if not (run / "leader").exists():
            mlpo(args, run, leader, team, kept, held_out)
    if files.rank() == 0 and args.eval_questions:
        evaluate.print_table([evaluate.measure(run)])


def write_prompts(args, run, leader, rows):
    """The leader's prompts as a dataset for TRL: see the README."""
    rng, lines = random.Random(args.seed), []
    for row in rows:
        texts = pick_responses(rng, row, args).values()
        prompt = agents.defuse(leader.tokenizer, agents.leader_messages(row["question"], texts))
        lines.append({"prompt": prompt, "answer": row["answer"], "task": row["task"]})
    files.write_jsonl(run / "prompts.jsonl", lines)


def seed_everything(*key):
    """Random numbers of (seed, phase, step) alone, so that a resumed run is the same run."""
    rng = random.Random(repr(key))  # the same in all processes; torch's is another one in each
    torch.manual_seed(rng.getrandbits(62) + files.rank())
    return rng


def propose(args, path, team, tasks, n):
    """Every agent answers every question n times, once and for all: the paper's cached responses.
    Returns tasks with `responses` (per agent, n texts) and `right`. A killed run goes on here; what
    another model, prompt or temperature made does not count."""
    how = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    own = path != args.proposals  # another run's file is not ours to repair
    read = lambda: {(r["agent"], r["question"]): r for r in files.read_jsonl(path, own)}
    try:
        cached, speakers = read(), {agent.name: agent for agent in team}
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not the proposals.jsonl of a run: agent, question...") from None
    made_by = {name: agent.fingerprint(**how) for name, agent in speakers.items()}
    # --agents none with --proposals: whoever is in that file
    made_by = made_by or {row["agent"]: row.get("made_by") for _, row in sorted(cached.items())}
    questions = [task["question"] for task in tasks]
    parts = [questions[i : i + 250] for i in range(0, len(tasks), 250)]
    for name, mark in made_by.items():
        fitting = [key for key, row in cached.items() if row.get("made_by") == mark]
        done = {q for a, q in fitting if a == name and len(cached[a, q]["responses"]) >= n}
        if not own and (left := [q for q in questions if q not in done]):
            same = "(same model, prompt, --temperature, --max_new_tokens, --dataset, --seed)"
            raise ValueError(f"--proposals: not {n} responses of {name} {same} to {left[0][:50]!r}")
        for part in tqdm(files.share(parts), f"proposals: {name}", leave=False):
            if not done.issuperset(part):  # then all of it, with the same random numbers again
                seed_everything(args.seed, "propose", name, part[0])
                prompts = [agents.agent_messages(question) for question in part]
                said = speakers[name].answer(prompts, n, **how)
                rows = [dict(agent=name, made_by=mark, question=q) for q in part]
                rows = [row | {"responses": [c.text for c in cs]} for row, cs in zip(rows, said)]
                files.append_jsonl(path, rows)
    files.wait_for_all()
    cached, rows = read(), []
    for task in tasks:
        said = [cached[name, task["question"]]["responses"][:n] for name in made_by]
        right = [[is_correct(extract_agent_answer(t), task["answer"]) for t in ts] for ts in said]
        rows.append({**task, "responses": said, "right": right})
    return rows


def drop_easy(args, rows):
    """(hard questions, the same and a share of the easy ones). Easy is what the team answers
    already; MLPO on the hard ones alone may learn what they have in common: see the README."""
    rng, right = random.Random(args.seed), lambda row: sum(row["right"], [])  # of all agents
    easy = lambda row: right(row) and fmean(right(row)) >= args.easy_threshold
    hard = [row for row in rows if not easy(row)]
    kept = [row for row in rows if not easy(row) or rng.random() < args.easy_share]
    share = fmean([ok for row in rows for ok in right(row)] or [0])
    print(f"proposals: {share:.0%} right; {len(hard)} of {len(rows)} questions hard for the team")
    if not hard:
        raise ValueError("every question is easy for this team: another --easy_threshold and --out")
    return hard, kept


def sft_example(rng, row, args):
    """Messages, the beginning of an output, and what to say after it: a right response of the team
    as the leader's own reasoning, at times after a wrong one and a turn back. The wrong part is
    given, not learned: the leader learns to turn back from errors, not to make them."""
    said = [list(zip(*agent)) for agent in zip(row["responses"], row["right"])]  # (text, right)
    team, cached = [rng.choice(pairs) for pairs in said], sum(said, [])
    team = [] if rng.random() < max(0.5, args.team_dropout) else some_of(rng, team, args)
    # those in the prompt if there is one, else any; "" if there is none at all
    fits = lambda pairs, wanted: [text for text, right in pairs if right == wanted]
    pick = lambda wanted: rng.choice(fits(team, wanted) or fits(cached, wanted) or [""])
    begin, target, wrong = "<think> ", agents.quote(pick(True)), agents.quote(pick(False))
    if wrong and rng.random() < args.backtrack:
        begin, target = f"<think> {wrong} ", f"Wait, that is wrong. {target}"
    target += f" </think> <answer> {row['answer']} </answer>"
    return agents.leader_messages(row["question"], [text for text, _ in team]), begin, target


def sft(args, run, leader, rows):
    """Phase 1: supervised steps on the team's own responses. Leaves `leader_sft/`."""
    rows = [row for row in rows if any(map(any, row["right"]))]
    if not rows:
        raise ValueError("SFT needs right responses and there are none: use --sft_steps 0")
    trainer = files.Trainer(args, run, leader.model, "sft", args.sft_steps, args.sft_lr)
    encode = lambda text: leader.tokenizer(text, add_special_tokens=False)["input_ids"]
    for step in trainer.steps():
        rng, batch, total = seed_everything(args.seed, "sft", step), [], 0.0
        for row in rng.choices(rows, k=args.sft_batch):
            messages, begin, target = sft_example(rng, row, args)
            prompt = agents.encode(leader.tokenizer, messages) + encode(begin)
            batch.append((prompt, [encode(target) + [leader.tokenizer.eos_token_id]]))
        tokens = sum(len(target) for _, [target] in batch)  # one denominator for the step
        for prompts, targets in files.by_tokens(files.share(batch), args.tokens_per_batch):
            logprobs, mask = completion_logprobs(leader.model, prompts, targets)
            loss = -(logprobs * mask).sum() / tokens
            loss.backward()
            total += loss.item()
        trainer.log(loss=sum(files.gather([total])), **trainer.update())
    files.save_leader(run / "leader_sft", leader)


def mlpo(args, run, leader, team, rows, held_out):
    """Phase 2: GRPO on the leader, with the team's cached responses in its prompt."""
    reference = copy.deepcopy(leader.model).requires_grad_(False) if args.kl_coef else None
    if reference is not None and args.checkpointing:
        reference.activation_checkpointing_disable()  # it has no gradient
    trainer = files.Trainer(args, run, leader.model, "mlpo", args.steps, args.lr)
    how = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    for step in trainer.steps():
        if step % args.validate_every == 0:
            trainer.log("validation", **evaluate.validate(args, leader, held_out))
        rng, began = seed_everything(args.seed, "mlpo", step), time.time()
        batch = nth_batch(rows, step, args.questions_per_step, args.seed)
        said = files.share([pick_responses(rng, row, args) for row in batch])
        rounds = files.share([rng.randrange(args.train_rounds) for _ in batch])
        batch = files.share(batch)  # of each step's questions every process has its share
        extra = agents.later_rounds(leader, team, batch, said, rounds, **how)
        prompts = [agents.leader_messages(r["question"], s.values()) for r, s in zip(batch, said)]
        groups = leader.answer(prompts, args.group_size, **how)
        sampled, asked = time.time(), list(zip(groups, batch))  # G completions each
        rewards = [reward([c.text for c in g], [row["answer"]] * len(g)) for g, row in asked]
        advantages = group_advantages(torch.tensor(rewards), args.scale_rewards)  # (questions, G)
        for _ in range(args.updates):
            stats = policy_gradient(args, leader.model, reference, groups, advantages)
            stats |= trainer.update()
        stats |= {"sampling": sampled - began, "training": time.time() - sampled}
        stats |= evaluate.describe(files.gather(list(zip(asked, rewards))))
        stats["tokens"] += sum(files.gather([len(c.prompt_ids) + len(c.ids) for c in extra]))
        trainer.log(**stats, tokens_per_s=stats["tokens"] / (time.time() - began))
    trainer.log("validation", **evaluate.validate(args, leader, held_out))
    files.save_leader(run / "leader", leader)


def nth_batch(rows, step, size, seed):
    """The questions of a step: a new order every time round, whatever was drawn before."""
    order = lambda epoch: random.Random(f"{seed} {epoch}").sample(rows, len(rows))
    return [order(n // len(rows))[n % len(rows)] for n in range(step * size, (step + 1) * size)]


def pick_responses(rng, row, args):
    """{agent's number: one of its proposals}; or nobody's, so that the leader practises alone."""
    if rng.random() < args.team_dropout:
        return {}
    team = [(k, rng.choice(texts)) for k, texts in enumerate(row["responses"])]
    return dict(some_of(rng, team, args))


def some_of(rng, team, args):
    """--random_team: some of it, in any order: the leader can learn neither who it is nor seats."""
    return rng.sample(team, rng.randint(1, len(team))) if args.random_team else team


def group_advantages(rewards, scale=False):
    """A_i = r_i - mean(r) within the group; with `scale`, divided by the group's std. Rewards and
    advantages: (questions, G). GRPO (arXiv 2402.03300) divides; Dr. GRPO (2503.20783) does not,
    since that favours questions that are nearly always or nearly never answered."""
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    advantages[(rewards == rewards[:, :1]).all(dim=1)] = 0.0  # exactly: a flat group is skipped
    return advantages / (rewards.std(dim=1, keepdim=True) + 1e-4) if scale else advantages


def policy_gradient(args, model, reference, groups, advantages):
    """Add up the gradient of the loss over the step's completions, some groups at a time."""
    # a flat group has nothing to compare: only the KL term could still pull on it
    kept = [(group, a) for group, a in zip(groups, advantages) if a.any() or args.kl_coef]
    batch = [(g[0].prompt_ids, [c.ids for c in g], [c.logprobs for c in g], a) for g, a in kept]
    # one denominator for the step, however it is cut, and whichever process has a share of it
    normalizer = args.questions_per_step * args.group_size * args.max_new_tokens
    sums = torch.zeros(4)  # loss; number of clipped tokens, sum of their KL, number of tokens
    repeated = model.is_activation_checkpointing
    for prompts, completions, old, a in files.by_tokens(batch, args.tokens_per_batch, repeated):
        logprobs, mask = completion_logprobs(model, prompts, completions, args.temperature)
        old = pad_sequence([torch.tensor(x) for x in sum(old, [])], batch_first=True).to(logprobs)
        a, ref = torch.cat(a).to(logprobs), logprobs.detach()  # (completions,); (completions, R)
        if reference is not None:
            ref, _ = completion_logprobs(reference, prompts, completions, args.temperature)
        loss = grpo_loss(logprobs, old, a, mask, args.clip, ref, args.kl_coef, normalizer)
        loss.backward()
        clipped = ((logprobs - old).exp() - 1).abs() > args.clip
        counts = [(x * mask).sum() for x in (clipped, k3(logprobs, ref), mask)]
        sums += torch.stack([loss, *counts]).detach().cpu()
    loss, clipped, kl, tokens = torch.tensor(files.gather([sums.tolist()])).sum(0).tolist()
    return {"loss": loss, "kl": kl / max(1, tokens), "clipped": clipped / max(1, tokens)}


def completion_logprobs(model, prompts, completions, temperature=1.0):
    """log pi(token | prompt, completion so far) of every completion token, with gradient, and the
    mask of these tokens, the end of sequence included: (B * G, R) each. prompts: B lists of token
    ids; completions: B lists of G lists. A prompt is run once (but with checkpointing: G times) and
    its G completions share its keys and values: P + G R tokens instead of G (P + R); gradients flow
    back through the cache. Completions of like length are run together: little is padding."""
    device, g = model.device, len(completions[0])
    # the prompt's last token predicts the completion's first: it is run with the completion; and so
    # is all of the prompt with checkpointing, which works in training mode and without a cache
    cut = 0 if model.is_activation_checkpointing else -1
    model.train(cut == 0)
    heads, seen = agents.pad([p[:cut] for p in prompts], device, "left")  # (B, P - 1) each
    inputs = [p[cut:] + c[:-1] for p, group in zip(prompts, completions) for c in group]
    targets, mask = agents.pad([c for group in completions for c in group], device, "right")
    logprobs = torch.zeros(mask.shape, device=device)
    left = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    with agents.autocast(model):
        kv, t = DynamicCache(), (seen.cumsum(1) - 1).clamp(min=0)  # t: (B, P - 1)
        if seen.any():
            model.base_model(heads, attention_mask=seen, position_ids=t, past_key_values=kv)
        while left:
            part = [i for i in left if len(inputs[i]) >= 0.7 * len(inputs[left[0]])]
            left, rows = left[len(part) :], torch.tensor(part, device=device)
            ids, own = agents.pad([inputs[i] for i in part], device, "right")  # (rows, R') each
            b = rows // g  # (rows,), their prompts; the backward of x[b] would add in any order
            shared = [(x.keys.index_select(0, b), x.values.index_select(0, b)) for x in kv.layers]
            shared = DynamicCache(shared) if shared else None  # the list would hold memory
            whole = torch.cat([seen[b], own], dim=1)  # (rows, P - 1 + R')
            read = dict(attention_mask=whole, position_ids=whole.cumsum(1)[:, -own.shape[1] :] - 1)
            hidden = model.base_model(ids, past_key_values=shared, use_cache=cut < 0, **read)[0]
            row, k = mask[rows].nonzero(as_tuple=True)  # the tokens of completions: (tokens,) each
            place, t = (rows[row], k), k + (own.sum(1) - mask[rows].sum(1))[row]
            logprobs[place] = token_logprobs(model, hidden[row, t], targets[place], temperature)
    model.eval()
    return logprobs, mask


def token_logprobs(model, hidden, targets, temperature, chunk=1024):
    """log softmax(logits / T)[target]: (tokens,) in float32. Logits, not weights, are what fills
    the memory of a small model: they are made in chunks, and again for the backward pass."""
    head = copy.copy(model)  # its own forward makes the logits: some models scale or cap them

    def some(hidden, targets):
        body = lambda *_, **__: MoeModelOutputWithPast(hidden[None])
        head._modules = {**model._modules, model.base_model_prefix: body}
        with agents.autocast(model):
            logits = head(targets[None]).logits[0].float()
        return torch.log_softmax(logits / temperature, -1).gather(1, targets[:, None])[:, 0]

    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(some, h, t, use_reentrant=False) for h, t in parts])


def k3(logprobs, ref):
    """KL(policy || reference) per token, unbiased and never negative (Schulman's estimator k3)."""
    d = ref - logprobs
    return d.exp() - d - 1


def grpo_loss(logprobs, old, advantages, mask, clip=0.2, ref=None, kl_coef=0.0, normalizer=None):
    """-1/Z sum_i sum_t [min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i) - kl_coef k3], a scalar.
    logprobs, old (from sampling; ratio = new / old), ref (the reference's) and mask: (completions,
    tokens); advantages: (completions,). Z, the normalizer, is a constant, completions x longest
    possible completion (Dr. GRPO); by itself the size of the mask."""
    ratio, a = (logprobs - old).exp(), advantages[:, None]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    if kl_coef:
        gain = gain - kl_coef * k3(logprobs, ref)
    return -(gain * mask).sum() / (normalizer or mask.numel())


if __name__ == "__main__":
    files.run_script(main)
