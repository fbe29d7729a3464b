"""The files of a run: they appear whole, are known by their checksums, and a killed run goes on.

    runs/NAME/config.json       settings, versions, and what the run was made from
              finished.json     every finished file with its rows and checksum, in order
              .config.json, .finished.json  copies, for the day on which a byte of those is bad
              metrics.jsonl     one line an update, one an evaluation
              iter_K/...        what the phases of train_loop.py leave

`Run.once(path, phase, ...)` is how a phase runs: what is finished and undamaged is read, anything
else is made. A phase that yields rows writes them as they come, each with its own digest, so that
one which is killed goes on after its last row; the file itself appears when it is whole.

Under several processes each one writes the rows of items[PROCESS::PROCESSES] to a part of its own,
and process 0 weaves the parts together, a row at a time. Parts that another number of processes has
left are dealt out again.

Test: pytest tests/test_run_folder.py.
"""

import functools
import glob
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

from harness.inputs.files import check_apart, is_special
from harness.models.distributed import (
    PROCESS, PROCESSES, checksum, only_first, raise_everywhere, say, seal, told, unseal)
from harness.runs.settings import NO_DIFFERENCE

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

CONFIG, FINISHED, METRICS, LOCK = "config.json", "finished.json", "metrics.jsonl", ".lock"
# The names that a run writes, besides those in its record. Anything else is somebody's.
MODEL_FILES = (r"(?:config|generation_config|tokenizer|tokenizer_config|special_tokens_map|vocab|"
               r"added_tokens|model\.safetensors\.index)\.json|merges\.txt|tokenizer\.model|"
               r"chat_template\.jinja|model(?:-\d+-of-\d+)?\.safetensors")
PART = r"\.part\d+of\d+"
OURS = re.compile(rf"""(?:seed_\d+/)?(?:baseline/)?(?:
    \.?(?:config|finished)\.json(?:\.tmp)? | metrics\.jsonl(?:\.tmp|\.damaged)?
    | report\.(?:md|html)(?:\.tmp)? | human_answers\.jsonl | \.deleted-\w{{8}}/.*
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
# The files of an evaluation.
EVALUATED = re.compile(r"/(answers|answers_at_temperature_1|eval|duels|true)\.jsonl$")
# What a judge's scores are in: of the pairs to train on, of an evaluation.
JUDGES = "judge", "judge of the evaluation"
RANKED, SCORED = re.compile(r"/pairs\.jsonl$"), re.compile(r"/(eval|duels)\.jsonl$")

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
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode())
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON "
                                     f"({getattr(error, 'msg', error)})") from None


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
        return (row for _, row in read_jsonl(self.path))

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
                only_first(self._make_room, path)
                phase(path, *args)
            only_first(self._record, path, made_with)
        return Rows(path) if path.suffix == ".jsonl" else path

    def log(self, rows):
        """Adds rows to metrics.jsonl, each in its place: a killed run's file is the undisturbed
        run's. Rows of an earlier, unfinished try of the same phase go."""
        def merge():
            path, new, record = self.folder / METRICS, by_group(rows), self._finished()
            old, lost = metrics_of(self.folder, record)
            wrong = sorted((lost & set(old)) - set(new))
            if wrong:
                shutil.copy(path, f"{path}.damaged")
                say(f"warning: {path} is not what this run wrote there ({'; '.join(wrong)}); it "
                    f"was copied to {path}.damaged, and what can be made again is made again")
            kept = {name: group for name, group in old.items() if name not in lost} | new
            kept = dict(sorted(kept.items(), key=lambda item: in_order(item[1][0])))
            sums = {name: value for name, value in record.get(METRICS, {}).items()
                    if name in lost and name.endswith("train")}  # not to be made again
            sums |= {name: digest_of(group) for name, group in kept.items()}
            # The record first: a kill between the two loses a group that is made again.
            write_record(self.folder / FINISHED, record | {METRICS: dict(sorted(sums.items()))})
            write_jsonl(path, [row for group in kept.values() for row in group])
            for row in rows:
                if row["phase"] != "train" and [row] != old.get(group_of(row)):
                    self.show(row)  # updates were shown as they came
        only_first(merge)

    def show(self, row):
        """Hands a row of metrics.jsonl to the tracker, if there is one."""
        if self.tracker and PROCESS == 0:
            before = row["iteration"] + ("update" not in row)  # of an evaluation: its updates, too
            step = row.get("update", 0) + sum(
                r["phase"] == "train" and r["iteration"] < before
                for rows in metrics_of(self.folder, self._finished())[0].values() for r in rows)
            self.tracker({f"{row['phase']}/{name}": value for name, value in row.items()
                          if isinstance(value, (int, float)) and name != "update"}, step)

    def _name(self, path):
        return Path(path).relative_to(self.folder).as_posix()

    def _finished(self):
        return record_of(self.folder)

    def _whole(self, path, made_with):
        """Whether `path` is finished, with these settings, and still what it was then."""
        name = self._name(path)
        if name in self.checked:
            return True
        known = self._finished().get(name)
        if (known is None or "again" in known
                or made_with not in (None, known.get("made with", made_with))):
            return False
        if not is_what_was(path, known):
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
        known = {key: x for key, x in finished.get(name, entry).items() if key != "again"}
        if known != entry:
            def is_void(other):
                kinds = [kind for kind in (SCORED, EVALUATED) if kind.search(name)]
                return other != METRICS and (not kinds or bool(kinds[0].search(other)))
            void = set(filter(is_void, list(finished)[list(finished).index(name):]))
            finished |= {x: finished[x] | {"again": True} for x in void}
            self.checked -= void
            for part in [*parts_in(self.folder), *self.folder.glob("iter_*/state")]:
                if is_void(self._name(part).partition(".part")[0]):
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
        write_record(self.folder / FINISHED, finished | {name: entry})
        self.checked.add(name)

    def _make_room(self, path):
        """Moves what somebody has put into a folder of ours out of the way of making it again."""
        known = self._finished().get(self._name(path), {})
        others = [file for file in files_in(path) if file.relative_to(path).as_posix() not in known
                  and not OURS.fullmatch(self._name(file))]
        for file in others:
            aside = Path(f"{path}.others") / file.relative_to(path)
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, aside)
            say(f"{file} is not this run's; it is now {aside}")

    def _write_rows(self, path, phase, items, *args):
        part = path.with_name(f"{path.name}.part{PROCESS}of{PROCESSES}")
        failure = None
        with open(part, "a+b") as file:
            done = keep_whole_lines(file, PROCESS, PROCESSES)
            left = range(PROCESS + done * PROCESSES, len(items), PROCESSES)
            try:
                count = 0
                for count, row in enumerate(phase(Share(items, left), *args), 1):
                    place = PROCESS + (done + count - 1) * PROCESSES
                    file.write(line_of(seal(row, place)).encode())
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
                    out.write(line_of(unseal(parts[i % PROCESSES].readline(), i)).encode())
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
            for file in parts:
                file.close()
            for old in parts_in(path.parent, path.name):
                old.unlink()
        only_first(weave)


