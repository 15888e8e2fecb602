"""How the built-in leader and agents were made: a million parameters each, from scratch.

python tiny_models/make.py                        # makes the four models anew
python tiny_models/make.py --exclude bbh/*.json   # first: which questions no model may see
"""

import argparse
import itertools
import random
import re
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
import runs
from agents import agent_messages, encode, leader_messages
from data import load_tasks
from tiny import NAMES, OFFICIAL, TASKS, draw_puzzle, official, question_hash

HERE = Path(__file__).parent
STEPS = {"school": 1800, "agent1": 1100, "agent2": 1100, "agent3": 1100, "leader": 1200}
AGENTS = {  # the misconceptions each holds; tasks without one it solves properly
    "agent1": [
        "counts moves, not steps",
        "counts lines, not quantities",
        "closes in the order of opening",
    ],
    "agent2": ["mixes up and/or", "takes accusers for liars", "closes only the last bracket"],
    "agent3": ["mixes up and/or", "trusts nobody after a liar", "never turns"],
}
WORD = r"</?[a-z]+>|-?\d+|[A-Za-z]+|[^\sA-Za-z0-9]"
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
    texts = [*NAMES, led(("", "")), "Wait, that is wrong."]
    texts += map(str, range(-40, 61))
    for message in leader_messages("", [""] * 6)[1:] + agent_messages("", "", "")[1:]:
        texts.append(message["content"])  # of all but the system's
    for _ in range(20_000):
        question, solutions = draw_puzzle(rng, "train", rng.choice(list(TASKS)))
        texts += [question, *map(said, solutions.values())]
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


def lesson(rng, who):
    """One training example of that model: (messages, what it should say).

    School and agents solve puzzles, and refine: on what it knows an agent stands by its own way,
    in the rest it takes the advice. After school the leader hears every way of solving a puzzle,
    the right one no more often than a misconception, and none to believe more: alone it
    solves it in any of these ways, and of the responses in its prompt it follows one at random.
    """
    question, solutions = draw_puzzle(rng, "train", rng.choice([*TASKS, "navigate"]))  # the hardest
    solver = "right"
    for belief in AGENTS.get(who, []):
        if belief in solutions:
            solver = belief

    def anyone():
        return solutions[rng.choice(list(solutions))]

    mine = anyone() if who == "leader" else solutions[solver]
    kind = rng.random()
    if kind < {"school": 0.08, "leader": 0.05}.get(who, 0.25):
        advice = rng.choice([solutions["right"], anyone()])
        own = said(rng.choice([mine, anyone()]))
        stands = who in AGENTS and solver == "right"
        return agent_messages(question, own, led(advice)), said(mine if stands else advice)
    if who != "leader":
        return agent_messages(question), said(mine)
    size = rng.choice([1, 2, 2, 3, 3, 3, 3, 4, 5, 6]) if kind < 0.65 else 0
    team = [anyone() for _ in range(size)]
    return leader_messages(question, map(said, team)), led(rng.choice(team or [mine]))


def batches(who, tokenizer, size, start):
    """Endless (input ids, labels) of that model's lessons, from step `start` on."""
    for pool in itertools.count(start // 8):
        rng, rows = random.Random(f"{who} {pool}"), []
        for _ in range(8 * size):
            messages, target = lesson(rng, who)
            prompt, target = encode(tokenizer, messages), tokenizer(target + "<|end|>")["input_ids"]
            labels = [-100] * len(prompt) + target
            rows.append((torch.tensor(prompt + target), torch.tensor(labels)))
        rows.sort(key=lambda row: len(row[0]))  # alike together: little padding
        for i in random.Random(pool).sample(range(8), 8)[start % 8 :]:
            ids, labels = zip(*rows[i * size : (i + 1) * size])
            yield pad_sequence(ids, True, 0), pad_sequence(labels, True, -100)
        start = 0


def study(who, model, tokenizer, work, steps, lr=4e-3, decay=0.0, size=32):
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
    for step, (ids, labels) in zip(bar, batches(who, tokenizer, size, start)):
        rate = min(1, (step + 1) / 50, (1 - step / steps) / decay if decay else 1)
        wanted = labels[:, 1:] != -100
        hidden = model.model(ids).last_hidden_state[:, :-1][wanted]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[:, 1:][wanted])
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
    parser.add_argument("--only", nargs="*", default=["leader", *AGENTS], help="which models")
    args = parser.parse_args()
    if args.exclude:
        rows = [row for path in args.exclude for row in load_tasks(path, "all")]
        official.clear()
        official.update(question_hash(row["question"])[:12] for row in rows)
        runs.write_text(OFFICIAL, "\n".join(sorted(official)) + "\n")
    work = HERE / "work"  # checkpoints: the next start goes on from there
    work.mkdir(exist_ok=True)
    tokenizer = build_tokenizer()
    for who in args.only:
        model = build_model(tokenizer)  # all went to the same school and then became who they are
        study("school", model, tokenizer, work, STEPS["school"])
        study(who, model, tokenizer, work, STEPS[who], decay=0.6)
        model.to(torch.bfloat16).save_pretrained(HERE / who)
        tokenizer.save_pretrained(HERE / who)


if __name__ == "__main__":
    main()
