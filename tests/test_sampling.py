"""sampling.py: what is drawn, and with which probability."""

import pytest
import torch

import grpo
import sampling
from sampling import sample
from shared_prompt import SharedPromptCache


def test_greedy_is_what_generate_says(model, tokenizer, prompts):
    ours = sample(model, tokenizer, prompts, temperature=0, max_new_tokens=12)
    for prompt, [completion] in zip(prompts, ours):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert completion.ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_logprobs_are_the_trainers(model, tokenizer, prompts, temperature, monkeypatch):
    torch.manual_seed(1)
    # ends come early
    monkeypatch.setattr(sampling, "stop_ids", lambda *_: list(range(0, 370, 7)))
    groups = sample(model, tokenizer, prompts, 5, temperature, 30, SharedPromptCache)
    completions = [[completion.ids for completion in group] for group in groups]
    logprobs, mask = grpo.completion_logprobs(model, prompts, completions, temperature)
    rows = [completion for group in groups for completion in group]
    assert len({len(row.ids) for row in rows}) > 1  # some ended early: rows have left the batch
    for row, kept, c in zip(logprobs, mask, rows):
        assert kept.tolist() == [1] * len(c.ids) + [0] * (len(row) - len(c.ids))
        torch.testing.assert_close(row[: len(c.ids)], torch.tensor(c.logprobs), atol=2e-5, rtol=0)


def test_frequencies_are_the_models(model, tokenizer, prompts):
    torch.manual_seed(3)
    [group] = sample(model, tokenizer, prompts[1:2], 4000, max_new_tokens=1)
    logits = model(torch.tensor(prompts[1:2])).logits[0, -1]
    expected = torch.softmax(logits.float(), -1)
    seen = torch.bincount(torch.tensor([c.ids[0] for c in group]), minlength=len(expected)) / 4000
    assert (seen - expected).abs().sum() < 0.25
    assert len({c.ids[0] for c in group}) > 5  # each sample drew its own first token


def test_generation_defaults_of_the_checkpoint_do_not_leak_in(model, tokenizer, prompts):
    own = model.generation_config.top_k
    model.generation_config.top_k = 1
    torch.manual_seed(0)
    [group] = sample(model, tokenizer, prompts[:1], 20, max_new_tokens=1)
    model.generation_config.top_k = own
    assert len({c.ids[0] for c in group}) > 1


def test_every_end_of_sequence_id_ends_a_completion(model, tokenizer, prompts):
    torch.manual_seed(0)
    usual = sample(model, tokenizer, prompts, 8, max_new_tokens=6)
    also = usual[0][0].ids[0]  # any id will do, if it occurs
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, also]
    torch.manual_seed(0)
    groups = sample(model, tokenizer, prompts, 8, max_new_tokens=6)
    model.generation_config.eos_token_id = own
    ends = {tokenizer.eos_token_id, also}
    completions = [completion for group in groups for completion in group]
    assert any(c.ids[-1] == also and c.finished for c in completions)
    for c in completions:
        assert not ends & set(c.ids[:-1])
        assert c.finished == (c.ids[-1] in ends) and (c.finished or len(c.ids) == 6)


def test_same_seed_same_completions(model, tokenizer, prompts):
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(sample(model, tokenizer, prompts, 3, max_new_tokens=10))
    assert runs[0] == runs[1]


def test_tokens_are_drawn_as_often_as_they_are_probable():
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = sampling.draw_tokens(p.log().expand(200_000, -1))
    shares = torch.bincount(drawn, minlength=6) / 200_000
    assert (shares[p == 0] == 0).all()  # an impossible token is never drawn
    assert torch.allclose(shares, p, atol=0.005)


def test_the_ends_of_the_range_are_possible_tokens(monkeypatch):
    logp = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log()
    for number, token in ((0.0, 2), (1 - 2**-24, 1)):  # what torch.rand may return
        monkeypatch.setattr(
            torch, "rand", lambda *size, number=number, **_: torch.full(size, number)
        )
        assert sampling.draw_tokens(logp).tolist() == [token]


@pytest.mark.parametrize("capability, fast", [((7, 0), False), ((7, 5), False), ((8, 0), True)])
def test_bf16_is_for_gpus_that_have_it_in_hardware(capability, fast, monkeypatch):
    """A stand-in for what a V100, a T4 and an A100 answer."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sampling.has_bf16("cuda") is fast and sampling.has_bf16("cuda:1") is fast
    assert not sampling.has_bf16("cpu") and not sampling.has_bf16("mps")


def test_a_text_alone_is_a_completion():
    completion = sampling.Completion("5")
    assert completion.finished and completion.ids == [] and completion.prompt_ids == []
