"""The real commands, as a user would type them, with very small settings."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

import train

SMALL = "--questions 20 --validation_questions 5 --sft_steps 3 --sft_batch 4 --steps 3 --rounds 2 "
SMALL += "--questions_per_step 4 --group_size 3 --max_new_tokens 60 --eval_questions 10 "
SMALL += "--validate_every 2 --save_steps 2 --kl_coef 0.1"


def command(script, *words):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)], capture_output=True, text=True
    )


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
    for name in (*names.split(), "transcripts.md"):
        assert (folder / name).stat().st_size > 100, name
    for leader in ("leader", "leader_sft"):
        model = AutoModelForCausalLM.from_pretrained(folder / leader)
        assert model.dtype == torch.float32
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["phase"] == "mlpo"] == [0, 1, 2]
    assert [r["step"] for r in rows if r["phase"] == "sft"] == [0, 1, 2]
    assert [r["step"] for r in rows if r["phase"] == "validation"] == [0, 2, 3]
    results = json.loads((folder / "results.json").read_text())
    assert results["dataset"] == "tiny" and results["questions"] == 10
    stages = {(r["stage"], r["team"], r["rounds"]) for r in results["rows"] if r["who"] == "leader"}
    for stage in ("untrained", "sft", "mlpo"):
        assert {(stage, False, 1), (stage, True, 1), (stage, True, 2)} <= stages
    assert "majority" in printed


def test_the_same_command_again_prints_the_table_again(run):
    folder, printed = run
    again = command("train.py", *SMALL.split(), "--out", folder)
    assert again.returncode == 0, again.stderr
    table = printed[printed.index("tiny: 10 questions") :]
    assert table in again.stdout


def test_another_run_is_not_overwritten(run):
    before = (run[0] / "config.json").read_bytes()
    for words in (["--seed", "1"], []):  # other settings; the defaults
        done = command("train.py", *(SMALL.split() if words else []), *words, "--out", run[0])
        assert done.returncode == 2 and "holds another run" in done.stderr
        assert done.stderr.count("\n") == 1
    assert (run[0] / "config.json").read_bytes() == before


def test_an_unfinished_run_is_left_alone_and_resumed_to_the_same_weights(run, tmp_path):
    """As if killed after the first checkpoint of MLPO, in step 2 of 3."""
    folder = tmp_path / "killed"
    shutil.copytree(run[0], folder)
    for name in ("leader", "results.json"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = command("train.py", *SMALL.split(), "--out", folder)
    assert done.returncode == 2 and "--resume" in done.stderr
    done = command("train.py", *SMALL.split(), "--out", folder, "--resume")
    assert done.returncode == 0, done.stderr
    name = "leader/model.safetensors"
    assert (folder / name).read_bytes() == (run[0] / name).read_bytes()
    steps = [
        (row["phase"], row["step"])
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]
    assert len(steps) == len(set(steps)) == 3 + 3 + 3


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


def test_evaluate_on_a_file_of_ones_own(run, tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {"question": "not ( True ) and ( True ) is", "answer": "False", "task": "mine"}
    path.write_text(json.dumps(row) + "\n")
    done = command("evaluate.py", run[0], "--dataset", path, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads((run[0] / "results-mine.json").read_text())["questions"] == 1


BAD = {
    "--dataset nonsense": "nonsense",
    "--dataset missing.jsonl": "missing.jsonl",
    "--leader /no/such/model": "/no/such/model",
    "--group_size 1": "--group_size",
    "--temperature 0": "--temperature",
    "--steps -1": "--steps",
    "--lr nan": "--lr",
    "--nonsense 3": "--nonsense",
    "--max_new_tokens 400": "--max_new_tokens",
    "--proposals missing.jsonl": "missing.jsonl",
    "--resume": "--resume",
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
    done = command("train.py", "--group_size", "1", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: --group_size")


def test_columns_of_ones_own(run, tmp_path):
    """In training, in the run's evaluation without another word, and in that of another file."""
    rows = [
        {"Frage": f"not ( True ) and {i} is", "Lösung": "False", "Art": "logic"} for i in range(60)
    ]
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text('{"Q": "not ( False ) is", "target": "True"}\n')
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
