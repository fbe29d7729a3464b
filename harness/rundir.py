"""Files of a run: they appear whole or not at all."""

import json
import os
from pathlib import Path


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


def write_jsonl(path, rows):
    """Writes rows so that the file appears whole or not at all (temporary name, fsync, rename)."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path, text):
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
