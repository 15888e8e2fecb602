"""How much memory does it take? Computed from the shapes of the models, and measured.

    python benchmarks/memory.py                                # computed; the tiny one measured too
    python benchmarks/memory.py --device cuda --measure 0.5B 1.5B      # on a GPU
    python benchmarks/memory.py --models 0.5B --measure 0.5B --prompt 128 --completion 32 --group 4

Weights are random: only their shapes matter. P tokens of prompt, G completions of R tokens each; N
weights, L layers, h hidden, I inner, kv key-value, V vocabulary size. b bytes: 4 on a CPU, else 2.

    weights 4 N, gradients 4 N, AdamW 8 N; on a GPU autocast's copy in training 2 N
    agent       2 N of the largest agent (--agent): they are bf16 and take turns; and its cache
    cache       2 L kv b (P + G R) for each prompt that is sampled at one time: what has room in
                1 GiB of a CPU, in a quarter of a GPU (--gpu_gb), as sampling.room_for_tokens says.
                Without grouped heads (1.7B, SmolLM2's) kv is h, and a token takes 16 times as much
                as in Qwen2.5-0.5B: fewer prompts at a time
    joined      L h (h + 2 kv + 2 I) b: the first matrices of each layer, copied by
                shared_prompt.join while a model samples
    activations (L + 1) times b [t (4 I + 4 h) + 2 h (P + R) rows] + 16 t h: what a layer keeps, and
                the gradient of one; t is P + G R for each prompt of a micro-batch, rows are G
    logits      4 copies in float32 of the rows in sampling, of 1,024 tokens in training
With --checkpointing: t is G (P + R), and activations are 4 L t h and those of one layer. Sums
without what an allocator loses; a sampling prompt's own activations are left out.
Measured: the most that a process held after the model was built, less what it held before.
"""

import argparse
import os
import random
import sys
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import step  # noqa: E402

import sampling  # noqa: E402
import train  # noqa: E402
from shared_prompt import SharedPromptCache  # noqa: E402

FRAME = "{:6}" + "{:>10}" * 14


@dataclass
class Sizes:
    """Of a model; `kv` is the width of its keys, which is h without grouped heads."""

    weights: int
    h: int
    inner: int
    layers: int
    kv: int
    vocabulary: int


