"""runs.py: what is on disk stays whole; a training that goes wrong says so; Ctrl-C."""

import json
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT

import runs
import train


def begin(run, total=30):
    """A phase of training on a model of four weights; a checkpoint every two steps."""
    model = torch.nn.Linear(3, 1)
    optimizer = train.make_optimizer(train.Arguments(), model, 0.1)
    return runs.Phase(run, "mlpo", total, 2, model, optimizer)


def one_step(phase, gradient=1.0, **numbers):
    phase.model(torch.ones(1, 3)).sum().mul(gradient).backward()
    norm = train.gradient_step(phase.model, phase.optimizer, 0.1)
    phase.check_gradient(norm)
    phase.log(**numbers, grad_norm=norm)


def learn(phase, steps, gradient=1.0, **numbers):
    for step in phase.steps():
        one_step(phase, gradient, **numbers)
        if step + 1 == steps:
            break


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "garbage"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(damage, tmp_path, capsys):
    phase = begin(tmp_path)
    learn(phase, 5)  # saved after steps 2 and 4
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    weight = runs.load_checkpoint(path)["model"]["weight"].numpy().tobytes()
    spoilt = bytearray(whole)
    spoilt[whole.index(weight)] ^= 1  # a single bit of a weight
    contents = {"cut": whole[:-100], "empty": b"", "flipped": spoilt, "garbage": b"x" * 999}
    path.write_bytes(contents[damage])
    capsys.readouterr()
    assert begin(tmp_path).step == 2
    said = capsys.readouterr().out
    assert f"{path} is damaged" in said and said.count("\n") == 1
    path.write_bytes(whole)
    assert begin(tmp_path).step == 4 and not capsys.readouterr().out


def test_a_kill_between_the_two_renamings_costs_one_checkpoint(tmp_path):
    learn(begin(tmp_path), 5)
    (tmp_path / "checkpoint.pt").unlink()
    assert begin(tmp_path).step == 2


def test_with_no_good_checkpoint_the_phase_begins_again(tmp_path, capsys):
    learn(begin(tmp_path), 5)
    for path in tmp_path.glob("checkpoint.pt*"):
        path.write_bytes(b"")
    assert begin(tmp_path).step == 0
    assert capsys.readouterr().out.count("damaged") == 2


def test_nothing_is_unpickled(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"phase": "mlpo", "step": 3, "model": Bomb()}, tmp_path / "checkpoint.pt")
    assert runs.load_checkpoint(tmp_path / "checkpoint.pt") is None
    assert not (tmp_path / "exploded").exists() and "damaged" in capsys.readouterr().out


