"""The fast way of sampling and of log-probabilities: a prompt is run once for its whole group.

G completions share one prompt of P tokens; each has R of its own. The plain way runs the model on
G (P + R) tokens, this one on P + G R. With K responses in the prompt, P is much longer than R: at
P = 500, R = 125, G = 8 that is 1,500 tokens instead of 5,000. In sampling the cache is as much
smaller; in training each row still gets a copy of its prompt's keys and values.

Both are equal to the plain way: tests/test_shared_prompt.py compares tokens, log-probabilities and
gradients. `--plain` switches this file off, so that both can be timed.
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from grpo import token_logprobs
from sampling import autocast, pad, read_prompts

# ------------------------------------------------------------------------------------ sampling

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")  # SmolLM2 is a llama, Qwen2.5 a qwen2
RECORD = 128  # on a GPU: after so many tokens a step is recorded anew; 0: never, to compare
ANGLES_CHANGE = ("dynamic", "longrope")  # rotary positions of all tokens change with the length


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
        cache.layers = []
        for layer, of_prompt in zip(model.model.layers, prefill.past_key_values.layers):
            cache.layers.append(LayerCache(layer, of_prompt, n, max_new_tokens))
        # added to scores: 0, and -inf at the padding and where nothing is written yet
        bias = F.pad(prompt_mask.float().log(), (0, max_new_tokens), value=-torch.inf)
        cache.bias = bias[:, None, None]  # (B, 1, 1, P + max_new_tokens)
        cache.prompt_length = prompt_ids.shape[1]  # P
        cache.length = 0  # how many tokens of its own each row has
        cache.place = torch.zeros(1, dtype=torch.long, device=model.device)  # of the last of them
        cache.recording = None  # on a GPU, see `replay`
        positions = torch.arange(prompt_ids.shape[1] + max_new_tokens, device=model.device)
        like = model.model.embed_tokens.weight  # its dtype
        cos, sin = model.model.rotary_emb(like, positions[None])
        cache.cos, cache.sin = cos[0], sin[0]  # (P + max_new_tokens, d): the rotation at each place
        return cache, prefill.logits[:, -1].repeat_interleave(n, 0)

    def step(self, model, token, position):
        """Logits (rows, V) of what follows `token`, (rows, 1), which stands at `position`. D is
        the model's width, d that of one of its heads."""
        decoder = model.model
        self.place.fill_(self.length)
        self.bias[..., self.prompt_length + self.length] = 0
        self.length += 1
        x = decoder.embed_tokens(token[:, 0])  # (rows, D)
        cos = self.cos[position]  # (rows, 1, d)
        sin = self.sin[position]
        if RECORD and x.is_cuda:
            x = self.replay(decoder, x, cos, sin)
        else:
            x = self.run_layers(decoder, x, cos, sin, self.length)
        return model.lm_head(rms_norm(x, decoder.norm))

    def run_layers(self, decoder, x, cos, sin, room):
        """All that a Llama does for one token: in each layer it looks back at what was read
        (attention), then thinks about what it saw (a gated network), and adds both to x, (rows, D).
        Of the buffers of own tokens, the first `room` are looked at."""
        bias = self.bias[..., : self.prompt_length + room]
        for layer, layer_cache in zip(decoder.layers, self.layers):
            y = rms_norm(x, layer.input_layernorm)
            query, key, value = layer_cache.project(y, layer.self_attn)  # (rows, heads, d) each
            query = rotate(query, cos, sin) * layer.self_attn.scaling  # 1 / sqrt(d), for attention
            layer_cache.append(rotate(key, cos, sin), value, self.place)
            seen = layer_cache.attend(query, bias, room)
            x = x + layer.self_attn.o_proj(seen)
            y = rms_norm(x, layer.post_attention_layernorm)
            gate_and_up = F.linear(y, *layer_cache.gate_up)  # (weight, bias) of both
            gate, up = gate_and_up.chunk(2, dim=-1)  # (rows, intermediate) each
            x = x + layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)
        return x

    def replay(self, decoder, x, cos, sin):
        """`run_layers` on a GPU, where to launch its many small operations from Python takes longer
        than to compute them. A CUDA graph records them once and launches all of them together; it
        reads and writes the same places in memory each time. So it is recorded anew when rows have
        left, and when a row has more tokens than the graph looks at."""
        if self.recording is None or self.length > self.recording.room:
            self.recording = None  # its memory is free before the next one takes some
            room = min(self.length + RECORD - 1, self.bias.shape[-1] - self.prompt_length)
            self.recording = Recording(self, decoder, x, cos, sin, room)
        return self.recording.play(x, cos, sin)

    def keep(self, kept):
        """Only these rows, and the prompts that have any of them, go on."""
        self.recording = None
        for layer_cache in self.layers:
            layer_cache.keep(kept, self.length)
        self.bias = self.bias[kept.prompts]


class Recording:
    """A CUDA graph of `SharedPromptCache.run_layers`, with its inputs and output."""

    def __init__(self, cache, decoder, x, cos, sin, room):
        self.room = room
        self.inputs = [x.clone(), cos.clone(), sin.clone()]
        # once without recording: libraries set themselves up, autocast makes its copies of weights
        cache.run_layers(decoder, *self.inputs, room)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = cache.run_layers(decoder, *self.inputs, room)

    def play(self, *inputs):
        for recorded, new in zip(self.inputs, inputs):
            recorded.copy_(new)
        self.graph.replay()
        return self.output


