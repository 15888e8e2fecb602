"""The solutions of EXERCISES.md: each applies, runs, and changes what it should."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SMALL = "--questions 24 --samples 2 --sft_steps 0 --steps 2 --questions_per_step 4 --group_size 4"
SMALL += " --validation_questions 4 --eval_questions 0 --max_new_tokens 90 --seed 1 --device cpu"


def small_run(folder, patch="", more=""):
    """A copy of the code in `folder`, with that patch, after a small run: (its folder, its log)."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "models", "work")
    shutil.copytree(ROOT, folder, ignore=ignored)
    if patch:
        subprocess.run(["git", "apply", ROOT / "exercises" / patch], cwd=folder, check=True)
    command = [sys.executable, "train.py", *SMALL.split(), *more.split(), "--out", "runs/small"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "small"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, [row for row in rows if row["phase"] == "mlpo"]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("usual") / "copy")


@pytest.fixture(scope="module")
def four_updates(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("usual") / "copy", more="--updates 4")


@pytest.mark.parametrize("number", range(1, 9))
def test_each_solution_applies(number):
    [patch] = (ROOT / "exercises").glob(f"{number}-*.patch")
    subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, check=True)


def responses_of(run):
    lines = (run / "proposals.jsonl").read_text().splitlines()
    responses = {}
    for row in map(json.loads, lines):
        responses.setdefault(row["agent"], []).extend(row["responses"])
    return responses


@pytest.mark.slow
def test_a_length_penalty(usual, tmp_path):
    """The same completions at first; but another gradient."""
    _, log = small_run(tmp_path / "copy", "1-length-penalty.patch")
    assert log[0]["length"] == usual[1][0]["length"]
    assert log[0]["no_gradient"] <= usual[1][0]["no_gradient"]
    assert log[0]["grad_norm"] != pytest.approx(usual[1][0]["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_rloo_is_the_same_gradient_but_for_its_size(usual, tmp_path):
    _, log = small_run(tmp_path / "copy", "2-rloo.patch")
    assert log[0]["grad_norm"] == pytest.approx(4 / 3 * usual[1][0]["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("patch", ["3-gspo.patch", "4-no-clip.patch"])
def test_another_ratio_matters_from_the_second_update_on(usual, four_updates, tmp_path, patch):
    _, one = small_run(tmp_path / "one", patch)
    _, four = small_run(tmp_path / "four", patch, "--updates 4")
    assert one[0]["grad_norm"] == pytest.approx(usual[1][0]["grad_norm"], rel=1e-3)
    assert four[0]["grad_norm"] != pytest.approx(four_updates[1][0]["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_the_question_first(usual, tmp_path):
    run, _ = small_run(tmp_path / "copy", "5-question-first.patch")
    for folder, first in ((usual[0], "Response 1"), (run, "Question")):
        lines = (folder / "prompts.jsonl").read_text().splitlines()
        prompts = [json.loads(line)["prompt"][1]["content"] for line in lines]
        with_team = [prompt for prompt in prompts if "Response 1" in prompt]
        assert with_team and all(prompt.startswith(first) for prompt in with_team)


@pytest.mark.slow
def test_an_agent_that_is_a_function(tmp_path):
    run, _ = small_run(tmp_path / "copy", "6-function.patch", "--agents tiny closer.py#closer")
    said = responses_of(run)["closer"]
    assert any("]" in text or ")" in text for text in said)


@pytest.mark.slow
def test_five_agents_of_which_two_are_bad(tmp_path):
    more = "--agents tiny guess.py#guess guess.py#guess_otherwise"
    run, _ = small_run(tmp_path / "copy", "7-bad-agents.patch", more)
    said = responses_of(run)
    assert len(said) == 5 and said["guess"] != said["guess_otherwise"]


@pytest.mark.slow
def test_a_reward_that_can_be_cheated(usual, tmp_path):
    """The same completions, none of which counts less; and an answer that only occurs is right."""
    _, log = small_run(tmp_path / "copy", "8-cheated.patch")
    assert log[0]["length"] == usual[1][0]["length"]
    assert log[0]["reward"] >= usual[1][0]["reward"]
    text = "<think> 7 or 8 </think> <answer> 8 </answer>"
    script = f"import rewards; print(rewards.judge({text!r}, '7').right)"
    words = {"capture_output": True, "text": True, "check": True}
    for folder, right in ((ROOT, "False\n"), (tmp_path / "copy", "True\n")):
        assert subprocess.run([sys.executable, "-c", script], cwd=folder, **words).stdout == right
