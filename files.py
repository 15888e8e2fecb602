"""What is no part of the method: a run's folder (whole files, one run at a time), its training
steps and their log, several processes, agents on a server."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import InferenceClient, get_session
from safetensors import SafetensorError
from tqdm import tqdm

import agents


def run_script(main):
    """For both scripts: what is wrong is said in one line."""
    try:
        main()
    except ValueError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped: the same command (train.py: with --resume) goes on from what is saved")
    except torch.OutOfMemoryError:
        fail("out of memory: lower --tokens_per_batch, then --resume; see the README")


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
    try:
        save(temporary)
        for file in temporary.glob("*") if temporary.is_dir() else [temporary]:
            with open(file) as handle:
                os.fsync(handle)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors: their own
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        reason = f"{error}".split("\n")[0]
        raise ValueError(f"cannot write {path}: {reason}; make room, then --resume") from error


def write_text(path, text):
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


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
        raise ValueError(f"cannot write {path}: {error}; make room, then --resume") from error


def read_jsonl(path, repair=True):
    """All rows. A last line that was being written when the run was killed is dropped, aloud; with
    `repair` (for files of one's own run) from the file as well, so that rows can be added."""
    *lines, rest = Path(path).read_bytes().split(b"\n") if Path(path).exists() else [b""]
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.doc[:60]}") from error
    try:
        rows += [json.loads(rest)] if rest.strip() else []
        lines += [rest] if rest.strip() else []
    except json.JSONDecodeError:
        print(f"{path}: dropped the last line, which was only half written")
    if rest and repair:
        write(path, lambda temporary: temporary.write_bytes(b"\n".join([*lines, b""])))
    return rows


def save_leader(folder, leader):
    """An ordinary checkpoint folder, float32, with its tokenizer."""
    write(folder, lambda to: [x.save_pretrained(to) for x in (leader.model, leader.tokenizer)])


def save_checkpoint(path, state):
    """The one before stays as `checkpoint.pt.previous`, for the day when this one is damaged."""
    write(f"{path}.new", lambda temporary: torch.save(state, temporary))
    if rank() == 0:
        if Path(path).exists():
            os.replace(path, f"{path}.previous")
        os.replace(f"{path}.new", path)


def load_checkpoint(path):
    """What was saved there, or before that, or None. Nothing is unpickled but tensors."""
    for file in (path, f"{path}.previous"):
        try:
            if zipfile.ZipFile(file).testzip():  # torch itself checks no sums
                raise ValueError("wrong checksum")
            return torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:  # the second, if a kill came between its two renamings
            continue
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:80]
            print(f"{file} is damaged and not used ({reason})")


def open_run(folder, config, resume):
    """The folder of the run with this config, and nobody else's. ValueError says what to do."""
    run = Path(folder)
    if (run / "config.json").exists():
        old, where = read_json(run / "config.json"), ("out", "resume", "device")
        how = ("save_steps", "checkpointing", "tokens_per_batch")  # may change: the result does not
        for name, value in config.items():
            if name not in where + how and old.get(name) != value:
                problem = f"holds another run, whose {name} is {old.get(name)!r}, not {value!r}"
                raise ValueError(f"--out {run} {problem}: name another folder")
        end = "results.json" if config.get("eval_questions", 1) else "leader"  # what comes last
        if not resume and not (run / end).exists():
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


# a policy that collapses: name in the log, what is wrong if 10 steps in a row say so, what to try
ALARMS = (
    ("format", lambda x: x < 0.1, "hardly an answer is in the form: lower --lr, more --sft_steps"),
    ("entropy", lambda x: x < 0.002, "all samples are alike: lower --lr, a --kl_coef of 0.01"),
    ("flat", lambda x: x == 1, "groups all right or all wrong: other questions, --group_size up"),
)


