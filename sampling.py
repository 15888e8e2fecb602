"""Sampling in plain PyTorch: the model reads a prompt, then writes one token after the other.

Read `sample_batch` first: draw a token, append it, stop. `PlainCache` is the plain way of keeping
what was read; shared_prompt.py has the fast one, which stores a prompt once for its whole group.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from rewards import TAGS


@dataclass
class Completion:
    """One sampled continuation of a prompt. A text alone is enough where no token is counted."""

    text: str  # decoded, without special tokens
    ids: list = field(default_factory=list)  # token ids, with the end of sequence if it came
    # of each, at the sampling temperature (of greedy tokens: at 1)
    logprobs: list = field(default_factory=list)
    finished: bool = True  # False: cut off by max_new_tokens
    prompt_ids: list = field(default_factory=list, repr=False)


@torch.inference_mode()
def sample(
    model,
    tokenizer,
    prompts,
    n=1,
    temperature=1.0,
    max_new_tokens=256,
    cache_class=None,
    cache_tokens=2**15,
    bar=None,
):
    """For every prompt (a list of token ids) a list of n `Completion`s.

    They are drawn from softmax(logits / temperature) (at 0: its maximum) and nothing else: no
    top-k, top-p or penalty, whatever generation_config says, so that log-probabilities are right.
    Randomness comes from torch's global generator. `cache_class`: PlainCache (the default) or
    shared_prompt.SharedPromptCache. `cache_tokens`: how many tokens the cache may hold at a time.
    """
    cache_class = cache_class or PlainCache
    results = [None] * len(prompts)
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # less padding
    while longest_first:
        longest = len(prompts[longest_first[0]])
        size = max(1, cache_tokens // cache_class.tokens(longest, n, max_new_tokens))
        batch = longest_first[:size]
        batch_prompts = [prompts[i] for i in batch]
        settings = (n, temperature, max_new_tokens, cache_class)
        try:
            with autocast(model):
                completions = sample_batch(model, tokenizer, batch_prompts, *settings)
        except RuntimeError as error:
            half = len(batch) // 2
            if not is_out_of_memory(error) or half == 0:
                raise
            print(f"out of memory: sampling goes on with {half} prompts at a time")
            cache_tokens = half * cache_class.tokens(longest, n, max_new_tokens)
            continue
        longest_first = longest_first[size:]
        for position, i in enumerate(batch):
            results[i] = completions[position * n : (position + 1) * n]
        if bar is not None:
            bar.update(len(completions))
    return results


def sample_batch(model, tokenizer, prompts, n, temperature, max_new_tokens, cache_class):
    """The loop: draw, append, stop. n `Completion`s of the first prompt, then of the next."""
    prompt_ids, prompt_mask = pad(prompts, model.device, "left")  # (B, P) each
    cache, logits = cache_class.read(model, prompt_ids, prompt_mask, n, max_new_tokens)
    stop = torch.tensor(stop_ids(model, tokenizer), device=model.device)
    prompt_length = prompt_mask.sum(1).repeat_interleave(n)  # (rows,)
    written = Written(len(logits), max_new_tokens, model.device)
    running = Running(len(logits), n, model.device)
    for t in range(max_new_tokens):
        logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (rows, V)
        token = draw_tokens(logprobs) if temperature else logprobs.argmax(-1)  # (rows,)
        written.append(t, running, token, logprobs.gather(1, token[:, None])[:, 0])
        # only now: the end of sequence belongs to the completion
        running.done |= torch.isin(token, stop)
        if t + 1 == max_new_tokens or running.done.all():
            break
        kept = running.drop_finished()
        if kept is not None:
            token = token[kept.rows]
            prompt_length = prompt_length[kept.rows]
            cache.keep(kept)
        position = prompt_length + t  # of the token just drawn
        logits = cache.step(model, token[:, None], position[:, None])
    return written.completions(tokenizer, prompts, n, stop.tolist())


class Written:
    """What was drawn so far, a row for each completion."""

    def __init__(self, rows, max_new_tokens, device):
        self.tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, max_new_tokens, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def append(self, t, running, token, logprob):
        """Token number t of the rows that are still in the batch: (rows,) each."""
        self.tokens[running.origin, t] = token
        self.logprobs[running.origin, t] = logprob
        self.lengths[running.origin] += ~running.done  # what a finished row draws is cut off

    def completions(self, tokenizer, prompts, n, stop):
        tokens = self.tokens.tolist()
        logprobs = self.logprobs.tolist()
        unseen = special_ids(tokenizer)
        completions = []
        for i, length in enumerate(self.lengths.tolist()):
            ids = tokens[i][:length]
            text = tokenizer.decode([token for token in ids if token not in unseen])
            finished = ids[-1] in stop
            completions.append(
                Completion(text, ids, logprobs[i][:length], finished, prompts[i // n])
            )
        return completions


@dataclass
class Kept:
    """What stays of a batch when it shrinks."""

    rows: torch.Tensor  # (rows that stay,): their indices in the batch as it was
    prompts: torch.Tensor  # (B,): True for a prompt that still has any


class Running:
    """The rows that are still in the batch: a grid, `slots` of them for each of its prompts.

    A finished row would go on being computed for nothing. But a group's rows are computed together
    (shared_prompt.py), so that all prompts must keep equally many: the grid shrinks to the rows
    of the prompt that has most left, and a prompt that has none leaves.
    """

    def __init__(self, rows, n, device):
        self.origin = torch.arange(rows, device=device)  # of each, its row in `Written`
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.slots = n

    def drop_finished(self):
        """`Kept`, or None while too few are idle: copying the cache costs time as well."""
        alive = ~self.done.view(-1, self.slots)  # (B, slots)
        most = int(alive.sum(1).max())
        busy = alive.any(1)  # (B,)
        if int(busy.sum()) * most > 0.8 * len(self.origin):
            return None
        alive_first = torch.argsort((~alive).int(), dim=1, stable=True)[:, :most]  # (B, most)
        # some finished rows stay, to fill the grid
        grid = torch.arange(len(self.origin), device=self.origin.device).view(-1, self.slots)
        rows = grid.gather(1, alive_first)[busy].flatten()
        self.origin = self.origin[rows]
        self.done = self.done[rows]
        self.slots = most
        return Kept(rows, busy)


class PlainCache:
    """The plain way: every row has its own copy of its prompt's keys and values."""

    @staticmethod
    def tokens(prompt, n, new):
        """How many tokens it holds for n rows behind a prompt."""
        return n * (prompt + new)

    @classmethod
    def read(cls, model, prompt_ids, prompt_mask, n, max_new_tokens):
        """Run the prompts, (B, P), once. The cache for n rows each; logits (B n, V) of what
        follows."""
        prefill = read_prompts(model, prompt_ids, prompt_mask)  # keys and values of the prompts
        cache = cls()
        cache.mask = prompt_mask.repeat_interleave(n, 0)  # (rows, P), grows with every token
        cache.kv = prefill.past_key_values
        cache.kv.batch_repeat_interleave(n)  # in place: each prompt n times
        return cache, prefill.logits[:, -1].repeat_interleave(n, 0)

    def step(self, model, token, position):
        """Logits (rows, V) of what follows `token`, (rows, 1), which stands at `position`."""
        self.mask = torch.cat([self.mask, torch.ones_like(token)], dim=1)
        output = model(
            token, attention_mask=self.mask, position_ids=position, past_key_values=self.kv
        )
        return output.logits[:, -1]

    def keep(self, kept):
        """Only these rows go on."""
        self.mask = self.mask[kept.rows]
        self.kv.batch_select_indices(kept.rows)


