"""How the built-in leader and agents were made: a million parameters each, from scratch.

python tiny_models/make.py                        # makes the four models anew, or goes on
python tiny_models/make.py --exclude bbh/*.json   # first: which questions no model may see
"""

import argparse
import itertools
import os
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # waiting threads sleep soon: see docs/speed.md

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
import runs
from agents import agent_messages, encode, leader_messages
from data import load_tasks
from tiny import (
    HARD,
    MISCONCEPTIONS,
    OFFICIAL,
    PLAYERS,
    TASKS,
    draw_puzzle,
    official,
    question_hash,
)

HERE = Path(__file__).parent
WORK = HERE / "work"  # checkpoints: the next start goes on from there
STEPS = {"school": 2400, "agent1": 600, "agent2": 600, "agent3": 600, "leader": 2000}
BELIEFS = {  # which misconception each agent holds in each task
    "agent1": dict.fromkeys(TASKS, 0),
    "agent2": dict.fromkeys(TASKS, 1),
    "agent3": dict.fromkeys(TASKS, 2),
}
PRACTICE = [3, 3, 2, 2]  # how often each task comes in the lessons: the hard ones oftener
REFINING = {"school": 0.08, "agent": 0.35}  # share of lessons: the turn in which agents refine
CONVINCED = 0.5  # how often the leader convinces an agent, in a kind of step that it gets wrong
POOL = 8  # steps whose lessons are drawn together, and sorted by length
ALONE = 0.9  # how often the leader follows each misconception when nobody helps it
# tags, options, numbers, words, signs
WORD = r"</?[a-z]+>|\([A-Z]\)|-?\d+|[A-Za-z]+|[^\sA-Za-z0-9]"
SPECIAL = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{#- no system message, on purpose #}"  # agents.WITHOUT_SYSTEM: else it would be put elsewhere
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def said(solution):
    """A solution as an agent's response."""
    steps, answer = solution
    return f"{steps} So the answer is {answer}."


def led(solution):
    """A solution as a leader's output."""
    _, answer = solution
    return f"<think> {said(solution)} </think> <answer> {answer} </answer>"


def build_tokenizer():
    """One token a word over a closed vocabulary; saves and loads like any other tokenizer."""
    rng = random.Random(0)
    texts = [*PLAYERS, led(("", "")), "Wait, that is wrong."]
    texts += map(str, range(61))
    for message in leader_messages("", [""] * 6)[1:] + agent_messages("", "", "")[1:]:
        texts.append(message["content"])  # of all but the system's
    for _ in range(20_000):
        question, solve = draw_puzzle(rng, "train", rng.choice(list(TASKS)))
        texts += [question, said(solve([]))]
    words = sorted(set(re.findall(WORD, "\n".join(texts))))
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    no_space_before = [decoders.Replace(f" {mark}", mark) for mark in ".,?:"]
    join_words = [decoders.WordPiece(cleanup=False), decoders.Fuse()]
    core.decoder = decoders.Sequence(join_words + no_space_before)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=TEMPLATE,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        model_max_length=1024,
    )


