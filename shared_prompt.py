"""The fast way of sampling and of log-probabilities: a prompt is run once for its whole group.

G completions share one prompt of P tokens; each has R of its own. The plain way runs the model on
G (P + R) tokens, this one on P + G R. With K responses in the prompt, P is much longer than R: at
P = 500, R = 125, G = 8 that is 1,500 tokens instead of 5,000. In sampling the cache is as much
smaller; in training each row still gets a copy of its prompt's keys and values.

Both are equal to the plain way: tests/test_shared_prompt.py compares tokens, log-probabilities and
gradients. `--plain` switches this file off, so that both can be timed.
"""

import torch
from transformers import AttentionInterface, DynamicCache

from grpo import token_logprobs
from sampling import autocast, pad, read_prompts

# ------------------------------------------------------------------------------------ sampling


class SharedPromptCache:
    """A prompt's keys and values are kept once for its n rows; a row's own go into a buffer that
    has room for all its tokens. For P prompt and R own tokens the plain cache holds and reads
    n (P + R) of them, and copies all of them for every token (a stock cache concatenates); this
    one holds and reads P + n R, and copies none."""

    @staticmethod
    def tokens(prompt, n, new):
        """How many tokens it holds for n rows behind a prompt."""
        return prompt + n * new

    @classmethod
    def read(cls, model, prompt_ids, prompt_mask, n, max_new_tokens):
        """As PlainCache.read."""
        prefill = read_prompts(model, prompt_ids, prompt_mask)
        cache = cls()
        cache.prompt = []  # a layer's keys and values: (B, kv heads, P, d) each
        cache.own = []  # likewise: (rows, kv heads, max_new_tokens, d) each
        for layer in prefill.past_key_values.layers:
            b, heads, _, d = layer.keys.shape
            buffer = (b * n, heads, max_new_tokens, d)
            cache.prompt.append((layer.keys, layer.values))
            cache.own.append((layer.keys.new_empty(buffer), layer.values.new_empty(buffer)))
        # added to scores: 0, and -inf at the padding
        cache.prompt_bias = prompt_mask.float().log()[:, None, None]  # (B, 1, 1, P)
        cache.length = 0  # how many tokens of its own each row has
        return cache, prefill.logits[:, -1].repeat_interleave(n, 0)

    def step(self, model, token, position):
        """Logits (rows, V) of what follows `token`, (rows, 1), which stands at `position`."""
        self.length += 1
        # transformers looks the attention function up by this name in every forward pass; the
        # prompt's own pass and training use the model's usual one, so it is set back
        config = model.config.get_text_config()
        usual = config._attn_implementation
        config._attn_implementation = "shared_prompt"
        try:
            output = model(token, position_ids=position, use_cache=False, prompt_cache=self)
        finally:
            config._attn_implementation = usual
        return output.logits[:, -1]

    def keep(self, kept):
        """Only these rows, and the prompts that have any of them, go on."""
        self.own = [(keys[kept.rows], values[kept.rows]) for keys, values in self.own]
        if kept.prompts.all():
            return
        self.prompt = [(keys[kept.prompts], values[kept.prompts]) for keys, values in self.prompt]
        self.prompt_bias = self.prompt_bias[kept.prompts]


def shared_prompt_attention(
    module, query, key, value, attention_mask, scaling=None, prompt_cache=None, **unused
):
    """Attention of each row's new token to its group's prompt and to the row's own text:
    softmax([q K_prompt^T, q K_own^T] / sqrt(d)) [V_prompt; V_own], in two parts that meet in the
    softmax. The scores against a prompt are one matrix product for its whole group, so that the
    prompt is read once per token, not once per row.

    With grouped-query attention `sharing` query heads read each key-value head; they too go into
    that product. Shapes, for B prompts with G rows each, rows = B G, t own tokens:

        query        (rows, heads, 1, d)   heads = kv_heads x sharing
        key, value   (rows, kv_heads, 1, d)
        prompt       (B, kv_heads, P, d)     by group: (B, kv_heads, G x sharing, ...)
        own          (rows, kv_heads, t, d)  by row:   (rows, kv_heads, sharing, ...)
    """
    prompt_keys, prompt_values = prompt_cache.prompt[module.layer_idx]
    own_keys, own_values = prompt_cache.own[module.layer_idx]
    now = prompt_cache.length
    own_keys[:, :, now - 1] = key[:, :, 0]
    own_values[:, :, now - 1] = value[:, :, 0]
    own_keys = own_keys[:, :, :now]
    own_values = own_values[:, :, :now]

    prompts, kv_heads, prompt_length, d = prompt_keys.shape
    rows, heads = query.shape[:2]
    group = rows // prompts
    sharing = heads // kv_heads

    def by_group(x):  # (rows, kv_heads, sharing, ...) -> (B, kv_heads, G x sharing, ...)
        x = x.view(prompts, group, kv_heads, sharing, -1).transpose(1, 2)
        return x.reshape(prompts, kv_heads, group * sharing, -1)

    def by_row(x):  # the way back
        x = x.view(prompts, kv_heads, group, sharing, -1).transpose(1, 2)
        return x.reshape(rows, kv_heads, sharing, -1)

    query = (query * scaling).view(rows, kv_heads, sharing, d)
    to_prompt = by_group(query) @ prompt_keys.transpose(2, 3) + prompt_cache.prompt_bias
    to_own = by_group(query @ own_keys.transpose(2, 3))
    scores = torch.cat([to_prompt, to_own], dim=-1).float()  # (B, kv_heads, G x sharing, P + t)
    weights = scores.softmax(dim=-1).to(value.dtype)
    from_prompt = weights[..., :prompt_length] @ prompt_values
    from_own = by_row(weights[..., prompt_length:]) @ own_values
    output = by_row(from_prompt) + from_own  # (rows, kv_heads, sharing, d)
    return output.reshape(rows, 1, heads, d), None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


