"""Files that a command writes: whole text, JSON lines, and rows that are kept as they come.

Test: pytest tests/test_run_folder.py tests/test_files.py.
"""

import functools
import json
import os
import re
from pathlib import Path

from harness.inputs.files import check_apart, is_special
from harness.models.distributed import seal, unseal

# ----------------------------------------------------------------------------------------------
# 1. Text
# ----------------------------------------------------------------------------------------------


def printable(text):
    """Text of users, models and judges for a terminal: without the control characters that could
    move its cursor, hide lines or answer for the user, and without half surrogate pairs. Newline
    and tab stay; so do accents, emoji and every script."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "", text)


def write_text(path, text):
    """Writes a file so that it appears whole or not at all. A link is followed. A pipe or a device
    is written to directly: a rename would replace it."""
    write_lines(path, [text])


def write_lines(path, lines):
    """The same of lines, any iterable: a temporary name, fsync, rename."""
    if is_special(path):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(lines)
        return
    path = os.path.realpath(path)
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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


# ----------------------------------------------------------------------------------------------
# 2. Rows of a finished file
# ----------------------------------------------------------------------------------------------


def line_of(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path, rows):
    write_lines(path, map(line_of, rows))


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
    """A JSONL file as a list of objects that stays on disk: memory holds only where lines begin.

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
        """prompt_id -> line index. ValueError for one that is there twice."""
        places = {}
        for i, row in enumerate(self):
            if places.setdefault(row["prompt_id"], i) != i:
                raise ValueError(f"{self.path}: prompt_id {row['prompt_id']} is there twice")
        return places

    def of(self, prompt_id):
        """The row of a prompt. ValueError where there is none."""
        if prompt_id not in self.places:
            raise ValueError(f"{self.path} has no row of prompt_id {prompt_id}: it was made from "
                             "other data; give another --run-dir, or --fresh to start over")
        return self[self.places[prompt_id]]


# ----------------------------------------------------------------------------------------------
# 3. Rows of an unfinished file, kept as they come
# ----------------------------------------------------------------------------------------------


def keep_rows(path, rows):
    """Appends rows to a file, each as a line with its own digest. A process that is killed loses
    at most the row that it is writing. path: of a file to which no other process appends."""
    with open(path, "ab") as file:
        for row in rows:  # \n first: it ends a line that a kill has cut off
            file.write(b"\n" + json.dumps(seal(row)).encode())
            file.flush()
        os.fsync(file.fileno())


def kept_rows(path):
    """Yields (where its line begins, row) of each intact line of such a file. A damaged line costs
    its own row only."""
    begin = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                row = unseal(line)
            except ValueError:
                row = None
            if row is not None:
                yield begin, row
            begin += len(line)
