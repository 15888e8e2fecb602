"""Everybody who speaks: the prompts, the models that can be asked, the team and its rounds."""

import hashlib
import importlib.util
import inspect
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import runs
from rewards import TAGS
from sampling import (
    Completion,
    PlainCache,
    error_of,
    has_bf16,
    is_out_of_memory,
    room_for_tokens,
    sample,
    stop_ids,
    tolerance,
)
from servers import ServedModel, merged
from shared_prompt import ANGLES_CHANGE, SharedPromptCache, can_sample_with_shared_prompt

logging.disable_progress_bar()  # loading weights takes no time worth a bar

# ------------------------------------------------------------------------------------- prompts
# Chat messages; the tokenizer's own template turns them into text. Change them as you like, but
# mind that the built-in models were trained on these: their template drops the system message, and
# they know no other words than those of the laboratory. With a real model both texts are read.

LEADER_SYSTEM = (
    "Answer the question. Other solvers' responses may stand before it: they may be right or "
    "wrong, so check them. Reason between <think> and </think>, then give the final answer, and "
    "nothing else, between <answer> and </answer>."
)
AGENT_SYSTEM = (
    "Answer the question. Reason step by step. Then say in one last sentence, after the words "
    "`So the answer is`, what the answer is."
)
TAG = re.compile("|".join(TAGS))  # what gives the leader's output its parts


def leader_messages(question, responses=(), names=()):
    """The leader's prompt: the K responses first, the question last. So the leader alone (without
    responses) reads the ending of the team's prompt, and what is learned with the team carries
    over; it also learns faster than with the question first.

    `names` are the agents' names, in the same order. The leader is not told them here: put them
    in place of the numbers if it shall know who speaks."""
    team = ""
    for number, response in enumerate(responses, start=1):
        team += f"Response {number}: {quote(response)}\n\n"
    return [
        {"role": "system", "content": LEADER_SYSTEM},
        {"role": "user", "content": f"{team}Question: {question}"},
    ]


def agent_messages(question, own=None, leader=None):
    """An agent's prompt: the question alone, or the turn in which it refines its `own` response.
    Agents are not told of each other: they see that and the leader's output."""
    messages = [
        {"role": "system", "content": AGENT_SYSTEM},
        {"role": "user", "content": f"Question: {question}"},
    ]
    if leader is not None:
        advice = f"Another solver says: {quote(leader)}\n\nCheck both and answer again."
        messages.append({"role": "assistant", "content": quote(own)})
        messages.append({"role": "user", "content": advice})
    return messages


def quote(text):
    """Somebody's text as data in another's prompt, where tags of its own would mislead:
    `<think>steps</think><answer>5</answer>` becomes `steps The answer is 5.` Lines stay lines, and
    keep their indentation: of a list, a sum or code they are half of the meaning."""
    text = re.sub(r"<answer>\s*([^<]*?)\s*</answer>", r" The answer is \1.", text)
    lines = []
    for line in text.splitlines():
        indentation = re.match(r"[ \t]*", line)[0]
        words = " ".join(TAG.sub(" ", line).split())
        if words:
            lines.append(indentation + words)
        elif lines and lines[-1]:
            lines.append("")  # of several empty lines one
    return "\n".join(lines).strip()


def encode(tokenizer, messages):
    """Chat messages -> token ids of the whole prompt, up to where the assistant begins to speak."""
    return tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]


