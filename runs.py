"""A run's folder: whole files, one run at a time, checkpoints and the log; several processes."""

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

from sampling import is_out_of_memory

# ------------------------------------------------------------------------------------- scripts


def run_script(main):
    """For both scripts: what is wrong is said in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may know fewer characters than UTF-8
    try:
        main()
    except ValueError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped: the same command (train.py: with --resume) goes on from what is saved")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = "a lower --tokens_per_batch, in sampling a lower --sample_gb; then --resume"
        fail(f"out of memory: train.py takes {advice}")
    if dist.is_initialized():
        end_now(0)


def say(text):
    """On the screen, once, however many processes there are."""
    if rank() == 0:
        tqdm.write(text)


def fail(message):
    """End the script with one line that says what is wrong, and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if dist.is_initialized():
        end_now(2)
    raise SystemExit(2)


def end_now(status):
    """End one of several processes, when all is written, without the destructors of C++: now and
    then PyTorch's threads make these abort, and torchrun would call the whole run failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ----------------------------------------------------------------------------------- whole files


def write_file(path, save):
    """Let `save(temporary path)` write, then move it into place: readers see all of it or none.
    ValueError if the disk is full; what was there before is whole."""
    if rank() != 0:  # one process writes
        return
    temporary = Path(f"{path}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a folder left by a run that was killed
    try:
        save(temporary)
        files = list(temporary.glob("*")) if temporary.is_dir() else [temporary]
        for file in files:
            with open(file, "rb+") as handle:  # Windows flushes only what may be written
                os.fsync(handle)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors: their own
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        reason = str(error).split("\n")[0]
        raise ValueError(f"cannot write {path}: {reason}; {MAKE_ROOM}") from error


MAKE_ROOM = "make room, then the same command (train.py: with --resume)"


def write_text(path, text):
    def save(temporary):
        temporary.write_text(text, encoding="utf-8")

    write_file(path, save)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_jsonl(path, rows):
    """Add rows at the end; they are on disk when this returns."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        with open(path, "ab", buffering=0) as file:  # one write: processes do not mix their lines
            if file.write(data) < len(data):
                raise OSError("only half of it fitted")
            os.fsync(file)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}; {MAKE_ROOM}") from error


def read_jsonl(path, repair=True):
    """All rows. A last line that was being written when the run was killed is dropped, aloud; with
    `repair` (for files of one's own run) from the file as well, so that rows can be added."""
    if not Path(path).exists():
        return []
    *lines, rest = Path(path).read_bytes().split(b"\n")
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.doc[:60]}") from error
    if not rest:
        return rows
    try:
        if rest.strip():
            rows.append(json.loads(rest))
            lines.append(rest)
    except json.JSONDecodeError:
        say(f"{path}: dropped the last line, which was only half written")
    if repair:
        whole = b"\n".join([*lines, b""])
        write_file(path, lambda temporary: temporary.write_bytes(whole))
    return rows


# --------------------------------------------------------------------------- the folder of a run

# the result does not depend on these settings (sample_gb: but for which random numbers are drawn)
WHERE = ("out", "resume", "device")
MEMORY_ONLY = ("save_steps", "checkpointing", "tokens_per_batch", "sample_gb", "plain")
_locks = {}  # of the folders that are this process's until it ends, however it ends


def claim_folder(folder, config, defaults, resume):
    """The folder of the run with this config, and nobody else's, locked. An older run, whose
    config.json lacks an argument, has what it did then, or else the default. ValueError says what
    to do."""
    run = Path(folder)
    if (run / "config.json").exists():
        check_same_run(run, config, defaults)
        last = "results.json" if config["eval_questions"] else "leader"  # what is written last
        if not resume and not (run / last).exists():
            raise ValueError(f"--out {run} holds an unfinished run: add --resume to go on with it")
    elif run.exists() and (not run.is_dir() or any(p.name != "lock" for p in run.iterdir())):
        raise ValueError(f"--out {run} is not empty and holds no run: name another folder")
    elif resume:
        raise ValueError(f"--resume: there is no run in {run}")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {run}: no folder can be made there: {error.strerror}") from error
    if rank() == 0:
        path = str((run / "lock").resolve())
        lock = _locks.get(path) or FileLock(path)  # a notebook may call this again
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process is at work in {run}: wait for it") from error
        except OSError as error:
            raise ValueError(f"--out {run}: cannot be written: {error.strerror}") from error
        _locks[path] = lock
    wait_for_all()
    return run


