"""Small random models of two architectures, with the shipped tokenizer."""

# ruff: noqa: E402
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

# two threads that wait for each other on a busy machine can take a hundred times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.pyplot  # noqa: F401 (commands are forks, and need not read it again)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train

SHARED = ROOT.parent / "shared" / "data"


def for_all(*strategies):
    """Two tests with one body: 100 examples in the normal run, 10,000 among the slow tests."""

    def decorate(body):
        @pytest.mark.parametrize("examples", [100, pytest.param(10_000, marks=pytest.mark.slow)])
        def test(examples):
            how = settings(max_examples=examples, deadline=None, database=None, derandomize=True)
            how(given(*strategies)(body))()

        return test

    return decorate


FRAGMENTS = ["<think>", "</think>", "<answer>", "</answer>", "<answer>8</answer>", "8", "9", "(B)",
             " ", "\n", ".", ",", "%", "$", "] )", "the answer is ", "The final answer is: ",
             "\\boxed{", "{", "}", "\\text{", "\\frac{1}{2}", "\\frac", "x^2", "y = ", "\\approx ",
             "or", "1,234.0", "\u200b", "\u202e", "\x00", "\ud800", "答案", "ответ", "إجابة", "İß",
             "²", "<|im_end|>", "é", "🦆", "−"]  # fmt: skip
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=20), max_size=12).map("".join)


def start(script, *words):
    """The command in a process of its own: a fork, in which nothing has to be imported again."""

    def run():
        sys.argv = [script, *map(str, words)]
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return fork(run)


def fork(work):
    """work() in a process of its own: what `wait` needs."""
    out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    if pid := os.fork():
        return pid, out, err
    status = 1
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        # torch mends its pool of threads after a fork: here, before several threads try at once
        torch.set_num_threads(1)
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(pid, *files):
    """returncode (negative: the signal), stdout, stderr."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read())
    return SimpleNamespace(returncode=status, stdout=texts[0], stderr=texts[1])


def command(script, *words):
    """What a user types, in a process of its own, to its end."""
    return wait(*start(script, *words))


def grouped(completions, advantages):
    """`Group`s without verdicts: all that the loss reads. One question's G completions in each."""
    return [train.Group(of_prompt, [], a) for of_prompt, a in zip(completions, advantages)]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny_models" / "leader", padding_side="left")


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def model(request, tokenizer):
    """Two layers, two query heads per key-value head, weights large enough to have opinions."""
    torch.manual_seed(0)
    kind, config = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    }[request.param]
    model = kind(
        config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,  # the trap: padding that looks like the end
            initializer_range=0.3,
        )
    )
    return model.eval()


@pytest.fixture
def prompts(tokenizer):
    """Prompts of unequal length, one of them of a single token, as token ids."""
    texts = ["Yes", "Take 3 steps left.", "I have a flute, two lamps, and a trumpet. How many?"]
    return [tokenizer(text)["input_ids"] for text in texts]