def test_half_a_line_is_dropped_aloud_and_nothing_else_is(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    runs.append_jsonl(path, [{"a": 1}, {"b": "é\n\u2028"}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"c": "half')
    assert runs.read_jsonl(path) == [{"a": 1}, {"b": "é\n\u2028"}]
    assert "half written" in capsys.readouterr().out and path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # whole but for the end of the line
    assert len(runs.read_jsonl(path)) == 2 and path.read_bytes() == whole
    path.write_bytes(b"my notes\nlast line")  # a file of somebody else's
    with pytest.raises(ValueError, match="not JSON"):
        runs.read_jsonl(path)
    assert path.read_bytes() == b"my notes\nlast line"
    path.write_bytes(whole + b"{")
    assert len(runs.read_jsonl(path, repair=False)) == 2 and path.read_bytes() == whole + b"{"
    path.write_bytes(b"{}\nnonsense\n{}\n")  # not what a kill leaves behind
    with pytest.raises(ValueError, match="not JSON"):
        runs.read_jsonl(path)


FULL = """
import sys, resource
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, agents, runs
run = Path(sys.argv[2])
runs.save_checkpoint(run / "checkpoint.pt", {"x": torch.ones(10)})
runs.append_jsonl(run / "rows.jsonl", [{"x": 1}])
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as if the disk had this much room
def a_checkpoint():
    runs.save_checkpoint(run / "checkpoint.pt", {"x": torch.ones(100_000)})
def a_long_row():
    runs.append_jsonl(run / "rows.jsonl", [{"x": "y" * 100_000}])
def a_model():
    runs.save_model(run / "leader", agents.load_model("tiny"))
for save in (a_checkpoint, a_long_row, a_model):
    try:
        save()
    except ValueError as error:
        print(error, file=sys.stderr)
"""


def test_a_full_disk_is_one_line_and_leaves_the_last_good_state(tmp_path):
    pytest.importorskip("resource")  # Windows has none
    words = [sys.executable, "-c", FULL, str(ROOT), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    assert all("cannot write" in line and "--resume" in line for line in lines)
    assert torch.equal(runs.load_checkpoint(tmp_path / "checkpoint.pt")["x"], torch.ones(10))
    assert runs.read_jsonl(tmp_path / "rows.jsonl") == [{"x": 1}]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "rows.jsonl"}


CONFIG = {"steps": 5, "eval_questions": 0, "device": "cpu", "plain": False, "clip": 0.2}


def claim(folder, resume=False, **changed):
    return runs.claim_folder(folder, {**CONFIG, **changed}, CONFIG, resume)


@pytest.mark.parametrize("where", ["file/run", "/proc/nothing/run"])
def test_a_folder_that_cannot_be_made_is_one_line(where, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out .*: no folder can be made there: ") as stop:
        claim(tmp_path / where)
    assert "\n" not in str(stop.value)


def test_a_run_of_an_older_version_goes_on_as_it_began(tmp_path):
    """What it lacks it did as that version did, not as today's default does."""
    runs.write_json(tmp_path / "config.json", {**CONFIG, "random_team": False})
    with pytest.raises(ValueError, match="whose random_order is False, not True"):
        claim(tmp_path, True, random_team=False, random_order=True)
    claim(tmp_path, True, random_team=False, random_order=False)


def test_two_runs_in_one_folder_the_second_refuses(tmp_path):
    claim(tmp_path / "run")
    words = "import runs, sys\ntry: runs.claim_folder(sys.argv[1], {}, {}, False)\n"
    words += "except ValueError as error: runs.fail(error)"
    command = [sys.executable, "-c", words, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "another process is at work" in done.stderr


def test_a_notebook_may_call_it_again_in_the_same_folder(tmp_path):
    claim(tmp_path / "run")
    claim(tmp_path / "run")


def finished(folder, config):
    (folder / "leader").mkdir(parents=True)
    runs.write_json(folder / "config.json", config)
    return folder


def test_an_older_run_that_lacks_an_argument_has_its_default(tmp_path):
    old = {name: value for name, value in CONFIG.items() if name != "clip"}
    claim(finished(tmp_path / "a", old))
    with pytest.raises(ValueError, match="another run, whose clip is 0.2, not 0.3"):
        claim(finished(tmp_path / "b", old), clip=0.3)


def test_where_and_how_it_runs_may_change_and_nothing_else(tmp_path):
    free = {name: "other" for name in runs.WHERE + runs.MEMORY_ONLY}
    assert {"device", "plain", "checkpointing", "tokens_per_batch", "save_steps"} <= set(free)
    claim(finished(tmp_path / "a", CONFIG), **free)
    with pytest.raises(ValueError, match="another run, whose steps is 5, not 6"):
        claim(finished(tmp_path / "b", CONFIG), steps=6)


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        claim(tmp_path)
    with pytest.raises(ValueError, match="--resume: there is no run"):
        claim(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_an_unfinished_run_asks_for_resume(tmp_path):
    runs.write_json(tmp_path / "config.json", CONFIG)
    with pytest.raises(ValueError, match="unfinished run: add --resume"):
        claim(tmp_path)
    claim(tmp_path, resume=True)


def test_steps_without_a_finite_gradient_are_skipped_aloud_and_then_end_the_run(tmp_path, capsys):
    phase = begin(tmp_path)
    learn(phase, 4)
    before = phase.model.weight.clone()
    with pytest.raises(ValueError) as stop:
        learn(phase, 30, gradient=float("nan"))
    assert torch.equal(phase.model.weight, before)
    assert capsys.readouterr().out.count("is skipped") == 5
    assert str(tmp_path / "checkpoint.pt") in str(stop.value) and "\n" not in str(stop.value)
    good = runs.load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(x.isfinite().all() for x in good["model"].values())


def test_one_bad_step_is_skipped_and_the_next_ones_count(tmp_path):
    phase = begin(tmp_path)
    for step in phase.steps():
        one_step(phase, gradient=float("nan") if step % 3 == 1 else 1.0)
    assert phase.model.weight.isfinite().all() and phase.skipped == 0


@pytest.mark.parametrize(
    "stats, word",
    [
        ({"format": 0.05, "entropy": 1.0, "no_gradient": 0.5}, "format"),
        ({"format": 0.9, "entropy": 0.0001, "no_gradient": 0.5}, "entropy"),
        ({"format": 0.9, "entropy": 1.0, "no_gradient": 1.0}, "no_gradient"),
        ({"format": 0.9, "entropy": 0.03, "no_gradient": 0.9}, None),
    ],
)
def test_a_collapse_is_warned_about_with_advice(stats, word, tmp_path, capsys):
    learn(begin(tmp_path), 25, **stats)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == (2 if word else 0)  # once for every 10 steps
    assert all(word in line and "--" in line for line in warnings)


def test_a_short_collapse_is_no_collapse(tmp_path, capsys):
    phase = begin(tmp_path)
    for step in phase.steps():
        phase.log(format=0.0 if step % 10 else 1.0)
    assert "WARNING" not in capsys.readouterr().out


def test_resuming_drops_the_log_after_the_checkpoint(tmp_path):
    learn(begin(tmp_path), 5)  # saved after 4
    assert begin(tmp_path).step == 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


def test_a_step_of_flat_groups_moves_nothing_whatever_the_momentum(tmp_path):
    """As in several processes, where a gradient that nobody has is a gradient of zeros."""
    phase = begin(tmp_path)
    learn(phase, 2)
    before = phase.model.weight.clone()
    for parameter in phase.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    train.gradient_step(phase.model, phase.optimizer, 0.1)
    assert torch.equal(phase.model.weight, before)


# --------------------------------------------------------------------------------------- Ctrl-C


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Also where the tests run in the background of a shell, which has Ctrl-C ignored there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_finishes_the_step_saves_and_ends(tmp_path):
    usual = signal.getsignal(signal.SIGINT)
    phase = begin(tmp_path)
    logged = []
    with pytest.raises(KeyboardInterrupt), phase:
        for step in phase.steps():
            if step == 2:
                press_ctrl_c()
            one_step(phase)
            logged.append(step)
    assert logged == [0, 1, 2] and begin(tmp_path).step == 3
    assert signal.getsignal(signal.SIGINT) is usual


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    usual = signal.getsignal(signal.SIGINT)
    phase = begin(tmp_path)
    with pytest.raises(KeyboardInterrupt), phase:
        for _ in phase.steps():
            press_ctrl_c()
            press_ctrl_c()
            pytest.fail("it went on")
    assert signal.getsignal(signal.SIGINT) is usual
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_call_that_fails_leaves_ctrl_c_as_it_was(tmp_path):
    usual = signal.getsignal(signal.SIGINT)
    phase = begin(tmp_path)
    with pytest.raises(ZeroDivisionError), phase:
        for _ in phase.steps():
            raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is usual
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()


def test_in_a_thread_of_a_notebook_it_trains_without_a_handler(tmp_path):
    phase = begin(tmp_path, total=3)

    def work():
        with phase:
            learn(phase, 3)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert runs.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2
    assert len(phase.recent) == 3


# --------------------------------------------------------------------------------------- scripts


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, max allowed: 18.13 GB)"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line_on_every_device(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        runs.run_script(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--tokens_per_batch" in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("another")])
def test_other_errors_are_not_hidden(error):
    def main():
        raise error

    assert not runs.is_out_of_memory(error)
    with pytest.raises(type(error), match=str(error)):
        runs.run_script(main)


@pytest.mark.parametrize("error", [ValueError("--steps -1: wrong"), KeyboardInterrupt()])
def test_bad_input_and_ctrl_c_are_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        runs.run_script(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert str(error) in said and ("--resume" in said) == isinstance(error, KeyboardInterrupt)
