"""The real commands, as a user would type them, with very small settings."""

import html
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from statistics import fmean

import pytest
import torch
from conftest import ROOT, command, start, wait
from transformers import AutoModelForCausalLM

import runs
import tiny
import train
from rewards import judge

SMALL = "--questions 20 --validation_questions 5 --sft_steps 3 --sft_batch 4 --steps 3 --rounds 2 "
SMALL += "--questions_per_step 4 --group_size 3 --max_new_tokens 45 --eval_questions 6 "
SMALL += "--validate_every 2 --save_steps 2 --kl_coef 0.1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "mlpo"
    done = command("train.py", *SMALL.split(), "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_what_it_should(run):
    folder, printed = run
    names = "config.json proposals.jsonl metrics.jsonl results.json results.png curves.png"
    for name in (*names.split(), "transcripts.md", "samples.jsonl", "report.html"):
        assert (folder / name).stat().st_size > 100, name
    for leader in ("leader", "leader_sft"):
        model = AutoModelForCausalLM.from_pretrained(folder / leader)
        assert model.dtype == torch.float32
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["phase"] == "mlpo"] == [0, 1, 2]
    assert [r["step"] for r in rows if r["phase"] == "sft"] == [0, 1, 2]
    looks = [(r["during"], r["step"]) for r in rows if r["phase"] == "validation"]
    assert looks == [("sft", 0), ("mlpo", 0), ("mlpo", 2), ("mlpo", 3)]
    results = json.loads((folder / "results.json").read_text())
    assert results["dataset"] == "tiny" and results["questions"] == 6
    stages = {(r["stage"], r["team"], r["rounds"]) for r in results["rows"] if r["who"] == "leader"}
    for stage in ("untrained", "sft", "mlpo"):
        assert {(stage, False, 1), (stage, True, 1), (stage, True, 2)} <= stages
    assert "majority" in printed


def test_the_groups_that_are_kept_are_as_they_were_judged(run):
    rows = runs.read_jsonl(run[0] / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert len(row["completions"]) == 3 and row["question"] in row["prompt"]
        rewards = [one["reward"] for one in row["completions"]]
        for one in row["completions"]:
            assert one["reward"] == judge(one["text"], row["answer"], row["question"]).reward
            assert one["advantage"] == pytest.approx(one["reward"] - fmean(rewards), abs=1e-6)
        assert sum(one["advantage"] for one in row["completions"]) == pytest.approx(0, abs=1e-6)
        assert html.escape(row["question"]) in (run[0] / "report.html").read_text("utf-8")


def test_the_same_command_again_prints_the_table_again(run):
    folder, printed = run
    again = command("train.py", *SMALL.split(), "--out", folder)
    assert again.returncode == 0, again.stderr
    table = printed[printed.index("tiny: 6 questions") :]
    assert table in again.stdout


def test_another_run_is_not_overwritten_and_the_field_is_named(run):
    before, own = (run[0] / "config.json").read_bytes(), SMALL.split()
    others = {"seed": 1, "agents": "tiny/agent1", "dataset": "gsm8k", "leader": "tiny/agent1"}
    wrong = [([*own, f"--{name}", value, "--resume"], name) for name, value in others.items()]
    for words, name in [*wrong, ([], "questions")]:  # the last: the defaults
        done = command("train.py", *words, "--out", run[0])
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"holds another run, whose {name} is" in done.stderr
    assert (run[0] / "config.json").read_bytes() == before


def test_an_unfinished_run_is_left_alone_and_resumed_to_the_same_weights(run, tmp_path):
    """As if killed after the first checkpoint of MLPO, in step 2 of 3."""
    folder = tmp_path / "killed"
    shutil.copytree(run[0], folder)
    shutil.rmtree(folder / "leader")
    (folder / "results.json").unlink()
    (folder / "checkpoint.pt").unlink()  # that of the last step: the one before is used
    done = command("train.py", *SMALL.split(), "--out", folder)
    assert done.returncode == 2 and "--resume" in done.stderr
    done = command("train.py", *SMALL.split(), "--out", folder, "--resume")
    assert done.returncode == 0, done.stderr
    name = "leader/model.safetensors"
    assert (folder / name).read_bytes() == (run[0] / name).read_bytes()
    steps = [
        (row["during"], row["phase"], row["step"])
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]
    assert len(steps) == len(set(steps)) == (1 + 3) + (3 + 3)  # looks at validation, and steps
    name = "samples.jsonl"  # the rows of step 2 were there already
    assert (folder / name).read_bytes() == (run[0] / name).read_bytes()


# what is on disk when a phase has begun
PHASES = {"proposals": "proposals.jsonl", "sft": "prompts.jsonl", "mlpo": "leader_sft"}
PHASES["evaluation"] = "leader"


def interrupt(folder, phase, delay, how=signal.SIGKILL):
    """Start the run, or go on with it, and hit it `delay` seconds into the phase."""
    resume = ["--resume"] if (folder / "config.json").exists() else []
    process = start("train.py", *SMALL.split(), "--out", folder, *resume)
    how_to_look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not (folder / PHASES[phase]).exists():
        if os.waitid(os.P_PID, process[0], how_to_look):
            break  # it has ended
        time.sleep(0.02)
    time.sleep(delay)
    os.kill(process[0], how)
    done = wait(*process)
    assert phase == "evaluation" or done.returncode not in (0, 1), done.stderr
    return done.returncode, done.stderr


def finish_and_compare(folder, whole):
    """Resume to the end: all that was made and logged is that of the run nobody interrupted."""
    resume = ["--resume"] if (folder / "config.json").exists() else []
    done = command("train.py", *SMALL.split(), "--out", folder, *resume)
    assert done.returncode == 0, done.stderr
    for name in ("leader", "leader_sft"):
        file = f"{name}/model.safetensors"
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), name
    took = ("sampling", "training", "tokens_per_s")
    for name in ("metrics.jsonl", "proposals.jsonl", "prompts.jsonl", "samples.jsonl"):
        mine = runs.read_jsonl(folder / name)
        theirs = runs.read_jsonl(whole / name)
        for row in mine + theirs:
            for key in took:
                row.pop(key, None)
        assert mine == theirs, name
    mine = runs.read_json(folder / "results.json")
    assert mine["rows"] == runs.read_json(whole / "results.json")["rows"]