def render(tokenizer, messages, **settings):
    """Chat messages -> the prompt as text, by the tokenizer's own template: `encode` gives its
    token ids. A template that refuses a system message (Gemma's), or drops it (Phi-3's), gets it at
    the head of the user's turn; the built-in one drops it on purpose, and says so. `settings`: for
    the template, besides those of `load_model`. ValueError if there is no template, or if it
    refuses that too."""
    template = tokenizer.chat_template
    if not template:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template: use an instruct model")
    messages = defuse(tokenizer, messages)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    settings = {**getattr(tokenizer, "template_settings", {}), **settings}
    settings |= {"tokenize": False, "add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(messages, **settings)
        if system.strip() in text or WITHOUT_SYSTEM in template:
            return text
    except Exception:  # a template is a program: it can fail in any way
        pass
    try:
        return tokenizer.apply_chat_template(merged(messages), **settings)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"the chat template of {tokenizer.name_or_path} refuses our prompts: {reason}"
        raise ValueError(f"{problem}: use other --chat_template_kwargs or another model") from error


WITHOUT_SYSTEM = "no system message, on purpose"  # in a template: its model knows no instructions


def defuse(tokenizer, messages):
    """Texts as data: a chat marker in one (`<|im_end|>`) would become the real special token, and
    so it is broken up by a space. Llama 3 calls some of its markers special nowhere but here.
    Where the form's tags are special tokens they stay whole: our own instructions name them."""
    markers = [x.content for x in tokenizer.added_tokens_decoder.values() if x.special]
    markers += tokenizer.all_special_tokens
    markers = [marker for marker in markers if marker.strip() not in TAGS]

    def broken(text):
        for marker in markers:
            apart = f"{marker[0]} {marker[1:]}"
            while marker in text and marker not in apart:
                text = text.replace(marker, apart)
        return text.encode(errors="replace").decode()  # half a surrogate pair is no character

    return [{**message, "content": broken(message["content"])} for message in messages]


# --------------------------------------------------------------------------- who can be asked
# An agent is any object with three things:
#     name                        a string, unlike the other agents' names
#     answer(prompts, n, ...)     for each prompt (chat messages) a list of n `Completion`s;
#                                 by keyword: temperature, max_new_tokens, bar (or None)
#     fingerprint(**settings)     a string that changes when its responses would; by keyword:
#                                 prompt (of an empty question), temperature, max_new_tokens
# LocalModel and servers.ServedModel are two; `--agents solver.py#Name` takes one of your own, or a
# plain function from a question to a response.


@dataclass
class LocalModel:
    """A model on this machine: the leader, or one of the team."""

    name: str
    model: object
    tokenizer: object
    device: str = "cpu"
    resting: str = ""  # where it waits between answers; by default it stays on its device
    cache_class: type = PlainCache
    sample_gb: float = 0.0  # memory for what is sampled at a time; 0: see `room_for_tokens`

    def answer(self, prompts, n=1, temperature=1.0, max_new_tokens=256, bar=None):
        """For every prompt, a list of chat messages, n `Completion`s."""
        self.model.to(self.device)
        completions = sample(
            self.model,
            self.tokenizer,
            [encode(self.tokenizer, messages) for messages in prompts],
            n,
            temperature,
            max_new_tokens,
            self.cache_class,
            room_for_tokens(self.model, self.device, self.sample_gb),
            bar,
        )
        self.model.to(self.resting or self.device)
        return completions

    def fingerprint(self, prompt, **settings):
        """Of all that makes its responses what they are: weights, prompt, sampling settings."""
        # some templates (Llama 3.2's) write the date; the agent is the same tomorrow
        undated = re.sub(r"strftime_now\s*\(", "(", self.tokenizer.chat_template)
        text = render(self.tokenizer, prompt, chat_template=undated)
        mark = hashlib.sha256(repr((text, settings)).encode())
        for weight in self.model.parameters():  # as bf16: the same on a CPU and on a GPU
            bits = weight.data.to("cpu", torch.bfloat16).contiguous()
            mark.update(bits.view(torch.int16).numpy())
        return mark.hexdigest()[:16]


class FunctionAgent:
    """An agent that is a function: a question's text in, a response out. In the turn in which
    others refine it says the same again."""

    def __init__(self, function, path):
        self.name = function.__name__
        self.function = function
        self.path = path

    def answer(self, prompts, n=1, temperature=1.0, max_new_tokens=256, bar=None):
        """For every prompt, a list of chat messages, n `Completion`s."""
        groups = []
        for messages in prompts:
            asked = [message["content"] for message in messages if message["role"] == "user"]
            question = asked[0].removeprefix("Question: ")
            groups.append([self.completion(question) for _ in range(n)])
        if bar is not None:
            bar.update(n * len(prompts))
        return groups

    def completion(self, question):
        text = self.function(question)
        if not isinstance(text, str):
            name = f"{self.path}#{self.name}"
            raise ValueError(f"--agents {name}: it must return a text, not {text!r:.40}")
        return Completion(text)

    def fingerprint(self, **settings):
        """Of its file: what it says may change with it."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]


def load_model(
    name,
    device="cpu",
    resting="",
    dtype=torch.float32,
    plain=False,
    sample_gb=0.0,
    chat_template_kwargs="",
):
    """A checkpoint by folder or hub name, with its tokenizer; a ValueError if there is none.
    `plain`: without shared_prompt.py, to compare. `chat_template_kwargs`: JSON, what the template
    is told besides the messages, such as {"enable_thinking": false}."""
    if name == "tiny":
        name = "tiny/leader"
    folder = name
    if name.startswith("tiny/"):
        folder = Path(__file__).parent / "tiny_models" / name.removeprefix("tiny/")
    if Path(folder).suffix == ".gguf" or (Path(folder).is_dir() and only_gguf(Path(folder))):
        advice = "make a folder of safetensors of it, as benchmarks/smollm2.py does"
        raise ValueError(f"model {name!r} is a GGUF file, which cannot be trained: {advice}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        model.to(resting or device).eval()  # for good: what learns is what sampled, no dropout
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error
    tokenizer.template_settings = template_settings(chat_template_kwargs)
    if tokenizer.eos_token_id is None:  # only the model's configuration knows it
        ends = stop_ids(model, tokenizer)
        if not ends:
            raise ValueError(f"model {name!r} names no end of sequence: it would write for ever")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    model.to(device)
    cache_class = choose_cache(name, model, plain)
    model.to(resting or device)
    return LocalModel(name, model, tokenizer, device, resting, cache_class, sample_gb)


def choose_cache(name, model, plain=False):
    """How this model is sampled: the fast way if that is right for its architecture, else the plain
    one, else ValueError."""
    fast = can_sample_with_shared_prompt(model) and not plain
    for cache_class in [SharedPromptCache, PlainCache] if fast else [PlainCache]:
        try:
            error = error_of(cache_class, model)
        except Exception as problem:  # an architecture without such a cache fails in many ways
            if is_out_of_memory(problem):
                raise
            error = math.inf
        if error <= tolerance(model):
            return cache_class
    kind = model.config.model_type
    reason = "has another kind of cache" if error == math.inf else f"is off by {error:.2g}"
    problem = f"model {name!r} cannot be sampled here: {kind} {reason}"
    raise ValueError(f"{problem}: choose one with plain attention, such as Llama or Qwen3")


def only_gguf(folder):
    return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))


def template_settings(text):
    """The object that this JSON text is; {} of an empty one. ValueError if it is none."""
    try:
        settings = json.loads(text or "{}")
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        wanted = "'{\"enable_thinking\": false}'"
        raise ValueError(f"--chat_template_kwargs {text}: no JSON object, like {wanted}")
    return settings


def load_team(spec, device="cpu", journal=None, **options):
    """The agents of `--agents`. Local models wait in main memory, so that a GPU holds one of them
    at a time, in bf16 where it has that: they are frozen. The same name twice is two agents, with
    names of their own. `journal`: the file for what servers reply; options: of `load_model`."""
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    team = []
    seen = []
    for name in team_names(spec):
        if "://" in name:
            agent = ServedModel(name, journal)
        elif ".py#" in name:
            agent = load_python_agent(name)
        else:
            agent = load_model(name, device, "cpu", dtype, **options)
        twins = seen.count(agent.name)
        seen.append(agent.name)
        if twins:
            agent.name += f" ({twins + 1})"
        team.append(agent)
    return team


def load_python_agent(name):
    """solver.py#Name: that object of that file; of a class one instance, and a function as a
    `FunctionAgent`."""
    path, _, wanted = name.rpartition("#")
    if not Path(path).is_file():
        raise ValueError(f"--agents {name}: no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"agent_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for a class's module
    spec.loader.exec_module(module)
    if not hasattr(module, wanted):
        raise ValueError(f"--agents {name}: there is no {wanted or 'name after #'} in {path}")
    agent = getattr(module, wanted)
    if inspect.isfunction(agent):
        return FunctionAgent(agent, Path(path))
    if isinstance(agent, type):
        agent = agent()  # a class: one instance of it
    for needed in ("name", "answer", "fingerprint"):
        if not hasattr(agent, needed):
            raise ValueError(f"--agents {name}: {wanted} in {path} has no {needed}: see agents.py")
    return agent


def team_names(spec):
    """`tiny` -> the three built-in agents; `none` -> nobody; names -> themselves."""
    names = []
    for name in spec:
        # no @ and no ?, where a key could be: it would be in the run's files
        if "://" in name and not re.fullmatch(r"https?://[^\s@?#]+#[^\s#]+", name):
            raise ValueError(f"--agents {name}: not like http://127.0.0.1:8000/v1#model")
        if name == "tiny":
            names += ["tiny/agent1", "tiny/agent2", "tiny/agent3"]
        elif name != "none":
            names.append(name)
    return names


def choose_device(wanted=""):
    """The device of that name, or by default the first of cuda, mps and cpu that is there.
    ValueError if it is not there."""
    here = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps or None
    here = here.type if here else "cpu"
    device = wanted or here
    kind, _, number = device.partition(":")
    is_here = kind in (here, "cpu")
    if is_here and number:
        is_here = number.isdecimal() and int(number) < torch.accelerator.device_count()
    if not is_here:
        raise ValueError(f"--device {device} is not on this machine: use {here}")
    if device.startswith("cuda") and not has_bf16(device):
        print("this GPU has no bf16 in hardware: everything is computed in float32")
    return device


UNKNOWN = 0.05  # share of a model's unknown words from which it is pointless to go on


def check_prompts(model, prompts, more_tokens):
    """Before anything long starts: can this local model read these prompts (chat messages), with
    `more_tokens` quoted in them or written after them? {index: tokens needed} of those that are too
    long. ValueError if too many words are unknown to it; a few are named on the screen."""
    encoded = [encode(model.tokenizer, messages) for messages in prompts]
    room = room_of(model)
    too_long = {}
    for index, ids in enumerate(encoded):
        if len(ids) + more_tokens > room:
            too_long[index] = len(ids) + more_tokens
    share = unknown_share(model.tokenizer, encoded)
    if share == 0:
        return too_long
    words = ", ".join(unknown_words(model.tokenizer, prompts)[:8])
    problem = f"{share:.1%} of the words in the prompts are unknown to {model.name}: {words}"
    if share > UNKNOWN:
        advice = "these questions need models that know them (train.py --leader and --agents)"
        raise ValueError(f"{problem}: {advice}")
    runs.say(problem)
    return too_long


def room_of(model):
    """How many tokens a local model can read and write. Where the rotary positions of all tokens
    change with the length of the text, as in longrope, keys in a cache would become wrong: there
    it is the length up to which they stay."""
    config = model.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    room = getattr(config, "max_position_embeddings", None) or math.inf
    if kind in ANGLES_CHANGE:
        first = rope.get("original_max_position_embeddings")
        return first or getattr(config, "original_max_position_embeddings", None) or room
    return room


def unknown_id(tokenizer):
    """The token that stands for unknown words; None where there is none: a tokenizer of bytes or
    subwords writes every word, and names some other special token (GPT-2's kin: the end) here."""
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def unknown_share(tokenizer, encoded):
    """The share of unknown tokens in these lists of token ids."""
    unknown = unknown_id(tokenizer)
    if unknown is None:
        return 0.0
    return sum(ids.count(unknown) for ids in encoded) / sum(len(ids) for ids in encoded)


def unknown_words(tokenizer, prompts):
    """The words that this tokenizer does not know, each once, as they are written."""
    words = {}
    for messages in prompts:
        text = render(tokenizer, messages)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
            if token == unknown_id(tokenizer):
                words[text[start:end]] = True
    return list(words)


# ---------------------------------------------------------------------------------- the rounds


@dataclass
class Round:
    """One round on one question: what the agents wrote, then what the leader made of it."""

    responses: list  # K Completions
    output: Completion  # the leader's


def deliberate(
    leader, team, questions, rounds, temperature=1.0, max_new_tokens=256, responses=None, bar=None
):
    """T rounds of leader and team, as in the paper's inference. Returns, per question, T `Round`s.

    Round 0: every agent answers alone; the leader reads the question and all K responses.
    Round t: every agent gets the question, its own previous response and the leader's previous
    output, and answers again; the leader reads the question and the K new responses.
    The last output's answer is final. The agents sample at `temperature`, the leader is greedy.
    `responses`: round 0's, per question a list of K Completions, where they exist already.
    """
    settings = {"max_new_tokens": max_new_tokens, "bar": bar}
    names = [agent.name for agent in team]
    history = [[] for _ in questions]
    for t in range(rounds):
        if t > 0 or responses is None:
            responses = ask_each_agent(team, questions, history, temperature, settings)
        prompts = []
        for question, said in zip(questions, responses):
            prompts.append(leader_messages(question, [r.text for r in said], names))
        outputs = leader.answer(prompts, n=1, temperature=0, **settings)
        for past, said, [output] in zip(history, responses, outputs):
            past.append(Round(said, output))
    return history


def ask_each_agent(team, questions, history, temperature, settings):
    """Per question K Completions, one of each agent, given its last response and the leader's
    last output where there are any."""
    responses = [[] for _ in questions]
    for k, agent in enumerate(team):
        prompts = []
        for question, past in zip(questions, history):
            if past:
                own = past[-1].responses[k].text
                prompts.append(agent_messages(question, own, past[-1].output.text))
            else:
                prompts.append(agent_messages(question))
        answers = agent.answer(prompts, n=1, temperature=temperature, **settings)
        for said, [completion] in zip(responses, answers):
            said.append(completion)
    return responses


def refine(leader, team, questions, responses, refinements, **settings):
    """For training on later rounds: on questions[i] the agents refine their responses
    refinements[i] times (0: they stay), as in `deliberate`, but with a leader that samples.
    responses[i]: {agent's name: its text}; these agents refine.
    Returns the new responses, in the same form and order, and the Completions of all that was
    written meanwhile."""
    responses = [dict(said) for said in responses]
    written = []
    for t in range(max(refinements)):
        left = [i for i, said in enumerate(responses) if refinements[i] > t and said]
        prompts = []
        for i in left:
            prompts.append(leader_messages(questions[i], responses[i].values(), responses[i]))
        outputs = [output for [output] in leader.answer(prompts, n=1, **settings)]
        written += outputs
        for agent in team:
            asked = []
            prompts = []
            for i, output in zip(left, outputs):
                if agent.name in responses[i]:
                    own = responses[i][agent.name]
                    asked.append(i)
                    prompts.append(agent_messages(questions[i], own, output.text))
            for i, [refined] in zip(asked, agent.answer(prompts, n=1, **settings)):
                responses[i][agent.name] = refined.text
                written.append(refined)
    return responses, written