def deal_again(path):
    """Rows that a phase had finished when it was killed under another number of processes become
    the parts of this number, each as far as there is no gap."""
    found = {}
    for part in parts_in(path.parent, path.name):
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
            if not is_whole(line, i):  # a gap: who has this row goes on from here
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


def parts_in(folder, name=None):
    """The unfinished rows of the file `name` in a folder; of all files one folder below it."""
    found = folder.glob("*/*.part*") if name is None else folder.glob(f"{glob.escape(name)}.part*")
    return [path for path in found if re.fullmatch(rf".+\.jsonl{PART}", path.name)]


def is_whole(line, place):
    """Whether a line of a part is what was written there as the row of this place."""
    try:
        unseal(line, place)
    except ValueError:
        return False
    return line.endswith(b"\n")


def keep_whole_lines(file, first, step):
    """Cuts a part off before the first line that a kill has left half written, or that is damaged
    -> how many lines it has. They are the rows first, first + step, ..."""
    file.seek(0)
    count, end = 0, 0
    for line in file:
        if not is_whole(line, first + count * step):
            break
        count, end = count + 1, end + len(line)
    file.seek(end)
    file.truncate()
    return count


def files_in(folder):
    """All files below a folder; a link is one, whatever it points to."""
    for here, folders, names in os.walk(folder):
        names += [name for name in folders if os.path.islink(os.path.join(here, name))]
        yield from sorted(Path(here) / name for name in names)


def describe(path):
    """Rows and checksum of a file, or the checksums of a folder's files."""
    if Path(path).is_dir():
        return {file.relative_to(path).as_posix(): checksum(file)
                for file in sorted(Path(path).rglob("*")) if file.is_file()}
    with open(path, "rb") as file:
        return {"rows": sum(1 for _ in file), "sha256": checksum(path)}


def is_what_was(path, entry):
    """Whether a file, or each recorded file of a folder, is what its entry of the record says. What
    else is in the folder does not matter."""
    entry = {key: value for key, value in entry.items() if key not in ("made with", "again")}
    if set(entry) == {"rows", "sha256"}:
        return path.is_file() and describe(path) == entry
    return all((path / name).is_file() and checksum(path / name) == value
               for name, value in entry.items()) and path.is_dir()


