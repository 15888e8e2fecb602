"""benchmarks/evidence.py: statistics and report on made-up rows; small measurements; pass_at.py."""

import random
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence
import evidence_plan
import evidence_report as report
import pass_at

import train
from sampling import Completion

# ------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (4, 2.776), (9, 2.262), (199, 1.972)])
def test_the_t_distribution_is_the_one_of_the_tables(freedom, t):
    noise = np.random.default_rng(0).normal(0, 1, (1, freedom + 1))
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    _, half, p = report.estimate(noise)
    assert half * (freedom + 1) ** 0.5 == pytest.approx(t, abs=2e-3) and p == pytest.approx(1)
    _, half, p = report.estimate(noise + t / (freedom + 1) ** 0.5)
    assert p == pytest.approx(0.05, abs=2e-4)


def test_one_seed_is_a_paired_t_test_over_questions():
    values = np.array([[1, 0, 0, 1, 1, -1, 0, 1.0]])
    mean, half, p = report.estimate(values)
    error = values.std(ddof=1) / 8**0.5
    assert mean == values.mean() and half == pytest.approx(2.3646 * error, rel=1e-3)
    assert p == pytest.approx(2 * report.stats.t.sf(mean / error, 7), rel=1e-6)


def test_both_seeds_and_questions_vary():
    by_seed = np.repeat([[0.0], [1.0], [0.0], [1.0]], 50, axis=1)  # the questions are all alike
    mean, half, _ = report.estimate(by_seed)
    assert mean == 0.5 and half == pytest.approx(3.182 * 0.57735 / 2, rel=1e-3)
    by_question = np.repeat([[0.0, 1.0] * 25], 4, axis=0)  # the seeds are all alike
    _, half, _ = report.estimate(by_question)
    assert half == pytest.approx(2.0096 * 0.50508 / 50**0.5, rel=1e-3)
    assert report.estimate(np.zeros((3, 5))) == (0.0, 0.0, 1.0)


