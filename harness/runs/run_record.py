"""Whose folder is it? The two records of a run, config.json and finished.json; the lock; --fresh.

A command may resume the run in its folder if settings, model, data and judge are the same. It
recognises them by their content and not by their paths, so that a run may be moved. What is in the
folder and not the run's stays, also under --fresh.

Test: pytest tests/test_run_folder.py.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from harness.models.distributed import PROCESSES, only_first, say, seal, unseal
from harness.runs.output_files import write_text
from harness.runs.settings import NO_DIFFERENCE

CONFIG, FINISHED, METRICS, LOCK = "config.json", "finished.json", "metrics.jsonl", ".lock"
# The names that a run writes, besides those in its record. Any other file is a user's.
MODEL_FILES = (r"(?:config|generation_config|tokenizer|tokenizer_config|special_tokens_map|vocab|"
               r"added_tokens|model\.safetensors\.index)\.json|merges\.txt|tokenizer\.model|"
               r"chat_template\.jinja|model(?:-\d+-of-\d+)?\.safetensors")
PART = r"\.part\d+of\d+"
OURS = re.compile(rf"""(?:seed_\d+/)?(?:baseline/)?(?:
    \.?(?:config|finished)\.json(?:\.tmp)? | metrics\.jsonl(?:\.tmp|\.damaged)?
    | report\.(?:md|html)(?:\.tmp)? | \.deleted-\w{{8}}/.*
    | figures/(?:evaluation|rewards|duels|implicit|training)\.png
    | tensorboard/events\.out\.tfevents\.[^/]+ | wandb/(?:offline-)?(?:run|latest-run|debug).*
    | (?:start|iter_\d+)/(?:scores\d+\.jsonl | (?:samples|reference_samples|pairs|reference
        |answers|answers_at_temperature_1|eval|duels|true|prompts)\.jsonl(?:{PART})?(?:\.tmp)?)
    | iter_\d+/samples_from\.sha256(?:\.tmp)?
    | iter_\d+/state/\d+(?:\.tmp)?/(?:history\.json|[^/]*\.safetensors(?:\.index\.json)?)
    | (?:iter_\d+/policy|start_policy)(?:\.tmp)?/(?:{MODEL_FILES})
    | world(?:\.unfinished)?/(?:base/(?:{MODEL_FILES})
        | (?:train|test)\.jsonl(?:\.tmp)? | world\.json(?:\.tmp)?))""", re.VERBOSE)
OUR_FOLDERS = re.compile(
    r"(?:(?:start|world|base|start_policy|figures|tensorboard|wandb|baseline|seed_\d+|iter_\d+|"
    r"policy|state|\d+)(?:\.tmp|\.unfinished)?(?:/|$))+")
# The two judges in config.json's made_from, and the files that have their scores.
JUDGES = "judge", "judge of the evaluation"
RANKED, SCORED = re.compile(r"/pairs\.jsonl"), re.compile(r"/(eval|duels)\.jsonl")

# ----------------------------------------------------------------------------------------------
# 1. Records
# ----------------------------------------------------------------------------------------------


def write_record(path, record):
    """Writes a JSON object twice, with its digest, so that one damaged byte costs nothing."""
    text = json.dumps(seal(record), indent=1)
    write_text(path, text)
    write_text(copy_of(path), text)


def read_record(path):
    """The object of a record or of its copy; None where there is neither. ValueError that names
    the file if both are damaged."""
    files = path, copy_of(path)
    for record in map(intact, files):
        if record is not None:
            return record
    if not any(file.exists() for file in files):
        return None
    try:  # an earlier version wrote no digest
        record = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        record = None
    if isinstance(record, dict):
        return {key: value for key, value in record.items() if key != "check"}
    raise ValueError(f"{path} is damaged or gone, and so is its copy {copy_of(path).name}; put one "
                     "of them back, or give another --run-dir; --fresh starts the run over")


def mend_record(path):
    """Writes a record again where it or its copy is damaged or gone, and says so."""
    record = read_record(path)
    bad = [file for file in (path, copy_of(path)) if intact(file) is None]
    if record is None or not bad:
        return
    if len(bad) == 1:
        say(f"{bad[0]} is damaged or gone; it is written again from its copy")
    write_record(path, record)


def copy_of(path):
    return path.with_name(f".{path.name}")


def intact(file):
    """The object that was written to a file; None where the file is damaged or gone."""
    with suppress(ValueError, OSError):
        return unseal(file.read_bytes())


def record_of(folder):
    """finished.json of a run: name -> entry; {} where there is none."""
    path = Path(folder) / FINISHED
    record = read_record(path) or {}
    if not all(isinstance(entry, dict) for entry in record.values()):
        raise ValueError(f"{path} is damaged: an entry is no object; put it back, or give another "
                         "--run-dir; --fresh starts the run over")
    return record


def made_from(folder):
    """What the run in this folder was made from; {} where there is none yet."""
    known = (read_record(Path(folder) / CONFIG) or {}).get("made_from")
    return known if isinstance(known, dict) else {}


# ----------------------------------------------------------------------------------------------
# 2. The same run?
# ----------------------------------------------------------------------------------------------


def fingerprint(path):
    """Tells two files, or two folders of files, apart without reading gigabytes: name -> size and a
    checksum of 16 blocks. The name of a single file does not count."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return {("" if file == path else file.relative_to(path).as_posix()): _sampled_checksum(file)
            for file in files}


