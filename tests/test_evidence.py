"""benchmarks/evidence.py: statistics and report on made-up rows; small measurements."""

import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence
import evidence_report as report

import runs
import train

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


SIZE = {"steps": 80, "train_questions": 1000}


def made_up(variant, seed, mode, share=0.7, questions=20, **more):
    rng = random.Random(f"{variant} {seed} {mode}")

    def bits():
        return "".join(rng.choices("01", [1 - share, share], k=questions))

    row = {"key": f"{variant}/{seed}/{mode}", "variant": variant, "seed": seed, "mode": mode}
    row |= {"correct": bits(), "agrees": bits(), "two_agree": bits(), "generations": 4}
    row |= {"seconds": 0.1, "size": SIZE, "prompt_tokens": 100, "generated_tokens": 50}
    out = f"--seed {seed} --out runs/evidence/{variant}-{seed}"
    told = f"--leader runs/evidence/sft-{seed}/leader --eval_questions 0 {out}"
    return row | {"command": f"python train.py --steps 80 {told}"} | more


def rows_of(names, seeds, modes):
    rows = [made_up(n, seed, mode) for n in names for seed in seeds for mode in modes]
    rows += [made_up("three", seed, f"agent {k}") for seed in seeds for k in (1, 2, 3)]
    rows += [made_up("three", seed, "majority of 3") for seed in seeds]
    rows.append(
        {"key": "tiny/tasks", "variant": "tiny", "seed": None, "mode": "tasks", "size": SIZE}
    )
    rows[-1]["tasks"] = ["navigate", "dyck_languages"] * 10
    return {row["key"]: row for row in rows}


