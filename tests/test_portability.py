"""Where students are: a machine without what only Unix has, and a console that knows ASCII.
And no pictures are drawn where none are wanted: to ask a question, matplotlib is not needed."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import runs

# what Windows lacks; a file in PYTHONPATH of this name is run before anything else
WITHOUT_UNIX = """
import signal, sys

missing = ["fcntl", "resource", "pwd", "grp", "termios"]
if "--ask" in sys.orig_argv:
    missing.append("matplotlib")

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

# libraries ask sys.platform what they may use, and that still says linux: they come first
if any(word.endswith(("train.py", "evaluate.py")) for word in sys.orig_argv):
    import datasets, torch.distributed.elastic.timer, transformers.hf_argparser
    from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM
for name in list(sys.modules):
    if name in missing or name.startswith("filelock"):
        del sys.modules[name]
sys.meta_path.insert(0, Missing())
del signal.SIGKILL
"""
SMALL = "--questions 20 --validation_questions 3 --sft_steps 2 --sft_batch 4 --steps 2 --rounds 1 "
SMALL += "--questions_per_step 4 --group_size 3 --max_new_tokens 40 --eval_questions 5 --out"


@pytest.fixture
def without_unix(tmp_path):
    """A function that runs Python in such a process."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_UNIX)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    def python(*words, console="ascii"):
        words = [sys.executable, *map(str, words)]
        env = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": console}
        return subprocess.run(
            words, capture_output=True, encoding=console, env=env, cwd=tmp_path, timeout=600
        )

    return python


@pytest.mark.parametrize("name", ["fcntl", "resource", "pwd", "grp", "termios"])
def test_the_stand_in_does_lack_them(without_unix, name):
    assert f"No module named '{name}'" in without_unix("-c", f"import {name}").stderr


def test_the_stand_in_lacks_a_signal_and_knows_few_letters(without_unix):
    done = without_unix("-c", "import signal; print(hasattr(signal, 'SIGKILL')); print('±')")
    assert done.stdout.split() == ["False"] and "UnicodeEncodeError" in done.stderr


def test_both_scripts_run_there(without_unix, tmp_path):
    done = without_unix(ROOT / "train.py", *SMALL.split(), "Läufe")
    assert done.returncode == 0, done.stderr
    assert " ?" in done.stdout and "±" not in done.stdout  # the letters that it does not know
    assert runs.read_json(tmp_path / "Läufe" / "results.json")["questions"] == 5
    words = [ROOT / "evaluate.py", "Läufe", "--ask", "How many fruits do I have?"]
    done = without_unix(*words, console="cp1252")  # a German or English Windows
    assert done.returncode == 0 and "[the leader alone]" in done.stdout, done.stderr


@pytest.mark.parametrize("known, shown", [("ascii", b"a ?"), ("cp1252", b"a \xb1")])
def test_a_console_shows_the_letters_that_it_knows(monkeypatch, known, shown):
    console = io.TextIOWrapper(io.BytesIO(), known)
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), known))
    runs.run_script(lambda: print("a ±"))
    console.flush()
    assert console.buffer.getvalue().strip() == shown


def test_latex_is_compared_and_ended_there(without_unix):
    words = "import formulas, rewards; formulas.SECONDS = 600;"
    words += "print(rewards.is_correct('$x^2 x$', 'x^3'));"
    words += "formulas.SECONDS = 1; print(rewards.is_correct('9^{9^{9^9}}', 'x^3'));"
    words += "formulas.SECONDS = 600; print(rewards.is_correct('$x^2 x^2$', 'x^4'))"
    assert without_unix("-c", words).stdout.split() == ["True", "False", "True"]