@torch.inference_mode()
def error_of(cache_class, model):
    """How far the log-probabilities that sampling sees, token by token behind prompts of unequal
    length, are from those of one plain pass over each text: 1e-5 where all is well."""
    prompts = [list(range(1, 12)), [5, 6, 7]]  # any tokens: what is compared is arithmetic
    written = [list(range(2, 6)), list(range(7, 11))]
    worst = 0.0
    with autocast(model):
        cache, logits = cache_class.read(model, *pad(prompts, model.device, "left"), 1, 4)
        for t in range(4):
            for prompt, tokens, of_cache in zip(prompts, written, logits):
                text = torch.tensor([prompt + tokens[:t]], device=model.device)
                plain = model(text, use_cache=False).logits[0, -1]
                gap = of_cache.float().log_softmax(-1) - plain.float().log_softmax(-1)
                largest = gap.abs().max().item()
                if math.isnan(largest):  # max() would pass over it
                    return math.inf
                worst = max(worst, largest)
            token = torch.tensor([tokens[t] for tokens in written], device=model.device)
            position = torch.tensor([len(prompt) + t for prompt in prompts], device=model.device)
            logits = cache.step(model, token[:, None], position[:, None])
    return worst


def tolerance(model):
    """What `error_of` may be: bf16 has three digits."""
    return 0.3 if has_bf16(model.device) or model.dtype == torch.bfloat16 else 1e-2