def check_same_run(run, config, defaults):
    """ValueError, which names the field, if the run in this folder has other settings."""
    old = {**defaults, **with_later_arguments(read_json(run / "config.json"))}
    for name, value in config.items():
        if name not in WHERE + MEMORY_ONLY and old.get(name) != value:
            problem = f"holds another run, whose {name} is {old.get(name)!r}, not {value!r}"
            raise ValueError(f"--out {run} {problem}: name another folder")


def with_later_arguments(config):
    """With the arguments that runs of older versions lack, as these runs behaved."""
    sft_alone = max(0.5, config.get("team_dropout", 0.33))
    earlier = {
        "plain": False,
        "sft_alone": sft_alone,
        "sft_questions": config.get("questions", 1000),
        "random_order": config.get("random_team", False),
    }
    return {**earlier, **config}


def save_model(folder, local_model):
    """An ordinary checkpoint folder, float32, with its tokenizer."""

    def save(temporary):
        local_model.model.save_pretrained(temporary)
        local_model.tokenizer.save_pretrained(temporary)

    write_file(folder, save)


def save_checkpoint(path, state):
    """The one before stays as `checkpoint.pt.previous`, for the day when this one is damaged."""
    write_file(f"{path}.new", lambda temporary: torch.save(state, temporary))
    if rank() == 0:
        if Path(path).exists():
            os.replace(path, f"{path}.previous")
        os.replace(f"{path}.new", path)


def load_checkpoint(path):
    """What was saved there, or before that, or None. Nothing is unpickled but tensors."""
    for file in (path, f"{path}.previous"):
        try:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip():  # torch itself checks no sums
                    raise ValueError("wrong checksum")
            return torch.load(file, map_location="cpu", weights_only=True)
        # none was saved yet; or a kill came between two renamings, and the one before is the last
        except FileNotFoundError:
            continue
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:80]
            print(f"{file} is damaged and not used ({reason})")


# ----------------------------------------------------------------------------- a phase of training


def hardly_any(share):
    return share < 0.1


def nearly_none(entropy):
    return entropy < 0.002


def all_of_them(share):
    return share == 1


# a policy that collapses: name in the log, what is wrong if 10 steps in a row say so, what to try
ALARMS = (
    ("format", hardly_any, "hardly an answer is in the form: lower --lr, more --sft_steps"),
    ("entropy", nearly_none, "all samples are alike: lower --lr, a --kl_coef of 0.01"),
    ("no_gradient", all_of_them, "all groups are flat: other questions, a larger --group_size"),
)


ON_SCREEN = "loss reward accuracy format length no_gradient tokens_per_s alone team".split()


