"""The files of a run. Each appears whole and is known by its checksum; a killed run resumes.

    runs/NAME/config.json       settings, versions, and what the run was made from
              finished.json     every finished file with its rows and checksum, in order
              .config.json, .finished.json  copies, in case a byte of those is damaged
              metrics.jsonl     a line for each update and each evaluation
              iter_K/...        what the phases of train_loop.py make

`Run.rows` and `Run.folder` run a phase: they load what is finished and intact, and make the rest.
A phase that yields rows keeps them as they come, so that a killed phase makes only the missing rows
when the same command runs again. Under several processes each one makes the rows of items[PROCESS::
PROCESSES] and appends them to a part of its own; process 0 joins the parts by prompt_id.

run_record.py writes config.json and finished.json. Test: pytest tests/test_run_folder.py.
"""

import json
import os
import re
import shutil
from pathlib import Path

from harness.models.distributed import (
    PROCESS, PROCESSES, checksum, only_first, raise_everywhere, say, seal, unseal)
from harness.runs.output_files import (
    Rows, keep_rows, kept_rows, line_of, write_jsonl, write_lines)
from harness.runs.run_record import (
    FINISHED, METRICS, OURS, PART, SCORED, files_in, record_of, write_record)

# All files of an evaluation. Training reads none of them.
EVALUATED = re.compile(r"/(answers|answers_at_temperature_1|eval|duels|true)\.jsonl")
ANY = re.compile("")
FILE = "file"  # the entry of a kept row that names its file; the finished file is without it


