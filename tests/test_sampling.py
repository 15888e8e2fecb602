"""sampling.py: what is drawn, and with which probability."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

import grpo
import sampling
from sampling import PlainCache, sample
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
    ids = []
    for group in groups:
        ids.append([completion.ids for completion in group])
    logprobs, mask = grpo.completion_logprobs(model, prompts, ids, temperature)
    completions = list(chain(*groups))
    assert len({len(completion.ids) for completion in completions}) > 1  # some ended early
    for row, kept, completion in zip(logprobs, mask, completions):
        length = len(completion.ids)
        assert kept.tolist() == [1] * length + [0] * (len(row) - length)
        sampled = torch.tensor(completion.logprobs)
        torch.testing.assert_close(row[:length], sampled, atol=2e-5, rtol=0)


# ----------------------------------------------------------- rows that are finished leave the batch


@pytest.fixture
def drops(monkeypatch):
    """What left the batch while a test sampled with early ends: a list of `Kept`."""
    kept = []
    usual = sampling.Running.drop_finished

    def watched(running):
        found = usual(running)
        if found is not None:
            kept.append(found)
        return found

    monkeypatch.setattr(sampling, "stop_ids", lambda *_: list(range(0, 370, 7)))
    monkeypatch.setattr(sampling.Running, "drop_finished", watched)
    return kept


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_both_caches_say_the_same_while_rows_leave(model, tokenizer, prompts, temperature, drops):
    results = []
    for cache_class in (PlainCache, SharedPromptCache):
        torch.manual_seed(4)
        groups = sample(model, tokenizer, prompts, 6, temperature, 30, cache_class)
        results.append(list(chain(*groups)))
    left = [len(kept.rows) for kept in drops]
    if temperature:  # a group's greedy rows are all alike
        assert len(left) >= 4 and left[: len(left) // 2] == left[len(left) // 2 :]
        assert len({len(completion.ids) for completion in results[0]}) > 3
    assert any(not kept.prompts.all() for kept in drops)  # some were a prompt's last
    for plain, shared in zip(*results):
        assert plain.ids == shared.ids and plain.finished == shared.finished
        assert plain.text == shared.text and plain.prompt_ids == shared.prompt_ids
        logprobs = torch.tensor(plain.logprobs)
        torch.testing.assert_close(torch.tensor(shared.logprobs), logprobs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("cache_class", [PlainCache, SharedPromptCache])
def test_who_stays_does_not_notice(model, tokenizer, prompts, cache_class, drops, monkeypatch):
    dropping = sample(model, tokenizer, prompts, 2, 0, 30, cache_class)
    assert drops
    monkeypatch.setattr(sampling.Running, "drop_finished", lambda running: None)
    waiting = sample(model, tokenizer, prompts, 2, 0, 30, cache_class)
    for one, other in zip(chain(*dropping), chain(*waiting)):
        assert one.ids == other.ids and one.finished == other.finished
        logprobs = torch.tensor(other.logprobs)
        torch.testing.assert_close(torch.tensor(one.logprobs), logprobs, atol=2e-5, rtol=0)


def test_the_grid_shrinks_to_the_prompt_that_has_most_left():
    """Of three prompts with four rows each, two rows are left, then one, then none."""
    running = sampling.Running(12, 4, "cpu")
    running.done[[0, 1]] = True
    assert running.drop_finished() is None  # two idle rows of twelve are not worth a copy
    running.done[[5, 6, 7, 8, 9, 10, 11]] = True
    kept = running.drop_finished()
    assert kept.prompts.tolist() == [True, True, False]
    assert kept.rows.tolist() == [2, 3, 4, 5]  # 5 is finished: it fills the second prompt's place
    assert running.origin.tolist() == [2, 3, 4, 5] and running.slots == 2
    assert running.done.tolist() == [False, False, False, True]
    running.done[[0, 1]] = True
    kept = running.drop_finished()  # its rows are now numbered within the batch
    assert kept.rows.tolist() == [2] and kept.prompts.tolist() == [False, True]
    assert running.origin.tolist() == [4] and running.slots == 1


def test_batches_change_nothing(model, tokenizer, prompts):
    """With room in the cache for one prompt at a time; the results keep the prompts' order."""
    together = sample(model, tokenizer, prompts, 2, 0, 10)
    done = []
    bar = SimpleNamespace(update=done.append)
    alone = sample(model, tokenizer, prompts, 2, 0, 10, cache_tokens=1, bar=bar)
    assert done == [2, 2, 2]
    for prompt, group, same in zip(prompts, together, alone):
        for one, other in zip(group, same):
            assert one.ids == other.ids and one.prompt_ids == other.prompt_ids == prompt


# ----------------------------------------------------------------------------- what is drawn