class Trainer:
    """What SFT and MLPO share: AdamW, its schedule, checkpoints, and a log line per step."""

    def __init__(self, args, run, model, phase, total, lr):
        self.args, self.run, self.model, self.phase, self.total = args, run, model, phase, total
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        self.peak, self.step, self.bad, self.recent = lr, 0, 0, []
        if args.checkpointing:
            model.activation_checkpointing_enable()
            if drop := [x for x, p in model.config.to_dict().items() if "drop" in x and p]:
                raise ValueError(f"--checkpointing trains without dropout: {drop[0]} must be 0")
        self.saved, path = "there is none", run / "checkpoint.pt"
        if (state := load_checkpoint(path)) and state["phase"] == phase:
            self.step, self.saved = state["step"], f"{path}, after step {state['step']}"
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        # what was logged after that checkpoint is going to happen again
        rows = read_jsonl(run / "metrics.jsonl")
        rows = [row for row in rows if row["during"] != phase or row["step"] < self.step]
        write_jsonl(run / "metrics.jsonl", rows)

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
                self.saved = f"{self.run / 'checkpoint.pt'}, after step {step + 1}"
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
        if self.bad:
            self.say(f"step {self.step} is skipped: its gradient is not finite")
        elif norm > 0:  # else nothing was learned, and AdamW's momentum shall not go on alone
            self.optimizer.step()
        if self.bad == 5:
            what = f"5 steps in a row without a finite gradient in {self.phase}: lower its rate"
            raise ValueError(f"{what}, in another --out. The last checkpoint: {self.saved}")
        self.optimizer.zero_grad()
        return {"grad_norm": norm.item(), "lr": rate}

    def log(self, phase=None, **values):
        """A row of metrics.jsonl, to 4 digits, and every few steps a line on the screen."""
        row = {"phase": phase or self.phase, "step": self.step}  # a look at validation has its own
        row |= {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        if rank() == 0:
            # resuming drops the looks of a phase along with its steps
            append_jsonl(self.run / "metrics.jsonl", [{**row, "during": self.phase}])
        if phase or self.step % 5 == 0:
            self.say("  ".join(f"{name} {value}" for name, value in row.items()))
        if not phase:
            self.recent.append(row)
            for name, wrong, advice in ALARMS if len(self.recent) % 10 == 0 else ():
                if all(name in past and wrong(past[name]) for past in self.recent[-10:]):
                    self.say(f"WARNING: for 10 steps {name} was {row[name]} or so: {advice}")

    def say(self, text):
        if rank() == 0:
            tqdm.write(text)


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


# -------------------------------------------------------------------------- agents on a server
CONCURRENT, TIMEOUT, WAITS = 8, 300, (0.5, 1, 2, 4, 8, 15, 30, 30, 30)  # requests; seconds


class Server:
    """An agent behind an OpenAI-compatible endpoint (vLLM, llama.cpp, `transformers serve`), asked
    like a `Speaker`. Every reply is at once in the `journal`, and the next start takes it from
    there: the j-th time that something is asked, the j-th reply to it."""

    def __init__(self, name, journal):
        self.name, self.journal, (url, self.model) = name, journal, name.split("#")
        # without this key the client would send the user's token for the hub
        self.key = os.environ.get("MLPO_API_KEY") or "EMPTY"
        self.client = InferenceClient(base_url=url, api_key=self.key, timeout=TIMEOUT / 5)
        # the client's hook enforces HF_HUB_OFFLINE; this server is not the hub
        hooks, ours = get_session().event_hooks["request"], lambda r: str(r.url).startswith(url)
        get_session().event_hooks = {"request": [lambda r: ours(r) or [h(r) for h in hooks]]}
        self.stop, self.hint, self.saved = threading.Event(), "", {}
        self.request(agents.agent_messages("1 + 1 is"), 1.0, 1, WAITS[:4])  # is anybody there?
        self.client.timeout = TIMEOUT
        self.hint = ". What it said is saved: repeat the command (train.py's with --resume)"
        for row in read_jsonl(journal):
            self.saved.setdefault(row["key"], []).append(row)

    def answer(self, prompts, n=1, temperature=1.0, max_new_tokens=256, bar=None):
        how, said = (temperature, max_new_tokens), []
        self.stop.clear()
        pool = ThreadPoolExecutor(CONCURRENT)
        try:  # one request for each sample: not every server knows n
            asked = [pool.submit(self.ask, m, *how) for m in prompts for _ in range(n)]
            for future in asked:
                said.append(future.result())
                if bar is not None:
                    bar.update()
        finally:  # what is under way still arrives and is saved; nothing else is asked
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        return [said[i : i + n] for i in range(0, len(said), n)]

    def fingerprint(self, **how):
        """Of all that is known of what makes its responses: its weights are not."""
        return self.key_of(agents.agent_messages(""), *how.values())

    def key_of(self, *asked):
        return hashlib.sha256(json.dumps([self.name, *asked]).encode()).hexdigest()

    def ask(self, messages, *how):
        key = self.key_of(messages, *how)
        try:
            row = self.saved[key].pop(0)
        except LookupError:
            row = {"agent": self.name, "key": key, **self.request(messages, *how, WAITS)}
            append_jsonl(self.journal, [row])
        # of these ids only the number counts
        ids, prompt_ids = range(row["completion_tokens"]), range(row["prompt_tokens"])
        return agents.Completion(row["text"], ids, [], row["finished"], prompt_ids)

    def request(self, messages, temperature, max_new_tokens, waits):
        """One reply; asked for again, ever later, while the server is away or talks nonsense."""
        how = dict(model=self.model, temperature=temperature, max_tokens=max_new_tokens)
        for wait in (*waits, None):
            try:
                reply = self.client.chat_completion(messages, **how)
                text, end = reply.choices[0].message.content, reply.choices[0].finish_reason
                text = text or ""  # null: it thought, and was cut off or said nothing
                # JSON can hold half a character, and a server may not heed max_tokens
                text = text.encode(errors="replace").decode()[: 20 * max_new_tokens]
                break
            except Exception as error:  # of a dozen kinds: refused, reset, late, not JSON, null
                status = getattr(getattr(error, "response", None), "status_code", 0)
                refused = 300 <= status < 500 and status not in (408, 429)
                if refused or wait is None or self.stop.wait(wait):
                    why = f"{status or type(error).__name__}: {error}".replace(self.key, "(key)")
                    why = " ".join(why.split())[:300] + self.hint
                    raise ValueError(f"agent {self.name} does not answer: {why}") from None
        said = {"text": text, "finished": end != "length"}
        asked = "".join(m["content"] for m in messages)
        for what, words in (("completion_tokens", text), ("prompt_tokens", asked)):
            n = getattr(reply.usage, what, None)  # not every server counts: 4 letters are a token
            said[what] = n if type(n) is int and 0 <= n < 2**31 else len(words) // 4 + 1
        return said
