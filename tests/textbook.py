"""The textbook way, for the tests of what is faster."""

import random

import torch


def textbook_logprobs(model, prompts, completions, temperature=1.0):
    """One completion behind its prompt at a time, with nothing clever."""
    rows = []
    for prompt, group in zip(prompts, completions):
        for completion in group:
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits.float() / temperature, -1)
            rows.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return rows


def gradient(model, loss):
    """The loss's gradient in all weights, as one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def random_completions(prompts, group_size):
    """`group_size` lists of 1 to 9 token ids for every prompt."""
    rng = random.Random(0)
    groups = []
    for _ in prompts:
        group = []
        for _ in range(group_size):
            group.append([rng.randrange(5, 300) for _ in range(rng.randint(1, 9))])
        groups.append(group)
    return groups
