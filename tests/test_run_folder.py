"""Files of a run: whole, known by checksum, joined by id; whose folder is whose."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from harness.runs import output_files, run_folder, run_reader, run_record
from harness.runs.output_files import Rows, keep_rows, read_jsonl, write_jsonl
from harness.runs.run_folder import Run
from harness.runs.run_record import claim, delete_run

ITEMS = [{"prompt_id": str(i)} for i in range(5)]


def doubled(items, calls=None):
    for item in items:
        if calls is not None:
            calls.append(item["prompt_id"])
        yield twice(item["prompt_id"])


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    """A half-written phase file that the resumed run takes for a finished one."""
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}])
    monkeypatch.setattr(
        output_files.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError):
        write_jsonl(path, [{"a": 2}] * 1000)
    assert [r for _, r in read_jsonl(path)] == [{"a": 1}]


def test_rows_are_joined_by_prompt_id_and_refuse_what_does_not_fit(tmp_path):
    """Another prompt's sample, because a row was lost above it."""
    write_jsonl(tmp_path / "a.jsonl", [{"prompt_id": p, "x": p * 2} for p in ("b", "é", "c")])
    rows = Rows(tmp_path / "a.jsonl")
    assert len(rows) == 3 and rows.of("é")["x"] == "éé" and rows[2]["x"] == "cc"
    assert [row["x"] for row in rows] == ["bb", "éé", "cc"]
    with pytest.raises(ValueError, match="no row of prompt_id z"):
        rows.of("z")
    write_jsonl(tmp_path / "b.jsonl", [{"prompt_id": "b"}] * 2)
    with pytest.raises(ValueError, match="prompt_id b is there twice"):
        Rows(tmp_path / "b.jsonl").of("b")


def test_a_phase_that_is_killed_resumes_after_its_last_whole_row(tmp_path):
    """An hour of sampling repeated; a half-written row that is taken for one, or left there."""
    run, path, calls = Run(tmp_path), tmp_path / "iter_1/x.jsonl", []

    def dies(items):
        for i, row in enumerate(doubled(items, calls)):
            if i == 3:
                raise KeyboardInterrupt
            yield row
    with pytest.raises(KeyboardInterrupt):
        run.rows(path, dies, ITEMS)
    assert not path.exists()
    [part] = path.parent.glob("x.jsonl.part*")
    with open(part, "ab") as file:
        file.write(b'\n{"prompt_id": "3", "twi')
    calls.clear()
    rows = Run(tmp_path).rows(path, doubled, ITEMS, calls)
    assert calls == ["3", "4"]
    assert [row["twice"] for row in rows] == [0, 2, 4, 6, 8]
    assert sorted(f.name for f in path.parent.iterdir()) == ["x.jsonl"]
    calls.clear()
    Run(tmp_path).rows(path, doubled, ITEMS, calls)
    assert calls == []


def twice(i):
    """The row that `doubled` makes of item i."""
    return {"prompt_id": str(i), "twice": 2 * int(i)}


def of_file(path, i):
    """Row i as a killed process leaves it."""
    return twice(i) | {run_folder.FILE: run_folder.name_of(path)}


def leave_parts(path, were, missing=()):
    """The parts of `were` processes that were killed: process 1 was slower than the others."""
    for p in range(were):
        mine = [i for i in range(p, len(ITEMS), were) if i not in missing]
        part = path.with_name(f"{path.name}.part{p}of{were}")
        keep_rows(part, [of_file(path, i) for i in mine])
        part.write_bytes(part.read_bytes() + b'\n{"prompt_id": "4')