def read_prompts(model, prompt_ids, prompt_mask):
    """One forward pass over prompts, (B, P), padded on the left; logits of the last token only."""
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    return model(prompt_ids, attention_mask=prompt_mask, position_ids=positions, logits_to_keep=1)


def draw_tokens(logprobs):
    """One token for each row of log-probabilities, (rows, V): the first at which the cumulated
    probability reaches a random number. torch.multinomial needs V random numbers a row for it."""
    cdf = logprobs.exp().cumsum(-1)  # (rows, V)
    if not cdf[:, -1].isfinite().all():
        raise ValueError("a model's probabilities are not finite: was its learning rate too high?")
    place = cdf[:, -1:] * (1 - torch.rand(len(cdf), 1, device=cdf.device))
    return torch.searchsorted(cdf, place)[:, 0]


def stop_ids(model, tokenizer):
    """All end-of-sequence ids: chat models often stop on two, and configurations disagree."""
    found = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        found.update(eos if isinstance(eos, list) else [eos])
    return sorted(found - {None})


def special_ids(tokenizer):
    """Ids of the special tokens, which are no text: all but those of the form (`<think>`)."""
    special = set()
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special and token.content not in TAGS:
            special.add(token_id)
    return special


def pad(rows, device, side):
    """Token ids of unequal length -> (rows, longest) ids and mask. The id of padding is never
    read: it may well be the end-of-sequence id, so that the mask is made from the lengths."""
    ids = [torch.LongTensor(row) for row in rows]
    ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_side=side)
    mask = pad_sequence(ones, batch_first=True, padding_side=side)
    return padded.to(device), mask.to(device)


def is_out_of_memory(error):
    """CUDA has a class for it, MPS and the CPU a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return any(said in str(error) for said in words)


def room_for_tokens(model, device, gigabytes=0.0):
    """How many tokens' keys and values the cache may hold: what `gigabytes` have room for, by
    default a quarter of a GPU's memory (the rest is for weights, AdamW and logits). It is the total
    memory, not what is free now, so that a run and its repetition sample in the same batches.
    On a CPU by default 1 GB and at most 2**14 tokens: larger batches are no faster there."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    number = 2 if has_bf16(device) else model.dtype.itemsize  # bytes; see `autocast`
    token = 2 * config.num_hidden_layers * heads * size * number  # bytes of keys and values
    kind = torch.device(device).type
    if gigabytes:
        return max(1, int(gigabytes * 2**30) // token)
    if kind == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4 // token
    if kind == "mps":
        return torch.mps.recommended_max_memory() // 4 // token
    return min(2**14, 2**30 // token)


def has_bf16(device):
    """Whether bfloat16 is faster than float32 there: a GPU of capability 8.0 or more has it in
    hardware; older ones (T4, V100) only emulate it."""
    if torch.device(device).type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(model):
    """Compute in bf16 where the device has it, while the weights stay float32: in pure bf16 AdamW's
    small steps are rounded away."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=has_bf16(model.device))