class Run:
    """The folder of one arm at `path`. tracker: None, or trackers.tracker's function."""

    def __init__(self, path, tracker=None):
        self.path, self.tracker = Path(path), tracker
        self.checked = set()  # names of files that are finished and intact
        self.logged = None  # (group, number of its rows) of the training that is being logged

    # ------------------------------------------------------------------------------------------
    # 1. Phases
    # ------------------------------------------------------------------------------------------

    def rows(self, path, phase, items, *args, made_with=None):
        """The Rows of a .jsonl file. If the file is finished and intact, load it. Otherwise
        phase(items, *args) yields one row for each item, in any order, with the item's prompt_id.

        The phase gets the items of this process whose rows no earlier try has kept. made_with: a
        JSON value; a file that was made with another value is made again (None: any value will do).
        """
        if not self._is_there(path, made_with):
            if made_with is not None:  # kept rows may have been made with another value
                only_first(remove_parts, path)
            make_rows(path, phase, items, *args)
            only_first(self._record, path, made_with)
        return Rows(path)

    def folder(self, path, phase, *args):
        """The path of a folder. If it is finished and intact, leave it. Otherwise phase(path,
        *args) writes it."""
        if not self._is_there(path):
            only_first(self._make_room, path)
            phase(path, *args)
            only_first(self._record, path)
        return path

    def _is_there(self, path, made_with=None):
        """Whether a file or folder is finished and intact. All processes get the same answer."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return only_first(self._is_intact, path, made_with)

    def _is_intact(self, path, made_with):
        name = self._name(path)
        if name in self.checked:
            return True
        known = record_of(self.path).get(name)
        if known is None or "again" in known:
            return False
        if made_with is not None and known.get("made with", made_with) != made_with:
            return False
        if not is_unchanged(path, known):
            what = "is not what this run wrote there" if path.exists() else "is gone"
            say(f"warning: {path} {what}; it is made again")
            return False
        self.checked.add(name)
        return True

    def _record(self, path, made_with=None):
        """Enters a finished file or folder in finished.json."""
        name, entry, finished = self._name(path), describe(path), record_of(self.path)
        if made_with is not None:
            entry["made with"] = made_with
        before = {key: x for key, x in finished.get(name, entry).items() if key != "again"}
        if before != entry:
            self._make_later_ones_again(name, finished)
        write_record(self.path / FINISHED, finished | {name: entry})
        self.checked.add(name)

    def _make_later_ones_again(self, name, finished):
        """The file `name` has another content than before, so what was made after it, from the old
        content, is made again: finished files, kept rows, checkpoints. Training reads nothing of an
        evaluation, and answers depend on no score, so they stay where only those have changed."""
        depend = next((kind for kind in (SCORED, EVALUATED) if kind.search(name)), ANY)
        for later in list(finished)[list(finished).index(name) + 1:]:
            if later != METRICS and depend.search(later):
                finished[later]["again"] = True
                self.checked.discard(later)
        for part in parts_in(self.path, "*/*"):
            if depend.search(self._name(part)):
                part.unlink()
        for state in self.path.glob("iter_*/state") if depend is ANY else ():
            shutil.rmtree(state)

    def _make_room(self, path):
        """Moves files that are not the run's out of a folder that is made again."""
        known = record_of(self.path).get(self._name(path), {})
        for file in list(files_in(path)):
            name = file.relative_to(path)
            if name.as_posix() not in known and not OURS.fullmatch(self._name(file)):
                aside = Path(f"{path}.others") / name
                aside.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, aside)
                say(f"{file} is not this run's; it is now {aside}")

    def _name(self, path):
        return Path(path).relative_to(self.path).as_posix()

    # ------------------------------------------------------------------------------------------
    # 2. Metrics
    # ------------------------------------------------------------------------------------------

    def log(self, rows, finished=True):
        """Writes rows of one group (an iteration's "rank", "train" or "eval") to metrics.jsonl.

        rows: all rows of the group so far; what an earlier try has left of it goes. finished: no
        more rows will come. The group's digest is then entered in finished.json.
        """
        only_first(self._log, rows, finished)

    def _log(self, rows, finished):
        group = group_of(rows[0])
        if self.logged == (group, len(rows) - 1) and not finished:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(line_of(rows[-1]))
            is_new = True
        else:
            is_new = self._merge(group, rows, finished)
        self.logged = None if finished else (group, len(rows))
        if is_new and self.tracker:
            self._track(rows[-1])

    def _merge(self, group, rows, finished):
        """Puts the rows of a group in their place in metrics.jsonl -> whether they are new there.
        Other groups stay, but for those that are damaged: their phases log them again."""
        path, record = self.path / METRICS, record_of(self.path)
        groups, damaged = read_groups(self.path, record)
        is_new = groups.get(group) != rows
        if wrong := sorted(damaged & set(groups) - {group}):
            shutil.copy(path, f"{path}.damaged")
            say(f"warning: {path} is not what this run wrote there ({'; '.join(wrong)}); it was "
                f"copied to {path}.damaged, and what can be made again is made again")
        known = record.get(METRICS)
        if known is None:  # a run of an earlier version
            known = {name: digest_of(groups[name]) for name in groups}
        digests = {name: digest for name, digest in known.items() if name != group and (
            name not in damaged or name.endswith("train"))}  # training is not repeated
        if finished:
            digests[group] = digest_of(rows)
        kept = {name: groups[name] for name in groups if name not in damaged} | {group: rows}
        # The record first: a kill between the two damages a group that is logged again.
        write_record(self.path / FINISHED, record | {METRICS: dict(sorted(digests.items()))})
        write_jsonl(path, sorted((row for some in kept.values() for row in some), key=in_order))
        return is_new

    def _track(self, row):
        """Hands a row to the tracker, with the number of updates so far."""
        before = row["iteration"] + ("update" not in row)  # of an evaluation: its updates, too
        groups, _ = read_groups(self.path, record_of(self.path))
        step = row.get("update", 0) + sum(r["phase"] == "train" and r["iteration"] < before
                                          for rows in groups.values() for r in rows)
        self.tracker({f"{row['phase']}/{name}": value for name, value in row.items()
                      if isinstance(value, (int, float)) and name != "update"}, step)


# ----------------------------------------------------------------------------------------------
# 3. The rows of a phase
# ----------------------------------------------------------------------------------------------


def make_rows(path, phase, items, *args):
    """Makes the rows that no part of the file holds yet, and joins all in the items' order."""
    keys, failure = [key_of(item) for item in items], None
    kept = only_first(lambda: set(find_rows(path)))
    # A process always has the same share, killed or not: the last bits of a log-prob depend on the
    # rows that are computed together with it.
    mine = [i for i in range(PROCESS, len(keys), PROCESSES) if keys[i] not in kept]
    try:
        rows = phase(Some(items, mine), *args)
        rows = one_each(rows, [keys[i] for i in mine], f"{path.name}: {phase.__name__}")
        keep_rows(path.with_name(f"{path.name}.part{PROCESS}of{PROCESSES}"),
                  ({**row, FILE: name_of(path)} for row in rows))
    except (ValueError, OSError) as error:
        failure = error
    raise_everywhere(failure)
    only_first(join_parts, path, keys)


