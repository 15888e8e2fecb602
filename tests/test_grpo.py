"""grpo.py: each equation by hand, and log-probabilities as the textbook has them."""

import math

import pytest
import torch
from textbook import gradient, random_completions, textbook_logprobs
from transformers import AutoConfig, AutoModelForCausalLM, modeling_layers

import grpo
import shared_prompt
import train


@pytest.mark.parametrize("group_size", [1, 3])
def test_the_plain_way_is_the_textbooks(model, prompts, group_size):
    """With padding, and for a prompt of one token."""
    completions = random_completions(prompts, group_size)
    weights = torch.rand(len(prompts) * group_size)
    expected = textbook_logprobs(model, prompts, completions, 0.8)
    weighted = [weight * row.sum() for weight, row in zip(weights, expected)]
    expected_gradient = gradient(model, sum(weighted))
    logprobs, mask = grpo.completion_logprobs(model, prompts, completions, 0.8)
    assert logprobs.shape == mask.shape
    for row, kept, by_hand in zip(logprobs, mask.bool(), expected):
        torch.testing.assert_close(row[kept], by_hand, atol=1e-5, rtol=0)
    own_gradient = gradient(model, (weights[:, None] * logprobs * mask).sum())
    assert (own_gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("group_size", [1, 3])
def test_checkpointing_changes_nothing_but_memory(model, prompts, group_size, monkeypatch):
    """Every layer is computed again for the backward pass, and nobody is warned of anything."""
    warnings = []
    monkeypatch.setattr(modeling_layers.logger, "warning_once", warnings.append)
    completions = random_completions(prompts, group_size)
    weights = torch.rand(len(prompts) * group_size, 1)
    passes = []
    watch = model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))

    def run():
        logprobs, mask = grpo.completion_logprobs(model, prompts, completions, 0.8)
        return logprobs.detach() * mask, gradient(model, (weights * logprobs * mask).sum())

    try:
        expected, expected_gradient = run()
        model.activation_checkpointing_enable()
        logprobs, again = run()
    finally:
        model.activation_checkpointing_disable()
        watch.remove()
    assert len(passes) == 1 + 2 and not warnings and not model.training
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    assert (again - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


SCALED = [
    ("granite", "logits_scaling"),
    ("cohere", "logit_scale"),
    ("gemma2", "final_logit_softcapping"),
]


@pytest.mark.parametrize("gaps", [(float("nan"), 0.0), (0.0, float("nan"))])
def test_a_leader_whose_numbers_are_none_is_refused(model, gaps, monkeypatch):
    def completion_logprobs(args, model, prompts, completions, temperature=1.0):
        logprobs, mask = grpo.completion_logprobs(model, prompts, completions, temperature)
        return logprobs + torch.tensor(gaps)[:, None], mask

    monkeypatch.setattr(train, "completion_logprobs", completion_logprobs)
    with pytest.raises(ValueError, match="--leader mine: .* another leader"):
        train.check_training(train.Arguments(), model, "mine")


@pytest.mark.parametrize("way", [grpo, shared_prompt])
@pytest.mark.parametrize("name, setting", SCALED)
def test_logits_that_a_model_scales_or_caps_are_those_of_training_too(name, setting, way, prompts):
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    special = {setting: 0.25, "num_key_value_heads": 2, "vocab_size": 400, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **size, **special, head_dim=8, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    train.check_training(train.Arguments(), model, name)
    ids = torch.tensor([prompts[2]])
    ours = grpo.logits_of(model, model.base_model(ids)[0][0])
    torch.testing.assert_close(ours, model(ids).logits[0], atol=1e-5, rtol=1e-5)
    completions = [[[7, 8, 9], [10]] for _ in prompts]
    expected = textbook_logprobs(model, prompts, completions)
    logprobs, mask = way.completion_logprobs(model, prompts, completions)
    for row, kept, by_hand in zip(logprobs, mask.bool(), expected):
        torch.testing.assert_close(row[kept], by_hand, atol=1e-4, rtol=0)


def test_a_leader_whose_logits_are_made_in_an_unknown_way_is_refused(model, monkeypatch):
    train.check_training(train.Arguments(), model, "mine")
    usual = model.forward

    def forward(*args, **kwargs):
        output = usual(*args, **kwargs)
        output.logits = output.logits / 3
        return output

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match="--leader mine: .* another leader") as stop:
        train.check_training(train.Arguments(), model, "mine")
    assert "\n" not in str(stop.value)


def test_chunks_of_logits_change_nothing(model):
    hidden = torch.randn(10, 32)
    targets = torch.randint(0, 300, (10,))
    whole = grpo.token_logprobs(model, hidden, targets, 1.0, chunk=100)
    torch.testing.assert_close(grpo.token_logprobs(model, hidden, targets, 1.0, chunk=3), whole)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.1, 0.1, 0.1, 0.1]])
    advantages = grpo.group_advantages(rewards)
    torch.testing.assert_close(advantages[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))
    torch.testing.assert_close(advantages[1], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    scaled = grpo.group_advantages(rewards, scale=True)
    torch.testing.assert_close(scaled.std(dim=1), torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1.1])
