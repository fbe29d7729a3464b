"""The files of a run: they appear whole, are known by their checksums, and a killed run goes on.

    runs/NAME/config.json       settings, versions, and what the run was made from
              finished.json     every finished file with its rows and checksum, in order
              metrics.jsonl     one line an update, one an evaluation
              iter_K/...        what the phases of train_loop.py leave

`Run.once(path, phase, ...)` is how a phase runs: what is finished and undamaged is read, anything
else is made. A phase that yields rows writes them as they come, so that one which is killed goes on
behind its last row; the file itself appears when it is whole.

Under several processes each one writes the rows of items[PROCESS::PROCESSES] to a part of its own,
and process 0 weaves the parts together, a row at a time. Parts that another number of processes has
left are dealt out again.

Test: pytest tests/test_rundir.py.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from harness.files import check_apart, is_special
from harness.scale import PROCESS, PROCESSES, checksum, only_first, raise_everywhere, say, told

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

CONFIG, FINISHED, METRICS, LOCK = "config.json", "finished.json", "metrics.jsonl", ".lock"
# What a run leaves, and --fresh may take away. Anything else in the folder is somebody's.
LEAVES = (CONFIG, FINISHED, METRICS, LOCK, "report.md", "report.html", "figures", "world", "start",
          "start_policy", "baseline", "tensorboard", "wandb", "human_answers.jsonl", "iter_*",
          "seed_*", "*.tmp", "*.part*", "*.unfinished", ".deleted-*")
EVALUATED = re.compile(r"/(answers.*|eval|duels|true)\.jsonl$")  # the files of an evaluation
JUDGED = ("pairs.jsonl*", "scores*.jsonl", "eval.jsonl*")
# Settings that change no number, or that made_from tells better.
NO_DIFFERENCE = ("fresh", "dry_run", "processes", "track", "run_dir", "baseline", "seeds", "slots",
                 "save_every", "gradient_checkpointing", "offload", "data", "tokens_per_forward",
                 "compile", "model", "ranker", "eval_ranker", "chat_template", "name")

# ----------------------------------------------------------------------------------------------
# 1. Text and rows
# ----------------------------------------------------------------------------------------------


def printable(text):
    """Text of strangers (data, models, judges) for a terminal: without the control characters that
    could move its cursor, hide lines or answer for the user, and without half surrogate pairs.
    Newline and tab stay; so do accents, emoji and every script."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "", text)