class Phase:
    """SFT or MLPO as it is on disk: where it goes on, its checkpoints, its log. Use it in a `with`:
    then Ctrl-C finishes the step, saves and ends the run, and a second Ctrl-C ends it at once."""

    def __init__(self, run, name, steps, save_steps, model, optimizer):
        self.run = run
        self.name = name
        self.total = steps
        self.save_steps = save_steps
        self.model = model
        self.optimizer = optimizer
        self.step = 0  # the one that is being done
        self.shown = 0.0  # when the last line of the log was on the screen, in seconds
        self.skipped = 0  # steps in a row without a finite gradient
        self.recent = []  # rows of the log
        self.pressed = threading.Event()  # Ctrl-C
        self.resume()

    def resume(self):
        """Go on after the last checkpoint of this phase, if there is one."""
        path = self.run / "checkpoint.pt"
        self.saved = "there is none"
        state = load_checkpoint(path)
        if state and state["phase"] == self.name:
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.saved = f"{path}, after step {self.step}"
        # what was logged after that checkpoint is going to happen again
        kept = []
        for row in read_jsonl(self.run / "metrics.jsonl"):
            if row["during"] != self.name or row["step"] < self.step:
                kept.append(row)
        write_jsonl(self.run / "metrics.jsonl", kept)

    def __enter__(self):
        self.usual_handler = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            self.usual_handler = signal.signal(signal.SIGINT, self.on_ctrl_c)
        return self

    def __exit__(self, *error):
        if self.usual_handler is not None:
            signal.signal(signal.SIGINT, self.usual_handler)

    def on_ctrl_c(self, *signal_and_frame):
        if self.pressed.is_set():
            raise KeyboardInterrupt
        self.pressed.set()

    def steps(self):
        """The numbers of the steps still to do; a checkpoint every `save_steps` of them."""
        for step in tqdm(range(self.step, self.total), self.name, self.total, initial=self.step):
            self.step = step
            yield step
            # all processes stop after the same step: one alone would wait for the others for ever
            stop = any(gather([self.pressed.is_set()]))
            last = step + 1 == self.total  # what comes after it may be interrupted
            if stop or last or (step + 1) % self.save_steps == 0:
                self.save(step + 1)
            if stop:
                raise KeyboardInterrupt
        self.step = self.total

    def save(self, step):
        path = self.run / "checkpoint.pt"
        state = {"phase": self.name, "step": step, "model": self.model.state_dict()}
        state["optimizer"] = self.optimizer.state_dict()
        save_checkpoint(path, state)
        self.saved = f"{path}, after step {step}"

    def check_gradient(self, norm):
        """Say it when a step was skipped for its gradient; ValueError after five in a row."""
        if math.isfinite(norm):
            self.skipped = 0
            return
        self.skipped += 1
        say(f"step {self.step} is skipped: its gradient is not finite")
        if self.skipped == 5:
            problem = f"5 steps in a row without a finite gradient in {self.name}"
            advice = "lower its learning rate, in another --out"
            raise ValueError(f"{problem}: {advice}. The last checkpoint: {self.saved}")

    def log(self, kind=None, **values):
        """A row of metrics.jsonl, to 4 digits; every few steps or seconds the numbers that matter
        are on the screen. `kind`: of a row that is not a step's, such as a look at validation."""
        # "phase": what the row is about; "during", below: the phase in which it was written
        row = {"phase": kind or self.name, "step": self.step}
        for name, value in values.items():
            row[name] = float(f"{value:.4g}") if isinstance(value, float) else value
        if rank() == 0:
            # resuming drops the looks of a phase along with its steps
            append_jsonl(self.run / "metrics.jsonl", [{**row, "during": self.name}])
        now = time.monotonic()
        if kind or self.step % 5 == 0 or now - self.shown > 5:  # slow steps: each of them
            self.shown = now
            numbers = [f"{name} {row[name]}" for name in ON_SCREEN if name in row]
            say("  ".join([f"{row['phase']} {self.step}/{self.total}", *numbers]))
        if not kind:
            self.recent.append(row)
            self.warn()

    def warn(self):
        """Every 10 steps: is this a policy that collapses?"""
        if len(self.recent) % 10:
            return
        last = self.recent[-10:]
        for name, wrong, advice in ALARMS:
            if all(name in row and wrong(row[name]) for row in last):
                say(f"WARNING: for 10 steps {name} was {last[-1][name]} or so: {advice}")


# --------------------------------------------------------------------------- several processes
# Under torchrun every process has a share of each step's questions; rank 0 alone writes.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items):
    """Those of the items that are this process's."""
    return items[rank() :: world_size()]


def gather(items):
    """The items of all processes, as a list in each of them."""
    if not dist.is_initialized():
        return list(items)
    shares = [None] * world_size()
    dist.all_gather_object(shares, items)
    gathered = []
    for items_of_process in shares:
        gathered += items_of_process
    return gathered


def wait_for_all():
    gather([])


def join_processes(args):
    """Under torchrun: join the others, a process per GPU (nccl) or several on the CPU (gloo)."""
    if "RANK" not in os.environ:
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)  # where `gather` sends what it gathers
    backend = "nccl" if "cuda" in args.device else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    if min(args.questions_per_step, args.sft_batch) < world_size():
        raise ValueError("--questions_per_step and --sft_batch: at least one for every process")


def add_up_gradients(model):
    """One sum for the whole step: a process may have had any number of micro-batches, even 0."""
    if not dist.is_initialized():
        return
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
