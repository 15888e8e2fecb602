"""The built-in laboratory: puzzles without end, and the script that made the four small models.

The puzzles are worded like five subtasks of BIG-Bench Hard, so that a model trained here can be
tested on the official files. Each comes with its worked solution, and with those of solvers who
hold a plausible *misconception* ("ignores not"). `python tiny.py` trains a leader and three agents
of a million parameters on them, from scratch: ordinary checkpoints to the rest of the project.

The wording of the questions is that of BIG-Bench Hard, github.com/suzgunmirac/BIG-Bench-Hard:
MIT License, Copyright (c) 2022 suzgunmirac (the whole notice: tiny_models/LICENSE-BIG-BENCH-HARD).

    python tiny.py                          # makes tiny_models/ anew, from scratch
    python tiny.py --exclude bbh/*.json     # first records which questions no model may see
"""

import argparse
import hashlib
import itertools
import random
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import files
from agents import agent_messages, encode, leader_messages
from data import load_tasks

# ------------------------------------------------------------------------------------- puzzles
# A puzzle is (question, {solver: (worked solution, answer)}); the solver "right" is always there.
KINDS = {
    "fruit": "apple banana blackberry grape nectarine orange peach plum raspberry strawberry",
    "vegetable": "cabbage carrot cauliflower garlic onion potato yam lettuce_head"
    " head_of_broccoli stalk_of_celery",
    "animal": "bear cat chicken cow dog donkey duck fish frog goat mouse pig rabbit snail snake",
    "musical instrument": "accordion clarinet drum flute piano trombone trumpet violin",
    "object": "bed car chair couch fridge lamp microwave oven stove table toaster",
}
PLURALS = {"mouse": "mice", "fish": "fish", "rry": "rries", "ch": "ches", "to": "toes"}  # by ending
PLURALS |= {"head_of_broccoli": "heads_of_broccoli", "stalk_of_celery": "stalks_of_celery", "": "s"}
NAMES = """Alejandro Alexis Amberly Andree Antwan Audrie Bernita Christie Conception Crista Dallas
Delbert Delfina Elanor Fidel Fletcher Gwenn Helene Inga Jamey Jaymie Jerry Jim Ka Kandi Kristian
Leda Lorine Maybelle Michael Michaela Millicent Millie Osvaldo Phoebe Rashida Raymond Ryan Sal
Shalonda Shaunda Shenna Sherrie Sima Tamika Teressa Vernell Vina Willian Yoland""".split()
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def boolean_expressions(rng):
    """`not ( True ) and ( True ) is`: rewritten, a kind of step at a time, until a word is left."""
    rules = [  # the kinds of step: what, and how often at a time (0: wherever it stands)
        (r"not (True|False)|\( (True|False) \)", 0),
        (r"(True|False) and (True|False)", 1),
        (r"(?<!and )(True|False) or (True|False)(?! and)", 1),
    ]

    def expression(n):
        if n == 1:
            return rng.choice(["True", "False"])
        form = rng.random()
        if n == 2 or form < 0.3:
            return f"not {expression(n - 1)}"
        if form < 0.47:
            return f"( {expression(n - 2)} )"
        left = rng.randint(1, n - 2)
        return f"{expression(left)} {rng.choice(['and', 'or'])} {expression(n - 1 - left)}"

    def solve(text):
        steps = []
        while " " in text:
            pattern, times = next(rule for rule in rules if re.search(rule[0], text))
            text = re.sub(pattern, lambda piece: str(eval(piece[0])), text, count=times)
            steps.append(text)
        return " = ".join(steps), text

    question = expression(rng.choice([7, 8, 8, 9, 10]))  # 8 words in BBH, all of them
    swapped = question.replace("and", "AND").replace("or", "and").replace("AND", "or")
    wrong = {"ignores not": solve(question.replace("not ", "")), "mixes up and/or": solve(swapped)}
    return f"{question} is", {"right": solve(question), **wrong}