def write_text(path, text):
    """Writes a file so that it appears whole or not at all (temporary name, fsync, rename). A link
    is followed. A pipe or a device is written to as it is: a rename would replace it."""
    if is_special(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    path = os.path.realpath(path)
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def line_of(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path, rows):
    write_text(path, "".join(map(line_of, rows)))


def read_jsonl(path):
    """Yields (line number, object); ValueError naming the line where one is not JSON."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: not valid JSON ({error.msg})") from None


class Rows:
    """A JSONL file as a list of objects that stays on disk: only where lines begin is in memory.

    rows[3] parses line 4, rows.of(prompt_id) the line of that prompt: files are joined by id.
    """

    def __init__(self, path):
        self.path, self.starts, position = Path(path), [], 0
        with open(path, "rb") as file:
            for line in file:
                self.starts.append(position)
                position += len(line)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return json.loads(file.readline())

    def __iter__(self):
        with open(self.path, "rb") as file:
            for line in file:
                yield json.loads(line)

    @functools.cached_property
    def places(self):
        """prompt_id -> line index. ValueError for one that stands twice."""
        places = {}
        for i, row in enumerate(self):
            if places.setdefault(row["prompt_id"], i) != i:
                raise ValueError(f"{self.path}: prompt_id {row['prompt_id']} stands there twice")
        return places

    def of(self, prompt_id):
        """The row of a prompt. ValueError where there is none."""
        if prompt_id not in self.places:
            raise ValueError(f"{self.path} has no row of prompt_id {prompt_id}: it was made from "
                             "other data; give another --run-dir, or --fresh to start over")
        return self[self.places[prompt_id]]


# ----------------------------------------------------------------------------------------------
# 2. A run
# ----------------------------------------------------------------------------------------------


class Run:
    """The folder of one arm: its record of finished files, and the metrics. tracker: None, or
    track.tracker's function."""

    def __init__(self, folder, tracker=None):
        self.folder, self.checked, self.tracker = Path(folder), set(), tracker

    def once(self, path, phase, *args, made_with=None):
        """What `phase` leaves at `path`: read if it is finished, else made; all processes agree.

        A .jsonl path: phase(items, *args) yields a row for each of items, in order. It gets the
        items of this process that a killed try did not finish; returns Rows.
        Any other path: phase(path, *args) writes it; returns the path. made_with: a JSON value;
        what was made with another one is made again (None: whatever it was made with).
        """
        if not told(PROCESS > 0 or self._whole(path, made_with)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".jsonl":
                if made_with is None:  # else another number's rows may be other numbers
                    only_first(deal_again, path)
                self._write_rows(path, phase, *args)
            else:
                phase(path, *args)
            only_first(self._record, path, made_with)
        return Rows(path) if path.suffix == ".jsonl" else path

    def log(self, rows):
        """Adds rows to metrics.jsonl, each in its place: a killed run's file is the undisturbed
        run's. Rows of an earlier, unfinished try of the same phase go."""
        def merge():
            path, keys = self.folder / METRICS, {(r["iteration"], r["phase"]) for r in rows}
            known = [r for _, r in read_jsonl(path)] if path.exists() else []
            kept = [r for r in known if (r["iteration"], r["phase"]) not in keys]
            order = {"rank": 0, "train": 1, "eval": 2}
            write_jsonl(path, sorted(kept + rows, key=lambda r: (
                r["iteration"], order[r["phase"]], r.get("update", 0))))
            for row in rows:
                if row["phase"] != "train" and row not in known:  # updates were shown as they came
                    self.show(row)
        only_first(merge)

    def show(self, row):
        """Hands a row of metrics.jsonl to the tracker, if there is one."""
        if self.tracker and PROCESS == 0:
            path = self.folder / METRICS
            before = row["iteration"] + ("update" not in row)  # of an evaluation: its updates, too
            step = row.get("update", 0) + sum(
                r["phase"] == "train" and r["iteration"] < before
                for _, r in (read_jsonl(path) if path.exists() else []))
            self.tracker({f"{row['phase']}/{name}": value for name, value in row.items()
                          if isinstance(value, (int, float)) and name != "update"}, step)

    def _name(self, path):
        return Path(path).relative_to(self.folder).as_posix()

    def _finished(self):
        path = self.folder / FINISHED
        return read_record(path) if path.exists() else {}

    def _whole(self, path, made_with):
        """Whether `path` is finished, with these settings, and still what it was then."""
        name = self._name(path)
        if name in self.checked:
            return True
        known = self._finished().get(name)
        if known is None or made_with not in (None, known.get("made with", made_with)):
            return False
        known = {key: value for key, value in known.items() if key != "made with"}
        if not path.exists() or known != describe(path):
            what = "is not what this run wrote there" if path.exists() else "is gone"
            say(f"warning: {path} {what}; it is made again")
            return False
        self.checked.add(name)
        return True

    def _record(self, path, made_with):
        """Enters a finished file. What was made after it from another version of it is void: other
        files, rows of an unfinished one, a checkpoint inside training. (Training reads nothing of
        an evaluation: of that, only what evaluations have made.)"""
        name, entry, finished = self._name(path), describe(path), self._finished()
        entry |= {} if made_with is None else {"made with": made_with}
        if name in finished and finished[name] != entry:
            def is_void(other):
                return not EVALUATED.search(name) or EVALUATED.search(other)
            void = set(filter(is_void, list(finished)[list(finished).index(name):]))
            finished = {x: known for x, known in finished.items() if x not in void}
            self.checked -= void
            for part in [*self.folder.glob("*/*.part*"), *self.folder.glob("*/state")]:
                if is_void(self._name(part).partition(".part")[0]):
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
        write_text(self.folder / FINISHED, json.dumps(finished | {name: entry}, indent=1))
        self.checked.add(name)

    def _write_rows(self, path, phase, items, *args):
        part = path.with_name(f"{path.name}.part{PROCESS}of{PROCESSES}")
        failure = None
        with open(part, "a+b") as file:
            done = keep_whole_lines(file)
            left = range(PROCESS + done * PROCESSES, len(items), PROCESSES)
            try:
                count = 0
                for count, row in enumerate(phase(Share(items, left), *args), 1):
                    file.write(line_of(row).encode())
                    file.flush()
                os.fsync(file.fileno())
                if count != len(left):  # rows of several processes are joined by their order
                    file.truncate(0)
                    raise ValueError(f"{path.name}: {phase.__name__} made {count} rows of "
                                     f"{len(left)} items; it must yield one for each, in order")
            except (ValueError, OSError) as error:
                failure = error
        raise_everywhere(failure)

        def weave():
            parts = [open(path.with_name(f"{path.name}.part{p}of{PROCESSES}"), "rb")
                     for p in range(PROCESSES)]
            temporary = Path(f"{path}.tmp")
            with open(temporary, "wb") as out:
                for i in range(len(items)):
                    out.write(parts[i % PROCESSES].readline())
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
            for file in parts:
                file.close()
            for old in path.parent.glob(f"{path.name}.part*"):
                old.unlink()
        only_first(weave)


def deal_again(path):
    """Rows that a phase had finished when it was killed under another number of processes become
    the parts of this number, each as far as there is no gap."""
    found = {}
    for part in path.parent.glob(f"{path.name}.part*[0-9]"):
        place, count = map(int, part.name.rpartition(".part")[2].split("of"))
        found.setdefault(count, {})[place] = part
    if PROCESSES in found or not found:
        return
    count, parts = found.popitem()
    names = [path.with_name(f"{path.name}.part{p}of{PROCESSES}") for p in range(PROCESSES)]
    with ExitStack() as stack:
        old = {p: stack.enter_context(open(part, "rb")) for p, part in parts.items()}
        new = {p: stack.enter_context(open(f"{name}.tmp", "wb")) for p, name in enumerate(names)}
        for i in itertools.count():
            line = old[i % count].readline() if i % count in old else b""
            if not line.endswith(b"\n"):  # a gap: who has this row goes on from here
                new.pop(i % PROCESSES, None)
            elif i % PROCESSES in new:
                new[i % PROCESSES].write(line)
            if not new:
                break
    for name in names:
        os.replace(f"{name}.tmp", name)
    for part in parts.values():
        part.unlink()


class Share:
    """Some of the items, each read when its turn comes."""

    def __init__(self, items, places):
        self.items, self.places = items, places

    def __len__(self):
        return len(self.places)

    def __iter__(self):
        return (self.items[place] for place in self.places)


def check_writable(path, inputs=(), flag="--output"):
    """ValueError, before hours of work, where `path` could not be written at their end, or would
    replace what the command reads. inputs: (flag, path)."""
    temporary = f"{os.path.realpath(path)}.tmp"  # the name under which it will be written
    if os.path.isfile(path):  # it would be replaced while it is written to
        inputs = [*inputs, ("standard output", "/dev/stdout")]
    for name in (path, temporary):
        check_apart(flag, name, inputs)
    if os.path.exists(temporary):
        raise ValueError(f"{flag} {path}: {temporary} is in the way, under whose name it is first "
                         "written; move that, or name another")
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if not is_special(path):
            with open(temporary, "x"):
                pass
            os.unlink(temporary)
        elif not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror}); name a file in a "
                         "folder that exists") from error