def key_of(row):
    """A row and its item have the same prompt_id. A file of a single row may do without."""
    return row.get("prompt_id") if isinstance(row, dict) else None


class Some:
    """Some of the items, each loaded when its turn comes."""

    def __init__(self, items, places):
        self.items, self.places = items, places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        return self.items[self.places[i]]

    def __iter__(self):
        return map(self.items.__getitem__, self.places)


def one_each(rows, keys, who):
    """Yields the rows. ValueError where a key has no row or two, or a row has none of the keys."""
    missing = dict.fromkeys(keys)
    for row in rows:
        if key_of(row) not in missing:
            raise ValueError(f"{who} made a row too many for prompt_id {key_of(row)}; it must "
                             "yield one for each item")
        del missing[key_of(row)]
        yield row
    if missing:
        raise ValueError(f"{who} made no row for prompt_id {next(iter(missing))}; it must yield "
                         "one for each item")


def find_rows(path):
    """key -> (part, where the line begins) of all intact rows in the parts of a file, whatever
    number of processes has left them."""
    return {key_of(row): (part, begin) for part in parts_in(path.parent, path.name)
            for begin, row in kept_rows(part) if row.get(FILE) == name_of(path)}


def name_of(path):
    """What a kept row says of its file. A part of another iteration may have the same prompts."""
    return f"{path.parent.name}/{path.name}"


def join_parts(path, keys):
    """The parts become the file, which has one row for each key, in this order."""
    found = find_rows(path)
    if lost := [key for key in keys if key not in found]:
        raise ValueError(f"{path}: the row of prompt_id {lost[0]} is gone; do all processes see "
                         "the same disk?")

    def lines():
        for key in keys:
            part, begin = found[key]
            with open(part, "rb") as file:
                file.seek(begin)
                row = unseal(file.readline())
            del row[FILE]
            yield line_of(row)
    write_lines(path, lines())
    remove_parts(path)


def parts_in(folder, name):
    """The parts of the unfinished file `name` in a folder; "*/*": of all files of a run."""
    return [path for path in sorted(folder.glob(f"{name}.part*"))
            if re.fullmatch(rf".+\.jsonl{PART}", path.name)]


def remove_parts(path):
    for part in parts_in(path.parent, path.name):
        part.unlink()


# ----------------------------------------------------------------------------------------------
# 4. What the record says of a file, a folder, a group of metrics
# ----------------------------------------------------------------------------------------------


def describe(path):
    """The record's entry: rows and checksum of a file, or the checksums of a folder's files."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): checksum(file)
                for file in sorted(path.rglob("*")) if file.is_file()}
    with open(path, "rb") as file:
        return {"rows": sum(1 for _ in file), "sha256": checksum(path)}


def is_unchanged(path, entry):
    """Whether a file, or each recorded file of a folder, is what its entry says. Other files may be
    in the folder."""
    entry = {key: value for key, value in entry.items() if key not in ("made with", "again")}
    if set(entry) == {"rows", "sha256"}:
        return path.is_file() and describe(path) == entry
    return all((path / name).is_file() and checksum(path / name) == value
               for name, value in entry.items()) and path.is_dir()


def group_of(row):
    """A group of metrics is what one phase of an iteration logs."""
    return f"iteration {row['iteration']}, {row['phase']}"


def in_order(row):
    return (int(row["iteration"]), ("rank", "train", "eval").index(row["phase"]),
            int(row.get("update", 0)))


def digest_of(rows):
    return seal({"rows": rows})["check"]


def read_groups(folder, record):
    """(group -> its rows in metrics.jsonl, the groups that differ from the record's digests). A
    group without a digest belongs to a training that still runs, or was killed."""
    path, groups, known = folder / METRICS, {}, record.get(METRICS)
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
            in_order(row)  # fails for what is no row
            groups.setdefault(group_of(row), []).append(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if known is None and line.strip():  # no digest would tell
                raise ValueError(f"{path} is damaged: {line[:60]!r} is no row of it") from None
    damaged = {name for name, digest in (known or {}).items()
               if digest_of(groups.get(name, [])) != digest}
    return groups, damaged
