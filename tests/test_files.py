"""What an output must not replace, and inputs that are no files to be read."""

import json
import os
import stat
import threading

import pytest

from harness.inputs.files import check_file, parse_json
from harness.runs.output_files import check_writable, write_text


@pytest.fixture
def pipe(tmp_path):
    """A FIFO, whose path a test opens; (path, what was written to it)."""
    path, said = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: said.append(path.read_text()), daemon=True)
    reader.start()
    return path, lambda: reader.join(10) or "".join(said)


def test_a_pipe_is_written_to_and_stays_one(pipe):
    """A rename that puts a file in the place of a pipe, or, as root, of a device."""
    path, said = pipe
    check_writable(path)
    write_text(path, "é")
    assert said() == "é" and stat.S_ISFIFO(path.stat().st_mode)
    assert [file.name for file in path.parent.iterdir()] == ["pipe"]


def test_a_link_is_followed_and_stays_one(tmp_path):
    """A link that becomes a file, while the file that it names keeps the last run's content."""
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store/real.json", tmp_path / "link.json"
    for old in ("old", None):  # a link to nothing too
        target.unlink(missing_ok=True)
        if old:
            target.write_text(old)
            link.symlink_to("store/real.json")
        check_writable(link)
        write_text(link, "new")
        assert link.is_symlink() and target.read_text() == "new"
    assert [file.name for file in target.parent.iterdir()] == ["real.json"]


def test_an_output_that_is_an_input_by_whatever_name_is_refused(tmp_path, monkeypatch):
    """An input that is gone in the end: under its own name, through a link, in the folder of a
    model, or because the name before the rename is an input's."""
    (tmp_path / "model").mkdir()
    for name in ("in.json", "out.json.tmp", "model/config.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("in.json")
    os.link(tmp_path / "in.json", tmp_path / "hard")
    monkeypatch.chdir(tmp_path)
    inputs = [("--input", "in.json"), ("--scores", "out.json.tmp"), ("--model", "model")]
    for name, words in [("in.json", "--input"), (str(tmp_path / "in.json"), "--input"),
                        ("model/../in.json", "--input"), ("link", "--input"), ("hard", "--input"),
                        ("out.json", "--scores"), ("model/config.json", "--model")]:
        with pytest.raises(ValueError, match=f"--output .*{name}.*: the same file as .*{words}"):
            check_writable(name, inputs)
    with pytest.raises(ValueError, match="out.json.tmp is in the way"):
        check_writable("out.json")  # not ours: neither opened nor removed
    check_writable("model/new.json", inputs)
    assert (tmp_path / "out.json.tmp").read_text() == "out.json.tmp"
    assert len(list(tmp_path.iterdir())) == 5


def test_an_input_that_is_no_file_to_be_read_is_refused(tmp_path):
    """A FIFO that is waited for without a word; a pointer of git-LFS, called bad JSON."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "data.parquet").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match="^--data .*pipe: a pipe or a device"):
        check_file("--data", tmp_path / "pipe")
    with pytest.raises(ValueError, match="^--data .*data.parquet: .*run git lfs pull"):
        check_file("--data", tmp_path / "data.parquet")
    check_file("--data", tmp_path)
    check_file("--data", tmp_path / "absent")


def test_a_key_that_stands_twice_is_named():
    """json.loads keeps the last 'chosen' of two, without a word."""
    assert parse_json('{"a": {"b": 1}, "c": [{"b": 2}]}') == {"a": {"b": 1}, "c": [{"b": 2}]}
    for text in ('{"a": 1, "b": 2, "b": 2}', '[{"a": [{"b": 1, "a": {}, "b": null}]}]'):
        with pytest.raises(ValueError, match="key 'b' occurs twice") as error:
            parse_json(text)
        assert not isinstance(error.value, json.JSONDecodeError)
