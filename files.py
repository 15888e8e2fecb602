"""A run's folder (whole files, one run at a time), its training steps, its several processes."""

import fcntl
import json
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


def fail(message):
    """End the script with one line that says what is wrong, and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, save):
    """Let `save(temporary path)` write, then move it into place: readers see all of it or none."""
    if rank():
        return
    temporary = Path(f"{path}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a folder left by a run that was killed
    save(temporary)
    for file in temporary.glob("*") if temporary.is_dir() else [temporary]:
        with open(file) as handle:
            os.fsync(handle)
    os.replace(temporary, path)


def write_text(path, text):
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_jsonl(path, rows):
    """Add rows at the end; they are on disk when this returns."""
    with open(path, "ab", buffering=0) as file:  # one write: processes do not mix their lines
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        os.fsync(file)


def read_jsonl(path):
    """All rows. A last line that was being written when the run was killed is dropped, aloud."""
    *lines, rest = Path(path).read_bytes().split(b"\n") if Path(path).exists() else [b""]
    if rest:
        print(f"{path}: dropped the last line, which was only half written")
        write(path, lambda temporary: temporary.write_bytes(b"\n".join([*lines, b""])))
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.doc[:60]}") from error


def save_leader(folder, leader):
    """An ordinary checkpoint folder, float32, with its tokenizer."""
    write(folder, lambda to: [x.save_pretrained(to) for x in (leader.model, leader.tokenizer)])


def save_checkpoint(path, state):
    write(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path):
    """What was saved there, or None. Nothing is unpickled but tensors."""
    if Path(path).exists():
        return torch.load(path, map_location="cpu", weights_only=True)


def open_run(folder, config, resume):
    """The folder of the run with this config, and nobody else's. ValueError says what to do."""
    run = Path(folder)
    if (run / "config.json").exists():
        old, free = (
            read_json(run / "config.json"),
            ("out", "resume", "device", "save_steps", "checkpointing"),
        )
        for name, value in config.items():
            if name not in free and old.get(name) != value:
                problem = f"holds another run, whose {name} is {old.get(name)!r}, not {value!r}"
                raise ValueError(f"--out {run} {problem}: name another folder")
        if not resume and not (run / "results.json").exists():
            raise ValueError(f"--out {run} holds an unfinished run: add --resume to go on with it")
    elif run.exists() and (not run.is_dir() or any(p.name != "lock" for p in run.iterdir())):
        raise ValueError(f"--out {run} is not empty and holds no run: name another folder")
    elif resume:
        raise ValueError(f"--resume: there is no run in {run}")
    run.mkdir(parents=True, exist_ok=True)
    global _lock  # open, and so locked, until this process ends, however it ends
    _lock = open(run / "lock", "w")
    try:
        if rank() == 0:
            fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another process is at work in {run}: wait for it") from error
    wait_for_all()
    return run


def by_tokens(items, budget, repeated=False):
    """Micro-batches of like (prompt, completions, ...): up to `budget` tokens with padding.
    `repeated`: every completion has its own copy of the prompt."""
    copies = lambda item: len(item[1]) if repeated else 1
    size = lambda item: copies(item) * len(item[0]) + sum(map(len, item[1]))
    left = sorted(items, key=size)
    while left:
        n = sum(k * size(item) <= budget for k, item in enumerate(left, start=1)) or 1
        yield zip(*left[:n])
        left = left[n:]


class Trainer:
    """What SFT and MLPO share: AdamW, its schedule, checkpoints, and a log line per step."""

    def __init__(self, args, run, model, phase, total, lr):
        self.args, self.run, self.model, self.phase, self.total = args, run, model, phase, total
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        self.peak, self.step, self.bad = lr, 0, 0
        if args.checkpointing:
            model.activation_checkpointing_enable()
            if drop := [x for x, p in model.config.to_dict().items() if "drop" in x and p]:
                raise ValueError(f"--checkpointing trains without dropout: {drop[0]} must be 0")
        if (state := load_checkpoint(run / "checkpoint.pt")) and state["phase"] == phase:
            self.step = state["step"]
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        # what was logged after that checkpoint is going to happen again
        rows = read_jsonl(run / "metrics.jsonl")
        rows = [row for row in rows if row["during"] != phase or row["step"] < self.step]
        write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def steps(self):
        """The numbers of the steps still to do; a checkpoint every `save_steps` of them, and when
        Ctrl-C is pressed: the step is finished, saved, and the run ends."""
        pressed = []
        usual = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
        for step in tqdm(range(self.step, self.total), self.phase, self.total, initial=self.step):
            self.step = step
            yield step
            if pressed or (step + 1) % self.args.save_steps == 0:
                state = {"phase": self.phase, "step": step + 1, "model": self.model.state_dict()}
                state |= {"optimizer": self.optimizer.state_dict()}
                save_checkpoint(self.run / "checkpoint.pt", state)
            if pressed:
                raise KeyboardInterrupt
        signal.signal(signal.SIGINT, usual)
        self.step = self.total

    def update(self):
        """One AdamW step on the gradient added up so far, clipped at norm 1."""
        add_up_gradients(self.model)
        warm, left = (self.step + 1) / (self.args.warmup + 1), 1 - self.step / self.total
        rate = self.peak * min(1, warm, 2 * left)  # it rises, and falls to 0 in the second half
        self.optimizer.param_groups[0]["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.bad = 0 if norm.isfinite() else self.bad + 1  # this many steps were skipped
        if self.bad == 5:
            raise ValueError("5 steps in a row without a finite gradient: lower the learning rate")
        if self.bad == 0:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": norm.item(), "lr": rate}

    def log(self, phase=None, **values):
        """A row of metrics.jsonl, to 4 digits, and every few steps a line on the screen."""
        row = {"phase": phase or self.phase, "step": self.step}
        row |= {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        if rank() == 0:
            append_jsonl(self.run / "metrics.jsonl", [{**row, "during": self.phase}])
            if phase or self.step % 5 == 0:
                tqdm.write("  ".join(f"{name} {value}" for name, value in row.items()))


# --------------------------------------------------------------------------- several processes
# Under torchrun every process has a share of each step's questions; rank 0 alone writes.
rank = lambda: dist.get_rank() if dist.is_initialized() else 0
world_size = lambda: dist.get_world_size() if dist.is_initialized() else 1
share = lambda items: items[rank() :: world_size()]
wait_for_all = lambda: gather([])


def start_processes(args):
    """A process per GPU (nccl), or several on the CPU (gloo)."""
    if "RANK" not in os.environ:
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)  # where `gather` sends what it gathers
    dist.init_process_group("nccl" if "cuda" in args.device else "gloo", timeout=timedelta(days=1))
    if min(args.questions_per_step, args.sft_batch) < world_size():
        raise ValueError("--questions_per_step and --sft_batch: at least one for every process")


def gather(items):
    """The items of all processes, as a list in each of them."""
    shares = [items] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(shares, items)
    return sum(shares, [])


def add_up_gradients(model):
    """One sum for the whole step: a process may have had any number of micro-batches, even 0."""
    if dist.is_initialized():
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
