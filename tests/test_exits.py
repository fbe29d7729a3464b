"""How a command ends, seen from the shell: harness/runs/exits.py imports nothing slow."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT


def run(body, encoding="utf-8", shell="", **environment):
    """`body` of a main() under exits.run -> (exit code, stdout, stderr)."""
    script = ("import os, sys\nfrom harness.runs import exits\n"
              f"def main():\n    {body}\nexits.run(main)")
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {shell}; exit ${{PIPESTATUS[0]}}', sys.executable, script],
        cwd=ROOT, capture_output=True, timeout=60,
        env=os.environ | {"PYTHONIOENCODING": encoding, **environment})
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.mark.parametrize("encoding, expected", [
    ("ascii", "\\xe9 \\u2713 \\ud800"), ("latin-1", "\xe9 \\u2713 \\ud800"),
    ("utf-8", "\xc3\xa9 \xe2\x9c\x93 \\ud800")])
def test_no_character_fails_to_be_printed(encoding, expected):
    """A report, or an answer, that is lost after all the work because the terminal lacks an e with
    an accent."""
    code, out, error = run(r'print("\xe9 \u2713 \ud800"); print("\u2713", file=sys.stderr)',
                           encoding)
    assert (code, out) == (0, expected + "\n") and "Traceback" not in error


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_is_no_error(unbuffered):
    """'error: Broken pipe', a traceback, or a complaint of the interpreter after `| head -1`."""
    lines = '[print("line", i) for i in range(20000)]'
    code, out, error = run(lines, shell="| head -1", PYTHONUNBUFFERED=unbuffered)
    assert (code, out, error) == (141, "line 0\n", "")
    lines += '; print("not reached", file=sys.stderr)'
    code, out, error = run(lines, shell="2>&1 | head -1")
    assert (code, out) == (141, "line 0\n")
    assert run("print(1)", shell="| true") in [(0, "", ""), (141, "", "")]
    assert run("print(1); tell = sys.stdout.write", shell=">&-") == (0, "", "")


def test_output_that_is_lost_is_an_error():
    """A report on a full disk, or a pipe of a judge that breaks, ended as if all were well."""
    code, out, error = run("r, w = os.pipe(); os.close(r); os.write(w, b'x')")
    assert (code, error) == (1, "error: [Errno 32] Broken pipe\n")
    if os.path.exists("/dev/full"):
        code, out, error = run("print(1)", shell=">/dev/full")
        assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