def _sampled_checksum(path, blocks=16, block=65536):
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(blocks):
            file.seek(max(0, size - block) * i // (blocks - 1))
            digest.update(file.read(block))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def claim(folder, settings, made_from):
    """Makes the folder this run's, or checks that the run in it is the same one.

    settings: name -> value; made_from: name -> JSON value that describes the content of a model,
    the data, a judge. ValueError, with what has changed, if the folder holds another run or a
    user's files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value if isinstance(value, (int, float, str, type(None))) else str(value)
                for name, value in settings.items()}
    known = read_record(folder / CONFIG)
    if known is not None:
        check_same_run(folder, known, settings, made_from)
        return
    found = run_files(folder)
    if found:
        raise ValueError(f"{folder} holds {found[0]}, but no {CONFIG} of a run; give another "
                         "--run-dir, or --fresh to delete it")
    import torch
    import transformers
    write_record(folder / CONFIG, {
        "settings": settings, "made_from": made_from, "command": sys.argv,
        "git_revision": git_revision(), "torch": torch.__version__,
        "transformers": transformers.__version__, "processes": PROCESSES})


def check_same_run(folder, known, settings, made_from):
    """ValueError with what differs from `known`, the config.json of the run in the folder. A judge
    that has failed may differ: somebody has mended it."""
    if not all(isinstance(known.get(part), dict) for part in ("made_from", "settings")):
        raise ValueError(f"{folder} holds a {CONFIG} that is not a run's; give another --run-dir")
    record_of(folder)  # fails where both copies are damaged
    mend_record(folder / CONFIG)
    mend_record(folder / FINISHED)
    changed = [f"{name} was {known['settings'].get(name)}, is {value}"
               for name, value in settings.items()
               if name not in NO_DIFFERENCE and known["settings"].get(name) != value]
    sources = {name: value for name, value in made_from.items()
               if known["made_from"].get(name) != value}
    if not changed and not sources:
        return
    if not changed and set(sources) <= set(JUDGES) and may_change_its_judge(folder):
        for run in runs_in(folder):
            judge_again(run, sources, settings)
        return
    changed += [_difference(name, known["made_from"].get(name), value)
                for name, value in sources.items()]
    raise ValueError(f"{folder} holds a run with other settings ({'; '.join(changed)}); "
                     "give another --run-dir, or --fresh to delete it")


def _difference(name, was, now):
    """One clause on what changed between two values of made_from, short enough to read."""
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in {**was, **now} if was.get(key) != now.get(key))
        return (f"the {name} has changed ({key + ': ' if key else ''}was {was.get(key, 'absent')}, "
                f"is {now.get(key, 'absent')})")
    return f"the {name} has changed"


def may_change_its_judge(folder):
    """A judge may change while nothing has been judged, or after it has failed: then the rows of a
    judging are unfinished."""
    names = list(names_in(folder))
    failed = any(re.search(rf"/(pairs|eval|duels)\.jsonl{PART}$", name) for name in names)
    return failed or not any(re.search(r"/(pairs|eval|scores\d+)\.jsonl$", name)
                             for name in names)


def judge_again(folder, sources, settings):
    """Marks what changed judges have scored, to be made again. sources: the judges, as in
    made_from. What was made after a marked file stays if the file comes out the same."""
    config, finished = read_record(folder / CONFIG), record_of(folder)
    kinds = [RANKED] if JUDGES[0] in sources else []
    if JUDGES[1] in sources or not config["made_from"].get(JUDGES[1]):
        kinds.append(SCORED)
    again = {name: entry | {"again": True} for name, entry in finished.items()
             if any(kind.search(name) for kind in kinds)}
    for name in list(names_in(folder)):
        if re.fullmatch(rf"(start|iter_\d+)/(scores\d+\.jsonl|(pairs|eval|duels)\.jsonl{PART})",
                        name):
            (folder / name).unlink()
    if again:
        say(f"{folder}: {' and '.join(f'the {name}' for name in sources)} has changed after it had "
            "failed; samples are kept, what it has scored is scored again, and what then differs "
            "is made again (pairs, reference, policies, evaluations)")
        write_record(folder / FINISHED, finished | again)
    named = {name: settings[name] for name in ("ranker", "eval_ranker") if name in settings}
    write_record(folder / CONFIG, config | {
        "made_from": config["made_from"] | sources, "settings": config["settings"] | named})


def git_revision():
    """The commit of this code, or None: git is not needed to train."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                              cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None


# ----------------------------------------------------------------------------------------------
# 3. One command at a time
# ----------------------------------------------------------------------------------------------


@contextmanager
def locked(folder):
    """Keeps a second command out of the folder while this one runs. The system takes the lock from
    a dead process. ValueError if another command has the lock. An empty folder is removed at the
    end."""
    held = []
    only_first(lambda: held.append(take_lock(folder)))
    try:
        yield
    finally:
        for lock in held:
            with suppress(OSError):  # Windows does not remove an open file
                (folder / LOCK).unlink()
            lock.release()
            with suppress(OSError):  # only an empty folder can be removed
                folder.rmdir()


def take_lock(folder):
    try:
        os.fspath(folder).encode()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
        return lock
    except Timeout:
        raise ValueError(f"another command is at work in {folder}; wait for it, or give another "
                         "--run-dir") from None
    except UnicodeEncodeError:
        raise ValueError(f"--run-dir {os.fsencode(folder)!r}: the name is not UTF-8 text, and no "
                         "model could be saved there; give another one") from None
    except OSError as error:
        what = ("there is a file of this name" if isinstance(
            error, (FileExistsError, NotADirectoryError)) else error.strerror)
        raise ValueError(f"--run-dir {folder}: it cannot be made or written to, {what}; give "
                         "another one") from None


# ----------------------------------------------------------------------------------------------
# 4. Which files are the run's, and --fresh
# ----------------------------------------------------------------------------------------------


def files_in(folder):
    """All files below a folder; a link is one, whatever it points to."""
    for here, folders, names in os.walk(folder):
        names += [name for name in folders if os.path.islink(os.path.join(here, name))]
        yield from sorted(Path(here) / name for name in names)


def names_in(folder):
    return (file.relative_to(folder).as_posix() for file in files_in(folder))


def runs_in(folder):
    """The folders of runs: other seeds' and the baselines', and last this one."""
    homes = [path for path in sorted(folder.glob("seed_*"))
             if re.fullmatch(r"seed_\d+", path.name)]
    return [run for home in [*homes, folder] for run in (home / "baseline", home)
            if (run / CONFIG).exists() or copy_of(run / CONFIG).exists()]


def run_files(folder):
    """The names of files in iter_K/ folders that only a run would write."""
    return [name for here in sorted(folder.glob("iter_*")) for name in (
        file.relative_to(folder).as_posix() for file in files_in(here)) if OURS.fullmatch(name)]


def our_files(folder):
    """The names of all files below a run's folder that a run has written: those in its record and
    its arms' records, and those that no other program would use."""
    found = {name for name in names_in(folder) if OURS.fullmatch(name)
             or (folder / name).is_symlink() and OUR_FOLDERS.fullmatch(name)}
    for run in runs_in(folder):
        with suppress(ValueError):  # a damaged record
            for name, entry in record_of(run).items():
                paths = [run / name, *(run / name / key for key in entry)]
                found |= {path.relative_to(folder).as_posix() for path in paths
                          if path.is_file() and path.resolve().is_relative_to(folder.resolve())}
    return found


def delete_run(folder, files):
    """--fresh: deletes what a run has written in the folder, and nothing else. ValueError, before
    anything is touched, if the folder is no run's, or holds one of `files`, (flag, path) of what
    the coming run reads."""
    for flag, path in files:
        if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--fresh would delete {path}, which {flag} reads; give another "
                             "--run-dir")
    check_is_run(folder)
    found = our_files(folder)
    left = [name for name in names_in(folder) if name not in found and name != LOCK]
    # The record goes first, because half a deleted run must not be resumed. All files move to a
    # new folder, which is then deleted: a kill leaves no file under its own name.
    trash = Path(tempfile.mkdtemp(prefix=".deleted-", dir=folder))
    for name in sorted(found, key=lambda name: (name.count("/"), name)):
        (trash / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, trash / name)
    shutil.rmtree(trash)
    for here, *_ in sorted(os.walk(folder), reverse=True):
        if OUR_FOLDERS.fullmatch(Path(here).relative_to(folder).as_posix()):
            with suppress(OSError):  # only an empty folder can be removed
                os.rmdir(here)
    if left:
        say(f"--fresh has left {len(left)} files in {folder} that are not the run's, such as "
            f"{left[0]}")


def check_is_run(folder):
    """ValueError for a folder that holds files, and no run."""
    config = None
    with suppress(ValueError):  # damaged
        config = read_record(folder / CONFIG)
    is_run = run_files(folder) or isinstance((config or {}).get("settings"), dict)
    others = [file.name for file in folder.iterdir() if file.name != LOCK]  # report.md, say
    if others and not is_run:
        raise ValueError(f"--fresh: {folder} does not look like a run (it holds {others[0]}); "
                         "delete it yourself")