def test_frequencies_are_the_models(model, tokenizer, prompts):
    torch.manual_seed(3)
    [group] = sample(model, tokenizer, prompts[1:2], 4000, max_new_tokens=1)
    logits = model(torch.tensor(prompts[1:2])).logits[0, -1]
    expected = torch.softmax(logits.float(), -1)
    seen = torch.bincount(torch.tensor([c.ids[0] for c in group]), minlength=len(expected)) / 4000
    assert (seen - expected).abs().sum() < 0.25
    assert len({c.ids[0] for c in group}) > 5  # each sample drew its own first token


def test_generation_defaults_of_the_checkpoint_do_not_leak_in(
    model, tokenizer, prompts, monkeypatch
):
    monkeypatch.setattr(model.generation_config, "top_k", 1)
    torch.manual_seed(0)
    [group] = sample(model, tokenizer, prompts[:1], 20, max_new_tokens=1)
    assert len({c.ids[0] for c in group}) > 1


def test_every_end_of_sequence_id_ends_a_completion(model, tokenizer, prompts, monkeypatch):
    torch.manual_seed(0)
    usual = sample(model, tokenizer, prompts, 8, max_new_tokens=6)
    also = usual[0][0].ids[0]  # any id will do, if it occurs
    ends = {tokenizer.eos_token_id, also}
    monkeypatch.setattr(model.generation_config, "eos_token_id", sorted(ends))
    torch.manual_seed(0)
    groups = sample(model, tokenizer, prompts, 8, max_new_tokens=6)
    completions = list(chain(*groups))
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
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = sampling.draw_tokens(probabilities.log().expand(200_000, -1))
    shares = torch.bincount(drawn, minlength=6) / 200_000
    assert (shares[probabilities == 0] == 0).all()  # an impossible token is never drawn
    assert torch.allclose(shares, probabilities, atol=0.005)


def test_probabilities_that_are_not_finite_are_said_in_one_line():
    with pytest.raises(ValueError, match="not finite: was its learning rate too high") as stop:
        sampling.draw_tokens(torch.full((2, 5), float("nan")))
    assert "\n" not in str(stop.value)


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
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *words, enabled: asked.append((*words, enabled)))
    for device in ("cuda:0", "cpu"):
        sampling.autocast(SimpleNamespace(device=torch.device(device)))
    assert asked == [("cuda", torch.bfloat16, fast), ("cpu", torch.bfloat16, False)]


def test_a_text_alone_is_a_completion():
    completion = sampling.Completion("5")
    assert completion.finished and completion.ids == [] and completion.prompt_ids == []


def test_the_cache_is_counted_as_it_is_held(model, tokenizer, prompts, monkeypatch):
    """The plain cache copies the prompt into each row, and so takes fewer prompts at a time."""
    sizes = []
    usual = sampling.sample_batch

    def watched(model, tokenizer, prompts, *rest):
        sizes.append(len(prompts))
        return usual(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(sampling, "sample_batch", watched)
    long = [[5] * 40] * 4
    for cache_class, size in ((PlainCache, 1), (SharedPromptCache, 4)):
        sample(model, tokenizer, long, 4, 1.0, 5, cache_class, cache_tokens=4 * 60)
        assert max(sizes) == size
        sizes.clear()


def test_out_of_memory_halves_the_batch_and_goes_on(model, tokenizer, prompts, monkeypatch, capsys):
    """As on a GPU that has room for two prompts; greedy, so that the tokens must be the same."""
    expected = sample(model, tokenizer, prompts, 2, 0, 6)
    usual = sampling.sample_batch
    sizes = []

    def small(model, tokenizer, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(sampling, "sample_batch", small)
    memory = 2
    found = sample(model, tokenizer, prompts, 2, 0, 6)
    assert sizes == [3, 1, 1, 1]
    assert "out of memory: sampling goes on with 1 prompts at a time" in capsys.readouterr().out
    for group, expected_group in zip(found, expected):
        assert [c.ids for c in group] == [c.ids for c in expected_group]
    memory = 0  # not even one
    with pytest.raises(torch.OutOfMemoryError):
        sample(model, tokenizer, prompts, 2, 0, 6)


def test_room_is_counted_in_bytes(model, monkeypatch):
    """Two layers, two key-value heads of 8 numbers, keys and values, in float32: 256 bytes."""
    assert sampling.room_for_tokens(model, "cpu", 1 / 2**10) == 2**20 // 256
    assert sampling.room_for_tokens(model, "cpu") == 2**14
    large = LlamaConfig(num_hidden_layers=24, num_attention_heads=32, hidden_size=2048)  # no groups
    monkeypatch.setattr(model, "config", large)
    assert sampling.room_for_tokens(model, "cpu") == 2**30 // (24 * 2 * 2048 * 4)
    total = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    for capability, number in (((7, 5), 4), ((8, 0), 2)):  # bytes: float32, bf16
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        room = sampling.room_for_tokens(model, "cuda")
        assert room == 6 * 2**30 // (24 * 2 * 2048 * number)