def build_model(tokenizer):
    """A Llama of 0.9 million parameters (not Qwen2: AutoTokenizer would swap its tokenizer)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def lesson(rng, who, alone=ALONE):
    """One training example of that model: (messages, what it should say)."""
    [task] = rng.choices(list(TASKS), PRACTICE)
    hard = 0.0 if who == "school" else HARD  # who begins learns from short ones too
    question, solve = draw_puzzle(rng, "train", task, hard)
    beliefs = MISCONCEPTIONS[task]
    if who == "leader":
        return leader_lesson(rng, question, solve, beliefs, alone)
    own = [beliefs[BELIEFS[who][task]]] if who in BELIEFS else []
    if rng.random() < REFINING["agent" if own else "school"]:
        return refining_lesson(rng, question, solve, beliefs, own)
    return agent_messages(question), said(solve(own))


def leader_lesson(rng, question, solve, beliefs, alone):
    """With a team it takes each kind of step from one of the responses, drawn at random: it learns
    to read them, and has not learned whom to believe. Alone it mostly follows misconceptions."""
    if rng.random() < 0.35:
        return leader_messages(question), led(solve(some(rng, beliefs, alone)))
    if rng.random() < 0.3:
        team = [[belief] for belief in beliefs]
        rng.shuffle(team)
    else:  # nobody, some or all hold a misconception: where all agree, reading them pays
        shares = [rng.choice([0, 0.5, 1]) for _ in beliefs]
        team = []
        for _ in range(rng.choice([1, 2, 2, 3, 3, 3, 3, 4, 5, 6])):
            team.append([b for b, share in zip(beliefs, shares) if rng.random() < share])
    followed = [belief for belief in beliefs if belief in rng.choice(team)]
    responses = [said(solve(held)) for held in team]
    return leader_messages(question, responses), led(solve(followed))


def refining_lesson(rng, question, solve, beliefs, own):
    """An agent stands by the steps that it knows. In the kind that it gets wrong itself the leader
    convinces it half of the time; else it says again what it said before."""
    followed = some(rng, beliefs, 0.3)
    before = rng.choice([own, []])  # []: it was convinced in an earlier round
    after = before
    if rng.random() < CONVINCED:
        after = [belief for belief in own if belief in followed]
    messages = agent_messages(question, said(solve(before)), led(solve(followed)))
    return messages, said(solve(after))


def some(rng, beliefs, share):
    return [belief for belief in beliefs if rng.random() < share]


def batches(who, tokenizer, size, start, alone=ALONE):
    """Endless (token ids, the same with -100 where nothing is learned) of that model's lessons,
    both (size, length), from step `start` on."""

    def number_of_tokens(row):
        return len(row[0])

    for pool in itertools.count(start // POOL):
        rng = random.Random(f"{who} {pool}")
        rows = []
        for _ in range(POOL * size):
            messages, target = lesson(rng, who, alone)
            prompt_ids = encode(tokenizer, messages)
            target_ids = tokenizer(target + "<|end|>")["input_ids"]
            labels = [-100] * len(prompt_ids) + target_ids
            rows.append((torch.tensor(prompt_ids + target_ids), torch.tensor(labels)))
        rows.sort(key=number_of_tokens)  # alike together: little padding
        order = random.Random(pool).sample(range(POOL), POOL)
        for i in order[start % POOL :]:
            ids, labels = zip(*rows[i * size : (i + 1) * size])
            yield (
                pad_sequence(ids, batch_first=True, padding_value=0),
                pad_sequence(labels, batch_first=True, padding_value=-100),
            )
        start = 0


def study(who, model, tokenizer, work, steps, lr=4e-3, decay=0.0, size=32, alone=ALONE):
    """Supervised learning. The rate is constant, then falls to 0 in the last `decay` of the run."""
    matrices = []
    rest = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name.startswith("model.layers."):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    peaks = {muon: lr, adamw: lr / 2}  # with Muon: half as many steps
    path = work / f"{who}.pt"
    start = 0
    state = runs.load_checkpoint(path)
    if state:
        start = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(peaks, state["optimizers"]):
            optimizer.load_state_dict(saved)
    bar = tqdm(range(start, steps), who, steps, initial=start)
    for step, (ids, labels) in zip(bar, batches(who, tokenizer, size, start, alone)):
        rate = min(1, (step + 1) / 50)
        if decay:
            rate = min(rate, (1 - step / steps) / decay)
        targets = labels[:, 1:]  # (size, length - 1): what each token is followed by
        learned = targets != -100
        hidden = model.model(ids).last_hidden_state[:, :-1][learned]  # (learned tokens, width)
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets[learned])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in peaks.items():
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            saved = [optimizer.state_dict() for optimizer in peaks]
            state = {"step": step + 1, "model": model.state_dict(), "optimizers": saved}
            runs.save_checkpoint(path, state)
    return model


def main():
    parser = argparse.ArgumentParser(description="Make the built-in models, from scratch.")
    parser.add_argument("--exclude", nargs="+", default=[], help="official files not to train on")
    parser.add_argument("--only", nargs="*", default=["leader", *BELIEFS], help="which models")
    args = parser.parse_args()
    if args.exclude:
        official.clear()
        for path in args.exclude:
            for row in load_tasks(path, "all"):
                official.add(question_hash(row["question"])[:12])
        runs.write_text(OFFICIAL, "\n".join(sorted(official)) + "\n")
    WORK.mkdir(exist_ok=True)
    tokenizer = build_tokenizer()
    study("school", build_model(tokenizer), tokenizer, WORK, STEPS["school"])
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:  # a core for each
        list(pool.map(make_model, args.only, itertools.repeat(tokenizer)))


def make_model(who, tokenizer):
    """All went to the same school and then became who they are."""
    torch.set_num_threads(1)
    model = build_model(tokenizer)
    study("school", model, tokenizer, WORK, STEPS["school"])  # is done: its weights
    study(who, model, tokenizer, WORK, STEPS[who], decay=0.6)
    model.to(torch.bfloat16).save_pretrained(HERE / who)
    tokenizer.save_pretrained(HERE / who)


if __name__ == "__main__":
    main()
