"""MLPO: train one leader to read the answers of a team of frozen agents and write a better one.

    python train.py                                 # the built-in laboratory, on a laptop
    python train.py --agents none --out runs/grpo   # plain GRPO on the leader alone
    torchrun --standalone --nproc_per_node=2 train.py   # several GPUs, or processes

Read `main` first: it is the method. Then, in this file: the proposals, SFT, the MLPO step, and
the functions that are GRPO (`group_advantages`, `completion_logprobs`, `grpo_loss`).

Where this is not textbook GRPO:
- Dr. GRPO: advantages are not divided by the group's standard deviation, and the loss is divided
  by a constant (completions x max_new_tokens), so that length has no price of its own.
- Groups with equal rewards have no advantage and are left out of the forward pass.
- A prompt is run once for the G completions that share it, in sampling and in training.
- Every step draws its randomness from (seed, phase, step): there is no random state to save, and
  a resumed run is the same run.
"""

import copy
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache
from transformers.hf_argparser import HfArg, HfArgumentParser

import agents
import evaluate
import files
from data import load_tasks
from rewards import extract_agent_answer, extract_answer, is_correct, reward, score


def option(default, text):
    """One field of `Arguments`: its default, and what --help says of it."""
    return HfArg(default_factory=lambda: default, help=text)


@dataclass
class Arguments:
    leader: str = option("tiny", "leader: a folder or hub name; tiny is the built-in one")
    agents: list[str] = option(["tiny"], "the team: folders or hub names; none: plain GRPO, alone")
    dataset: str = option("tiny", "tiny, a .json/.jsonl file, or a benchmark (see data.py)")
    out: str = option("runs/mlpo", "folder of the run")
    seed: int = option(0, "seed of everything random")
    device: str = option("", "cuda, mps or cpu; by itself the first of them that is there")
    max_new_tokens: int = option(120, "longest completion, of agents and leader")
    temperature: float = option(1.0, "sampling temperature of agents and leader")
    # proposals
    questions: int = option(1000, "training questions that the team answers beforehand")
    samples: int = option(4, "responses per agent and training question")
    proposals: str = option("", "another run's proposals.jsonl, used in place of new ones")
    easy_threshold: float = option(0.75, "a question is easy with this share of right responses")
    easy_share: float = option(0.5, "share of the easy questions kept for MLPO (the paper: 0)")
    # SFT
    sft_steps: int = option(120, "supervised steps before MLPO; 0 skips them")
    sft_lr: float = option(5e-4, "learning rate of SFT")
    sft_batch: int = option(32, "examples per SFT step")
    backtrack: float = option(0.3, "share of SFT examples that turn back from an error")
    # MLPO
    steps: int = option(150, "MLPO steps; 0 skips them")
    questions_per_step: int = option(16, "questions per step")
    group_size: int = option(8, "G, completions per question")
    updates: int = option(1, "gradient steps on each step's completions")
    lr: float = option(1e-4, "learning rate of MLPO; about 1e-6 for models of 0.5B up")
    warmup: int = option(10, "steps of linear warm-up")
    team_dropout: float = option(0.33, "share of questions asked without the team")
    clip: float = option(0.2, "epsilon of the clipped probability ratio")
    kl_coef: float = option(0.0, "weight of the KL to the leader as it was before MLPO")
    scale_rewards: bool = option(False, "divide advantages by the group's standard deviation")
    tokens_per_batch: int = option(8192, "tokens in one forward pass: lower it if memory ends")
    save_steps: int = option(50, "steps between checkpoints")
    resume: bool = option(False, "go on with the unfinished run in --out")
    # evaluation
    validate_every: int = option(25, "MLPO steps between looks at the validation questions")
    validation_questions: int = option(100, "how many of them")
    eval_questions: int = option(300, "test questions of the final evaluation")
    rounds: int = option(5, "T, rounds of leader and team in the final evaluation")