def keep_whole_lines(file):
    """Cuts off the half line that a kill may leave at the end -> how many whole ones there are."""
    file.seek(0)
    count, end = 0, 0
    for line in file:
        try:
            json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        count, end = count + 1, end + len(line)
    file.seek(end)
    file.truncate()
    return count


def describe(path):
    """Rows and checksum of a file, or the checksums of a folder's files."""
    if Path(path).is_dir():
        return {file.relative_to(path).as_posix(): checksum(file)
                for file in sorted(Path(path).rglob("*")) if file.is_file()}
    with open(path, "rb") as file:
        return {"rows": sum(1 for _ in file), "sha256": checksum(path)}


def read_record(path):
    """A JSON object of ours; ValueError that names the file if it is damaged."""
    try:
        record = json.loads(Path(path).read_text("utf-8"))
        assert isinstance(record, dict)
        return record
    except (ValueError, AssertionError):
        raise ValueError(f"{path} is damaged; --fresh starts the run over") from None


# ----------------------------------------------------------------------------------------------
# 3. Whose folder is it?
# ----------------------------------------------------------------------------------------------


def fingerprint(path):
    """What tells two files, or two folders of files, apart without reading gigabytes: names, sizes
    and a checksum of 16 blocks of each file. A single file's name does not count."""
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
    """Makes the folder this run's, or recognises it as a run to go on with.

    settings: name -> value; made_from: name -> JSON value, where what it was made from is told by
    content, not by a path: a folder that has moved is still the same. ValueError, with what has
    changed, if it holds another run or somebody's files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, known = folder / CONFIG, {}
    settings = {name: value if isinstance(value, (int, float, str, type(None))) else str(value)
                for name, value in settings.items()}
    if path.exists():
        known = read_record(path)
        if not {"made_from", "settings"} <= set(known):
            raise ValueError(f"{folder} holds a {CONFIG} that is not a run's; give another "
                             "--run-dir")
        changed = [f"{name} was {known['settings'].get(name)}, is {value}"
                   for name, value in settings.items()
                   if name not in NO_DIFFERENCE and known["settings"].get(name) != value]
        changed += [_difference(name, known["made_from"].get(name), value)
                    for name, value in made_from.items()
                    if known["made_from"].get(name) != value]
        judged = any(file.stat().st_size for name in JUDGED for file in folder.rglob(name))
        if changed and (judged or not all(name.startswith("the judge") for name in changed)):
            raise ValueError(f"{folder} holds a run with other settings ({'; '.join(changed)}); "
                             "give another --run-dir, or --fresh to delete it")
        if changed:  # a judge that failed before its first score has been mended
            write_text(path, json.dumps(known | {"made_from": made_from}, indent=1))
        return
    found = sorted(f.name for f in folder.glob("iter_*"))
    if found:
        raise ValueError(f"{folder} holds {', '.join(found)}, but no {CONFIG} of a run; give "
                         "another --run-dir, or --fresh to delete it")
    import torch
    import transformers
    write_text(path, json.dumps({
        "settings": settings, "made_from": made_from, "command": sys.argv,
        "git_revision": git_revision(), "torch": torch.__version__,
        "transformers": transformers.__version__, "processes": PROCESSES}, indent=1))


def made_from(folder):
    """What the run in this folder was made from; {} where there is none yet."""
    path = Path(folder) / CONFIG
    return read_record(path).get("made_from", {}) if path.exists() else {}


def _difference(name, was, now):
    """One clause on what changed between two values of made_from, short enough to read."""
    if isinstance(was, dict) and isinstance(now, dict):
        changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        key = changed[0]
        return (f"the {name} has changed ({key + ': ' if key else ''}was {was.get(key, 'absent')}, "
                f"is {now.get(key, 'absent')})")
    return f"the {name} has changed"


def git_revision():
    """The commit of this code, or None: git is not needed to train."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                              cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None