def test_killed_twice_and_stopped_by_ctrl_c_a_run_is_the_same_run(run, tmp_path):
    folder = tmp_path / "run"
    interrupt(folder, "proposals", 0)
    status, said = interrupt(folder, "mlpo", 0.3, signal.SIGINT)
    assert status == 2 and "--resume) goes on" in said and "Traceback" not in said
    interrupt(folder, "evaluation", 0.5)
    finish_and_compare(folder, run[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_at_any_moment_a_run_is_the_same_run(number, run, tmp_path):
    rng, folder = random.Random(number), tmp_path / "run"
    for phase in rng.sample(list(PHASES), 2) if number > 3 else [list(PHASES)[number]]:
        interrupt(folder, phase, rng.uniform(0, 2))
    finish_and_compare(folder, run[0])


def test_out_of_memory_names_the_setting_and_keeps_the_checkpoint(run, tmp_path, monkeypatch):
    """What CUDA raises; tests/test_runs.py has what other devices do."""
    folder = tmp_path / "run"
    usual = runs.Phase.check_gradient

    def check_gradient(self, norm):  # the fork in which the command runs has it too
        if self.name == "sft" and self.step == 2:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return usual(self, norm)

    monkeypatch.setattr(runs.Phase, "check_gradient", check_gradient)
    done = command("train.py", *SMALL.split(), "--out", folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "lower --tokens_per_batch" in done.stderr.splitlines()[-1]
    assert runs.load_checkpoint(folder / "checkpoint.pt")["step"] == 2
    monkeypatch.undo()
    lower = ["--tokens_per_batch", 500, "--resume"]  # what the line advises is allowed
    done = command("train.py", *SMALL.split(), "--out", folder, *lower)
    assert done.returncode == 0 and (folder / "results.json").exists(), done.stderr


def test_plain_grpo_and_shared_proposals(run, tmp_path):
    folder = tmp_path / "grpo"
    words = SMALL.replace("--rounds 2", "--rounds 1").split()
    shared = ["--proposals", run[0] / "proposals.jsonl"]
    done = command("train.py", *words, *shared, "--agents", "none", "--out", folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert {(r["who"], r["stage"], r["team"]) for r in rows} == {
        ("leader", stage, False) for stage in ("untrained", "sft", "grpo")
    }


def test_random_teams_and_later_rounds_resumed_and_evaluated_afterwards(run, tmp_path):
    folder = tmp_path / "rounds"
    words = [*SMALL.replace("--eval_questions 6", "--eval_questions 0").split(), "--random_team"]
    words += ["--proposals", run[0] / "proposals.jsonl", "--train_rounds", 2, "--out", folder]
    done = command("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert not (folder / "results.json").exists() and "majority" not in done.stdout
    first = (folder / "leader" / "model.safetensors").read_bytes()
    assert first != (run[0] / "leader" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "leader")  # as if killed in step 2 of 3
    (folder / "checkpoint.pt").unlink()
    done = command("train.py", *words, "--resume")
    assert done.returncode == 0, done.stderr
    assert (folder / "leader" / "model.safetensors").read_bytes() == first
    done = command("train.py", *words)  # it is finished: nothing is done again
    assert done.returncode == 0, done.stderr

    done = command("evaluate.py", folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--eval_questions" in done.stderr
    done = command("evaluate.py", folder, "--ask", "How many fruits do I have?")
    assert done.returncode == 0 and "[the leader alone]" in done.stdout, done.stderr
    done = command("evaluate.py", folder, "--eval_questions", 5, "--rounds", 1)
    assert done.returncode == 0 and "majority" in done.stdout, done.stderr


def test_the_config_says_what_the_papers_setting_is(run, tmp_path):
    folder = tmp_path / "paper"
    words = "--questions 20 --validation_questions 1 --sft_steps 0 --steps 0 --eval_questions 0 "
    words += "--max_new_tokens 45"
    shared = ["--proposals", run[0] / "proposals.jsonl"]
    done = command("train.py", *words.split(), *shared, "--paper", "--out", folder)
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "config.json").read_text())
    names = ("easy_share", "team_dropout", "random_team", "train_rounds")
    assert [config[name] for name in names] == [0, 0, False, 1]


def test_evaluate_on_a_file_of_ones_own(run, tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {"question": "How many fruits do I have?", "answer": "8", "task": "mine"}
    path.write_text(json.dumps(row) + "\n")
    done = command("evaluate.py", run[0], "--dataset", path, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads((run[0] / "results-mine.json").read_text())["questions"] == 1


def test_a_start_that_fails_for_its_proposals_leaves_the_folder_free(run, tmp_path):
    theirs, out = tmp_path / "proposals.jsonl", tmp_path / "run"
    words = ["--out", out, "--proposals", theirs]
    for text in ('{"agent": "a"}\n', "[1]\n", '{"agent": "a", "question": "q", "responses": []}'):
        theirs.write_text(text)
        done = command("train.py", *SMALL.split(), *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert theirs.read_text() == text and not (out / "config.json").exists()
    words[-1] = run[0] / "proposals.jsonl"
    done = command("train.py", *SMALL.split(), *words, "--temperature", 0.5)
    assert done.returncode == 2 and "--temperature" in done.stderr
    assert not (out / "config.json").exists()


BAD = {
    "--dataset nonsense": "nonsense",
    "--dataset missing.jsonl": "missing.jsonl",
    "--leader /no/such/model": "/no/such/model",
    "--group_size 1": "--group_size",
    "--temperature 0": "--temperature",
    "--steps -1": "--steps",
    "--train_rounds 0": "--train_rounds",
    "--eval_questions -1": "--eval_questions",
    "--lr nan": "--lr",
    "--nonsense 3": "--nonsense",
    "--max_new_tokens 400": "--max_new_tokens",
    "--proposals missing.jsonl": "missing.jsonl",
    "--resume": "--resume",
    "--device tpu": "--device tpu",
    "--agents missing.py#Solver": "missing.py#Solver",
    "--team_dropout 1.5": "--team_dropout",
    "--sft_alone -0.1": "--sft_alone",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_before_anything_starts(words, tmp_path, capsys):
    out = tmp_path / "run"
    try:
        train.main([*words.split(), "--out", str(out)])
        message = "it started"
    except ValueError as error:  # the script prints it, and exits with status 2
        message = str(error)
    except SystemExit as stop:
        message = capsys.readouterr().err.strip()
        assert stop.code == 2
    assert BAD[words] in message and "\n" not in message, message
    assert not (out / "config.json").exists()


def test_bad_input_ends_the_script_with_status_2(tmp_path):
    done = command("train.py", "--group_size", 1, "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: --group_size")


LONG = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import runs, train
held = []
usual = runs.Phase.log

def log(self, kind=None, **values):
    usual(self, kind, **values)
    if not kind:
        status = Path("/proc/self/status").read_text()
        held.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)

runs.Phase.log = log
small = "--sft_steps 0 --steps 500 --questions_per_step 2 --group_size 2 --max_new_tokens 60 "
small += "--questions 20 --validation_questions 2 --eval_questions 0 --validate_every 1000"
train.main([*small.split(), "--out", sys.argv[2]])
print([max(held[i : i + 100]) for i in range(0, 500, 100)])
"""


@pytest.mark.slow
def test_memory_is_flat_over_500_steps(tmp_path):
    words = [sys.executable, "-c", LONG, str(ROOT), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    held = json.loads(done.stdout.splitlines()[-1])  # MB: the most in each hundred steps
    assert held[-1] < held[1] + 20, held


def test_columns_of_ones_own(run, tmp_path):
    """In training, in the run's evaluation without another word, and in that of another file."""
    rows = []
    for row in tiny.puzzles("train", 60):
        rows.append({"Frage": row["question"], "Lösung": row["answer"], "Art": "logic"})
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text('{"Q": "How many plums do I have?", "target": "8"}\n')
    own = ["--question_column", "Frage", "--answer_column", "Lösung", "--task_column", "Art"]
    words = [*SMALL.replace("--rounds 2", "--rounds 1").split(), "--dataset", mine]
    words += ["--questions", 12, "--easy_threshold", 1.01, "--out", tmp_path / "run"]
    done = command("train.py", *words, *own, "--agents", "tiny/agent1")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["rows"][0]["per_task"]) == {"logic"}
    again = command("evaluate.py", tmp_path / "run")
    assert "already evaluated" in again.stdout, again.stderr
    for column, status in (["Q", 0], ["Frage", 2]):
        words = [tmp_path / "run", "--dataset", other, "--question_column", column]
        done = command("evaluate.py", *words)
        assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1 and "no text in Frage" in done.stderr


SOLVER = '''
from sampling import Completion


class Counter:
    """Says how many things are listed; no model."""

    name = "counter"

    def answer(self, prompts, n=1, **settings):
        responses = []
        for messages in prompts:
            listed = messages[1]["content"].count(",")
            responses.append([Completion(f"{listed} things . So the answer is {listed}.")] * n)
        return responses

    def fingerprint(self, **settings):
        return "counter, version 1"
'''


def test_an_agent_that_is_no_model_takes_part_in_training_and_evaluation(tmp_path):
    (tmp_path / "solver.py").write_text(SOLVER)
    words = SMALL.replace("--rounds 2", "--rounds 1 --train_rounds 2").split()
    team = ["--agents", f"{tmp_path / 'solver.py'}#Counter", "tiny/agent2"]
    done = command("train.py", *words, *team, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    proposals = runs.read_jsonl(tmp_path / "run" / "proposals.jsonl")
    [said] = [row["responses"] for row in proposals if row["agent"] == "counter"][:1]
    assert len(said) == 4 and "things" in said[0]
    rows = runs.read_json(tmp_path / "run" / "results.json")["rows"]
    assert "counter" in [row["name"] for row in rows]


def test_questions_in_words_that_the_built_in_models_do_not_know(run, tmp_path):
    """One line that names the words, before anything starts; for --ask too."""
    path = tmp_path / "capitals.jsonl"
    rows = []
    for i in range(60):
        rows.append({"question": f"Which capital has Atlantis {i}?", "answer": "Poseidonis"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset", path, "--questions", 10, "--validation_questions", 2]
    done = command("train.py", *words, "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "Atlantis" in done.stderr and "--leader" in done.stderr and "--agents" in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()
    done = command("evaluate.py", run[0], "--ask", "Which capital has Atlantis?")
    assert done.returncode == 2 and "Atlantis" in done.stderr, done.stderr


def test_the_plain_way_trains_the_same_leader(run, tmp_path):
    """--plain: to the digits that the order of sums leaves."""
    folder = tmp_path / "plain"
    words = SMALL.replace("--eval_questions 6", "--eval_questions 0").split()
    done = command("train.py", *words, "--plain", "--out", folder)
    assert done.returncode == 0, done.stderr
    first = runs.read_jsonl(run[0] / "metrics.jsonl")
    for mine, theirs in zip(runs.read_jsonl(folder / "metrics.jsonl"), first):
        if mine["phase"] == "sft":
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    assert (folder / "leader").exists()
