"""One training step, three ways, side by side: this project's, TRL's GRPOTrainer's, and the plain.

    pip install -r requirements-trl.txt
    python benchmarks/step.py                     # a table, after some minutes on two cores
    python benchmarks/step.py --plot ratio.png    # TRL's time / ours over P / R, and over K
    python benchmarks/step.py --device cuda --shapes gpu-0.5b gpu-1.5b

All have the same random weights and prompts, sample what `force_lengths` lets them, and take a step
on random rewards, each in a process of its own; on a CPU in turns. Numbers are medians.
"""

import argparse
import random
import sys
import tempfile
import time
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo  # noqa: E402
import sampling  # noqa: E402
import train  # noqa: E402
from shared_prompt import SharedPromptCache  # noqa: E402

SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
MODELS = {  # architecture, vocabulary, and these
    "tiny": ("llama", 363, 128, 384, 4, 4, 4),  # the built-in leader
    "5M": ("qwen2", 2048, 256, 768, 6, 4, 2),
    "0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2),  # Qwen2.5
    "1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2),
    "1.7B": ("llama", 49152, 2048, 8192, 24, 32, 32),  # SmolLM2: no grouped heads
}
SHAPES = {  # model, tokens of each prompt, tokens of each of its G completions
    "tiny": ("tiny", tuple(range(100, 260, 10)), (40,) * 8),
    "fixed": ("5M", (512,) * 4, (128,) * 8),
    "spread": ("5M", (512,) * 4, (16, 32, 48, 64, 80, 96, 112, 128)),
    "long": ("5M", (1500,) * 4, (128,) * 8),
    "gpu-0.5b": ("0.5B", (1024,) * 4, (256,) * 8),
    "gpu-1.5b": ("1.5B", (1024,) * 4, (256,) * 8),
    "toy": ("tiny", (12, 20), (4, 5, 7, 9)),  # does this script work?
}
# in a method's process
STEPS = {}  # shape: its steps, a generator
TOOK = {}  # what the last one took, in seconds; "memory": what was held before, in MB


def build(kind, prompts, device):
    """Random weights, a tokenizer of words w2 w3 ..., prompts of random words, an optimizer."""
    name, vocabulary, *sizes = MODELS[kind]
    sizes = dict(zip(SIZES.split(), sizes), vocab_size=vocabulary, tie_word_embeddings=True)
    special = dict(pad_token_id=0, bos_token_id=None, eos_token_id=1)
    config = transformers.AutoConfig.for_model(name, **sizes, **special)
    torch.manual_seed(0)
    with torch.device(device):  # made there: a CPU takes a minute for the larger ones
        model = transformers.AutoModelForCausalLM.from_config(config)
    words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    splits = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    splits.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splits, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    ids = []
    for i, length in enumerate(prompts):
        ids.append(random.Random(i).choices(range(2, vocabulary), k=length))
    TOOK["memory"] = peak(device)
    return model, tokenizer, ids, torch.optim.AdamW(model.parameters(), lr=1e-6)


@contextmanager
def force_lengths(model, lengths, eos=1):
    """In here the i-th of a prompt's G completions has lengths[i] tokens, and time is sampling's.

    One hook sees the ids that go into the model, the other changes the logits that come out: no end
    of sequence before its time, nothing else when it is due (unless max_new_tokens ends all alike).
    Where lengths differ, a row must be known when others have left the batch: row i only says
    tokens with id % G = i, after the first (G of which may be drawn from one row of logits).
    """
    g = len(lengths)
    device = model.device
    differ = len(set(lengths)) > 1
    due = torch.tensor(lengths, device=device)  # (G,)
    token = torch.arange(model.config.vocab_size, device=device)  # (V,)
    is_end = token == eos
    others = token % g != torch.arange(g, device=device)[:, None]  # (G, V): what row i never says
    ids = None  # what went in last
    step = -1  # how many tokens each row has by now

    def goes_in(module, args):
        nonlocal ids, step
        ids = args[0].view(len(args[0]), -1)  # (rows, tokens), or (rows,) from shared_prompt.py
        if ids.shape[1] > 1:  # a prompt: begin again
            step = 0
        else:
            step += 1

    def comes_out(module, args, logits):
        last = logits.view(len(ids), -1, logits.shape[-1])[:, -1]  # (rows, V)
        if not differ or step == 0:
            last.masked_fill_(is_end, -torch.inf)
            return
        if step > 1:
            row = ids[:, -1] % g  # by what it said
        else:
            row = torch.arange(len(ids), device=device) % g
        is_due = due[row] == step + 1
        last.masked_fill_(torch.where(is_due[:, None], ~is_end, others[row] | is_end), -torch.inf)

    into = model.get_input_embeddings().register_forward_pre_hook(goes_in)
    out_of = model.get_output_embeddings().register_forward_hook(comes_out)
    with into, out_of:
        start = clock()
        yield
        TOOK["sampling"] = clock() - start


