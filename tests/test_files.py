"""What is on disk stays whole; a training that goes wrong says so."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import files

ARGS = SimpleNamespace(warmup=0, save_steps=2, checkpointing=False)


def trainer(run, total=30):
    model = torch.nn.Linear(3, 1)
    return files.Trainer(ARGS, run, model, "mlpo", total, 0.1)


def learn(worker, steps, gradient=1.0, **stats):
    for step in worker.steps():
        worker.model(torch.ones(1, 3)).sum().mul(gradient).backward()
        worker.log(**stats, **worker.update())
        if step + 1 == steps:
            break


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "garbage"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(damage, tmp_path, capsys):
    worker = trainer(tmp_path)
    learn(worker, 5)  # saved after steps 2 and 4
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    weight = files.load_checkpoint(path)["model"]["weight"].numpy().tobytes()
    spoilt = bytearray(whole)
    spoilt[whole.index(weight)] ^= 1  # a single bit of a weight
    contents = {"cut": whole[:-100], "empty": b"", "flipped": spoilt, "garbage": b"x" * 999}
    path.write_bytes(contents[damage])
    capsys.readouterr()
    assert trainer(tmp_path).step == 2
    said = capsys.readouterr().out
    assert f"{path} is damaged" in said and said.count("\n") == 1
    path.write_bytes(whole)
    assert trainer(tmp_path).step == 4 and not capsys.readouterr().out


def test_a_kill_between_the_two_renamings_costs_one_checkpoint(tmp_path):
    learn(trainer(tmp_path), 5)
    (tmp_path / "checkpoint.pt").unlink()
    assert trainer(tmp_path).step == 2


def test_with_no_good_checkpoint_the_phase_begins_again(tmp_path, capsys):
    learn(trainer(tmp_path), 5)
    for path in tmp_path.glob("checkpoint.pt*"):
        path.write_bytes(b"")
    assert trainer(tmp_path).step == 0
    assert capsys.readouterr().out.count("damaged") == 2


def test_nothing_is_unpickled(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"phase": "mlpo", "step": 3, "model": Bomb()}, tmp_path / "checkpoint.pt")
    assert files.load_checkpoint(tmp_path / "checkpoint.pt") is None
    assert not (tmp_path / "exploded").exists() and "damaged" in capsys.readouterr().out


def test_half_a_line_is_dropped_aloud_and_nothing_else_is(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    files.append_jsonl(path, [{"a": 1}, {"b": "é\n\u2028"}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"c": "half')
    assert files.read_jsonl(path) == [{"a": 1}, {"b": "é\n\u2028"}]
    assert "half written" in capsys.readouterr().out and path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # whole but for the end of the line
    assert len(files.read_jsonl(path)) == 2 and path.read_bytes() == whole
    path.write_bytes(b"my notes\nlast line")  # a file of somebody else's
    with pytest.raises(ValueError, match="not JSON"):
        files.read_jsonl(path)
    assert path.read_bytes() == b"my notes\nlast line"
    path.write_bytes(whole + b"{")
    assert len(files.read_jsonl(path, repair=False)) == 2 and path.read_bytes() == whole + b"{"
    path.write_bytes(b"{}\nnonsense\n{}\n")  # not what a kill leaves behind
    with pytest.raises(ValueError, match="not JSON"):
        files.read_jsonl(path)


FULL = """
import sys, resource
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, agents, files
run = Path(sys.argv[2])
files.save_checkpoint(run / "checkpoint.pt", {"x": torch.ones(10)})
files.append_jsonl(run / "rows.jsonl", [{"x": 1}])
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as if the disk had this much room
for save in (
    lambda: files.save_checkpoint(run / "checkpoint.pt", {"x": torch.ones(100_000)}),
    lambda: files.append_jsonl(run / "rows.jsonl", [{"x": "y" * 100_000}]),
    lambda: files.save_leader(run / "leader", agents.load("tiny")),
):
    try:
        save()
    except ValueError as error:
        print(error, file=sys.stderr)
"""


def test_a_full_disk_is_one_line_and_leaves_the_last_good_state(tmp_path):
    words = [sys.executable, "-c", FULL, str(ROOT), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    assert all("cannot write" in line and "--resume" in line for line in lines)
    assert torch.equal(files.load_checkpoint(tmp_path / "checkpoint.pt")["x"], torch.ones(10))
    assert files.read_jsonl(tmp_path / "rows.jsonl") == [{"x": 1}]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "rows.jsonl"}


def test_two_runs_in_one_folder_the_second_refuses(tmp_path):
    files.open_run(tmp_path / "run", {}, False)
    words = "import files, sys\ntry: files.open_run(sys.argv[1], {}, False)\n"
    words += "except ValueError as error: files.fail(error)"
    command = [sys.executable, "-c", words, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "another process is at work" in done.stderr


def test_steps_without_a_finite_gradient_are_skipped_aloud_and_then_end_the_run(tmp_path, capsys):
    worker = trainer(tmp_path)
    learn(worker, 4)
    before = worker.model.weight.clone()
    with pytest.raises(ValueError) as stop:
        learn(worker, 30, gradient=float("nan"))
    assert torch.equal(worker.model.weight, before)
    assert capsys.readouterr().out.count("is skipped") == 5
    assert str(tmp_path / "checkpoint.pt") in str(stop.value) and "\n" not in str(stop.value)
    good = files.load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(x.isfinite().all() for x in good["model"].values())


def test_one_bad_step_is_skipped_and_the_next_ones_count(tmp_path):
    worker = trainer(tmp_path)
    for step in worker.steps():
        worker.model(torch.ones(1, 3)).sum().mul(float("nan") if step % 3 == 1 else 1).backward()
        worker.update()
    assert worker.model.weight.isfinite().all() and worker.bad == 0


@pytest.mark.parametrize(
    "stats, word",
    [
        ({"format": 0.05, "entropy": 1.0, "flat": 0.5}, "format"),
        ({"format": 0.9, "entropy": 0.0001, "flat": 0.5}, "entropy"),
        ({"format": 0.9, "entropy": 1.0, "flat": 1.0}, "flat"),
        ({"format": 0.9, "entropy": 0.03, "flat": 0.9}, None),
    ],
)
def test_a_collapse_is_warned_about_with_advice(stats, word, tmp_path, capsys):
    learn(trainer(tmp_path), 25, **stats)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == (2 if word else 0)  # once for every 10 steps
    assert all(word in line and "--" in line for line in warnings)


def test_a_short_collapse_is_no_collapse(tmp_path, capsys):
    worker = trainer(tmp_path)
    for step in worker.steps():
        worker.log(format=0.0 if step % 10 else 1.0)
    assert "WARNING" not in capsys.readouterr().out


def test_resuming_drops_the_log_after_the_checkpoint(tmp_path):
    learn(trainer(tmp_path), 5)  # saved after 4
    assert trainer(tmp_path).step == 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


def test_a_step_of_flat_groups_moves_nothing_whatever_the_momentum(tmp_path):
    """As in several processes, where a gradient that nobody has is a gradient of zeros."""
    worker = trainer(tmp_path)
    learn(worker, 2)
    before = worker.model.weight.clone()
    for p in worker.model.parameters():
        p.grad = torch.zeros_like(p)
    worker.update()
    assert torch.equal(worker.model.weight, before)
