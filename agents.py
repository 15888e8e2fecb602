"""Everything that speaks: the prompts, sampling with a shared prompt, the team and its rounds."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()  # loading weights takes no time worth a bar

# ------------------------------------------------------------------------------------- prompts
# Chat messages; the tokenizer's own template turns them into text. Change them as you like.

LEADER_SYSTEM = (
    "Answer the question. Other solvers' responses may stand before it: they may be right or "
    "wrong, so check them. Reason between <think> and </think>, then give the final answer, and "
    "nothing else, between <answer> and </answer>."
)
AGENT_SYSTEM = (
    "Answer the question. Reason step by step, then end with the sentence: So the answer is X."
)
TAGS = re.compile(r"</?think>|</?answer>")  # what gives the leader's output its parts


def leader_messages(question, responses=()):
    """The leader's prompt: the K responses first, the question last. So the leader alone (without
    responses) reads the ending of the team's prompt, and what is learned with the team carries
    over; it also learns faster than with the question first."""
    team = "".join(f"Response {k}: {quote(r)}\n\n" for k, r in enumerate(responses, start=1))
    return [
        {"role": "system", "content": LEADER_SYSTEM},
        {"role": "user", "content": f"{team}Question: {question}"},
    ]


def agent_messages(question, own=None, leader=None):
    """An agent's prompt: the question alone, or the turn in which it refines its `own` response.
    Agents are not told of each other: they see that and the leader's output."""
    turns = [("system", AGENT_SYSTEM), ("user", f"Question: {question}")]
    if leader is not None:
        advice = f"Another solver says: {quote(leader)}\n\nCheck both and answer again."
        turns += [("assistant", quote(own)), ("user", advice)]
    return [{"role": role, "content": text} for role, text in turns]


def quote(text):
    """Somebody's text as data in another's prompt, where tags of its own would mislead:
    `<think>steps</think><answer>5</answer>` becomes `steps The answer is 5.`"""
    text = re.sub(r"<answer>([^<]*)</answer>", r" The answer is \1.", text)
    return " ".join(TAGS.sub(" ", text).split())


