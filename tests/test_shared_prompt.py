"""shared_prompt.py: the fast way is the plain way, in tokens, log-probabilities and gradients."""

import random
from itertools import chain

import pytest
import torch
from conftest import fork, wait
from textbook import gradient, random_completions
from transformers import AutoConfig, AutoModelForCausalLM

import agents
import grpo
import sampling
import shared_prompt
from sampling import PlainCache, sample
from shared_prompt import SharedPromptCache


@pytest.mark.parametrize("group_size", [1, 3])
def test_training_on_a_shared_prompt_is_the_plain_one(model, prompts, group_size):
    """Log-probabilities to 1e-5, gradients to 1e-4; one of the prompts has a single token."""
    completions = random_completions(prompts, group_size)
    weights = torch.rand(len(prompts) * group_size, 1)
    plain, mask = grpo.completion_logprobs(model, prompts, completions, 0.8)
    plain_gradient = gradient(model, (weights * plain * mask).sum())
    shared, same_mask = shared_prompt.completion_logprobs(model, prompts, completions, 0.8)
    assert mask.equal(same_mask)
    torch.testing.assert_close(shared * mask, plain * mask, atol=1e-5, rtol=0)
    shared_gradient = gradient(model, (weights * shared * mask).sum())
    assert (shared_gradient - plain_gradient).norm() < 1e-4 * plain_gradient.norm()


def test_prompts_of_one_token_alone(model):
    completions = [[[7, 8, 9], [10]], [[11, 12], [13, 14, 15, 16]]]
    plain, mask = grpo.completion_logprobs(model, [[5], [6]], completions)
    shared, same_mask = shared_prompt.completion_logprobs(model, [[5], [6]], completions)
    assert mask.equal(same_mask)
    torch.testing.assert_close(shared * mask, plain * mask, atol=1e-5, rtol=0)
    plain_gradient = gradient(model, (plain * mask).sum())
    shared_gradient = gradient(model, (shared * mask).sum())
    assert (shared_gradient - plain_gradient).norm() < 1e-4 * plain_gradient.norm()


def test_two_threads_make_the_same_gradient_every_time():
    """Its sums must not depend on which thread comes first: "bit for bit" rests on it."""
    leader = agents.load_model("tiny")
    rng = random.Random(0)
    # fewer, shorter or in the rows' order: no race
    prompts = [rng.choices(range(5, 300), k=250) for _ in range(4)]
    completions = []
    for _ in prompts:
        completions.append([rng.choices(range(5, 300), k=rng.randrange(6, 9)) for _ in range(32)])

    def compute():
        gradients = []
        torch.set_num_threads(2)
        for _ in range(4):
            logprobs, mask = shared_prompt.completion_logprobs(leader.model, prompts, completions)
            gradients.append(gradient(leader.model, (logprobs * mask).sum()))
        print(all(torch.equal(other, gradients[0]) for other in gradients[1:]))

    done = wait(*fork(compute))  # a worker with two threads is not forked again by later tests
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("n", [1, 5])
def test_both_caches_sample_the_same(model, tokenizer, prompts, n, temperature, monkeypatch):
    """Also when rows end at different times, and so leave the batch."""
    monkeypatch.setattr(sampling, "stop_ids", lambda *_: list(range(0, 370, 7)))
    results = []
    for cache_class in (PlainCache, SharedPromptCache):
        torch.manual_seed(2)
        groups = sample(model, tokenizer, prompts, n, temperature, 20, cache_class)
        results.append(list(chain(*groups)))
    for plain, shared in zip(*results):
        assert plain.ids == shared.ids and plain.finished == shared.finished
        logprobs = torch.tensor(plain.logprobs)
        torch.testing.assert_close(torch.tensor(shared.logprobs), logprobs, atol=2e-5, rtol=0)
    if temperature:
        assert len({len(completion.ids) for completion in results[0]}) > 1


def test_a_step_may_look_at_more_than_is_written(model, tokenizer, prompts, monkeypatch):
    """As a recorded one does on a GPU, which looks at the same room each time (test_gpu.py)."""
    monkeypatch.setattr(sampling, "stop_ids", lambda *_: list(range(0, 370, 7)))
    usual = SharedPromptCache.run_layers

    def with_room(self, decoder, x, cos, sin, room):
        return usual(self, decoder, x, cos, sin, min(room + 7, 20))

    results = []
    for run_layers in (usual, with_room):
        monkeypatch.setattr(SharedPromptCache, "run_layers", run_layers)
        torch.manual_seed(2)
        groups = sample(model, tokenizer, prompts, 5, 0.9, 20, SharedPromptCache)
        results.append(list(chain(*groups)))
    for usual_row, roomy_row in zip(*results):
        assert usual_row.ids == roomy_row.ids
        logprobs = torch.tensor(roomy_row.logprobs)
        torch.testing.assert_close(torch.tensor(usual_row.logprobs), logprobs, atol=2e-5, rtol=0)


OTHER = [("mistral", {"sliding_window": 4, "num_key_value_heads": 2}), ("gptj", {})]


@pytest.mark.parametrize("kind, own", OTHER)
def test_other_kinds_of_attention_are_sampled_rightly(kind, own, tokenizer, prompts, tmp_path):
    """A sliding window takes the plain way; GPT-J does where transformers lends it no attention."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, rotary_dim=4)
    sizes |= dict(vocab_size=len(tokenizer), initializer_range=0.3, bos_token_id=1, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **own)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cache_class = agents.load_model(str(tmp_path)).cache_class
    if kind == "mistral":
        assert cache_class is PlainCache
    groups = sample(model, tokenizer, prompts, 3, 1.0, 20, cache_class)
    for prompt, group in zip(prompts, groups):
        for completion in group:
            ids = torch.tensor(completion.ids)
            logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            logprobs = torch.tensor(completion.logprobs)
            torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=0)


def test_plain_is_a_flag_and_the_built_in_leader_is_fast_without_it():
    assert agents.load_model("tiny").cache_class is SharedPromptCache
    assert agents.load_model("tiny", plain=True).cache_class is PlainCache
