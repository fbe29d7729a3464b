"""Files that a user names: how they are read, and what an output must not replace.

Imports no other file of the project. Test: pytest tests/test_files.py.
"""

import json
import os
from collections import Counter
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"


def check_file(flag, path):
    """ValueError for an input that exists but cannot be the right file. (Whoever opens it reports a
    missing one.)"""
    if is_special(path):  # reading a pipe that nobody writes to would never end
        raise ValueError(f"{flag} {path}: a pipe or a device, no regular file; write its "
                         "content into a file, and name that")
    if os.path.isfile(path) and os.access(path, os.R_OK):
        try:
            check_no_pointer(path)
        except ValueError as error:
            raise ValueError(f"{flag} {error}") from None


def check_no_pointer(path):
    """ValueError for a git-LFS pointer, which stands for the real file."""
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError(f"{path}: a git-LFS pointer, not the file itself; run git lfs pull")


def is_special(path):
    """A pipe, a device, a socket; links are followed."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def same_file(one, other):
    """Whether both names mean the same file, through links too, and also if it does not exist."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def check_apart(flag, path, inputs):
    """ValueError if writing to `path` would replace an input. inputs: (flag, path) of files and of
    folders, whose files are all inputs."""
    for name, given in inputs:
        files = [given, *Path(given).iterdir()] if os.path.isdir(given) else [given]
        for file in files:
            if same_file(path, file):
                raise ValueError(f"{flag} {path}: the same file as {file}, which {name} names; "
                                 "name another")


def parse_json(text):
    """json.loads, but ValueError for an object with the same key twice: the first would be lost."""
    return json.loads(text, object_pairs_hook=_each_key_once)


def _each_key_once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name[:60]!r} occurs twice in one object")
    return found


def check_characters(value, what="the row"):
    """ValueError for a JSON value with half of a surrogate pair (\\ud800, or a byte that is not
    UTF-8). It cannot be written, and the error would come only after the work."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a character (a lone surrogate); fix it") from None