@pytest.mark.parametrize("were", [1, 2, 3, 9])
@pytest.mark.parametrize("are", [1, 2, 4])
def test_rows_of_another_number_of_processes_are_kept(were, are, tmp_path, monkeypatch):
    """A run that was killed on eight GPUs and resumes on four: an hour of sampling that is lost, or
    rows that go to other prompts."""
    path, calls = tmp_path / "x.jsonl", []
    leave_parts(path, were, missing=(1, 4))
    monkeypatch.setattr(run_folder, "PROCESSES", are)
    monkeypatch.setattr(run_folder, "only_first", lambda action, *args: (
        run_folder.PROCESS == 0 or action not in (run_folder.join_parts,)) and action(*args))
    for process in reversed(range(are)):  # process 0, which joins, is the last one here
        monkeypatch.setattr(run_folder, "PROCESS", process)
        run_folder.make_rows(path, doubled, ITEMS, calls)
    assert sorted(calls) == ["1", "4"]
    assert list(Rows(path)) == [twice(i) for i in range(5)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_has_the_same_share_again_after_a_kill(tmp_path, monkeypatch):
    """Log-probs of other micro-batches than in the run that was left alone: other last bits."""
    path, calls = tmp_path / "x.jsonl", []
    monkeypatch.setattr(run_folder, "PROCESSES", 2)
    keep_rows(tmp_path / "x.jsonl.part0of2", [of_file(tmp_path / "x.jsonl", i) for i in (0, 2, 4)])
    monkeypatch.setattr(run_folder, "join_parts", lambda *_: None)
    run_folder.make_rows(path, doubled, ITEMS, calls)
    assert calls == []
    monkeypatch.setattr(run_folder, "PROCESS", 1)
    monkeypatch.setattr(run_folder, "only_first", lambda action, *args: action(*args))
    run_folder.make_rows(path, doubled, ITEMS, calls)
    assert calls == ["1", "3"]


@pytest.mark.parametrize("made_with, left", [(None, ["3", "4"]), ("x", ["0", "1", "2", "3", "4"])])
def test_one_process_resumes_with_what_two_have_finished(made_with, left, tmp_path):
    """Parts that nobody looks at; or reference log-probs of other micro-batches than update 0's."""
    leave_parts(tmp_path / "x.jsonl", 2, missing=(3, 4))
    calls = []
    rows = Run(tmp_path).rows(tmp_path / "x.jsonl", doubled, ITEMS, calls, made_with=made_with)
    assert calls == left and [row["twice"] for row in rows] == [0, 2, 4, 6, 8]
    assert not list(tmp_path.glob("*.part*"))


def test_a_part_of_another_iterations_file_is_not_used(tmp_path):
    """Held-out prompts are the same in all iterations: answers of another policy, copied there with
    a backup, would be judged as this one's."""
    (tmp_path / "iter_1").mkdir()
    (tmp_path / "iter_2").mkdir()
    leave_parts(tmp_path / "iter_1/x.jsonl", 1)
    os.replace(tmp_path / "iter_1/x.jsonl.part0of1", tmp_path / "iter_2/x.jsonl.part0of1")
    calls = []
    Run(tmp_path).rows(tmp_path / "iter_2/x.jsonl", doubled, ITEMS, calls)
    assert calls == ["0", "1", "2", "3", "4"]


def test_rows_may_come_in_any_order(tmp_path):
    """Samples come as they end; a file in that order would differ from run to run."""
    rows = Run(tmp_path).rows(tmp_path / "x.jsonl", lambda items: doubled(list(items)[::-1]), ITEMS)
    assert list(rows) == [twice(i) for i in range(5)]


def test_a_row_that_is_lost_between_two_processes_is_named(tmp_path):
    """A KeyError of process 0, for which the others wait, where each has a disk of its own."""
    keep_rows(tmp_path / "x.jsonl.part0of2", [of_file(tmp_path / "x.jsonl", i) for i in (0, 2, 4)])
    with pytest.raises(ValueError, match="row of prompt_id 1 is gone; do all processes see"):
        run_folder.join_parts(tmp_path / "x.jsonl", list("01234"))


@pytest.mark.parametrize("damage", ["last line", "bit", "empty", "gone"])
def test_a_damaged_file_is_noticed_and_made_again(damage, tmp_path, capsys):
    """A lost last line or a flipped bit that changes every number after it without a word."""
    path = tmp_path / "iter_1/x.jsonl"
    whole = list(Run(tmp_path).rows(path, doubled, ITEMS))
    data = bytearray(path.read_bytes())
    if damage == "last line":
        path.write_bytes(b"".join(bytes(data).splitlines(True)[:-1]))
    elif damage == "bit":
        data[20] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    assert list(Run(tmp_path).rows(path, doubled, ITEMS)) == whole
    assert "x.jsonl is" in capsys.readouterr().out


def test_one_flipped_bit_in_a_folder_is_noticed(tmp_path, capsys):
    """A policy that loads, and is not the one that was trained."""
    def save(path):
        path.mkdir(exist_ok=True)
        (path / "model.safetensors").write_bytes(bytes(range(256)))
        (path / "config.json").write_text("{}")
    Run(tmp_path).folder(tmp_path / "policy", save)
    data = bytearray((tmp_path / "policy/model.safetensors").read_bytes())
    data[200] ^= 4
    (tmp_path / "policy/model.safetensors").write_bytes(data)
    Run(tmp_path).folder(tmp_path / "policy", save)
    assert (tmp_path / "policy/model.safetensors").read_bytes() == bytes(range(256))
    assert "policy is not what this run wrote there" in capsys.readouterr().out


def test_what_was_made_from_another_version_of_a_file_is_made_again(tmp_path):
    """Pairs of samples that no longer exist."""
    made = []

    def phase(items, name, value):
        made.append(name)
        for item in items:
            yield {"prompt_id": item["prompt_id"], "value": value}

    def both(value):
        run = Run(tmp_path)
        run.rows(tmp_path / "samples.jsonl", phase, ITEMS, "samples", value)
        run.rows(tmp_path / "pairs.jsonl", phase, ITEMS, "pairs", value)
    both(1)
    (tmp_path / "samples.jsonl").unlink()
    both(1)  # the same again: what was made from it is still right
    assert made == ["samples", "pairs", "samples"]
    (tmp_path / "samples.jsonl").unlink()
    both(2)
    assert made == ["samples", "pairs", "samples"] + ["samples", "pairs"]
    assert Rows(tmp_path / "pairs.jsonl")[0]["value"] == 2


def test_metrics_stand_in_the_order_of_the_loop_however_often_they_are_logged(tmp_path):
    """25 of 27 killed runs that differ from the undisturbed one in the order of this file alone."""
    rows = {("train", 1): [{"iteration": 1, "phase": "train", "update": u} for u in range(3)],
            ("train", 2): [{"iteration": 2, "phase": "train", "update": u} for u in range(3)],
            ("eval", 0): [{"iteration": 0, "phase": "eval"}],
            ("eval", 1): [{"iteration": 1, "phase": "eval"}],
            ("rank", 1): [{"iteration": 1, "phase": "rank"}]}
    orders = [[("eval", 0), ("rank", 1), ("train", 1), ("eval", 1), ("train", 2)],
              [("train", 1), ("eval", 0), ("train", 2), ("eval", 1), ("rank", 1), ("train", 1)]]
    texts = []
    for n, order in enumerate(orders):
        (tmp_path / str(n)).mkdir()
        for key in order:
            Run(tmp_path / str(n)).log(rows[key])
        texts.append((tmp_path / str(n) / "metrics.jsonl").read_text())
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 9


# ----------------------------------------------------------------------------------------------
# Whose folder
# ----------------------------------------------------------------------------------------------


def test_a_run_is_recognised_by_what_it_was_made_from(tmp_path):
    """A resumed run that mixes two alphas, or resumes with other data of the same name."""
    settings, made_from = {"alpha": 0.1, "slots": 4}, {"data": {"rows": 14, "sha256": "a"}}
    claim(tmp_path / "run", settings, made_from)
    claim(tmp_path / "run", settings | {"slots": 8}, made_from)  # changes no number
    (tmp_path / "run").rename(tmp_path / "moved")
    claim(tmp_path / "moved", settings, made_from)
    with pytest.raises(ValueError, match="alpha was 0.1, is 0.2"):
        claim(tmp_path / "moved", settings | {"alpha": 0.2}, made_from)
    with pytest.raises(ValueError, match=r"the data has changed \(rows: was 14, is 13"):
        claim(tmp_path / "moved", settings, {"data": {"rows": 13, "sha256": "b"}})


def test_a_mended_judge_may_go_on_only_where_nothing_was_judged(tmp_path):
    """Scores of two judges in one file; or a run that is lost because its judge had a bug."""
    claim(tmp_path, {}, {"judge": {"": "1"}})
    (tmp_path / "iter_1").mkdir()
    claim(tmp_path, {}, {"judge": {"": "2"}})
    (tmp_path / "iter_1/scores0.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="the judge has changed"):
        claim(tmp_path, {}, {"judge": {"": "3"}})
    claim(tmp_path, {}, {"judge": {"": "2"}})


def test_somebody_elses_config_is_not_taken_for_a_run(tmp_path):
    """A model folder that becomes a run folder."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="not a run's"):
        claim(tmp_path, {}, {})
    (tmp_path / "config.json").write_text('{"model_')
    with pytest.raises(ValueError, match="config.json is damaged"):
        claim(tmp_path, {}, {})


def test_nothing_breaks_where_there_is_no_git(tmp_path, monkeypatch):
    """Optional things that are not."""
    monkeypatch.setenv("PATH", str(tmp_path))
    claim(tmp_path / "run", {}, {})
    assert json.loads((tmp_path / "run/config.json").read_text())["git_revision"] is None


@pytest.mark.parametrize("wrong", [
    lambda items: (item for item in list(items)[1:]),
    lambda items: (item for item in items for _ in range(2))])
def test_a_phase_that_loses_or_adds_a_row_is_refused_the_second_time_too(wrong, tmp_path):
    """A fork's sampler that skips a prompt, or answers one twice."""
    for _ in range(2):
        with pytest.raises(ValueError, match="x.jsonl: .* must yield one for each item"):
            Run(tmp_path).rows(tmp_path / "x.jsonl", wrong, ITEMS)
    assert not (tmp_path / "x.jsonl").exists()


def finished_run(folder):
    claim(folder, {"alpha": 0.1}, {})
    Run(folder).rows(folder / "iter_1/x.jsonl", doubled, ITEMS)
    return folder


def test_fresh_takes_away_what_a_run_left_and_nothing_else(tmp_path):
    """Notes that somebody keeps beside the results; a neighbour called run.deleted."""
    run = finished_run(tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (tmp_path / "run.deleted").mkdir()
    (tmp_path / "run.deleted/thesis.tex").write_text("mine")
    delete_run(run, [])
    assert [f.name for f in run.iterdir()] == ["notes.txt"]
    assert (tmp_path / "run.deleted/thesis.tex").exists()


def test_fresh_works_through_a_link_and_does_not_follow_links_inside(tmp_path):
    """Somebody's folder emptied because a link in the run points there."""
    run = finished_run(tmp_path / "real")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    (run / "figures").symlink_to(tmp_path / "precious")
    (tmp_path / "link").symlink_to(run)
    delete_run(tmp_path / "link", [])
    assert (tmp_path / "link").is_symlink() and not list(run.iterdir())
    assert (tmp_path / "precious/file").exists()


@pytest.mark.parametrize("make, words", [
    (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "does not look like a"),
    (lambda d: (d / "photo.jpg").write_text("x"), "photo.jpg"),
    (lambda d: finished_run(d), "which --model reads")])
def test_fresh_refuses_what_no_run_has_made_and_what_the_run_reads(make, words, tmp_path):
    """A model folder with a config.json and the notes in it; the very policy that is named."""
    make(tmp_path)
    before = sorted(str(f) for f in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words):
        delete_run(tmp_path, [("--model", str(tmp_path / "iter_1"))])
    assert sorted(str(f) for f in tmp_path.rglob("*")) == before


def test_a_second_command_waits_outside_and_a_dead_one_holds_no_lock(tmp_path):
    """Two runs that write into each other's files; a lock that outlives a power cut."""
    script = ("import sys, time; from pathlib import Path; from harness.runs import run_record\n"
              "with run_record.locked(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="another command is at work"):
        with run_record.locked(tmp_path):
            pass
    holder.kill()
    holder.wait()
    with run_record.locked(tmp_path):
        pass


def test_two_files_of_one_size_have_two_fingerprints_and_a_moved_one_keeps_its_own(tmp_path):
    """b.gguf that trains a.gguf's weights."""
    blocks = os.urandom(3_000_000)
    for name, data in (("a", blocks), ("b", blocks[:-1] + b"x" if blocks[-1:] != b"x" else b""),
                       ("c", blocks)):
        (tmp_path / name).write_bytes(data)
    a, b, c = (run_record.fingerprint(tmp_path / name) for name in "abc")
    assert a == c != b
    started = time.time()
    with open(tmp_path / "big", "wb") as file:
        file.truncate(4 * 2**30)  # a hole: no disk is used
    run_record.fingerprint(tmp_path / "big")
    assert time.time() - started < 5, "a fingerprint reads blocks, not gigabytes"


def test_control_characters_of_a_model_never_reach_the_terminal():
    """An escape sequence in a response that retitles the window or hides a line."""
    assert output_files.printable("a\x1b[31mred\x07\x9b1m\n\tb é 日") == "a[31mred1m\n\tb é 日"


def test_what_was_made_after_another_version_of_a_file_is_void_unfinished_or_not(tmp_path):
    """Training that resumes from a checkpoint of a policy that is no more; rows of a ranking of
    other samples, kept because the next version of the samples is as long."""
    run, made = Run(tmp_path), iter("ab")
    here, items = tmp_path / "iter_1", ITEMS[1:3]

    def rows(items):
        text = next(made)
        return ({**item, "text": text} for item in items)
    run.rows(here / "first.jsonl", rows, items)
    (tmp_path / "iter_2/state/000001").mkdir(parents=True)
    (here / "second.jsonl.part0of1").write_text('{"prompt_id": "1"}\n')
    (here / "first.jsonl").unlink()
    Run(tmp_path).rows(here / "first.jsonl", rows, items)
    assert not (tmp_path / "iter_2/state").exists()
    assert sorted(path.name for path in here.iterdir()) == ["first.jsonl"]


def test_another_evaluation_voids_evaluations_and_no_training(tmp_path):
    """Days of training that are repeated because a file of held-out answers was damaged, and came
    out a digit otherwise; or duels with answers that are no more."""
    made = iter(range(100))

    def row(items):
        return ({"prompt_id": "1", "made": next(made)} for _ in items)

    def go_on():
        run, names = Run(tmp_path), ("start/answers", "start/eval", "iter_1/pairs",
                                     "iter_1/answers", "iter_1/duels")
        for name in names:
            run.rows(tmp_path / f"{name}.jsonl", row, ITEMS[1:2])
        return {name: (tmp_path / f"{name}.jsonl").read_text() for name in names}
    before = go_on()
    (tmp_path / "start/answers.jsonl").unlink()
    (tmp_path / "iter_2/state/000001").mkdir(parents=True)
    (tmp_path / "iter_2/answers.jsonl.part0of1").write_text('{"prompt_id": "1"}\n')
    after = go_on()
    assert [name for name in before if after[name] == before[name]] == ["iter_1/pairs"]
    assert [path.name for path in (tmp_path / "iter_2").iterdir()] == ["state"]
    (tmp_path / "iter_2/samples.jsonl.part0of1").write_text('{"prompt_id": "1"}\n')
    (tmp_path / "iter_1/duels.jsonl").unlink()  # now the last of the record
    go_on()
    assert len(list((tmp_path / "iter_2").iterdir())) == 2


def test_what_was_made_with_other_settings_is_made_again(tmp_path):
    """Reference log-probs of other micro-batches than those of the training that follows."""
    made = []

    def rows(items):
        made.append(1)
        return iter(items)
    for budget, times in (([64, 1], 1), ([64, 1], 1), ([32, 1], 2), ([32, 1], 2)):
        Run(tmp_path).rows(tmp_path / "iter_1/x.jsonl", rows, ITEMS[:1], made_with=budget)
        assert len(made) == times


# ----------------------------------------------------------------------------------------------
# One bad byte, one line too many
# ----------------------------------------------------------------------------------------------

LOGGED = [{"iteration": 0, "phase": "eval", "score": 1.5}] + [
    {"iteration": 1, "phase": "train", "update": u, "loss": 0.5 + u} for u in range(3)] + [
    {"iteration": 1, "phase": "eval", "score": 2.5}]


def logged(folder):
    """A run whose metrics are LOGGED."""
    run = Run(folder)
    for k, phase in ((0, "eval"), (1, "train"), (1, "eval")):
        run.log([row for row in LOGGED if (row["iteration"], row["phase"]) == (k, phase)])
    (folder / "iter_1/policy").mkdir(parents=True, exist_ok=True)
    return run


def test_updates_are_logged_as_they_come_and_cut_back_when_the_training_resumes(tmp_path):
    """A loss that nobody sees for days; a killed run whose file has an update twice, or half a
    line, or the updates after the last checkpoint; one that trains again after all was logged."""
    folders = tmp_path / "alone", tmp_path / "killed"
    history, path = LOGGED[1:4], folders[1] / "metrics.jsonl"

    def train(run, first=0, last=3):
        for u in range(first, last):
            run.log(history[:u + 1], finished=False)
        if last == 3:
            run.log(history)
    for folder in folders:
        folder.mkdir()
        Run(folder).log(LOGGED[:1])
    train(Run(folders[0]))
    Run(folders[0]).log(LOGGED[4:])

    def lines():
        return [json.loads(line) for line in path.read_text().splitlines()]
    for first, last, damage in ((0, 3, ""), (0, 2, '{"iteration": 1, "ph'), (1, 2, ""), (0, 1, "")):
        train(Run(folders[1]), first, last)  # the policy of the first try was not saved
        assert lines() == LOGGED[:1 + last] and run_reader.rows_of(folders[1], "train") == (
            history[:last])
        with open(path, "a") as file:
            file.write(damage)
        Run(folders[1]).log(LOGGED[:1])  # each command logs once more what is finished
        assert lines() == LOGGED[:1 + last]
    train(Run(folders[1]), 1)
    Run(folders[1]).log(LOGGED[4:])
    for name in ("metrics.jsonl", "finished.json"):
        assert (folders[1] / name).read_text() == (folders[0] / name).read_text()


@pytest.mark.parametrize("line", range(len(LOGGED)))
@pytest.mark.parametrize("how", ["digit", "twice", "gone", "array", "half", "bytes"])
def test_a_damaged_line_of_the_metrics_reaches_no_figure(line, how, tmp_path, capsys):
    """A loss of another digit, an update twice or not at all, in figures and report, exit 0; a
    traceback; whole rows that go with the damaged one, and cannot be looked at any more."""
    logged(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(True)
    lines[line:line + 1] = {
        "digit": [lines[line].replace(b".5", b".4")], "twice": [lines[line]] * 2, "gone": [],
        "array": [b"[1]\n"], "half": [lines[line][:9]], "bytes": [b"\xe9\n"]}[how]
    path.write_bytes(damaged := b"".join(lines))
    phase = LOGGED[line]["phase"]
    words = "lost the updates of iteration 1; put it back, or remove .*iter_1/policy"
    with pytest.raises(ValueError, match=words if phase == "train" else "again, makes it again"):
        run_reader.rows_of(tmp_path, phase)
    if phase == "train":  # what is not made again stays to be looked at, and is refused
        Run(tmp_path).log([LOGGED[0]])
        with pytest.raises(ValueError, match=words):
            run_reader.rows_of(tmp_path, "train")
        assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
        (tmp_path / "iter_1/policy").rmdir()
    capsys.readouterr()
    logged(tmp_path)
    assert [row for phase in ("train", "eval") for row in run_reader.rows_of(tmp_path, phase)
            ] == LOGGED[1:4] + [LOGGED[0], LOGGED[4]]


@pytest.mark.parametrize("damage, again", [
    (lambda lines: [lines[0], lines[1].replace(b"[7]", b"[6]"), *lines[2:]], ["1", "4"]),
    (lambda lines: [lines[0], lines[0], *lines[1:]], ["4"]),
    (lambda lines: [lines[0], *lines[2:]], ["1", "4"]),
    (lambda lines: [b"[]\n", *lines[1:]], ["0", "4"]),
    (lambda lines: [b"\xe9\n", *lines[1:]], ["0", "4"]),
    (lambda lines: [lines[0].replace(b'"0"', b'"4"'), *lines[1:]], ["0", "4"])],
    ids=["changed", "twice", "gone", "array", "latin-1", "neighbour's"])
def test_a_damaged_row_of_an_unfinished_file_is_made_again_and_no_other(damage, again, tmp_path):
    """A token of a sample that has changed, and another policy, exit 0; or a sample that is used
    for another prompt; or all rows after the damaged one, made again."""
    calls = []

    def ids(items, die=False):
        for item in items:
            if die and item["prompt_id"] == "4":
                raise KeyboardInterrupt
            calls.append(item["prompt_id"])
            yield {**item, "ids": [7 * int(item["prompt_id"])]}
    path = tmp_path / "iter_1/samples.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).rows(path, ids, ITEMS, True)
    [part] = path.parent.glob("*.part0of1")
    part.write_bytes(b"".join(damage(part.read_bytes().lstrip().splitlines(True))))
    calls.clear()
    rows = Run(tmp_path).rows(path, ids, ITEMS)
    assert list(rows) == [{"prompt_id": str(i), "ids": [7 * i]} for i in range(5)]
    assert calls == again


@pytest.mark.parametrize("name", ["finished.json", "config.json"])
@pytest.mark.parametrize("how", ["bit", "digit", "empty", "half", "gone", "array", "latin-1"])
def test_a_bad_byte_in_a_record_costs_nothing(name, how, tmp_path, capsys):
    """Intact policies that only --fresh is offered for, which deletes them."""
    run = finished_run(tmp_path)
    path = tmp_path / name
    expected, position = path.read_text(), path.read_text().index('"') + 3
    content = path.read_bytes()
    digits = content.replace(b"0.1", b"0.2") if name == "config.json" else content.replace(
        b'"rows": 5', b'"rows": 4')
    assert digits != content
    path.write_bytes({"bit": content[:position] + bytes([content[position] ^ 128])
                      + content[position + 1:], "digit": digits, "empty": b"", "array": b"[1]",
                      "half": content[:20], "gone": b"", "latin-1": b"\xe9"}[how])
    if how == "gone":
        path.unlink()
    assert run_reader.settings_of(run) == {"alpha": 0.1}
    claim(run, {"alpha": 0.1}, {})
    assert path.read_text() == expected and name in capsys.readouterr().out
    Run(run).rows(run / "iter_1/x.jsonl", lambda items: pytest.fail("made again"), ITEMS)


def test_records_damaged_on_both_sides_are_one_line_that_deletes_nothing(tmp_path):
    """A traceback; --fresh as the only way."""
    run = finished_run(tmp_path)
    for name in ("finished.json", ".finished.json"):
        (run / name).write_text('{"iter_1/x.jsonl": 5}')
    with pytest.raises(ValueError, match="finished.json is damaged.*put it back"):
        claim(run, {"alpha": 0.1}, {})
    for name in ("config.json", ".config.json"):
        (run / name).write_text('{"settings": [], "made_from": 5}')
    with pytest.raises(ValueError, match="not a run's"):
        claim(run, {"alpha": 0.1}, {})


@pytest.mark.parametrize("text", ["[1]\n", '{"prompt_id": "0"}\n', "\\xe9", ""])
def test_a_reader_from_outside_draws_no_damaged_file(text, tmp_path):
    """python -m harness.runs.report_page on a run with a changed answer: another figure, or a
    traceback."""
    path = finished_run(tmp_path) / "iter_1/x.jsonl"
    assert [row["twice"] for row in run_reader.finished_rows(path)] == [0, 2, 4, 6, 8]
    path.write_text(text)
    with pytest.raises(ValueError, match="x.jsonl is not what the run wrote there; the command"):
        run_reader.finished_rows(path)


@pytest.mark.parametrize("line", ["5", "[]", '{"iteration": 1}', '{"iteration": null, "phase": 1}',
                                  '{"iteration": 1, "phase": "other"}', "{", "[" * 9999])
def test_metrics_of_another_shape_are_one_line_without_a_record_too(line, tmp_path):
    """A traceback for what an editor has left in a run of an earlier version."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LOGGED[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl is damaged: .* is no row"):
        run_reader.rows_of(tmp_path, "eval")


def save_policy(path, made=None):
    """Makes a policy's folder as a run does: what is there is replaced."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    if made is not None:
        made.append(1)


def test_a_file_too_much_in_a_policy_voids_nothing_and_is_never_deleted(tmp_path, capsys):
    """A README.md or .DS_Store that costs a training, and is gone after it."""
    path, made = tmp_path / "iter_1/policy", []
    Run(tmp_path).folder(path, save_policy, made)
    (path / "README.md").write_text("mine")
    (path / "plots").mkdir()
    (path / "plots/a.png").write_text("mine")
    Run(tmp_path).folder(path, save_policy, made)
    assert made == [1] and (path / "README.md").exists()
    (path / "model.safetensors").write_bytes(b"Weights")
    Run(tmp_path).folder(path, save_policy, made)
    assert made == [1, 1] and [file.name for file in path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "iter_1/policy.others/README.md").read_text() == "mine"
    assert (tmp_path / "iter_1/policy.others/plots/a.png").read_text() == "mine"
    assert "README.md is not this run's; it is now" in capsys.readouterr().out


def test_fresh_leaves_what_only_looks_like_a_runs_and_names_it(tmp_path, capsys):
    """iter_plan.txt, seed_list.csv or draft.tmp of somebody, deleted by a pattern."""
    mine = ["iter_plan.txt", "seed_list.csv", "draft.tmp", "paper.part2", "iter_1/notes.md",
            "figures/mine.png", "iter_x/a", "baseline/why.txt", "iter_1/policy/README.md",
            "iter_1/samples.jsonl.part1", "seed_1/x", ".deleted-mails", "world/map.png",
            "start.tmp/x", "iter_1/scores_old.jsonl", "report.md.bak"]
    ours = ["report.md", "report.html", "figures/training.png", "iter_1/state/000002/history.json",
            "iter_1/state/000002/model-00001-of-00001.safetensors", "start/eval.jsonl.part0of2",
            "iter_2/policy.tmp/model.safetensors", "iter_1/scores0.jsonl", "iter_1/prompts.jsonl",
            "world.unfinished/base/config.json", "metrics.jsonl", "iter_2/pairs.jsonl.tmp",
            "seed_3/baseline/iter_1/answers.jsonl"]
    run = finished_run(tmp_path)
    finished_run(run / "baseline")
    Run(run).folder(run / "iter_1/policy", save_policy)
    for name in mine + ours:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    delete_run(run, [])
    left = [file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()]
    assert sorted(left) == sorted(mine)
    assert f"left {len(mine)} files" in capsys.readouterr().out
    assert not (run / "iter_2").exists() and not (run / "seed_3").exists()
    claim(run, {"alpha": 0.1}, {})  # what is left does not keep the new run out


def test_a_judge_that_failed_and_was_mended_goes_on_and_keeps_the_samples(tmp_path, capsys):
    """Samples that are lost because the judge had a bug; or half a run by one judge, half by
    another: only what the judge has touched is made again, and what differs after it."""
    made = []

    def phase(items, name, value):
        made.append(name)
        for item in items:
            if value is None:
                raise ValueError("the judge fails")
            yield {"prompt_id": item["prompt_id"], "value": value}

    def go_on(judge, *scores):
        claim(tmp_path, {"alpha": 1}, {"data": 1, "judge": judge})
        run = Run(tmp_path)
        for k, score in enumerate(scores, 1):
            for name, value in (("samples", f"by the policy of {scores[:k - 1]}"),
                                ("pairs", score), ("answers", f"by {scores[:k]}"), ("eval", score)):
                run.rows(tmp_path / f"iter_{k}/{name}.jsonl", phase, ITEMS, f"{name} {k}", value)
        return made
    with pytest.raises(ValueError, match="the judge fails"):
        go_on("bug", 1, None)
    (tmp_path / "iter_2/scores0.jsonl").write_text("{}")
    assert made == ["samples 1", "pairs 1", "answers 1", "eval 1", "samples 2", "pairs 2"]
    with pytest.raises(ValueError, match="alpha was 1, is 2; the judge has changed"):
        claim(tmp_path, {"alpha": 2}, {"data": 1, "judge": "mended"})
    with pytest.raises(ValueError, match="the data has changed; the judge has changed"):
        claim(tmp_path, {"alpha": 1}, {"data": 2, "judge": "mended"})
    made.clear()
    assert go_on("mended", 1, 1) == ["pairs 1", "eval 1", "pairs 2", "answers 2", "eval 2"]
    assert "samples are kept" in capsys.readouterr().out
    assert not list(tmp_path.glob("*/scores*"))
    with pytest.raises(ValueError, match="the judge has changed"):
        go_on("another", 1, 1)  # nothing has failed
    (tmp_path / "iter_2/eval.jsonl.part0of1").write_text("")
    made.clear()
    assert go_on("another", 2, 2) == ["pairs 1", "answers 1", "eval 1", "samples 2", "pairs 2",
                                      "answers 2", "eval 2"]


@pytest.mark.parametrize("make, words", [
    (lambda d: (d / "run").write_text("x"), "there is a file of this name"),
    (lambda d: (d / "run").symlink_to("/nowhere/at/all"), "cannot be made")])
def test_a_run_dir_that_cannot_be_one_is_named(make, words, tmp_path):
    """[Errno 17]."""
    make(tmp_path)
    with pytest.raises(ValueError, match=f"--run-dir .*run: .*{words}"):
        with run_record.locked(tmp_path / "run"):
            pass


def test_a_run_dir_that_is_no_text_is_refused_before_the_first_sample(tmp_path):
    """"Free some space", after all the work: no model can be saved below such a name."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
    with pytest.raises(ValueError, match="--run-dir .*not UTF-8"):
        with run_record.locked(path):
            pass
    assert not path.exists()