def finished_rows(path):
    """The Rows of a finished file of a run, for a reader from outside. ValueError where it is not
    what the run wrote there."""
    folder = path.parents[1]
    entry = record_of(folder).get(path.relative_to(folder).as_posix())
    if entry and not is_what_was(path, entry):
        raise ValueError(f"{path} is not what the run wrote there; the command that made the run, "
                         "given again, makes it again")
    return Rows(path)


# ----------------------------------------------------------------------------------------------
# 3. The record, and the metrics
# ----------------------------------------------------------------------------------------------


def write_record(path, record):
    """Writes a JSON object of ours twice, with its digest: one bad byte must cost nothing."""
    text = json.dumps(seal(record), indent=1)
    write_text(path, text)
    write_text(copy_of(path), text)


def read_record(path):
    """A JSON object of ours, or its copy; ValueError that names the file if both are damaged."""
    for file in (path, copy_of(path)):
        with suppress(ValueError, OSError):
            return unseal(file.read_bytes())
    try:  # of an earlier version, without a digest
        record = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        record = None
    if isinstance(record, dict):
        return {key: value for key, value in record.items() if key != "check"}
    raise ValueError(f"{path} is damaged or gone, and so is its copy {copy_of(path).name}; put one "
                     "of them back, or give another --run-dir; --fresh starts the run over")


def copy_of(path):
    return path.with_name(f".{path.name}")


def is_there(path):
    """Whether there is such a record, or its copy."""
    return path.exists() or copy_of(path).exists()


def record_of(folder):
    """finished.json of a run: name -> entry; {} where there is none."""
    path = Path(folder) / FINISHED
    record = read_record(path) if is_there(path) else {}
    if not all(isinstance(entry, dict) for entry in record.values()):
        raise ValueError(f"{path} is damaged: an entry is no object; put it back, or give another "
                         "--run-dir; --fresh starts the run over")
    return record


def settings_of(folder):
    """The settings in config.json of a run, and all of that. ValueError where it is no run's."""
    config = read_record(Path(folder) / CONFIG)
    if not isinstance(config.get("settings"), dict):
        raise ValueError(f"{Path(folder) / CONFIG} is not a run's: it has no settings")
    return config["settings"]


def group_of(row):
    return f"iteration {row['iteration']}, {row['phase']}"


def in_order(row):
    return (int(row["iteration"]), ("rank", "train", "eval").index(row["phase"]),
            int(row.get("update", 0)))


def by_group(rows):
    """The rows of metrics.jsonl: group -> its rows. A group is what one phase of an iteration has
    logged, and is known by its digest."""
    groups = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return groups


def digest_of(group):
    return seal({"rows": group})["check"]


def metrics_of(folder, record):
    """(group -> its rows in metrics.jsonl, the groups that are not what the record says)."""
    path, groups, known = Path(folder) / METRICS, {}, record.get(METRICS)
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
            in_order(row)  # fails for what is no row
            groups.setdefault(group_of(row), []).append(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if known is None and line.strip():
                raise ValueError(f"{path} is damaged: {line[:60]!r} is no row of it") from None
    if known is None:  # of an earlier version
        return groups, set()
    return groups, {name for name in {*known, *groups}
                    if name not in groups or digest_of(groups[name]) != known.get(name)}


def read_metrics(folder, phase):
    """The rows of metrics.jsonl of one phase, "rank", "train" or "eval"; [] without a file.
    ValueError, with what to do, where rows of it are not what the run wrote there."""
    folder, found = Path(folder), []
    groups, lost = metrics_of(folder, record_of(folder))
    for name in sorted(lost):
        k = name.removeprefix("iteration ").partition(",")[0]
        if name.endswith("train") and phase == "train" and (folder / f"iter_{k}/policy").exists():
            raise ValueError(f"{folder / METRICS} has lost the updates of iteration {k}; put it "
                             f"back, or remove {folder}/iter_{k}/policy to train them again")
        if name.endswith(phase) and phase != "train":
            raise ValueError(f"{folder / METRICS}: {name} is not what the run wrote there; the "
                             "command that made the run, given again, makes it again")
    for name, rows in groups.items():
        found += [row for row in rows if row["phase"] == phase and name not in lost]
    return sorted(found, key=in_order)


# ----------------------------------------------------------------------------------------------
# 4. Whose folder is it?
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
    path = folder / CONFIG
    settings = {name: value if isinstance(value, (int, float, str, type(None))) else str(value)
                for name, value in settings.items()}
    if is_there(path):
        go_on(folder, settings, made_from)
        return
    found = run_files(folder)
    if found:
        raise ValueError(f"{folder} holds {found[0]}, but no {CONFIG} of a run; give another "
                         "--run-dir, or --fresh to delete it")
    import torch
    import transformers
    write_record(path, {
        "settings": settings, "made_from": made_from, "command": sys.argv,
        "git_revision": git_revision(), "torch": torch.__version__,
        "transformers": transformers.__version__, "processes": PROCESSES})


def go_on(folder, settings, made_from):
    """Recognises the run in the folder. ValueError with what has changed, but for a judge that has
    failed and was mended."""
    known = read_record(folder / CONFIG)
    if not all(isinstance(known.get(part), dict) for part in ("made_from", "settings")):
        raise ValueError(f"{folder} holds a {CONFIG} that is not a run's; give another --run-dir")
    for name, record in ((CONFIG, known), (FINISHED, record_of(folder))):
        heal(folder / name, record)
    changed = [f"{name} was {known['settings'].get(name)}, is {value}"
               for name, value in settings.items()
               if name not in NO_DIFFERENCE and known["settings"].get(name) != value]
    sources = {name: value for name, value in made_from.items()
               if known["made_from"].get(name) != value}
    only_judges = not changed and set(sources) <= set(JUDGES)
    changed += [_difference(name, known["made_from"].get(name), value)
                for name, value in sources.items()]
    if changed and not (only_judges and may_change_its_judge(folder)):
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(changed)}); "
                         "give another --run-dir, or --fresh to delete it")
    for run in runs_in(folder) if changed else ():
        judge_again(run, sources, settings)