def clock():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device):
    """The most memory that this process has held so far, in MB; on a GPU, of the GPU's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10


def ours(kind, prompts, lengths, device):
    """Steps that run each prompt once. (Forcing makes the ratios in this loss differ from 1.)"""
    model, tokenizer, prompts, optimizer = build(kind, prompts, device)
    b = len(prompts)
    g = len(lengths)
    room = max(lengths)
    args = train.Arguments(questions_per_step=b, group_size=g, max_new_tokens=room)
    while True:
        with force_lengths(model, lengths):
            completions = sampling.sample(
                model, tokenizer, prompts, g, 1.0, room, SharedPromptCache
            )
        advantages = grpo.group_advantages(torch.rand(b, g))
        groups = [train.Group(c, [], a) for c, a in zip(completions, advantages)]
        train.loss_and_gradient(args, model, None, groups)
        optimizer.step()
        optimizer.zero_grad()
        yield [len(completion.ids) for group in completions for completion in group]


def plain(kind, prompts, lengths, device):
    """The same with G copies of every prompt, in `generate` and in one forward with all logits."""
    model, _, prompts, optimizer = build(kind, prompts, device)
    ids, mask = sampling.pad(prompts, device, "left")
    ids = ids.repeat_interleave(len(lengths), 0)
    mask = mask.repeat_interleave(len(lengths), 0)
    model.generation_config.update(do_sample=True, top_k=0, max_new_tokens=max(lengths))
    while True:
        with force_lengths(model, lengths):
            whole = model.generate(ids, attention_mask=mask)
        said = whole[:, ids.shape[1] :]  # (B G, R)
        kept = ((said == 1).cumsum(1) - (said == 1).int() == 0).int()  # up to the end of sequence
        logits = model(whole, attention_mask=torch.cat([mask, kept], dim=1)).logits
        logprobs = torch.log_softmax(logits[:, ids.shape[1] - 1 : -1], dim=-1)
        logprobs = logprobs.gather(2, said[:, :, None])[:, :, 0]
        advantages = grpo.group_advantages(torch.rand(len(prompts), len(lengths)))
        grpo.grpo_loss(logprobs, logprobs.detach(), advantages.flatten(), kept).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield kept.sum(1).tolist()


def trl(kind, prompts, lengths, device):
    """The same by GRPOTrainer, without checkpointing, with our loss; its steps alone are timed."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            TOOK["start"] = clock()

        def on_step_end(self, *args, **kwargs):
            TOOK["all"] = clock() - TOOK["start"]

    model, tokenizer, prompts, _ = build(kind, prompts, device)
    model.generate = force_lengths(model, lengths)(model.generate)
    rows = len(prompts) * len(lengths)
    seen = []  # lengths of the completions

    def reward(completion_ids, **kwargs):
        seen[:] = map(len, completion_ids)
        return torch.rand(len(completion_ids)).tolist()

    parts = len(prompts) if device == "cuda" else 1  # all at once is too much for a GPU
    config = GRPOConfig(
        num_generations=len(lengths),
        max_completion_length=max(lengths),
        max_steps=1,
        per_device_train_batch_size=rows // parts,
        gradient_accumulation_steps=parts,
        gradient_checkpointing=False,
        loss_type="dr_grpo",
        scale_rewards="none",
        max_grad_norm=0.0,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        output_dir=tempfile.mkdtemp(),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts]
    data = Dataset.from_list([{"prompt": text} for text in texts])
    assert tokenizer(list(data["prompt"]))["input_ids"] == prompts
    trainer = GRPOTrainer(model, reward, config, data, processing_class=tokenizer)
    trainer.add_callback(Watch())
    trainer.remove_callback(transformers.PrinterCallback)
    while True:
        trainer.train()
        yield seen


def one_step(method, shape, device):
    """In a method's process: seconds of sampling, training, both; peak memory, and before steps."""
    if shape not in STEPS:
        STEPS[shape] = globals()[method](*shape, device)
    start = clock()
    lengths = next(STEPS[shape])
    took = TOOK.get("all", clock() - start)
    assert lengths == list(shape[2]) * len(shape[1]), (method, lengths)
    return TOOK["sampling"], took - TOOK["sampling"], took, peak(device), TOOK["memory"]