def test_intervals_hold_what_they_promise():
    """Seeds and questions with effects of their own: 95% intervals cover the truth, p is no lie."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(200):
        effects = rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 1, (1, 40))
        mean, half, p = report.estimate(effects + rng.normal(0, 1, (5, 40)))
        covered.append(abs(mean) <= half)
        assert (p < 0.05) == (abs(mean) > half)
    assert 0.93 <= np.mean(covered) <= 1


def test_what_is_left_out_does_not_count():
    values = np.array([[1, np.nan, 0, 1], [np.nan, np.nan, 1, 1.0]])
    mean, half, _ = report.estimate(values)
    assert mean == pytest.approx(4 / 5) and 0 < half < 5


# ----------------------------------------------------------------------------------------- report


def made_up(variant, seed, mode, share=0.7, questions=20):
    rng = random.Random(f"{variant} {seed} {mode}")
    row = {"variant": variant, "seed": seed, "mode": mode, "command": "benchmarks/evidence.py"}
    if variant in report.LABELS:
        leader = f"--leader runs/evidence/sft-{seed}/leader"
        row["command"] = f"train.py {leader} --seed {seed} --out runs/evidence/{variant}-{seed}"
    if mode.startswith("curve"):
        return {**row, "curve": [[0, 0.3], [25, 0.6]]}
    row["tokens"] = 100.0
    row["correct"] = "".join(rng.choices("01", [1 - share, share], k=questions))
    return row


def rows_of(names, seeds, modes):
    rows = []
    for seed in seeds:
        rows += [made_up(name, seed, mode) for name in names for mode in modes]
        team = ("agent 1", "agent 2", "agent 3", "majority of 3", "any")
        rows += [made_up("three", seed, mode) for mode in team]
    return rows


def test_a_report_of_what_is_there(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    modes = ("alone", "three:1", "three:2", "three:3", "three:4", "three:5", "curve alone")
    report.report(rows_of(("untrained", "sft", "mlpo"), range(10, 15), modes), tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    headings = [heading for heading in report.SECTIONS if f"\n## {heading}\n" in page]
    there = ["1. Claims", "2. Parts", "3. Baselines", "7. Rounds"]
    assert headings == there
    assert "Not measured yet: MLPO, no SFT; GRPO, no SFT; " in page
    assert "| SFT + MLPO |" in page and "GRPO, no SFT:" not in page and "nan" not in page
    assert "with the team: SFT + MLPO over SFT" in page and "over GRPO" not in page
    assert len(list((tmp_path / "benchmarks").glob("*.png"))) == 3
    assert len(page.splitlines()) < 200


def test_sections_of_nothing_are_empty():
    for sections, _ in report.SECTIONS.values():
        for section in sections:
            assert section({}) == "", section


def test_differences_are_paired_by_seed():
    one, two = made_up("mlpo", 10, "alone"), made_up("sft", 10, "alone")
    of_sft = {10: two, 11: made_up("sft", 11, "alone")}  # a seed that mlpo has not
    measured = {("mlpo", "alone"): {10: one}, ("sft", "alone"): of_sft}
    values = report.matrix(measured, ("mlpo", "alone"), ("sft", "alone"))
    expected = [int(a) - int(b) for a, b in zip(one["correct"], two["correct"])]
    assert values.tolist() == [expected]
    assert report.difference(measured, ("mlpo", "alone"), ("grpo", "alone")) == ""


# ------------------------------------------------------------------------------------------- plan


def settings(tmp_path, **changed):
    usual = {"steps": 1, "sft_steps": 1, "questions": 6, "train_questions": 10, "jobs": 1}
    usual |= {"bbh": "", "work": str(tmp_path), "seed_list": [10, 11]}
    return SimpleNamespace(**{**usual, **changed})


def test_what_was_made_with_other_numbers_is_refused(tmp_path):
    evidence.check_size(settings(tmp_path))
    evidence.check_size(settings(tmp_path))
    with pytest.raises(ValueError, match="another --out"):
        evidence.check_size(settings(tmp_path, steps=2))


def test_the_plan_measures_all_that_the_report_shows(tmp_path):
    units = sum(evidence_plan.plan([10, 11], bbh=True), [])
    looked = {variant for name, variant, *_ in units if name == "look"}
    assert looked == set(report.LABELS)
    (tmp_path / "sft-10").mkdir()
    for name in ("sft-10/proposals.jsonl", "finals-10.jsonl"):
        (tmp_path / name).touch()
    for variant in evidence_plan.VARIANTS:
        if variant not in evidence_plan.EQUAL_TOKENS:  # they ask two runs how long they are
            assert train.parse(evidence.words_of(settings(tmp_path), variant, 10)), variant


def test_measurements_of_what_needs_no_training(tmp_path):
    args = settings(tmp_path)
    rows = []
    for name in evidence.TEAM:
        evidence.say(args, "tiny", name)
    rows += evidence.baselines(args, "three", "tiny", 10)
    rows += evidence.look(args, "untrained", "alone three:2 same:1 finals:1 shuffled:1", 10)
    rows += evidence.debate(args, "three", 10)
    modes = {row["mode"]: row for row in rows if "correct" in row}
    wanted = "agent 3,majority of 40,any,three:1,three:2,finals:1,shuffled:1,debate:2".split(",")
    for mode in wanted:
        assert len(modes[mode]["correct"]) == 6, mode
    assert modes["three:1"]["tokens"] < modes["three:2"]["tokens"]
    assert modes["finals:1"]["tokens"] < modes["three:1"]["tokens"]
    assert modes["any"]["accuracy"] >= modes["agent 1"]["accuracy"]
    # the second agent1 gives another of its samples than the first
    [first, *_] = evidence.first_responses(args, "same", "tiny", 10)
    said = evidence.runs.read_json(tmp_path / "said-tiny-agent1.json")[0]
    assert [c.text for c in first] == [said[(10 + 5 * twin) % 14][0] for twin in range(3)]
    assert evidence.final_sentence("two 2 . So the answer is 2.") == "So the answer is 2."


@pytest.mark.slow
def test_the_whole_of_it_stopped_and_gone_on_with(tmp_path):
    words = "--seeds 2 --steps 2 --sft_steps 3 --questions 6 --train_questions 30 --jobs 2"
    command = [sys.executable, ROOT / "benchmarks" / "evidence.py", *words.split()]
    command += ["--out", tmp_path]
    with subprocess.Popen(command) as process:
        units = tmp_path / "runs" / "evidence" / "units"
        while len(list(units.glob("*"))) < 6:
            time.sleep(0.2)
        process.terminate()
    times = {path: path.stat().st_mtime for path in units.glob("say*")}
    subprocess.run(command, check=True, timeout=1800)
    assert times == {path: path.stat().st_mtime for path in times}  # nothing twice
    page = (tmp_path / "RESULTS.md").read_text()
    assert "MLPO, no SFT" in page and "Not measured yet" not in page
    assert "8. Official files" not in page
    done = subprocess.run([*command, "--steps", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and "another --out" in done.stderr


# ------------------------------------------------------------------------------------- pass_at.py


def test_what_a_model_can_just_about_do():
    """pass@1, pass@2, finished, read: of two questions and two samples each."""
    tasks = [{"question": "1 + 1?", "answer": "2"}, {"question": "1 + 2?", "answer": "3"}]
    cut_off = Completion("First I", finished=False)
    answers = [[Completion("It is 2."), Completion("I do not know.")], [Completion("2"), cut_off]]
    assert pass_at.line(tasks, answers).split() == ["25", "50", "75", "67"]
    assert pass_at.line(tasks[:1], [[cut_off]]).split() == ["0", "0", "0", "-"]
