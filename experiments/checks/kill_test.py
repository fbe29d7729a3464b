"""Does a run that was killed, wherever it dies, end in the files of one that was left alone?

    python experiments/checks/kill_test.py 40                 4 minutes on two cores
    python experiments/checks/kill_test.py 8 --processes 1    one process only (or 2)

Four cases take turns: one process, or two under torchrun; without a checkpoint inside the training
phase, or with one every two updates. In each case a small run (two iterations on the toy's base
model) is left alone once, and the length of its phases is measured: a phase lasts from one new
entry of finished.json to the next, the first from the start of the command, the last to its end.
Then, N times in all: the same command in an empty folder; SIGKILL to one of its processes (the
launcher is one), drawn at random, at a moment drawn from a phase drawn at random, so that short
phases get their share; the others have to end by themselves within a minute; the same command again
has to finish, and *every* file of its folder has to be that of the undisturbed run, bit for bit.

Ends with `N kills, N identical`, and with exit code 1 if one is not; says which file differs first.
Needs Linux. Every command is forked from a process that has the libraries, but none of our files,
in memory: that saves their seconds of loading, twice a kill; the launcher is torchrun's own.
Test: pytest tests/test_experiments.py.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch.distributed.checkpoint.state_dict  # noqa: E402, F401  for two processes
import torch.distributed.fsdp  # noqa: E402, F401
import transformers  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

import train_loop  # noqa: E402, F401  for its libraries
from harness.inputs import toy  # noqa: E402

OURS = {file.stem for file in ROOT.glob("*.py")} | {"harness"}
fork = multiprocessing.get_context("fork")
COMMAND = ("--model world/base --data world/train.jsonl --ranker judge.py:judge --run-dir run "
           "--iterations 2 --prompts-per-iteration 24 --batch-size 4 --eval-prompts 4 --slots 1 "
           "--max-length 48 --max-prompt-length 24 --max-new-tokens 8 --tokens-per-forward 128 "
           "--temperature 1 --alpha 0.1 --lr 1e-3 --dtype fp32 --device cpu").split()
JUDGE = """def judge(prompts, candidates):
    return [[float(sum(map(ord, text)) % 97) for text in texts] for texts in candidates]
"""

# ----------------------------------------------------------------------------------------------
# 1. A command
# ----------------------------------------------------------------------------------------------


def start(processes, save_every):
    """The command of a case, as if it were typed, in a session of its own -> its Process."""
    command = [str(ROOT / "train_loop.py"), *COMMAND, "--save-every", str(save_every)]
    process = fork.Process(target=_launch, args=(processes, command))
    process.start()
    return process


def _launch(processes, command):
    os.setsid()
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    if processes == 1:
        _script(command)
    else:  # as torchrun does, but for the fork
        config = LaunchConfig(1, 1, processes, start_method="fork", max_restarts=0,
                              rdzv_backend="c10d", rdzv_endpoint="localhost:0")
        elastic_launch(config, _script)(command)


def _script(command):
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:  # the launcher would wait for the result of one that ends with 0
        if end.code:
            raise


def prepare():
    """The world and the judge that the command names."""
    def build():
        transformers.utils.logging.disable_progress_bar()
        toy.SFT_STEPS = 60
        toy.build_world("world", seed=0, prompts=96, progress=False)
    Path("judge.py").write_text(JUDGE)
    builder = fork.Process(target=build)  # what computes here could not be forked any more
    builder.start()
    builder.join()


def processes_of(session):
    """The ids of the living processes of a session, its first one first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:  # pid (name) state parent group session ...
            state, _, _, its = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(its) == session and state != "Z":
            found.append(int(folder.name))
    return sorted(found)


def finished():
    """The names of what a run has finished, in order."""
    record = Path("run/finished.json")
    names = json.loads(record.read_text()) if record.exists() else []
    return [name for name in names if name != "check"]  # its own digest


# ----------------------------------------------------------------------------------------------
# 2. Left alone, killed, and run again
# ----------------------------------------------------------------------------------------------


def left_alone(case):
    """Runs it -> ([(phase, seconds), ...], name -> content of every file)."""
    process, begin, phases = start(*case), time.monotonic(), []
    while process.is_alive():
        for name in finished()[len(phases):]:
            phases.append((name, time.monotonic() - begin))
            begin = time.monotonic()
        time.sleep(0.002)
    phases.append(("the report", time.monotonic() - begin))
    check_end(process)
    return phases, take_files()


def kill_once(case, phases, chooser):
    """Starts it and kills one of its processes -> where; None where it ended before the moment."""
    place, process = chooser.randrange(len(phases)), start(*case)
    while len(finished()) < place and process.is_alive():
        time.sleep(0.001)
    process.join(chooser.random() * phases[place][1])
    victims = processes_of(process.pid) or [process.pid] * process.is_alive()
    if not victims:
        return None
    victim, came = chooser.choice(victims), len(finished())  # further than it should, at times
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        process.join(0.02)
    if left:
        list(map(os.kill, left, itertools.repeat(signal.SIGKILL)))
        raise SystemExit(f"of {len(victims)} processes {len(left)} outlived another by a minute")
    return f"{phases[min(came, len(phases) - 1)][0]}, process {victims.index(victim)}"


def first_difference(case, expected):
    """Runs the command that was killed to its end -> the first file that differs, or None."""
    process = start(*case)
    process.join()
    check_end(process)
    got = take_files()
    return next((name for name in sorted({*got, *expected})
                 if got.get(name) != expected.get(name)), None)


def check_end(process):
    if process.exitcode:
        output = Path("output.txt").read_text(errors="replace")
        raise SystemExit(f"exit code {process.exitcode}: {output[-3000:]}")


def take_files():
    """name -> content of every file that a run has left; the folder is gone afterwards."""
    files = {str(path): path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    shutil.rmtree("run")
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(description="Kill a run, run it again, compare its files.")
    parser.add_argument("kills", type=int)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--save-every", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    chooser, identical, done = random.Random(args.seed), 0, 0
    cases = list(itertools.product(args.processes, args.save_every))[:args.kills]
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        prepare()
        alone = {case: left_alone(case) for case in cases}
        while done < args.kills:
            case = cases[done % len(cases)]
            phases, expected = alone[case]
            where = kill_once(case, phases, chooser)
            different = first_difference(case, expected)
            if where:
                done, identical = done + 1, identical + (different is None)
                print(f"{done}: {case[0]} processes, --save-every {case[1]}, killed in {where}: "
                      + (f"{different} DIFFERS" if different else "identical"), flush=True)
    print(f"{args.kills} kills, {identical} identical")
    sys.exit(identical < args.kills)


if __name__ == "__main__":
    main()