@contextmanager
def locked(folder):
    """Keeps a second command out of the folder while this one is at work; the system takes the lock
    from a dead process. ValueError if it is taken. A folder that stays empty goes again."""
    def take():
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                raise BlockingIOError  # its last holder has just removed the file
        except (BlockingIOError, FileNotFoundError):
            raise ValueError(f"another command is at work in {folder}; wait for it, or give "
                             "another --run-dir") from None
        except OSError:  # a file system without locks
            pass
        held.append(file)
    held = []
    only_first(take)
    try:
        yield
    finally:
        for file in held:
            (folder / LOCK).unlink(missing_ok=True)
            file.close()
            with suppress(OSError):  # only an empty folder can be removed
                folder.rmdir()


def delete_run(folder, files):
    """--fresh: takes away what a run has left in the folder, and nothing else. ValueError, before
    anything is touched, if it is no run's folder, or holds one of `files`, (flag, path) of what the
    coming run reads."""
    for flag, path in files:
        if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--fresh would delete {path}, which {flag} reads; give another "
                             "--run-dir")
    ours = (folder / CONFIG).exists() and "made_from" in read_record(folder / CONFIG)
    strangers = [f.name for f in folder.iterdir() if f.name != LOCK]  # report.md may be anybody's
    if not ours and strangers:
        raise ValueError(f"--fresh: {folder} does not look like a run (it holds "
                         f"{strangers[0]}); delete it yourself")
    # The record goes first, for half a deleted run must not be resumed; in one step, under a name
    # that nobody has.
    trash = Path(tempfile.mkdtemp(prefix=".deleted-", dir=folder))
    for leaf in LEAVES:
        for path in sorted(set(folder.glob(leaf)) - {trash, folder / LOCK}):
            os.replace(path, trash / path.name)
    shutil.rmtree(trash)