def sizes(kind):
    """`Sizes` of a kind of step.MODELS, without making the weights."""
    name, vocabulary, *numbers = step.MODELS[kind]
    own = dict(zip(step.SIZES.split(), numbers), vocab_size=vocabulary, tie_word_embeddings=True)
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(name, **own)
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for p in model.parameters())
    h, inner, layers, heads, kv_heads = numbers
    return Sizes(weights, h, inner, layers, h // heads * kv_heads, vocabulary)


def number_bytes(args):
    """b: of a number that is computed with."""
    return 4 if args.device == "cpu" else 2


def token_bytes(kind, args):
    """Of one token's keys and values."""
    model = sizes(kind)
    return 2 * model.layers * model.kv * number_bytes(args)


def cache_room(kind, args):
    """How many tokens' keys and values the cache of this model may hold."""
    if args.device == "cpu":
        return min(2**14, 2**30 // token_bytes(kind, args))
    return int(args.gpu_gb * 2**30) // 4 // token_bytes(kind, args)


def prompts_at_a_time(kind, args):
    """(in sampling, in a micro-batch of training)."""
    shared = args.prompt + args.group * args.completion
    copies = args.group * (args.prompt + args.completion)
    sampled = cache_room(kind, args) // shared
    trained = args.tokens_per_batch // (copies if args.checkpointing else shared)
    return min(args.questions, max(1, sampled)), min(args.questions, max(1, trained))


def joined_bytes(kind, b):
    """What shared_prompt.join copies of this model, in numbers of b bytes."""
    model = sizes(kind)
    return model.layers * model.h * (model.h + 2 * model.kv + 2 * model.inner) * b


def cache_bytes(kind, args):
    """Of all prompts that are sampled at one time."""
    sampled, _ = prompts_at_a_time(kind, args)
    tokens = sampled * (args.prompt + args.group * args.completion)
    return tokens * token_bytes(kind, args)


def activation_bytes(kind, args):
    """What a micro-batch keeps for its backward pass."""
    model = sizes(kind)
    b = number_bytes(args)
    h = model.h
    _, trained = prompts_at_a_time(kind, args)
    rows = trained * args.group
    tokens = trained * (args.prompt + args.group * args.completion)
    if args.checkpointing:
        tokens = rows * (args.prompt + args.completion)
    of_tokens = tokens * (4 * model.inner + 4 * h)
    of_keys = rows * 2 * h * (args.prompt + args.completion)
    layer = b * (of_tokens + of_keys) + 16 * tokens * h
    if args.checkpointing:
        return 4 * model.layers * tokens * h + layer
    return (model.layers + 1) * layer


def compute(kind, args):
    """The columns, in bytes."""
    model = sizes(kind)
    n = model.weights
    sampled, trained = prompts_at_a_time(kind, args)
    copy = 0 if args.device == "cpu" else 2 * n
    agent = 2 * sizes(args.agent).weights + joined_bytes(args.agent, 2)
    agent += cache_bytes(args.agent, args)
    cache = cache_bytes(kind, args)
    joined = joined_bytes(kind, number_bytes(args))
    activations = activation_bytes(kind, args)
    logits_sampled = 16 * model.vocabulary * sampled * args.group
    tokens_at_a_time = min(1024, trained * args.group * args.completion)
    logits_trained = 16 * model.vocabulary * tokens_at_a_time
    return {
        "weights": 4 * n,
        "gradients": 4 * n,
        "AdamW": 8 * n,
        "copy": copy,
        "agent": agent,
        "cache": cache,
        "joined": joined,
        "logits": logits_sampled,
        "activ.": activations,
        " logits": logits_trained,
        "sampling": 4 * n + cache + joined + logits_sampled,
        "meas.": None,
        "training": 16 * n + copy + activations + logits_trained,
        " meas.": None,
    }


def measure(kind, phase, args):
    """In a process of its own: proposals-length sampling, or a training step with its AdamW."""
    if args.device == "cuda":
        torch.cuda.init()
    before = step.peak(args.device)
    sampled, trained = prompts_at_a_time(kind, args)
    prompts = (args.prompt,) * (sampled if phase == "sampling" else trained)
    model, tokenizer, prompts, optimizer = step.build(kind, prompts, args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:  # building a model takes more than having one
        Path("/proc/self/clear_refs").write_text("5")
    g = args.group
    r = args.completion
    if phase == "sampling":
        with step.force_lengths(model, (r,) * g):
            sampling.sample(
                model, tokenizer, prompts, g, 1.0, r, SharedPromptCache, cache_room(kind, args)
            )
    else:
        if args.checkpointing:
            model.activation_checkpointing_enable()
        ids = random.choices(range(2, 300), k=r)
        groups = []
        for prompt in prompts:
            completions = [sampling.Completion("", ids, [-5.0] * r, True, prompt)] * g
            groups.append(train.Group(completions, [], torch.randn(g)))
        how = train.Arguments(questions_per_step=trained, group_size=g, max_new_tokens=r)
        how.tokens_per_batch = args.tokens_per_batch
        how.checkpointing = args.checkpointing
        train.loss_and_gradient(how, model, None, groups)
        optimizer.step()
    return (step.peak(args.device) - before) * 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", default=["tiny", "0.5B", "1.5B"], choices=step.MODELS)
    add("--measure", nargs="*", default=["tiny"], choices=step.MODELS, help="these by running them")
    add("--agent", default="1.5B", choices=step.MODELS, help="the largest of the agents")
    add("--device", default="cpu")
    add("--gpu_gb", type=float, default=24.0, help="memory of the GPU")
    numbers = dict(prompt=1024, completion=256, group=8, questions=16, tokens_per_batch=8192)
    for name, number in numbers.items():
        add(f"--{name}", type=int, default=number)
    add("--checkpointing", action="store_true")
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # what is freed is given back, and not counted
    print(f"MB, for {args.device}; P {args.prompt}, R {args.completion}, G {args.group};", end=" ")
    for kind in args.models:
        sampled, trained = prompts_at_a_time(kind, args)
        at_a_time = f"{sampled} prompts sampled at one time, {trained} in a micro-batch"
        print(f"{kind}: {at_a_time};", end=" ")
    print()
    print("All but meas. is computed; sampling and training are sums of what stands before them.\n")
    print(FRAME.format("model", *compute("tiny", args)))
    for kind in args.models:
        row = compute(kind, args)
        for what, phase in (("meas.", "sampling"), (" meas.", "training")):
            if kind in args.measure:
                with get_context("spawn").Pool(1) as pool:
                    row[what] = pool.apply(measure, (kind, phase, args))
        cells = ["-" if x is None else f"{x / 1e6:,.0f}" for x in row.values()]
        print(FRAME.format(kind, *cells), flush=True)


if __name__ == "__main__":
    main()