def encode(tokenizer, messages):
    """Chat messages -> token ids of the whole prompt, up to where the assistant begins to speak.
    A template that refuses a system message (Gemma's) gets it at the head of the user's turn."""
    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template: use an instruct model")
    ids = lambda x: tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False)
    messages = defuse(tokenizer, messages)
    try:
        return ids(messages)
    except TemplateError:
        system, user, *rest = messages
        return ids([{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest])


def defuse(tokenizer, messages):
    """Texts as data: a chat marker in one (`<|im_end|>`) would become the real special token, and
    so it is broken up by a space. Llama 3 calls some of its markers special nowhere but here."""
    added = [x.content for x in tokenizer.added_tokens_decoder.values() if x.special]

    def broken(text):
        for token in added + tokenizer.all_special_tokens:
            apart = f"{token[0]} {token[1:]}"
            while token in text and token not in apart:
                text = text.replace(token, apart)
        return text.encode(errors="replace").decode()  # half a surrogate pair is no character

    return [{**m, "content": broken(m["content"])} for m in messages]


# ------------------------------------------------------------------------------------ sampling


@dataclass
class Completion:
    """One sampled continuation of a prompt."""

    text: str  # decoded, without special tokens
    ids: list  # token ids, with the end-of-sequence token if it came
    logprobs: list  # of each of them, under the distribution it was drawn from
    finished: bool  # False: cut off by max_new_tokens
    prompt_ids: list = field(repr=False)


def stop_ids(model, tokenizer):
    """All end-of-sequence ids: chat models often stop on two, and configurations disagree."""
    found = {tokenizer.eos_token_id}
    for eos in (model.generation_config.eos_token_id, model.config.eos_token_id):
        found.update(eos if isinstance(eos, list) else [eos])
    return sorted(found - {None})


@torch.inference_mode()
def sample(
    model, tokenizer, prompts, n=1, temperature=1.0, max_new_tokens=256, room=2**15, bar=None
):
    """For every prompt (chat messages or token ids) a list of n `Completion`s.

    They are drawn from softmax(logits / temperature) (at 0: its maximum) and nothing else: no
    top-k, top-p or penalty, whatever generation_config says, so that log-probabilities are right.
    Randomness comes from torch's global generator. `room`: tokens in the cache at one time.
    """
    prompts = [p if isinstance(p[0], int) else encode(tokenizer, p) for p in prompts]
    out = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike together: less pad
    while order:
        size = max(1, room // (len(prompts[order[0]]) + n * max_new_tokens))
        batch, order = order[:size], order[size:]
        asked = [prompts[i] for i in batch]
        with autocast(model):
            said = _sample_batch(model, tokenizer, asked, n, temperature, max_new_tokens)
        for k, i in enumerate(batch):
            out[i] = said[k * n : (k + 1) * n]
        if bar is not None:
            bar.update(len(said))
    return out


def _sample_batch(model, tokenizer, prompts, n, temperature, max_new_tokens):
    """The loop of `sample` for one batch: n `Completion`s of the first prompt, then the next's."""
    device, stop = model.device, stop_ids(model, tokenizer)
    ids, mask = pad(prompts, device, "left")  # (B, P) each
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prefill = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
    logits = prefill.logits[:, -1].repeat_interleave(n, 0)  # (B * n, V): n first tokens are drawn
    kind = SharedPromptCache if shares_prompts(model) else PlainCache
    cache = kind(prefill.past_key_values, mask, n, max_new_tokens)
    start = mask.sum(1).repeat_interleave(n)  # where each row's completion begins, (rows,)

    # rows are a grid: `slots` for each prompt, n at first, and fewer once some are finished
    row, slots, ends = torch.arange(len(logits), device=device), n, torch.tensor(stop).to(device)
    tokens = torch.zeros(len(row), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(row), max_new_tokens, device=device)
    lengths, done = torch.zeros_like(row), torch.zeros_like(row, dtype=torch.bool)
    for t in range(max_new_tokens):
        logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
        token = draw(logp) if temperature else logp.argmax(-1)
        tokens[row, t], logprobs[row, t] = token, logp.gather(1, token[:, None])[:, 0]
        lengths[row] += ~done  # what is still drawn for finished rows is cut off in the end
        done = done | torch.isin(token, ends)
        if t + 1 == max_new_tokens or done.all():
            break
        alive = ~done.view(-1, slots)
        most, busy = int(alive.sum(1).max()), alive.any(1)
        if int(busy.sum()) * most <= 0.8 * len(row):  # a fifth of the grid is idle: it leaves
            first = torch.argsort((~alive).int(), dim=1, stable=True)[:, :most]
            grid = torch.arange(len(row), device=device).view(-1, slots)
            keep, slots = grid.gather(1, first)[busy].flatten(), most
            row, done, token, start = row[keep], done[keep], token[keep], start[keep]
            cache.keep(keep, busy)
        logits = cache.step(model, token[:, None], (start + t)[:, None])
    out = []
    for i, (ids, logps, k) in enumerate(zip(tokens.tolist(), logprobs.tolist(), lengths.tolist())):
        text = tokenizer.decode(ids[:k], skip_special_tokens=True)
        out.append(Completion(text, ids[:k], logps[:k], ids[k - 1] in stop, prompts[i // n]))
    return out


def draw(logp):
    """One token for each row of log-probabilities, (rows, V): that on whose share of (0, 1] one
    random number falls. torch.multinomial does the same with V random numbers a row."""
    cdf = logp.exp().cumsum(-1)  # (rows, V)
    if not cdf[:, -1].isfinite().all():
        raise ValueError("a model's probabilities are not finite: was its learning rate too high?")
    place = cdf[:, -1:] * (1 - torch.rand(len(cdf), 1, device=cdf.device))
    return torch.searchsorted(cdf, place)[:, 0]


def pad(rows, device, side):
    """Token ids of unequal length -> (rows, longest) ids and mask. The id of padding is never
    read: it may well be the end-of-sequence id, so that the mask is made from the lengths."""
    fill = lambda rows: pad_sequence([torch.LongTensor(r) for r in rows], True, 0, side).to(device)
    return fill(rows), fill([[1] * len(row) for row in rows])


def autocast(model):
    """Compute in bf16 on a GPU, while the weights stay float32: in pure bf16 AdamW's small steps
    are rounded away."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")


class PlainCache:
    """The plain way: every row has its own copy of its prompt, and each token copies it again."""

    def __init__(self, cache, mask, n, room):
        self.cache, self.mask = cache, mask.repeat_interleave(n, 0)
        cache.batch_repeat_interleave(n)

    def step(self, model, token, positions):
        """Logits (rows, V) of what follows `token` (rows, 1)."""
        self.mask = torch.cat([self.mask, torch.ones_like(token)], dim=1)
        seen = dict(attention_mask=self.mask, past_key_values=self.cache)
        return model(token, position_ids=positions, **seen).logits[:, -1]

    def keep(self, rows, groups):
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)


class SharedPromptCache:
    """The fast way: a prompt's keys and values are kept once for its n rows; a row's own go into a
    buffer that has room for all its tokens. For P prompt and R own tokens the plain cache holds
    and reads n (P + R) of them, and copies all for every token (a stock cache concatenates); this
    one holds and reads P + n R, and copies none."""

    def __init__(self, cache, mask, n, room):
        buffer = lambda x: x.new_empty(len(x) * n, x.shape[1], room, x.shape[3])
        self.prompt = [(layer.keys, layer.values) for layer in cache.layers]  # (B, heads, P, d)
        self.own = [(buffer(k), buffer(v)) for k, v in self.prompt]  # (rows, heads, room, d)
        self.bias = mask.float().log()[:, None, None]  # (B, 1, 1, P): 0, and -inf at the padding
        self.length = 0

    def step(self, model, token, positions):
        """Logits (rows, V) of what follows `token` (rows, 1)."""
        self.length += 1
        config = model.config.get_text_config()
        usual, config._attn_implementation = config._attn_implementation, "shared_prompt"
        try:
            out = model(token, position_ids=positions, use_cache=False, shared_prompt=self)
        finally:
            config._attn_implementation = usual
        return out.logits[:, -1]

    def keep(self, rows, groups):
        self.own = [(keys[rows], values[rows]) for keys, values in self.own]
        if not groups.all():
            self.prompt = [(keys[groups], values[groups]) for keys, values in self.prompt]
            self.bias = self.bias[groups]


def shared_prompt_attention(module, query, key, value, _, scaling=None, shared_prompt=None, **kw):
    """Attention of a new token in two parts, to the prompt, held once, and to the row's own text:
    softmax([q K_prompt^T, q K_own^T] / sqrt(d)) [V_prompt; V_own]. The scores against the prompt
    are one matrix product for a group, whose prompt is thus read once per token, not per row.
    query: (rows, heads, 1, d); key, value: (rows, kv heads, 1, d); prompt: (B, kv heads, P, d).
    """
    prompt_keys, prompt_values = shared_prompt.prompt[module.layer_idx]
    own, end = shared_prompt.own[module.layer_idx], shared_prompt.length
    for buffer, new in zip(own, (key, value)):
        buffer[:, :, end - 1] = new[:, :, 0]
    (b, h, p, d), (rows, heads) = prompt_keys.shape, query.shape[:2]
    g, r = rows // b, heads // h  # rows of each of b prompts, query heads of each of h kv heads
    own_keys, own_values = own[0][:, :, :end], own[1][:, :, :end]  # (rows, h, t, d)
    group = lambda x: x.view(b, g, h, r, -1).transpose(1, 2).reshape(b, h, g * r, -1)
    apart = lambda x: x.view(b, h, g, r, -1).transpose(1, 2).reshape(rows, h, r, -1)
    query = (query * scaling).view(rows, h, r, d)
    to_prompt = group(query) @ prompt_keys.transpose(2, 3) + shared_prompt.bias  # (b, h, g r, p)
    to_own = group(query @ own_keys.transpose(2, 3))  # (b, h, g r, t)
    weights = torch.cat([to_prompt, to_own], dim=-1).float().softmax(dim=-1).to(value.dtype)
    out = apart(weights[..., :p] @ prompt_values) + apart(weights[..., p:]) @ own_values
    return out.reshape(rows, 1, heads, d), None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


def shares_prompts(model):
    """Whether the two-part attention above is this model's own: plain, over the whole context."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    other = [getattr(config, x, None) for x in ("sliding_window", "attn_logit_softcapping")]
    return layers == {"full_attention"} and not any(other) and model._supports_attention_backend


# ------------------------------------------------------------------------ the team, the rounds


@dataclass
class Speaker:
    """A model that can be asked: the leader, or one of the team."""

    name: str
    model: object
    tokenizer: object
    device: str = "cpu"
    resting: str = ""  # where it waits between answers; by itself it stays on its device

    def answer(self, prompts, n=1, temperature=1.0, max_new_tokens=256, bar=None):
        self.model.to(self.device)
        room = 2**14 if self.device == "cpu" else 2**17  # what a CPU's cache, a GPU's memory hold
        out = sample(self.model, self.tokenizer, prompts, n, temperature, max_new_tokens, room, bar)
        self.model.to(self.resting or self.device)
        return out

    def fingerprint(self, **how):
        """Of all that makes its responses what they are: weights, prompt, sampling settings."""
        mark = hashlib.sha256(repr((encode(self.tokenizer, agent_messages("")), how)).encode())
        for weight in self.model.parameters():  # as bf16: the same on a CPU and on a GPU
            bits = weight.data.to("cpu", torch.bfloat16).contiguous()
            mark.update(bits.view(torch.int16).numpy())
        return mark.hexdigest()[:16]


def load(name, device="cpu", resting="", dtype=torch.float32):
    """A checkpoint by folder or hub name, with its tokenizer; a ValueError if there is none."""
    name = "tiny/leader" if name == "tiny" else name
    built_in = Path(__file__).parent / "tiny_models" / name.removeprefix("tiny/")
    folder = built_in if name.startswith("tiny/") else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        model.to(resting or device).eval()  # for good: what learns is what sampled, no dropout
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error
    return Speaker(name, model, tokenizer, device, resting)


def load_team(spec, device="cpu", served=None):
    """The agents of `--agents`. They wait in main memory, so that a GPU holds one of them at a
    time, in bf16: they are frozen. The same name twice is two agents, with names of their own.
    `served` makes those that are on a server out of their names."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    local = lambda name: load(name, device, "cpu", dtype)
    team = [served(name) if "://" in name else local(name) for name in team_names(spec)]
    names = [agent.name for agent in team]
    for i, agent in enumerate(team):
        if twins := names[:i].count(agent.name):
            agent.name += f" ({twins + 1})"
    return team


def team_names(spec):
    """`tiny` -> the three built-in agents; `none` -> nobody; names -> themselves."""
    tiny = {"tiny": [f"tiny/agent{k}" for k in (1, 2, 3)], "none": []}
    for name in spec:  # no @ and no ?, where a key could be: it would be in the run's files
        if "://" in name and not re.fullmatch(r"https?://[^\s@?#]+#[^\s#]+", name):
            raise ValueError(f"--agents {name}: not like http://127.0.0.1:8000/v1#model")
    return [x for name in spec for x in tiny.get(name, [name])]


@dataclass
class Turn:
    """One round on one question: what the agents wrote, then what the leader made of it."""

    responses: list  # K Completions
    output: Completion  # the leader's


def deliberate(
    leader, team, questions, rounds, temperature=1.0, max_new_tokens=256, responses=None, bar=None
):
    """T rounds of leader and team, as in the paper's inference. Returns, per question, T `Turn`s.

    Round 0: every agent answers alone; the leader reads the question and all K responses.
    Round t: every agent gets the question, its own previous response and the leader's previous
    output, and answers again; the leader reads the question and the K new responses.
    The last output's answer is final. The agents sample at `temperature`, the leader is greedy.
    `responses`: round 0's, per question a list of K Completions, where they exist already.
    """
    history = [[] for _ in questions]
    for t in range(rounds):
        if t > 0 or responses is None:
            responses = [[] for _ in questions]
            for k, agent in enumerate(team):
                last = [(p[-1].responses[k].text, p[-1].output.text) if p else () for p in history]
                prompts = [agent_messages(q, *texts) for q, texts in zip(questions, last)]
                answers = agent.answer(prompts, 1, temperature, max_new_tokens, bar)
                for said, samples in zip(responses, answers):
                    said += samples
        prompts = [leader_messages(q, [r.text for r in rs]) for q, rs in zip(questions, responses)]
        outputs = leader.answer(prompts, 1, 0, max_new_tokens, bar)
        for past, said, [output] in zip(history, responses, outputs):
            past.append(Turn(said, output))
    return history


def later_rounds(leader, team, rows, said, rounds, **how):
    """For training: let rounds[i] rounds pass on rows[i], as above but with a leader that samples.
    It reads said[i], {agent's number: response}, and these agents refine: `said` then holds their
    new responses. Returns all that was written meanwhile."""
    written = []
    for t in range(max(rounds)):
        left = [(row["question"], s) for row, s, n in zip(rows, said, rounds) if n > t and s]
        outputs = leader.answer([leader_messages(q, s.values()) for q, s in left], 1, **how)
        written += outputs
        for k, agent in enumerate(team):
            mine = [(q, s, c.text) for (q, s), [c] in zip(left, outputs) if k in s]
            refined = agent.answer([agent_messages(q, s[k], text) for q, s, text in mine], 1, **how)
            written += refined
            for (_, s, _), [c] in zip(mine, refined):
                s[k] = c.text
    return [c for [c] in written]
