"""Files that a user names: how they are read, and what an output must not replace.

Imports nothing local. Test: pytest tests/test_files.py.
"""

import json
import os
from collections import Counter
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"


def check_file(flag, path):
    """ValueError where an input is there, but is not the file that is meant. (That nothing is there
    is said by whoever opens it.)"""
    if is_special(path):  # a pipe that nobody writes to would be waited for without a word
        raise ValueError(f"{flag} {path}: a pipe or a device, no regular file; write its "
                         "content into a file, and name that")
    if os.path.isfile(path) and os.access(path, os.R_OK):
        try:
            check_no_pointer(path)
        except ValueError as error:
            raise ValueError(f"{flag} {error}") from None


def check_no_pointer(path):
    """ValueError for a file that only says where git-LFS keeps the real one."""
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError(f"{path}: a git-LFS pointer, not the file itself; run git lfs pull")


def is_special(path):
    """A pipe, a device, a socket; links are followed."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def same_file(one, other):
    """Whether both names mean one file, there already or not: by a link, or written differently."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def check_apart(flag, path, inputs):
    """ValueError where writing to `path` would replace what the command reads. inputs: (flag, path)
    of files and folders; of a folder, every file in it is one."""
    for name, given in inputs:
        files = [given, *Path(given).iterdir()] if os.path.isdir(given) else [given]
        for file in files:
            if same_file(path, file):
                raise ValueError(f"{flag} {path}: the same file as {file}, which {name} names; "
                                 "name another")


def parse_json(text):
    """json.loads, but ValueError for an object with a key twice: only the last would be used."""
    return json.loads(text, object_pairs_hook=_each_key_once)


def _each_key_once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name[:60]!r} stands twice in one object")
    return found


def check_characters(value, what="the row"):
    """ValueError where a JSON value holds half of a surrogate pair (\\ud800, or a byte that is not
    UTF-8): it cannot be written, which would be found out after the work."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a character (a lone surrogate); mend it") from None