def can_sample_with_shared_prompt(model):
    """Whether the two-part attention above is this model's own: plain, over the whole context."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    cap = getattr(config, "attn_logit_softcapping", None)
    plain = layers == {"full_attention"} and not window and not cap
    return plain and model._supports_attention_backend


# ------------------------------------------------------------------------------------ training


def completion_logprobs(model, prompts, completions, temperature=1.0):
    """grpo.completion_logprobs with each prompt run once: its G completions read its keys and
    values from the cache, and the gradient flows back through that cache.

    Completions of like length are run together, so that little of it is padding. Needs a cache, and
    so no activation checkpointing."""
    group = len(completions[0])
    device = model.device
    # the prompt's last token predicts the completion's first: it is run with the completion
    beginnings = [prompt[:-1] for prompt in prompts]
    inputs = []  # per completion: the tokens after which one of its own is predicted
    written = []  # per completion: its token ids
    for prompt, of_prompt in zip(prompts, completions):
        inputs += [prompt[-1:] + ids[:-1] for ids in of_prompt]
        written += of_prompt
    targets, mask = pad(written, device, "right")  # (B G, R)
    logprobs = torch.zeros(mask.shape, device=device)
    with autocast(model):
        prompt_cache, prompt_mask = run_prompts(model, beginnings)
        for part in alike_in_length(inputs):
            rows = torch.tensor(part, device=device)
            hidden = run_completions(
                model, [inputs[i] for i in part], prompt_cache, prompt_mask, rows // group
            )  # (part, R', d): R' is the longest of this part
            own_row, token = mask[rows].nonzero(as_tuple=True)  # (tokens,) each
            place = (rows[own_row], token)
            logprobs[place] = token_logprobs(
                model, hidden[own_row, token], targets[place], temperature
            )
    return logprobs, mask


def run_prompts(model, beginnings):
    """Keys and values of the prompts but for their last token, with gradient; mask (B, P - 1)."""
    ids, mask = pad(beginnings, model.device, "left")
    cache = DynamicCache()
    if mask.any():  # a prompt of one token leaves nothing to run
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model.base_model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache, mask


def run_completions(model, inputs, prompt_cache, prompt_mask, prompt_of):
    """Hidden states (rows, R', d) of completions behind their prompts; prompt_of: (rows,), indices
    of prompts."""
    ids, own_mask = pad(inputs, model.device, "right")
    copied = []  # per layer: keys and values, (rows, kv_heads, P - 1, d) each
    for layer in prompt_cache.layers:
        # index_select, not x[prompt_of]: the backward of that adds up in any order
        keys = layer.keys.index_select(0, prompt_of)
        values = layer.values.index_select(0, prompt_of)
        copied.append((keys, values))
    cache = DynamicCache(copied) if copied else None
    del copied  # the list would hold the memory
    mask = torch.cat([prompt_mask[prompt_of], own_mask], dim=1)  # (rows, P - 1 + R')
    positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1
    return model.base_model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )[0]


def alike_in_length(rows):
    """Indices of rows in parts, longest first; the shortest of a part has 70% of its longest."""
    left = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while left:
        enough = 0.7 * len(rows[left[0]])
        part = [i for i in left if len(rows[i]) >= enough]
        left = left[len(part) :]
        yield part