def navigate(rng):
    """Do the steps lead back to the start? The position after every instruction: east, north."""
    wanted = rng.choices(["Yes", "No"], [44, 56])[0]  # as in BBH; by chance few walks lead back
    tempting = wanted == "No" and rng.random() < 0.5  # lead back if only the moves are counted
    ahead = rng.random() < 0.5  # always facing north, or with turns
    points = ["north", "east", "south", "west"]
    quarters = {"": 0, "forward": 0, "right": 1, "around": 2, "backward": 2, "left": 3}  # clockwise

    def instruction():  # (word, steps): a turn has no steps
        if not ahead and rng.random() >= 0.6:
            return rng.choice(["right", "around", "left"]), 0
        side = rng.choice(["forward", "right", "backward", "left"]) if ahead else ""
        return side, rng.randint(1, 10)

    def solve(turning=True, cap=10):
        x = y = facing = 0
        steps = []
        for word, n in moves:
            way = (facing + turning * quarters[word]) % 4
            x += min(n, cap) * (0, 1, 0, -1)[way]
            y += min(n, cap) * (1, 0, -1, 0)[way]
            steps.append(f"{points[way]} {n} : {x} {y}" if n else f"turn {points[way]}")
            facing = facing if n else way
        return " , ".join(steps) + " .", "Yes" if x == y == 0 else "No"

    while True:
        moves = [instruction() for _ in range(rng.randint(2 if ahead else 3, 8))]
        if sum(n > 0 for _, n in moves) > 1 and solve()[1] == wanted:
            if not tempting or solve(cap=1)[1] == "Yes":
                break
    say = ["Always face forward."] * ahead
    for word, n in moves:
        say.append(f"Take {n} step{'s' * (n > 1)} {word}".strip() + "." if n else f"Turn {word}.")
    head = "If you follow these instructions, do you return to the starting point?"
    wrong = {"never turns": solve(turning=False), "counts moves, not steps": solve(cap=1)}
    return f"{head} {' '.join(say)}\nOptions:\n- Yes\n- No", {"right": solve(), **wrong}


def object_counting(rng):
    """How many fruits do I have? A running total over the list; `no` for what is not asked for."""
    kind = rng.choice(list(KINDS))
    asked = KINDS[kind].split()
    nouns = rng.sample(asked, rng.randint(3, 8))
    if kind != "object":  # everything is an object; of the rest, some lists hold a second kind
        other = rng.choice([k for k in KINDS if k != kind])
        nouns += rng.sample(KINDS[other].split(), rng.randint(0, min(5, 10 - len(nouns))))
    rng.shuffle(nouns)
    items = []  # (noun, how many, as it is written)
    for noun in nouns:
        n = rng.choice([1, 1, 1, 1, 1, 1, 2, 2, 3, 4, 5])
        article = "an" if noun[0] in "aeiou" else "a"
        number = [article, "two", "three", "four", "five"][n - 1]
        ending = next(ending for ending in PLURALS if noun.endswith(ending))
        written = noun if n == 1 else noun.removesuffix(ending) + PLURALS[ending]
        items.append((noun, n, f"{number} {written}".replace("_", " ")))

    def solve(counted, cap=5):
        total, steps = 0, []
        for noun, n, text in items:
            total += min(n, cap) * (noun in counted)
            steps.append(f"{text} {total if noun in counted else 'no'}")
        return " , ".join(steps) + " .", str(total)

    *listed, last = [text for _, _, text in items]
    wrong = {"counts every kind": solve(nouns), "counts lines, not quantities": solve(asked, cap=1)}
    question = f"I have {', '.join(listed)}, and {last}. How many {kind}s do I have?"
    return question, {"right": solve(asked), **wrong}


def web_of_lies(rng):
    """`Vernell says Sherrie lies.` ... does the last one tell the truth? One person at a time."""
    people = rng.sample(NAMES, rng.choice([4, 5, 5, 5, 6]))
    claims = [rng.random() < 0.5 for _ in people]  # what each is said to be
    words = ["lies", "tells the truth"]
    say = [f"Question: {people[0]} {words[claims[0]]}."]
    say += [f"{b} says {a} {words[claim]}." for a, b, claim in zip(people, people[1:], claims[1:])]

    def solve(honest):
        steps = [f"{person} {words[truth]}" for person, truth in zip(people, honest)]
        return " . ".join(steps) + " .", "Yes" if honest[-1] else "No"

    right = list(itertools.accumulate(claims, lambda honest, claim: honest == claim))
    wary = list(itertools.accumulate(claims, lambda honest, claim: honest and claim))
    wrong = {"takes accusers for liars": solve(claims), "trusts nobody after a liar": solve(wary)}
    return f"{' '.join(say)} Does {people[-1]} tell the truth?", {"right": solve(right), **wrong}


