"""Tokens a second in sampling: ours, `generate`'s, and the bound that memory sets. On a GPU also
ours without the recorded step (a CUDA graph, see `SharedPromptCache.replay`).

    python benchmarks/decode.py                                        # the built-in shape, a CPU
    python benchmarks/decode.py --device cuda --models 0.5B 1.5B --rows 32 128

Random weights, a prompt of its own for each four rows, every row as long. The bound: each token of
a batch needs all weights once, and they come no faster than a large copy does.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import memory  # noqa: E402
import step  # noqa: E402

import sampling  # noqa: E402
import shared_prompt  # noqa: E402

GROUP = 4  # rows of one prompt


def bytes_per_second(device):
    """Of a copy, which reads and writes."""
    values = torch.empty(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(values)
    copy = Timer("target.copy_(values)", globals={"target": target, "values": values})
    return 2 * values.numel() / copy.blocked_autorange(min_run_time=0.5).median


@torch.no_grad()
def measure(kind, rows, args):
    """(ours, without recording, generate's), in tokens a second."""
    lengths = (args.prompt,) * (rows // GROUP)
    model, tokenizer, prompts, _ = step.build(kind, lengths, args.device)
    ids = torch.tensor(prompts, device=args.device).repeat_interleave(GROUP, 0)  # (rows, prompt)
    settings = (GROUP, 1.0, args.new, shared_prompt.SharedPromptCache)
    seconds = []
    for _ in range(args.times + 1):  # the first is a warm-up
        took = []
        for recorded in (shared_prompt.RECORD, 0):
            shared_prompt.RECORD, before = recorded, shared_prompt.RECORD
            with step.force_lengths(model, (args.new,) * GROUP):
                sampling.sample(model, tokenizer, prompts, *settings)
            shared_prompt.RECORD = before
            took.append(step.TOOK["sampling"])
        start = step.clock()
        with sampling.autocast(model):
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                min_new_tokens=args.new,
                max_new_tokens=args.new,
            )
        seconds.append((*took, step.clock() - start))
    return [rows * args.new / min(column) for column in zip(*seconds[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", default=["tiny"], choices=step.MODELS)
    add("--rows", nargs="+", type=int, default=[32, 128])
    add("--prompt", type=int, default=256, help="tokens")
    add("--new", type=int, default=64, help="tokens")
    add("--times", type=int, default=2)
    add("--device", default="cpu")
    args = parser.parse_args()
    speed = bytes_per_second(args.device)
    print(f"{args.device}: {speed / 1e9:.0f} GB/s in a copy")
    print("model   rows      ours  unrecorded  generate     bound   tokens a second")
    for kind in args.models:
        number = 2 if sampling.has_bf16(args.device) else 4  # bytes
        for rows in args.rows:
            ours, unrecorded, theirs = measure(kind, rows, args)
            bound = rows * speed / (number * memory.sizes(kind).weights)
            cells = f"{ours:9,.0f} {unrecorded:11,.0f} {theirs:9,.0f} {bound:9,.0f}"
            print(f"{kind:6} {rows:5} {cells}", flush=True)


if __name__ == "__main__":
    main()
