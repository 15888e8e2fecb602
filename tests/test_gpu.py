"""On an NVIDIA GPU: what the other tests show on a CPU. `python -m pytest -m gpu -n 0`"""

import json
import subprocess
import sys
from itertools import chain

import pytest
import torch
from conftest import ROOT
from test_commands import SMALL
from textbook import gradient, random_completions

import agents
import grpo
import sampling
import shared_prompt
from sampling import sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
DEVICE = "cuda"


@pytest.fixture
def leader():
    return agents.load_model("tiny", DEVICE)


@pytest.fixture
def float32(monkeypatch):
    """Without bf16, so that differences are of rounding alone."""
    monkeypatch.setattr(sampling, "has_bf16", lambda device: False)


def asked():
    """Prompts of unequal length."""
    questions = ["I have a flute.", "I have a flute, two lamps, and a trumpet. How many?"] * 3
    tokenizer = agents.load_model("tiny").tokenizer
    return [agents.encode(tokenizer, agents.agent_messages(question)) for question in questions]


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_recorded_step_is_the_step(leader, float32, temperature, monkeypatch):
    """Rows leave, and the recording is made anew for more tokens."""
    monkeypatch.setattr(sampling, "stop_ids", lambda *_: list(range(0, 370, 30)))
    results = []
    for record in (0, 8):
        monkeypatch.setattr(shared_prompt, "RECORD", record)
        torch.manual_seed(2)
        settings = (5, temperature, 60, shared_prompt.SharedPromptCache)
        groups = sample(leader.model, leader.tokenizer, asked(), *settings)
        results.append(list(chain(*groups)))
    for eager, recorded in zip(*results):
        assert eager.ids == recorded.ids
        logprobs = torch.tensor(recorded.logprobs)
        torch.testing.assert_close(torch.tensor(eager.logprobs), logprobs, atol=1e-4, rtol=0)
    assert max(len(completion.ids) for completion in results[0]) > 16


def test_greedy_is_what_generate_says(leader, float32):
    prompts = asked()
    groups = sample(
        leader.model, leader.tokenizer, prompts, 1, 0, 40, shared_prompt.SharedPromptCache
    )
    for prompt, [completion] in zip(prompts, groups):
        ids = torch.tensor([prompt], device=DEVICE)
        theirs = leader.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
        assert completion.ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("fast", [False, True])
def test_gradients_are_those_of_a_cpu(leader, float32, fast):
    prompts = asked()
    completions = random_completions(prompts, 4)
    way = shared_prompt.completion_logprobs if fast else grpo.completion_logprobs
    found = []
    for device in (DEVICE, "cpu"):
        model = leader.model.to(device)
        logprobs, mask = way(model, prompts, completions)
        weights = torch.linspace(-1, 1, len(logprobs), device=device)[:, None]
        found.append((logprobs * mask, gradient(model, (weights * logprobs * mask).sum())))
    (ours, of_ours), (theirs, of_theirs) = found
    torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=0)
    assert (of_ours.cpu() - of_theirs).norm() < 1e-3 * of_theirs.norm()


def test_in_bf16_sampling_and_training_see_nearly_the_same(leader):
    """The ratio of a step's first update is 1: here within what three digits allow."""
    prompts = asked()
    groups = sample(
        leader.model, leader.tokenizer, prompts, 8, 1.0, 60, shared_prompt.SharedPromptCache
    )
    ids = []
    for group in groups:
        ids.append([completion.ids for completion in group])
    logprobs, mask = shared_prompt.completion_logprobs(leader.model, prompts, ids)
    differences = []
    for row, completion in zip(logprobs.detach().cpu(), chain(*groups)):
        sampled = torch.tensor(completion.logprobs)
        differences.append((row[: len(sampled)] - sampled).abs())
    differences = torch.cat(differences)
    print(f"bf16: mean {differences.mean():.4f}, largest {differences.max():.3f}")
    assert differences.mean() < 0.02


def test_sampling_that_runs_out_of_memory_goes_on_with_fewer(leader, capsys):
    torch.cuda.empty_cache()
    used = torch.cuda.memory_allocated() + 100 * 2**20
    torch.cuda.set_per_process_memory_fraction(
        used / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        prompts = asked() * 30
        groups = sample(
            leader.model,
            leader.tokenizer,
            prompts,
            8,
            1.0,
            60,
            shared_prompt.SharedPromptCache,
            cache_tokens=2**30,
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: sampling goes on with" in capsys.readouterr().out
    assert len(groups) == 180 and all(len(group) == 8 for group in groups)


def run(script, *words):
    words = [sys.executable, script, *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_whole_run_there_and_evaluated_on_a_cpu(tmp_path):
    run("train.py", *SMALL.split(), "--device", DEVICE, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["device"] == DEVICE
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert len([row for row in rows if row["during"] == "mlpo" and "loss" in row]) == 3
    again = run("evaluate.py", tmp_path / "run", "--device", "cpu")
    assert "mlpo leader, alone" in again