def dyck_languages(rng):
    """`< [ [` -> `] ] >`: the brackets still open, then their partners in reverse."""
    length, still_open = rng.randint(2, 30), rng.choice([1, 1, 1, 2, 2, 2, 3, 3, 4])
    shown, stack = [], []
    while len(shown) < length or len(stack) != still_open:
        if stack and (rng.random() < 0.5 or len(stack) > 6):
            shown.append(BRACKETS[stack.pop()])
        else:
            stack.append(rng.choice(list(BRACKETS)))
            shown.append(stack[-1])
    opened = " ".join(stack) + " ."
    closing = lambda brackets: " ".join(BRACKETS[bracket] for bracket in brackets)
    head = "Complete the rest of the sequence, making sure that the parentheses are closed properly"
    return f"{head}. Input: {' '.join(shown)}", {
        "right": (opened, closing(reversed(stack))),
        "closes in the order of opening": (opened, closing(stack)),
        "closes only the last bracket": (f"{stack[-1]} .", closing(stack[-1:])),
    }


PUZZLES = boolean_expressions, navigate, object_counting, web_of_lies, dyck_languages
TASKS = {puzzle.__name__: puzzle for puzzle in PUZZLES}
HERE = Path(__file__).parent / "tiny_models"
OFFICIAL = HERE / "official_questions.txt"  # fingerprints of what is in no split: see --exclude
official = set(OFFICIAL.read_text().split()) if OFFICIAL.exists() else set()
fingerprint = lambda question: hashlib.sha256(" ".join(question.split()).encode()).hexdigest()[:12]


def split_of(question):
    """train, validation or test: decided by the question alone, so that they cannot overlap."""
    mark = fingerprint(question)
    named = {"0": "test", "1": "test", "2": "validation"}
    return "official" if mark in official else named.get(mark[0], "train")


def draw(rng, split, task):
    """One puzzle of that split: (question, {solver: (steps, answer)})."""
    while True:
        question, solutions = TASKS[task](rng)
        if split_of(question) == split:
            return question, solutions


def puzzles(split, n, seed=0):
    """n different puzzles, tasks in turn: a list of {question, answer, task}."""
    rng, rows = random.Random(f"{split} {seed}"), {}
    for _ in range(20 * n + 1000):  # short expressions are not without end
        if len(rows) == n:
            return list(rows.values())
        task = list(TASKS)[len(rows) % len(TASKS)]
        question, solutions = draw(rng, split, task)
        rows[question] = {"question": question, "answer": solutions["right"][1], "task": task}
    raise ValueError(f"tiny has fewer than {n} different {split} questions: ask for less")


# -------------------------------------------------------------------------------------- models
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
said = lambda solution: "{} So the answer is {}.".format(*solution)
led = lambda solution: f"<think> {said(solution)} </think> <answer> {solution[1]} </answer>"
WORD = r"</?[a-z]+>|-?\d+|[A-Za-z]+|[^\sA-Za-z0-9]"
SPECIAL = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (  # without the system message, as some real templates do
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer():
    """One token a word over a closed vocabulary; saves and loads like any other tokenizer."""
    rng, texts = random.Random(0), [*NAMES, led(("", "")), "Wait, that is wrong."]
    texts += map(str, range(-40, 61))
    for message in leader_messages("", [""] * 6)[1:] + agent_messages("", "", "")[1:]:
        texts.append(message["content"])  # of all but the system's
    for _ in range(20_000):
        question, solutions = draw(rng, "train", rng.choice(list(TASKS)))
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
    question, solutions = draw(rng, "train", rng.choice([*TASKS, "navigate"]))  # the hardest
    solver = next((belief for belief in AGENTS.get(who, []) if belief in solutions), "right")
    anyone = lambda: solutions[rng.choice(list(solutions))]
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
    if state := files.load_checkpoint(path):
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
            files.save_checkpoint(path, state)
    return model


def main():
    parser = argparse.ArgumentParser(description="Make the built-in models, from scratch.")
    parser.add_argument("--exclude", nargs="+", default=[], help="official files not to train on")
    parser.add_argument("--only", nargs="*", default=["leader", *AGENTS], help="which models")
    args = parser.parse_args()
    if args.exclude:
        rows = [row for path in args.exclude for row in load_tasks(path, "all")]
        official.clear()
        official.update(fingerprint(row["question"]) for row in rows)
        files.write_text(OFFICIAL, "\n".join(sorted(official)) + "\n")
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