def test_a_report_of_what_is_there(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    rows = rows_of(("untrained", "sft", "mlpo"), range(10, 15), ("alone", "three:1", "three:5"))
    report.report(rows, tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert [page.count(f"\n## {heading}\n") for heading in report.SECTIONS] == [1] * 8
    assert "`train.py --steps 80 --leader runs/evidence/sft-S/leader`" in page
    assert "| SFT + MLPO |" in page and "GRPO only |" not in page
    assert "nan" not in page and "**only" not in page
    assert len(list((tmp_path / "benchmarks").glob("*.png"))) == 5


def test_few_seeds_are_said_to_be_few():
    assert "**only 2**" in report.parts(rows_of(("mlpo",), (10, 11), ("alone", "three:1")))
    for section in report.SECTIONS.values():
        assert "nan" not in section({})  # nothing was measured yet


def test_differences_are_paired_by_seed():
    one, two = made_up("mlpo", 10, "alone"), made_up("sft", 10, "alone")
    other = made_up("sft", 11, "alone")  # a seed that mlpo has not
    rows = {row["key"]: row for row in (one, two, other)}
    values = report.matrix(rows, ("mlpo", "alone"), ("sft", "alone"))
    expected = [int(a) - int(b) for a, b in zip(one["correct"], two["correct"])]
    assert values.tolist() == [expected]
    assert report.difference(rows, ("mlpo", "alone"), ("grpo", "alone")) == ""


# ------------------------------------------------------------------------------------------- plan


def settings(tmp_path, **changed):
    usual = {"steps": 1, "sft_steps": 1, "questions": 6, "train_questions": 10, "jobs": 1}
    usual |= {"quick": False, "bbh": "", "only": [], "work": str(tmp_path), "seed_list": [10, 11]}
    return SimpleNamespace(**{**usual, **changed})


def test_rows_without_their_leaders_or_of_another_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # main changes it
    (tmp_path / "benchmarks").mkdir()
    row = {"key": "a", "seed": 10, "size": {"steps": 60}}
    runs.write_jsonl(tmp_path / "benchmarks" / "evidence.jsonl", [row])
    with pytest.raises(ValueError, match="no leaders"):  # as in a clone
        evidence.main(["--out", str(tmp_path)])
    runs.write_jsonl(tmp_path / "runs" / "evidence" / "size.jsonl", [row["size"]])
    with pytest.raises(ValueError, match="rows of other --steps"):
        evidence.main(["--out", str(tmp_path)])


def test_the_plan_measures_all_that_the_report_shows(tmp_path):
    units = sum(evidence.plan(settings(tmp_path, bbh="bbh")), [])
    looked = {name for f, name, *_ in units if f is evidence.look_at}
    assert looked == set(report.LABELS) and set(evidence.VARIANTS) <= looked
    looks = [(name, more[-1]) for f, name, *more in units if f is evidence.look_at]
    modes = {(name, look) for name, several in looks for look in several.split()}
    assert modes >= {(name, "three:5") for name in report.ROUNDS}
    assert modes >= {(name, "fresh/alone") for name in ("untrained", "sft", *report.LONGER)}
    quick = sum(evidence.plan(settings(tmp_path, quick=True)), [])
    assert 0 < len(quick) < len(units) / 3
    for name, (_, words) in evidence.VARIANTS.items():
        assert train.parse(words.split("--proposals")[0].split()), name


def test_measurements_of_what_needs_no_training(tmp_path):
    args, new = settings(tmp_path), []
    for k in (1, 2, 3):
        new += evidence.say(args, {}, "tiny", f"tiny/agent{k}")
    new += evidence.baselines(args, {}, "three", 10, "tiny")
    new += evidence.look_at(args, {}, "untrained", 10, "alone three:2 same:1 finals:1")
    new += evidence.debate(args, {}, "three", 10)
    new += evidence.pick(args, {}, "judge", 10, "three shuffled")
    rows = {row["key"]: row for row in new}
    assert len(rows["tiny/tasks"]["tasks"]) == 6
    modes = {row["mode"]: row for row in new if "correct" in row}
    for mode in (
        "agent 3",
        "majority of 40",
        "any",
        "three:1",
        "three:2",
        "finals:1",
        "three:picks",
    ):
        assert len(modes[mode]["correct"]) == 6 and modes[mode]["seconds"] > 0, mode
    assert modes["majority of 40"]["generations"] == 40 and modes["debate:2"]["generations"] == 9
    assert (modes["three:1"]["generations"], modes["three:2"]["generations"]) == (4, 8)
    assert modes["three:1"]["generated_tokens"] < modes["three:2"]["generated_tokens"]
    assert modes["finals:1"]["prompt_tokens"] < modes["three:1"]["prompt_tokens"]
    assert modes["any"]["accuracy"] >= modes["agent 1"]["accuracy"]
    assert not evidence.look_at(args, rows, "untrained", 10, "alone three:2")  # nothing twice
    # the second agent3 gives another of its samples than the first
    [first, *_], _ = evidence.first_responses(args, "same", "tiny", 10)
    said = evidence.runs.read_json(tmp_path / "said-tiny-agent3.json")["said"][0]
    assert [c.text for c in first] == [said[(10 + 5 * twin) % 14][0] for twin in range(3)]
    assert evidence.cut("two 2 . So the answer is 2.") == "So the answer is 2."


@pytest.mark.slow
def test_the_whole_of_it_stopped_and_gone_on_with(tmp_path):
    words = "--quick --steps 2 --sft_steps 3 --questions 5 --train_questions 20 --jobs 2"
    command = [sys.executable, ROOT / "benchmarks" / "evidence.py", *words.split()]
    command += ["--out", tmp_path]
    subprocess.run([*command, "--only", "sft", "mlpo"], check=True, timeout=900)
    rows = (tmp_path / "benchmarks" / "evidence.jsonl").read_text().splitlines()
    subprocess.run(command, check=True, timeout=1800)
    more = (tmp_path / "benchmarks" / "evidence.jsonl").read_text().splitlines()
    assert more[: len(rows)] == rows and len(more) > len(rows)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "MLPO only" in page and "**only 2**" in page
    done = subprocess.run([*command, "--steps", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and "rows of other --steps" in done.stderr