def rms_norm(x, norm):
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def rotate(x, cos, sin):
    """Rotary positions: pairs of numbers, half a head apart, turned by an angle that grows with the
    position. x: (rows, heads, d); cos, sin: (rows, 1, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def join(*linears):
    """Weight and bias of one matrix product in place of several of the same input, in the dtype
    that is computed in. It is a copy, and lies in memory by columns, which is faster for few rows.
    """
    weight = torch.cat([linear.weight for linear in linears]).t().contiguous().t()
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias for linear in linears])
    if torch.is_autocast_enabled(weight.device.type):
        weight = weight.to(torch.get_autocast_dtype(weight.device.type))
    return weight, bias


class LayerCache:
    """One layer's part. B prompts with G rows each, rows = B G; t tokens of their own so far. With
    grouped-query attention `sharing` query heads read each key-value head:

        query             (rows, heads, d)   heads = kv_heads x sharing
        prompt_keys       (B, kv_heads, d, P), transposed once
        prompt_values     (B, kv_heads, P, d)
        own_keys, values  (rows, kv_heads, max_new_tokens, d)
    """

    def __init__(self, layer, of_prompt, n, max_new_tokens):
        attention = layer.self_attn
        self.qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = join(layer.mlp.gate_proj, layer.mlp.up_proj)
        self.prompt_keys = of_prompt.keys.transpose(2, 3).contiguous()
        self.prompt_values = of_prompt.values
        prompts, kv_heads, _, d = of_prompt.values.shape
        # zeros: what is not written yet may be looked at, with a weight of 0
        self.own_keys = of_prompt.values.new_zeros(prompts * n, kv_heads, max_new_tokens, d)
        self.own_values = torch.zeros_like(self.own_keys)

    def project(self, y, attention):
        """Query (rows, heads, d), key and value (rows, kv_heads, d) of y, (rows, D)."""
        _, kv_heads, _, d = self.own_keys.shape
        qkv = F.linear(y, *self.qkv).view(len(y), -1, d)  # (rows, heads + 2 kv_heads, d)
        query, key, value = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        if hasattr(attention, "q_norm"):  # Qwen3
            query = rms_norm(query, attention.q_norm)
            key = rms_norm(key, attention.k_norm)
        return query, key, value

    def append(self, key, value, place):
        """As own token number `place`, (1,): a tensor, which a recording reads anew each time."""
        self.own_keys.index_copy_(2, place, key[:, :, None].to(self.own_keys.dtype))
        self.own_values.index_copy_(2, place, value[:, :, None].to(self.own_values.dtype))

    def attend(self, query, bias, room):
        """softmax([q K_prompt^T, q K_own^T]) [V_prompt; V_own], (rows, heads d), in two parts that
        meet in the softmax. The scores against a prompt are one matrix product for its whole group,
        and for the heads that share, so that the prompt is read once per token, not once per row.
        bias: (B, 1, 1, P + room), -inf where there is nothing to look at."""
        own_keys = self.own_keys[:, :, :room]
        own_values = self.own_values[:, :, :room]
        prompts, kv_heads, prompt_length, d = self.prompt_values.shape
        rows, heads, _ = query.shape
        group = rows // prompts
        sharing = heads // kv_heads

        def by_group(x):  # (rows, kv_heads, sharing, ...) -> (B, kv_heads, G x sharing, ...)
            x = x.view(prompts, group, kv_heads, sharing, -1).transpose(1, 2)
            return x.reshape(prompts, kv_heads, group * sharing, -1)

        def by_row(x):  # the way back
            x = x.view(prompts, kv_heads, group, sharing, -1).transpose(1, 2)
            return x.reshape(rows, kv_heads, sharing, -1)

        query = query.view(rows, kv_heads, sharing, d)
        to_prompt = by_group(query) @ self.prompt_keys
        to_own = by_group(query @ own_keys.transpose(2, 3))
        # (B, kv_heads, G x sharing, P + room)
        scores = torch.cat([to_prompt, to_own], dim=-1) + bias
        weights = scores.softmax(dim=-1).to(own_values.dtype)
        from_prompt = weights[..., :prompt_length] @ self.prompt_values
        from_own = by_row(weights[..., prompt_length:]) @ own_values
        return (by_row(from_prompt) + from_own).reshape(rows, heads * d)

    def keep(self, kept, length):
        """Only these rows go on. What is not written yet need not be copied."""
        keys, values = self.own_keys, self.own_values
        size = (len(kept.rows), *keys.shape[1:])
        self.own_keys = keys.new_zeros(size)
        self.own_values = values.new_zeros(size)
        self.own_keys[:, :, :length] = keys[kept.rows, :, :length]
        self.own_values[:, :, :length] = values[kept.rows, :, :length]
        if not kept.prompts.all():
            self.prompt_keys = self.prompt_keys[kept.prompts]
            self.prompt_values = self.prompt_values[kept.prompts]


def can_sample_with_shared_prompt(model):
    """Whether `step` is meant for this model: a plain architecture over the whole context, with
    angles that do not change as the text grows. (agents.choose_cache then compares them.)"""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if model.config.model_type not in ARCHITECTURES or layers != {"full_attention"} or window:
        return False
    return model.model.rotary_emb.rope_type not in ANGLES_CHANGE


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
            )  # (part, R', D): R' is the longest of this part
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
    """Hidden states (rows, R', D) of completions behind their prompts; prompt_of: (rows,), indices
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
    positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1  # of each: how many real tokens before it
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