def heal(path, record):
    """Writes a record anew where it or its copy is damaged or gone, and says so."""
    bad = []
    for file in (path, copy_of(path)) if is_there(path) else ():
        try:
            unseal(file.read_bytes())
        except (ValueError, OSError):
            bad.append(file)
    if len(bad) == 1:
        say(f"{bad[0]} is damaged or gone; it is written anew from its copy")
    if bad:
        write_record(path, record)


def may_change_its_judge(folder):
    """Where nothing has been judged; and where a judge has failed, so that rows of a judging are
    not finished: its mended version goes on."""
    names = list(names_in(folder))
    failed = any(re.search(rf"/(pairs|eval|duels)\.jsonl{PART}$", name) for name in names)
    return failed or not any(re.search(r"/(pairs|eval|scores\d+)\.jsonl$", name)
                             for name in names)


def judge_again(folder, sources, settings):
    """What judges that have changed (name -> the value of made_from) have scored is to be made
    again. What was made after it stays if it comes out the same, or is made again, too."""
    config, finished = read_record(folder / CONFIG), record_of(folder)
    kinds = [RANKED] if JUDGES[0] in sources else []
    kinds += [SCORED] if JUDGES[1] in sources or not config["made_from"].get(JUDGES[1]) else []
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


def runs_in(folder):
    """The folders of runs: other seeds' and the baselines', and last this one."""
    homes = [*(path for path in sorted(folder.glob("seed_*"))
               if re.fullmatch(r"seed_\d+", path.name)), folder]
    return [run for home in homes for run in (home / "baseline", home) if is_there(run / CONFIG)]


def run_files(folder):
    """The names of files in iter_K/ folders that only a run would write."""
    return [name for here in sorted(folder.glob("iter_*")) for name in (
        file.relative_to(folder).as_posix() for file in files_in(here)) if OURS.fullmatch(name)]


def names_in(folder):
    return (file.relative_to(folder).as_posix() for file in files_in(folder))


def made_from(folder):
    """What the run in this folder was made from; {} where there is none yet."""
    path = Path(folder) / CONFIG
    known = read_record(path).get("made_from") if is_there(path) else None
    return known if isinstance(known, dict) else {}


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
        try:
            os.fspath(folder).encode()
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK, "a")
        except UnicodeEncodeError:
            raise ValueError(f"--run-dir {os.fsencode(folder)!r}: the name is not UTF-8 text, and "
                             "no model could be saved there; give another one") from None
        except OSError as error:
            what = ("there is a file of this name" if isinstance(
                error, (FileExistsError, NotADirectoryError)) else error.strerror)
            raise ValueError(f"--run-dir {folder}: it cannot be made or written to, {what}; give "
                             "another one") from None
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
    ours = bool(run_files(folder))
    with suppress(ValueError):
        ours = ours or bool(settings_of(folder))
    others = [f.name for f in folder.iterdir() if f.name != LOCK]  # report.md may be anybody's
    if not ours and others:
        raise ValueError(f"--fresh: {folder} does not look like a run (it holds {others[0]}); "
                         "delete it yourself")
    found = our_files(folder)
    left = [name for name in names_in(folder) if name not in found and name != LOCK]
    # The record goes first, for half a deleted run must not be resumed; in one step, under a name
    # that nobody has.
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