def test_a_flat_group_has_no_advantage_at_all(value):
    for scale in (False, True):
        assert not grpo.group_advantages(torch.full((3, 7), value), scale).any()


def test_loss_by_hand():
    """Two completions, the second one token shorter; ratios inside and outside the clip range."""
    ratio = torch.tensor([[1.0, 1.5], [0.5, 9.9]])
    mask = torch.tensor([[1, 1], [1, 0]])
    old = torch.zeros(2, 2)
    for advantages, gains in [
        ([1.0, 1.0], [1.0, 1.2, 0.5]),  # a gain stops at 1 + eps, a loss of probability counts
        ([-1.0, -1.0], [-1.0, -1.5, -0.8]),  # min for either sign: the worse of the two
    ]:
        loss = grpo.grpo_loss(ratio.log(), old, torch.tensor(advantages), mask, clip=0.2)
        assert loss.item() == pytest.approx(-sum(gains) / 4)
        loss = grpo.grpo_loss(ratio.log(), old, torch.tensor(advantages), mask, normalizer=100)
        assert loss.item() == pytest.approx(-sum(gains) / 100)


def test_loss_is_zero_at_first_and_its_gradient_is_not():
    logprobs = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    advantages = torch.tensor([0.5, -0.5])
    loss = grpo.grpo_loss(logprobs, logprobs.detach(), advantages, torch.ones(2, 1))
    loss.backward()
    assert loss.item() == 0
    assert logprobs.grad.flatten().tolist() == [-0.25, 0.25]


def test_kl_is_k3():
    logprobs = torch.tensor([[-1.0, -3.0]])
    reference = torch.tensor([[-2.0, -1.0]])
    expected = [math.exp(-1) + 1 - 1, math.exp(2) - 2 - 1]
    assert grpo.k3(logprobs, reference).flatten().tolist() == pytest.approx(expected)
    zero = torch.zeros(1)
    loss = grpo.grpo_loss(logprobs, logprobs, zero, torch.ones(1, 2), 0.2, reference, kl_coef=0.5)
    assert loss.item() == pytest.approx(0.5 * sum(expected) / 2)


@pytest.mark.parametrize("way", [grpo, shared_prompt])
def test_the_end_of_sequence_gets_gradient_and_padding_none(way, model, tokenizer, prompts):
    eos = tokenizer.eos_token_id
    completions = [[[7, 8, eos], [eos]]]
    logprobs, mask = way.completion_logprobs(model, prompts[2:], completions)
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    grad = torch.autograd.grad((logprobs * mask).sum(), logprobs)[0]
    assert grad.tolist() == mask.tolist()
    # one step on "stop here" makes stopping likelier
    model_copy = type(model)(model.config)
    model_copy.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model_copy.parameters(), lr=1e-3)
    before = logprobs[1, 0].item()
    advantages = torch.tensor([0.0, 1.0])
    now, mask = way.completion_logprobs(model_copy, prompts[2:], completions)
    grpo.grpo_loss(now, now.detach(), advantages, mask).backward()
    optimizer.step()
    after, _ = way.completion_logprobs(model_copy, prompts[2:], completions)
    assert after[1, 0].item() > before
