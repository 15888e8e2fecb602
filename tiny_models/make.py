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
    tidy = [decoders.Replace(f" {mark}", mark) for mark in ".,?:"]
    core.decoder = decoders.Sequence([decoders.WordPiece(cleanup=False), decoders.Fuse(), *tidy])
    marks = dict(pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>")
    marks["additional_special_tokens"] = ["<|user|>", "<|assistant|>"]
    limits = dict(padding_side="left", model_max_length=1024)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **marks, **limits)


def build_model(tokenizer):
    """A Llama of 0.9 million parameters (not Qwen2: AutoTokenizer would swap its tokenizer)."""
    torch.manual_seed(0)
    size = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=True)
    marks = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**size, **text, **marks))


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
    """An agent stands by the steps that it knows, and takes the leader's in the kind that it gets
    wrong itself."""
    followed = some(rng, beliefs, 0.3)
    kept = [belief for belief in own if belief in followed]
    before = rng.choice([own, kept])
    messages = agent_messages(question, said(solve(before)), led(solve(followed)))
    return messages, said(solve(kept))


def some(rng, beliefs, share):
    return [belief for belief in beliefs if rng.random() < share]


def batches(who, tokenizer, size, start, alone=ALONE):
    """Endless (token ids, the same with -100 where nothing is learned) of that model's lessons,
    both (size, length), from step `start` on."""
    for pool in itertools.count(start // 8):
        rng, rows = random.Random(f"{who} {pool}"), []
        for _ in range(8 * size):
            messages, target = lesson(rng, who, alone)
            prompt, target = encode(tokenizer, messages), tokenizer(target + "<|end|>")["input_ids"]
            labels = [-100] * len(prompt) + target
            rows.append((torch.tensor(prompt + target), torch.tensor(labels)))
        rows.sort(key=lambda row: len(row[0]))  # alike together: little padding
        for i in random.Random(pool).sample(range(8), 8)[start % 8 :]:
            ids, labels = zip(*rows[i * size : (i + 1) * size])
            yield pad_sequence(ids, True, 0), pad_sequence(labels, True, -100)
        start = 0


def study(who, model, tokenizer, work, steps, lr=4e-3, decay=0.0, size=32, alone=ALONE):
    """Supervised learning. The rate is constant, then falls to 0 in the last `decay` of the run."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    peaks = {muon: lr, adamw: lr / 2}  # with Muon: half as many steps
    path, start = work / f"{who}.pt", 0
    if state := runs.load_checkpoint(path):
        start = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(peaks, state["optimizers"]):
            optimizer.load_state_dict(saved)
    bar = tqdm(range(start, steps), who, steps, initial=start)
    for step, (ids, labels) in zip(bar, batches(who, tokenizer, size, start, alone)):
        rate = min(1, (step + 1) / 50, (1 - step / steps) / decay if decay else 1)
        learned = labels[:, 1:] != -100
        hidden = model.model(ids).last_hidden_state[:, :-1][learned]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[:, 1:][learned])
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
        rows = [row for path in args.exclude for row in load_tasks(path, "all")]
        official.clear()
        official.update(question_hash(row["question"])[:12] for row in rows)
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
