"""Several processes: the same gradient, and no hanging."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

WORK = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from types import SimpleNamespace
import agents, files, train

args = SimpleNamespace(device="cpu", questions_per_step=4, sft_batch=4, group_size=2, clip=0.2,
                       max_new_tokens=8, temperature=1.0, kl_coef=0.0, tokens_per_batch=200)
files.start_processes(args)
leader = agents.load("tiny")
torch.manual_seed(0)
groups = leader.answer([[5, 6, 7], [8], [9, 10], [11, 12]], 2, 1.0, 8)
advantages = torch.tensor([[0.5, -0.5], [0.0, 0.0], [-0.5, 0.5], [0.0, 0.0]])
mine = files.share(range(4))  # the second process has nothing but flat groups
train.policy_gradient(args, leader.model, None, [groups[i] for i in mine], advantages[list(mine)])
files.add_up_gradients(leader.model)
if files.rank() == 0:
    torch.save([p.grad for p in leader.model.parameters()], sys.argv[2])
"""


def torchrun(n, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
    command += ["--standalone", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_one_and_two_processes_have_the_same_gradient(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    subprocess.run([sys.executable, script, ROOT, tmp_path / "1.pt"], check=True, timeout=300)
    torchrun(2, script, ROOT, tmp_path / "2.pt")
    gradients = [torch.cat([g.flatten() for g in torch.load(tmp_path / f"{n}.pt")]) for n in "12"]
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.slow
def test_a_run_on_two_processes(tmp_path):
    small = "--questions 12 --validation_questions 4 --sft_steps 2 --sft_batch 3 --steps 3 "
    small += "--questions_per_step 3 --group_size 2 --max_new_tokens 60 --eval_questions 5 "
    torchrun(2, ROOT / "train.py", *small.split(), "--rounds", 1, "--out", tmp_path / "run")
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "mlpo"] == [0, 1, 2]
    proposals = (tmp_path / "run" / "proposals.jsonl").read_text().splitlines()
    assert len(proposals) == 3 * 12 and (tmp_path / "run" / "results.json").exists()