def measure(shape, methods, device, repeats):
    """Per method what `one_step` returns, row by row; and the operations/s of a matrix product."""
    rows = {method: [] for method in methods}
    rates = []
    a = torch.rand(2048, 2048, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    timer = Timer("a @ a", globals={"a": a.to(device)}, num_threads=torch.get_num_threads())
    turns = [methods]
    if device != "cpu":
        turns = [[method] for method in methods]  # a GPU is for one
    for together in turns:
        pools = {method: get_context("spawn").Pool(1) for method in together}
        for repeat in range(repeats + 1):
            rates.append(2 * 2048**3 / timer.timeit(5).median)
            for method, pool in pools.items():
                row = pool.apply(one_step, (method, shape, device))
                if repeat > 0:  # the first is for warming up
                    rows[method].append(row)
        for pool in pools.values():
            pool.terminate()
    return rows, median(rates)


def needed(kind, prompts, lengths):
    """Floating-point operations that a step cannot do without: for sampling, for training, in all.

    A forward pass over a prompt of P tokens and its completions of R: 2 N (P + G R) in the layers'
    N weights, 2 V d G R for logits of completion tokens, and attention: 4 d L per pair of query and
    key, P^2 / 2 of them in the prompt, R P + R^2 / 2 in a completion. Backward is twice as much.
    """
    _, vocabulary, width, inner, layers, heads, kv = MODELS[kind]
    weights = layers * width * (2 * width + 2 * kv * width // heads + 3 * inner)
    said = len(prompts) * sum(lengths)
    pairs = 0
    for p in prompts:
        pairs += p * p / 2 + sum(r * p + r * r / 2 for r in lengths)
    products = weights * (sum(prompts) + said) + vocabulary * width * said
    forward = 2 * (products + 2 * width * layers * pairs)
    return [forward, 3 * forward, 4 * forward]


def table(name, rows, rate):
    """Lines of the table; with each time, which share of the floor's speed it is."""
    kind, prompts, lengths = SHAPES[name]
    floor = [operations / rate for operations in needed(kind, prompts, lengths)]
    medians = {}
    for method, of_method in rows.items():
        medians[method] = [median(column) for column in zip(*of_method)]
    medians[f"floor at {rate / 1e9:.0f} GFLOP/s"] = [*floor, 0, 0]
    for method, (*times, top, before) in medians.items():
        cells = [f"{time:.2f} ({best / time:.0%})" for time, best in zip(times, floor)]
        cells.append(f"{len(prompts) * sum(lengths) / times[2]:,.0f}")
        cells += [f"{top:,.0f}", f"{top - before:,.0f}", f"{medians['trl'][2] / times[2]:.2f}"]
        print("|", " | ".join([name, method, *cells]), "|", flush=True)


def plot(file, repeats, r=128):
    """TRL's time / ours over P / R; or over K, for K responses and a question of R tokens each.
    Dashed: the tokens that go through the model in either, G (P + R) / (P + G R)."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3.5))
    points = (1, 2, 3, 5, 9)
    ratios = []
    for x in points:
        rows, _ = measure(("5M", (x * r,) * 4, (r,) * 8), ["trl", "ours"], "cpu", repeats)
        trls = median(row[2] for row in rows["trl"])
        own = median(row[2] for row in rows["ours"])
        ratios.append(trls / own)
        print(f"P = {x * r}, R = {r}: {trls:.2f} s / {own:.2f} s = {trls / own:.2f}", flush=True)
    axis.plot(points, ratios, "o-")
    axis.plot(points, [8 * (x + 1) / (x + 8) for x in points], "--")
    axis.set(xlabel="P / R", ylabel="TRL's step / ours", ylim=0)
    axis.secondary_xaxis("top", (lambda x: x - 1, lambda k: k + 1)).set_xlabel("K")
    figure.savefig(file, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratio, in place of a table")
    args = parser.parse_args()
    if args.plot:
        return plot(args.plot, args.repeats)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{time.strftime('%F')}, {name}, {torch.get_num_threads()} threads, {args.repeats} x\n")
    columns = "sampling s (of the floor's speed) | training s | both s | tokens/s | peak MB"
    print(f"| shape | method | {columns} | the steps' part | TRL's time / this |")
    print("| --- " * 9 + "|", flush=True)
    for name in args.shapes:
        methods = ["ours", "trl", "plain"][: 2 if args.device == "cuda" else 3]
        table(name, *measure(SHAPES[name], methods, args.device, args.repeats))


if __name__ == "__main__":
    main()