# bounds of these numbers; by itself a whole number is at least 1, and any other not negative
LEAST = {"seed": 0, "sft_steps": 0, "steps": 0, "warmup": 0, "group_size": 2}
LEAST |= {"temperature": 1e-3, "lr": 1e-12, "sft_lr": 1e-12}
MOST = {"team_dropout": 1, "backtrack": 1, "easy_share": 1}


def parse(argv=None):
    """The command line as `Arguments`; a ValueError of one line if something is off."""
    parser = HfArgumentParser(Arguments, allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.error = files.fail
    args = Arguments(**vars(parser.parse_args(argv)))
    for name, value in asdict(args).items():
        if type(value) in (int, float):
            least, most = LEAST.get(name, int(type(value) is int)), MOST.get(name, math.inf)
            if not (least <= value <= most and value < math.inf):
                raise ValueError(f"--{name} must be from {least} to {most}, not {value}")
    if args.proposals and not Path(args.proposals).is_file():
        raise ValueError(f"--proposals {args.proposals}: no such file; name a proposals.jsonl")
    args.device = args.device or agents.default_device()
    if not agents.team_names(args.agents):  # plain GRPO: nobody to listen to, or to learn from
        args.team_dropout, args.sft_steps = 1.0, args.sft_steps if args.proposals else 0
    return args


def main(argv=None):
    args = parse(argv)
    files.start_processes(args)
    run = files.open_run(args.out, asdict(args), args.resume)
    if not (run / "results.json").exists():  # else it is finished: just its table once more
        train_leader(args, run)
    if files.rank() == 0:
        evaluate.evaluate_run(run)


def train_leader(args, run):
    """The method: proposals, filter, SFT, MLPO."""
    leader, team = agents.load(args.leader, args.device), agents.load_team(args.agents, args.device)
    tasks = list(load_tasks(args.dataset, "train", args.questions, args.seed))
    held = list(load_tasks(args.dataset, "validation", args.validation_questions, args.seed))
    for speaker in (leader, *team):
        questions = [task["question"] for task in tasks + held]
        agents.check_context(speaker, questions, max(2, len(team)), args.max_new_tokens)
    files.write_json(run / "config.json", asdict(args))

    proposals = propose(args, run / "proposals.jsonl", team, tasks, args.samples)
    held_out = propose(args, run / "validation.jsonl", team, held, 1)
    hard, kept = drop_easy(args, proposals)
    rng, keys = random.Random(args.seed), ("answer", "task")  # for TRL: see the README
    prompts = [{"prompt": leader_prompt(args, rng, r), **{k: r[k] for k in keys}} for r in kept]
    files.write_text(run / "prompts.jsonl", "".join(json.dumps(p) + "\n" for p in prompts))
    if args.sft_steps:
        sft(args, run, leader, hard)
    mlpo(args, run, leader, kept, held_out)


def seed_everything(*key):
    """The random numbers of a step depend on (seed, phase, step) and on nothing before it. The
    generator returned is the same in all processes; torch's is another one in each."""
    rng = random.Random(repr(key))
    torch.manual_seed(rng.getrandbits(62) + files.rank())
    return rng


def propose(args, path, team, tasks, n):
    """Every agent answers every question n times, once and for all: the paper's cached responses.

    Returns a row per question: question, answer, task, `responses` (per agent, n texts) and
    `right` (the same shape). The file grows by chunks, so that a killed run goes on where it was.
    """
    path = Path(args.proposals) if args.proposals and n > 1 else path
    read = lambda: {(r["agent"], r["question"]): r["responses"] for r in files.read_jsonl(path)}
    cached, size = read(), 250
    for agent in team:
        left = [task["question"] for task in tasks if (agent.name, task["question"]) not in cached]
        if left and str(path) == args.proposals:
            raise ValueError(f"--proposals: nothing of {agent.name} on {left[0][:50]!r}...")
        parts = [left[start : start + size] for start in range(0, len(left), size)]
        for part in tqdm(files.share(parts), f"{path.stem}: {agent.name}", leave=False):
            seed_everything(args.seed, "propose", agent.name, part[0])
            prompts = [agents.agent_messages(question) for question in part]
            answers = agent.answer(prompts, n, args.temperature, args.max_new_tokens)
            said = [(question, [c.text for c in group]) for question, group in zip(part, answers)]
            rows = [{"agent": agent.name, "question": q, "responses": texts} for q, texts in said]
            files.append_jsonl(path, rows)
    files.wait_for_all()
    cached, rows = read(), []
    names = [agent.name for agent in team] or sorted({name for name, _ in cached})
    for task in tasks:
        said = [cached[name, task["question"]] for name in names]
        right = [[is_correct(extract_agent_answer(t), task["answer"]) for t in ts] for ts in said]
        rows.append({**task, "responses": said, "right": right})
    return rows


def drop_easy(args, rows):
    """(hard questions, the same and a share of the easy ones). Easy is what the team answers
    already, with `easy_threshold` or more of its responses right. Some are kept for MLPO: the
    questions where a team errs may have a twist in common, which pays there and nowhere else."""
    rng, hard, kept, oks = random.Random(args.seed), [], [], []
    for row in rows:
        right = sum(row["right"], [])  # of all agents
        easy = right and sum(right) >= args.easy_threshold * len(right)
        hard += [] if easy else [row]
        kept += [row] if not easy or rng.random() < args.easy_share else []
        oks += right
    share = sum(oks) / max(1, len(oks))
    print(
        f"proposals: {share:.0%} right; of {len(rows)} questions {len(hard)} are hard for the team"
    )
    if not hard:
        raise ValueError("every question is easy for this team: raise --easy_threshold")
    return hard, kept


def sft_example(rng, row, args):
    """Messages, the beginning of an output, and what to say after it.

    The target is a right response of the team as the leader's own reasoning. In a share of the
    examples a wrong one stands before it, and a turn back between them. The wrong part is given,
    not learned: the leader learns to turn back from errors, not to make them.
    """
    team = [rng.choice(list(zip(*said))) for said in zip(row["responses"], row["right"])]
    cached = [pair for said in zip(row["responses"], row["right"]) for pair in zip(*said)]
    team = [] if rng.random() < max(0.5, args.team_dropout) else team

    def response(wanted):
        """One that is right (or wrong): of those in the prompt if there is one, else of any."""
        fits = lambda pairs: [text for text, right in pairs if right == wanted]
        return agents.quote(rng.choice(fits(team) or fits(cached) or [""]))

    begin, target, wrong = "<think> ", response(True), response(False)
    if wrong and rng.random() < args.backtrack:
        begin, target = f"<think> {wrong} ", f"Wait, that is wrong. {target}"
    target += f" </think> <answer> {row['answer']} </answer>"
    return agents.leader_messages(row["question"], [text for text, _ in team]), begin, target


def sft(args, run, leader, rows):
    """Phase 1: supervised steps on the team's own responses. Leaves `leader_sft/`."""
    if (run / "leader_sft").exists():
        leader.model = agents.load(str(run / "leader_sft"), args.device).model
        return
    rows = [row for row in rows if any(map(any, row["right"]))]
    if not rows:
        raise ValueError("SFT needs right responses and there are none: use --sft_steps 0")
    trainer = files.Trainer(args, run, leader.model, "sft", args.sft_steps, args.sft_lr)
    encode = lambda text: leader.tokenizer(text, add_special_tokens=False)["input_ids"]
    for step in trainer.steps():
        rng = seed_everything(args.seed, "sft", step)
        batch, total = [], 0.0  # (prompt ids, target ids)
        for row in rng.choices(rows, k=args.sft_batch):
            messages, begin, target = sft_example(rng, row, args)
            prompt = agents.encode(leader.tokenizer, messages) + encode(begin)
            batch.append((prompt, encode(target) + [leader.tokenizer.eos_token_id]))
        tokens = sum(len(target) for _, target in batch)  # one denominator for the step
        size = lambda row: sum(map(len, row))
        for part in by_tokens(files.share(batch), size, args.tokens_per_batch):
            prompts, targets = zip(*part)
            logprobs, mask = completion_logprobs(leader.model, prompts, [[t] for t in targets])
            loss = -(logprobs * mask).sum() / tokens
            loss.backward()
            total += loss.item()
        trainer.log(loss=sum(files.gather([total])), **trainer.update())
    files.save_leader(run / "leader_sft", leader)


def mlpo(args, run, leader, rows, held_out):
    """Phase 2: GRPO on the leader, with the team's cached responses in its prompt."""
    if (run / "leader").exists():
        return
    trainer = files.Trainer(args, run, leader.model, "mlpo", args.steps, args.lr)
    reference = copy.deepcopy(leader.model).requires_grad_(False) if args.kl_coef else None
    for step in trainer.steps():
        if step % args.validate_every == 0:
            trainer.log("validation", **validate(args, leader, held_out))
        rng, began = seed_everything(args.seed, "mlpo", step), time.time()
        batch = nth_batch(rows, step, args.questions_per_step, args.seed)
        prompts = files.share([leader_prompt(args, rng, row) for row in batch])
        groups = leader.answer(prompts, args.group_size, args.temperature, args.max_new_tokens)
        sampled, batch = time.time(), files.share(batch)  # groups: (questions, G) completions
        rewards = torch.tensor(
            [reward([c.text for c in g], [r["answer"]] * len(g)) for g, r in zip(groups, batch)]
        )  # (questions, G)
        advantages = group_advantages(rewards, args.scale_rewards)  # (questions, G)
        for _ in range(args.updates):
            stats = policy_gradient(args, leader.model, reference, groups, advantages)
            stats |= trainer.update()
        stats |= {"sampling": sampled - began, "training": time.time() - sampled}
        stats |= describe(files.gather(list(zip(groups, batch, rewards.tolist()))))
        trainer.log(**stats, tokens_per_s=stats["tokens"] / (time.time() - began))
    trainer.log("validation", **validate(args, leader, held_out))
    files.save_leader(run / "leader", leader)


def nth_batch(rows, step, size, seed):
    """The questions of a step: a new order every time round, whatever was drawn before."""
    order = lambda epoch: random.Random(f"{seed} {epoch}").sample(rows, len(rows))
    return [order(n // len(rows))[n % len(rows)] for n in range(step * size, (step + 1) * size)]


def leader_prompt(args, rng, row):
    """One proposal of each agent, then the question; or, to practise that too, it alone."""
    alone = rng.random() < args.team_dropout
    team = [] if alone else [rng.choice(texts) for texts in row["responses"]]
    return agents.leader_messages(row["question"], team)


def group_advantages(rewards, scale=False):
    """A_i = r_i - mean(r) within the group; with `scale`, divided by the group's std.

    rewards and advantages: (questions, G). GRPO (arXiv 2402.03300) divides; Dr. GRPO (2503.20783)
    does not, since that favours questions that are nearly always or nearly never answered.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    advantages[(rewards == rewards[:, :1]).all(dim=1)] = 0.0  # exactly: a flat group is skipped
    return advantages / (rewards.std(dim=1, keepdim=True) + 1e-4) if scale else advantages


def policy_gradient(args, model, reference, groups, advantages):
    """Add up the gradient of the loss over the step's completions, some groups at a time."""
    # a flat group has nothing to compare: only the KL term could still pull on it
    kept = [i for i in range(len(groups)) if advantages[i].any() or args.kl_coef]
    # one denominator for the step, however it is cut, and whichever process has a share of it
    normalizer = args.questions_per_step * args.group_size * args.max_new_tokens
    size = lambda i: len(groups[i][0].prompt_ids) + sum(len(c.ids) for c in groups[i])
    sums = torch.zeros(4)  # loss; number of clipped tokens, sum of their KL, number of tokens
    for part in by_tokens(kept, size, args.tokens_per_batch):
        prompts = [groups[i][0].prompt_ids for i in part]
        completions = [[c.ids for c in groups[i]] for i in part]
        logprobs, mask = completion_logprobs(model, prompts, completions, args.temperature)
        old = [torch.tensor(c.logprobs) for i in part for c in groups[i]]
        old, ref = pad_sequence(old, batch_first=True).to(logprobs), logprobs.detach()
        if reference is not None:
            with torch.no_grad():
                ref, _ = completion_logprobs(reference, prompts, completions, args.temperature)
        a = advantages[part].flatten().to(logprobs)  # (completions,)
        loss = grpo_loss(logprobs, old, a, mask, args.clip, ref, args.kl_coef, normalizer)
        loss.backward()
        with torch.no_grad():
            clipped = ((logprobs - old).exp() - 1).abs() > args.clip
            counts = [(x * mask).sum() for x in (clipped, k3(logprobs, ref), mask)]
        sums += torch.stack([loss.detach(), *counts]).cpu()
    loss, clipped, kl, tokens = torch.tensor(files.gather([sums.tolist()])).sum(0).tolist()
    return {"loss": loss, "kl": kl / max(1, tokens), "clipped": clipped / max(1, tokens)}


def completion_logprobs(model, prompts, completions, temperature=1.0):
    """log pi(token | prompt, completion so far) of every completion token, with gradient.

    prompts: B lists of token ids. completions: B lists of G lists of token ids. Returns log-probs
    and mask, (B * G, R) each; mask is 1 on completion tokens, the end-of-sequence token included.

    Saving: each prompt is run once and its keys and values are shared by its G completions, so
    that P + G R tokens are computed instead of G (P + R); gradients flow back through the cache.
    Completions of like length are run together, so that little is padding; logits are made for
    their tokens alone, some at a time.
    """
    device, g = model.device, len(completions[0])
    # the prompt's last token predicts the completion's first: it is run with the completion
    heads, seen = agents.pad([p[:-1] for p in prompts], device, "left")  # (B, P - 1)
    inputs = [p[-1:] + c[:-1] for p, group in zip(prompts, completions) for c in group]
    targets, mask = agents.pad([c for group in completions for c in group], device, "right")
    logprobs = torch.zeros(mask.shape, device=device)
    with agents.autocast(model):
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        read = dict(attention_mask=seen, position_ids=positions, use_cache=True)
        cache = model.base_model(heads, **read).past_key_values.layers if seen.any() else []
        for rows in alike(inputs):
            ids, own = agents.pad([inputs[row] for row in rows], device, "right")
            rows = torch.tensor(rows, device=device)
            shared = DynamicCache()
            for i, layer in enumerate(cache):
                shared.update(layer.keys[rows // g], layer.values[rows // g], i)
            start = seen[rows // g].sum(1, keepdim=True)
            hidden = model.base_model(
                ids,
                attention_mask=torch.cat([seen[rows // g], own], dim=1),
                position_ids=start + torch.arange(ids.shape[1], device=device),
                past_key_values=shared,
            ).last_hidden_state[own.bool()]  # (tokens, width)
            place = rows[:, None].expand_as(own)[own.bool()], own.nonzero()[:, 1]
            logprobs[place] = token_logprobs(model, hidden, targets[place], temperature)
    return logprobs, mask


def alike(texts):
    """Numbers of the texts in parts, the shortest of a part being at least 0.7 of its longest."""
    parts = []
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if not parts or len(texts[i]) < 0.7 * len(texts[parts[-1][0]]):
            parts.append([])
        parts[-1].append(i)
    return parts


def token_logprobs(model, hidden, targets, temperature, chunk=1024):
    """log softmax(logits / T)[target] for (tokens, width) hidden states: (tokens,) in float32.

    In chunks, whose logits are made again for the backward pass: (tokens x vocabulary) logits,
    not the weights, are what exhausts the memory of a small model.
    """

    def some(hidden, targets):
        with agents.autocast(model):
            logits = model.get_output_embeddings()(hidden).float()
        cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return torch.log_softmax(logits / temperature, dim=-1).gather(1, targets[:, None])[:, 0]

    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(some, h, t, use_reentrant=False) for h, t in parts])


def k3(logprobs, ref):
    """KL(policy || reference) per token, estimated without bias and never negative:
    exp(d) - d - 1 with d = log ref - log policy (Schulman, 'Approximating KL Divergence')."""
    d = ref - logprobs
    return d.exp() - d - 1


def grpo_loss(
    logprobs, old_logprobs, advantages, mask, clip=0.2, ref=None, kl_coef=0.0, normalizer=None
):
    """-1/Z sum_i sum_t min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i) - kl_coef k3, a scalar.

    ratio = exp(logprob - old_logprob). logprobs, old_logprobs, ref (the reference's) and mask:
    (completions, tokens); advantages: (completions,). Z, the normalizer, is a constant:
    completions x longest possible completion (Dr. GRPO); by itself the size of the mask.
    """
    ratio = (logprobs - old_logprobs).exp()
    a = advantages[:, None]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    if kl_coef:
        gain = gain - kl_coef * k3(logprobs, ref)
    return -(gain * mask).sum() / (normalizer or mask.numel())


def by_tokens(items, size, budget):
    """Cut items into parts whose padded size stays under `budget` tokens; alike ones together."""
    parts = []
    for item in sorted(items, key=size):
        if not parts or size(item) * (len(parts[-1]) + 1) > budget:
            parts.append([])
        parts[-1].append(item)
    return parts


def describe(step):
    """The step's (completions, question, rewards) in numbers, each a mean over completions."""
    scores = [[score(c.text, row["answer"]) for c in group] for group, row, _ in step]
    everyone = [c for group, _, _ in step for c in group]
    mean = lambda values: sum(values) / len(everyone)
    return {
        "reward": mean(r for _, _, rewards in step for r in rewards),
        "accuracy": mean(right for group in scores for right, _ in group),
        "format": mean(formatted for group in scores for _, formatted in group),
        "length": mean(len(c.ids) for c in everyone),
        "truncated": mean(not c.finished for c in everyone),
        "entropy": mean(-sum(c.logprobs) / len(c.ids) for c in everyone),  # per token, estimated
        "flat": sum(len({right for right, _ in group}) == 1 for group in scores) / len(scores),
        "tokens": sum(len(g[0].prompt_ids) + sum(len(c.ids) for c in g) for g, _, _ in step),
    }


def validate(args, leader, rows):
    """Accuracy on questions that are never trained on, greedy: alone, and with the team."""
    accuracy = {}
    for mode in ["alone", "team"] if rows[0]["responses"] else ["alone"]:
        teams = [[texts[0] for texts in r["responses"]] if mode == "team" else [] for r in rows]
        prompts = [agents.leader_messages(r["question"], team) for r, team in zip(rows, teams)]
        answers = [a[0].text for a in leader.answer(prompts, 1, 0, args.max_new_tokens)]
        right = [is_correct(extract_answer(a), r["answer"]) for a, r in zip(answers, rows)]
        accuracy[mode] = sum(right) / len(right)
    return accuracy


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        files.fail(error)
    except KeyboardInterrupt:
        files.fail("stopped; what is done is saved: the same command with --resume goes on")
    except torch.OutOfMemoryError:
        files.fail("out of memory: lower --tokens_per_batch, then --resume; see the README")
