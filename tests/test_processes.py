"""Several processes: the same gradient, and no hanging."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command

WORK = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import torch
import agents, runs, sampling, train

args = train.Arguments(device="cpu", questions_per_step=4, sft_batch=4, group_size=2,
                       max_new_tokens=8, tokens_per_batch=200)
runs.join_processes(args)
leader = agents.load_model("tiny")
torch.manual_seed(0)
prompts = [[5, 6, 7], [8], [9, 10], [11, 12]]
groups = sampling.sample(leader.model, leader.tokenizer, prompts, 2, 1.0, 8)
advantages = torch.tensor([[0.5, -0.5], [0.0, 0.0], [-0.5, 0.5], [0.0, 0.0]])
mine = list(runs.share(range(4)))  # the second process has nothing but flat groups
groups = [train.Group(groups[i], [], advantages[i]) for i in mine]
train.loss_and_gradient(args, leader.model, None, groups)
runs.add_up_gradients(leader.model)
if runs.rank() == 0:
    torch.save([p.grad for p in leader.model.parameters()], sys.argv[2])
"""

STOP = """
from pathlib import Path
import signal
folder = Path(sys.argv[2]).parent
model = torch.nn.Linear(3, 1)
phase = runs.Phase(folder, "mlpo", 30, 10, model, train.make_optimizer(args, model, 0.1))
step = None
try:
    with phase:
        for step in phase.steps():
            if step == 3 and runs.rank() == 1:
                signal.raise_signal(signal.SIGINT)  # one of them alone
except KeyboardInterrupt:
    Path(folder, f"stopped-{runs.rank()}").write_text(str(step))
runs.end_now(0)  # as run_script does
"""


def torchrun(processes, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--standalone", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_have_the_gradient_of_one_and_agree_on_stopping(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    done = command(script, ROOT, tmp_path / "1.pt")
    assert done.returncode == 0, done.stderr
    script.write_text(WORK + STOP)
    torchrun(2, script, ROOT, tmp_path / "2.pt")
    gradients = []
    for n in (1, 2):
        of_weights = torch.load(tmp_path / f"{n}.pt")
        gradients.append(torch.cat([gradient.flatten() for gradient in of_weights]))
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
    # and then one of them got Ctrl-C: the other did not wait for it for ever
    for rank in (0, 1):
        assert (tmp_path / f"stopped-{rank}").read_text() == "3"
    assert (tmp_path / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_run_on_two_processes(tmp_path):
    small = "--questions 12 --validation_questions 4 --sft_steps 2 --sft_batch 3 --steps 3 "
    small += "--questions_per_step 3 --group_size 2 --max_new_tokens 60 --eval_questions 5 "
    torchrun(2, ROOT / "train.py", *small.split(), "--rounds", 1, "--out", tmp_path / "run")
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "mlpo"] == [0, 1, 2]
    rows = [json.loads(r) for r in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]  # the first process alone writes
    proposals = (tmp_path / "run" / "proposals.jsonl").read_text().splitlines()
    assert len(proposals) == 3 * 12 and (tmp_path / "run" / "results.json").exists()
