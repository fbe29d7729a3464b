"""Strangers' files: each becomes exact records, or one line that names row, reason and remedy."""

import csv
import json
import os
from types import SimpleNamespace

import pytest

from conftest import TEMPLATES, make_tokenizer
from harness.runs import setup
from harness.inputs.preferences import NoSplit, check_rows, load_preferences
from harness.inputs.chat_template import ChatFormat

CHAT = [{"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "how are you?"},
        {"role": "user", "content": "the cat sat"}]
FRENCH = {"role": "system", "content": "Answer in French."}
REMEDY = "; .*--skip-bad-rows$"


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def row(context=CHAT, **changes):
    """A good row in UltraFeedback-binarized format, with `changes`; a change to None removes."""
    whole = {"prompt": context[-1]["content"], "prompt_id": "7",
             "chosen": [*context, answer("on the mat")],
             "rejected": [*context, answer("at the moon")]} | changes
    return {name: value for name, value in whole.items() if value is not None}


def write(path, rows, encoding="utf-8"):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding=encoding)
    return path


@pytest.fixture
def load(tmp_path):
    return lambda *rows, **more: load_preferences(write(tmp_path / "p.jsonl", rows), **more)


# ----------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------


def test_only_the_last_assistant_turn_of_a_long_conversation_is_the_response(load, tmp_path):
    """Training on the earlier assistant turns, which chosen and rejected share."""
    assert load(row()) == [{
        "prompt_id": "7", "prompt": CHAT, "data_chosen": "on the mat",
        "data_rejected": "at the moon", "where": f"{tmp_path / 'p.jsonl'}, line 1"}]


GOOD = {
    "strings": (row([user("hi")], chosen="a", rejected="b"), [user("hi")]),
    "one string": (row(chosen="a"), CHAT),
    "only the assistant's turns": (row([user("hi")], chosen=[answer("a")], rejected=[answer("b")]),
                                   [user("hi")]),
    "no prompt": (row(prompt=None), CHAT),
    "the whole conversation as prompt": (row(prompt=CHAT), CHAT),
    "the first question as prompt": (row(prompt="hello there"), CHAT),
    "a space more in prompt": (row(prompt="the cat sat\n"), CHAT),
    "system in the transcripts": (row([FRENCH, *CHAT]), [FRENCH, *CHAT]),
    "system only in prompt": (row(prompt=[FRENCH, *CHAT]), [FRENCH, *CHAT]),
    "an empty system turn only in prompt": (
        row(prompt=[FRENCH | {"content": ""}, *CHAT]), [FRENCH | {"content": ""}, *CHAT]),
    "system and one question in prompt": (row(prompt=[FRENCH, CHAT[-1]]), [FRENCH, *CHAT]),
    "system in a column": (row(system="Answer in French."), [FRENCH, *CHAT]),
    "system in a column, strings": (
        row([user("hi")], chosen="a", rejected="b", system_prompt="Answer in French."),
        [FRENCH, user("hi")]),
    "system in both": (row([FRENCH, *CHAT], system="Answer in French.\n"), [FRENCH, *CHAT]),
    "no system in the column": (row(system="  "), CHAT),
    "system only in messages": (row(messages=[FRENCH, *CHAT, answer("on the mat")]),
                                [FRENCH, *CHAT]),
    "columns of UltraFeedback and others": (
        row(messages=[*CHAT, answer("on the mat")], score_chosen=8.5, score_rejected=1.0,
            chosen_model="gpt", source="web", tags=["a"]), CHAT),
    "a column that repeats the prompt": (
        row(instruction="the cat sat ", input="", history=[]), CHAT),
    **{f"tools {text!r}": (row(tools=text), CHAT) for text in ("[]", "{} ", "null", " ")},
    "no tool calls, as text": (
        row(chosen=[*({**t, "tool_calls": "[]"} for t in CHAT), answer("a", tool_calls="null")]),
        CHAT),
    "keys that a data set filled in": (
        row(chosen=[*({**t, "tool_calls": None} for t in CHAT), answer("a", name=None, weight=1)]),
        CHAT),
    "a system turn in the middle": (row([*CHAT[:2], FRENCH, CHAT[2]], prompt=None),
                                    [*CHAT[:2], FRENCH, CHAT[2]]),
    "a tool's answer in words": (row([*CHAT, {"role": "tool", "content": "rain"}], prompt=None),
                                 [*CHAT, {"role": "tool", "content": "rain"}]),
    "short echo": (row([user("Hi")], chosen="Hi!", rejected="Hi, you"), [user("Hi")]),
    "a dialogue that was asked for": (
        row([user("write a dialogue")], chosen="User: hi\nAssistant: ho", rejected="no"),
        [user("write a dialogue")])}


@pytest.mark.parametrize("case", GOOD)
def test_what_a_row_says_is_used(case, load):
    """A system turn that is dropped without a word; a data set's ordinary columns refused."""
    given, prompt = GOOD[case]
    [record] = load(given)
    last = [value if isinstance(value, str) else value[-1]["content"]
            for value in (given["chosen"], given["rejected"])]
    assert (record["prompt"], [record["data_chosen"], record["data_rejected"]]) == (prompt, last)


TOOL_CALL = {"tool_calls": [{"type": "function", "function": {"name": "w", "arguments": "{}"}}]}
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
BAD = {
    "contexts differ": (row(rejected=[user("hi"), answer("no")]), "different conversations"),
    "contexts differ by a system turn": (row(rejected=[FRENCH, *CHAT, answer("no")]),
                                         "different conversations"),
    "prompt says something else": (row(prompt="the dog sat"), "'prompt' says something else"),
    "prompt has turns more": (row(CHAT[-1:], prompt=CHAT), "'prompt' says something else"),
    "a system turn in the middle": (
        row(prompt=[*CHAT[:2], FRENCH, CHAT[2]]), "'prompt' says something else"),
    "system is a list": (row(system=["a"]), "'system' must be"),
    "system is two turns": (row(system=[FRENCH, FRENCH]), "'system' must be"),
    "two systems": (row([FRENCH, *CHAT], prompt=[FRENCH | {"content": "No."}, *CHAT]),
                    "'prompt' has another system turn"),
    "system column contradicts": (row([FRENCH, *CHAT], system="No."), "'system' has another"),
    "system is no string": (row(system=3), "'system' must be"),
    **{f"column {name}": (row(**{name: value}), f"column '{name}'") for name, value in [
        ("instruction", "Be rude."), ("input", "x y"), ("history", [["a", "b"]]),
        ("tools", [{"name": "w"}]), ("tools", '[{"name": "w"}]'), ("Context", "a page"),
        ("images", ["a.png"])]},
    "tool call": (row([user("weather?"), answer("", **TOOL_CALL),
                       {"role": "tool", "content": "rain"}], prompt=None), "'tool_calls'"),
    "tool call in prompt": (row(prompt=[user("a"), answer("", **TOOL_CALL), user("b")], chosen="x",
                                rejected="y"), "'tool_calls'"),
    "a thought in a field of its own": (row(chosen=[*CHAT, answer("x", reasoning_content="hm")]),
                                        "'reasoning_content'"),
    **{f"content {content!r}": (row(prompt=[{"role": "user", "content": content}], chosen="x",
                                    rejected="y"), "content is missing or no string")
       for content in (None, 3, ["hi"], [{"type": "text", "text": "hi"}], {})},
    "content missing": (row(prompt=[{"role": "user"}], chosen="x", rejected="y"),
                        "content is missing"),
    "content of the response": (row(chosen=[*CHAT, answer(None)]), "content is missing"),
    **{f"role {role!r}": (row(prompt=[{"role": role, "content": "hi"}], chosen="x", rejected="y"),
                          "'prompt' must be") for role in ("human", "User", None, ["user"])},
    "a turn that is no message": (row(prompt=["hi"], chosen="x", rejected="y"), "'prompt' must be"),
    "prompt is a number": (row(prompt=3), "'prompt' must be"),
    "prompt ends with the assistant": (row(prompt=CHAT[:2], chosen="x", rejected="y"),
                                       "'prompt' must be"),
    "a prompt that ends with the assistant, inside chosen": (
        row([*CHAT, answer("a")], prompt=None), "'chosen' must be"),
    "no prompt": (row(prompt=None, chosen="x", rejected="y"), "no field 'prompt'"),
    "empty prompt": (row(prompt="", chosen="x", rejected="y"), "no field 'prompt'"),
    "chosen ends with the user": (row(chosen=CHAT), "'chosen' must be"),
    "rejected is empty": (row(rejected=[]), "'rejected' must be"),
    "chosen is a message": (row(chosen=answer("x")), "'chosen' must be"),
    "chosen is null": (row(chosen=None), "no field 'chosen'"),
    "misspelt": (row(chosen=None, choosen="x"), "no field 'chosen' .*choosen"),
    "Anthropic's transcripts": (row(prompt=None, chosen=HH + " a", rejected=HH + " b"),
                                "no field 'prompt'"),
    "transcripts as strings": (row([user("hi")], chosen=HH + " a", rejected=HH + " b"), "as text"),
    "a transcript as prompt": (row([user(HH)], chosen="a", rejected="b"), "as text"),
    "responses that repeat the prompt": (
        row([user("Name a colour.")], chosen="Name a colour. Blue.", rejected="Name a colour.\nNo"),
        "as text"),
    "message lists as text": (row([user("hi")], chosen=str(CHAT), rejected=json.dumps(CHAT)),
                              "as text"),
    "a rendered prompt": (row([user("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")],
                              chosen="a", rejected="b"), "as text|ends"),
    "surrogate in the prompt": (row([user("hi \ud83d")], chosen="x", rejected="y"), "surrogate"),
    "surrogate in a response": (row(chosen="\udc00"), "surrogate"),
    "surrogate in the id": (row(prompt_id="\udc00"), "surrogate")}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_with_line_reason_and_remedy(case, load, tmp_path):
    """Rows that are reduced in silence: another conversation, prompt or role than the file has."""
    bad, reason = BAD[case]
    with pytest.raises(ValueError, match=f"p.jsonl, line 2: .*({reason}).*{REMEDY}") as refusal:
        load(row(), bad)
    assert "\n" not in str(refusal.value)
    assert [r["where"] for r in load(row(), bad, skip_bad_rows=True)] == [
        f"{tmp_path / 'p.jsonl'}, line 1"]


def test_empty_and_equal_responses_are_no_faults_of_a_row(load):
    """Rows refused that the loop drops and counts by itself."""
    given = [("", "No."), ("Same.", "Same."), ("  ", "\n")]
    records = load(*(row([user(c)], chosen=c, rejected=r, prompt=f"prompt {i}", prompt_id=str(i))
                     for i, (c, r) in enumerate(given)))
    assert [(r["data_chosen"], r["data_rejected"]) for r in records] == given


def test_skipped_rows_are_counted_by_reason_with_the_first_place(load, capsys):
    """A thousand lines about a thousand rows, or a silent loss."""
    assert len(load(row(), row(system=3), row(chosen=[]), row(system=4), skip_bad_rows=True)) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "; " not in "".join(said)
    assert said[0].startswith("2 rows dropped") and "line 2" in said[0]
    assert said[1].startswith("1 rows dropped") and "line 3" in said[1]
    with pytest.raises(ValueError, match="no preference rows"):
        load(row(system=3), skip_bad_rows=True)


# ----------------------------------------------------------------------------------------------
# Ids
# ----------------------------------------------------------------------------------------------


def test_one_id_for_all_rows_keeps_them_all_under_ids_that_file_order_does_not_change(load):
    """A constant id ('train') keeps one row of ten; samples joined to another prompt's row."""
    rows = [row([user(f"colour {i}")], prompt_id="train") for i in range(10)] + [
        row([user("alone")], prompt_id="mine")]
    ids = {r["prompt"][0]["content"]: r["prompt_id"] for r in load(*rows)}
    assert len(set(ids.values())) == 11 and ids["alone"] == "mine"
    assert {r["prompt"][0]["content"]: r["prompt_id"] for r in load(*rows[::-1])} == ids


def test_several_pairs_of_one_prompt_are_kept_and_exact_repetitions_left_out(load, capsys):
    """The second pair of a prompt thrown away; or one pair trained on twice."""
    rows = [row(prompt_id=None), row(prompt_id=None, rejected="no"), row(prompt_id="other")]
    records = load(*rows)
    assert len(records) == len({r["prompt_id"] for r in records}) == 2
    assert [r["where"][-1] for r in records] == ["1", "2"]
    assert "1 rows repeat a prompt with both responses" in capsys.readouterr().out


def test_a_missing_id_is_made_of_the_prompt_and_others_are_strings(load):
    """Ids that differ from run to run; 7 and '7' that are two ids in Python and one in a file."""
    first, second, third = load(row(prompt_id=None), row([user("a")], prompt_id=7),
                                row([user("b")], prompt_id="7"))
    assert len(first["prompt_id"]) == 64 and second["prompt_id"] != third["prompt_id"]
    assert second["prompt_id"].startswith("7-") and load(row(prompt_id=0))[0]["prompt_id"] == "0"


# ----------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------

ROWS = [row([user(f"colour {i}, \"é\"\n?")], prompt_id=str(i)) for i in range(3)]
PLAIN = [{"prompt": r["prompt"], "prompt_id": r["prompt_id"], "chosen": r["chosen"][-1]["content"],
          "rejected": r["rejected"][-1]["content"]} for r in ROWS]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    "a.jsonl": write, "bom.jsonl": lambda path, rows: write(path, rows, "utf-8-sig"),
    "without_ending": write, "crlf.jsonl": lambda path, rows: path.write_bytes(
        "\r\n\r\n".join(map(json.dumps, rows)).encode()),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), "utf-8"),
    "array.jsonl": lambda path, rows: path.write_text(json.dumps(rows), "utf-8-sig"),
    "a.parquet": write_parquet,
    "strings.parquet": lambda path, rows: write_parquet(path, PLAIN),
    "strings.csv": lambda path, rows: write_csv(path, PLAIN)}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_records(name, tmp_path):
    """A byte order mark that breaks line 1; a CSV reader that turns 'NA' into nothing."""
    WRITERS[name](tmp_path / name, ROWS)
    records = load_preferences(tmp_path / name)
    assert [{**r, "where": None} for r in records] == [
        {"prompt_id": str(i), "prompt": [user(f"colour {i}, \"é\"\n?")], "where": None,
         "data_chosen": "on the mat", "data_rejected": "at the moon"} for i in range(3)]
    assert all(str(tmp_path / name) in r["where"] and r["where"][-1].isdigit() for r in records)


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", json.dumps(row()).encode() + b"\n\n{oops\n", "line 3: not valid JSON"),
    ("a.jsonl", b"[" * 100_000, "cannot be read"),
    ("b.jsonl", b'{"a":' * 100_000, "line 1: not valid"),
    ("a.jsonl", b"3\n", "line 1: expected a JSON object, found int"),
    ("a.json", b"[3]", "row 1: expected a JSON object"),
    ("a.json", b"[{},", "cannot be read as json"),
    ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}\n',
     "line 1: .*'chosen' occurs twice"),
    ("a.json", b'[{"prompt": [{"role": "user", "content": "a", "role": "user"}]}]',
     "'role' occurs twice"),
    ("a.csv", b"prompt,chosen,rejected,chosen\na,b,c,d\n", "2 columns 'chosen'"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid x\n", "run git lfs pull"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", "run git lfs pull"),
    ("a.json", b"[]", "no preference rows"), ("a.jsonl", b"", "no preference rows"),
    ("a.jsonl", b"\xef\xbb\xbf\n \n", "no preference rows"),
    ("a.csv", b"prompt,chosen,rejected\n", "no preference rows"),
    ("a.jsonl", json.dumps(row(prompt="é"), ensure_ascii=False).encode("latin-1"), "not UTF-8"),
    ("a.jsonl", json.dumps(row()).encode("utf-16"), "not UTF-8"),
    ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "not UTF-8.*decompress"),
    ("a.parquet", b"PAR1", "cannot be read as parquet"),
    ("a.csv", b"prompt,chosen,rejected\na,b,c,d\n", "line 2: .*more cells"),
    ("a.csv", b"prompt,chosen,rejected\na,b\n", "line 2: no field 'rejected'"),
    ("a.csv", b"prompt,chosen,rejected\na,\"[{'role': 'user'}]\",\"[{'role': 'user'}]\"\n",
     "as text")])
def test_a_damaged_file_is_named_in_one_line(name, content, words, tmp_path):
    """A traceback, or a fault in line 3 of 60,000 blamed on the file as a whole."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{words}") as refusal:
        load_preferences(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_a_folder_a_missing_file_and_a_missing_data_set_are_three_things(tmp_path, monkeypatch):
    """'no such file' about a folder that is there; a hub that is asked for a mistyped path."""
    import datasets

    def load_dataset(name, split):
        raise ConnectionError("offline")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source, words in [(tmp_path, "a folder"), (tmp_path / "absent.jsonl", "no such file"),
                          (tmp_path / "absent", "no such file"), ("../absent", "no such file"),
                          ("org/prefs", "neither a file here nor a data set.*offline")]:
        with pytest.raises(ValueError, match=words):
            load_preferences(source)


def test_a_pipe_is_not_waited_for(tmp_path):
    """A run that hangs without a word."""
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match="^--data .*p.jsonl: a pipe or a device"):
        load_preferences(tmp_path / "p.jsonl")


@pytest.fixture
def data_sets(tmp_path, monkeypatch):
    """{name: folder} of data sets as `datasets` and the hub leave them, with their split names."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    train, test = (datasets.Dataset.from_list(rows) for rows in (PLAIN[:2], PLAIN[2:]))
    train.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "splits")
    for folder, name, rows in [("shards", "a", PLAIN[:1]), ("shards", "b", PLAIN[1:2]),
                               ("hub", "train_prefs-00000-of-00001", PLAIN[:2]),
                               ("hub", "test_prefs-00000-of-00001", PLAIN[2:])]:
        (tmp_path / folder / "data").mkdir(parents=True, exist_ok=True)
        write_parquet(tmp_path / folder / f"data/{name}.parquet", rows)
    return tmp_path


@pytest.mark.parametrize("name, own_test", [("saved", False), ("splits", True), ("shards", False),
                                            ("hub", True)])
def test_a_folder_of_datasets_is_read_with_its_splits(name, own_test, data_sets, capsys):
    """A data set that has been downloaded or filtered, and 'name a file in it'; a train split taken
    for the test split."""
    path = data_sets / name
    texts = [r["prompt"][0]["content"] for r in load_preferences(path)]
    assert texts == [row["prompt"] for row in PLAIN[:2]]
    said = capsys.readouterr().out
    assert ("no split train_prefs in it; train is used" in said) == (name != "hub")
    if own_test:
        [record] = load_preferences(path, "test_prefs")
        assert record["prompt"][0]["content"] == PLAIN[2]["prompt"] and "test" in record["where"]
    else:
        with pytest.raises(NoSplit, match=f"{name}: no split test in it .*train"):
            load_preferences(path, "test_prefs")


def test_rows_are_set_aside_where_a_data_set_has_no_test_split(tmp_path, monkeypatch, capsys):
    """Hub data sets with train alone, or train and test, that no run can read."""
    import datasets
    splits = {"train": [{**PLAIN[0], "prompt": f"p{i}", "prompt_id": i} for i in range(10)]}

    def load_dataset(name, split):
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return splits[split]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    s = SimpleNamespace(skip_bad_rows=False, data="org/prefs", ranker="pairrm", eval_ranker=None,
                        eval_prompts=2, variant=None, seed=0)
    left, held_out = setup.read_data(s)
    assert (len(left), len(held_out)) == (8, 2) and "; train is used" in capsys.readouterr().out
    splits["test"] = PLAIN[:1]
    left, held_out = setup.read_data(s)
    assert (len(left), [r["prompt_id"] for r in held_out]) == (10, ["0"])
    splits.clear()
    with pytest.raises(ValueError, match=r"--data org/prefs: no split train in it \(Should be"):
        setup.read_data(s)


def test_the_real_preference_file_parses(real_preferences):
    """A schema of UltraFeedback-binarized that the parser does not know."""
    records = load_preferences(real_preferences)
    assert len(records) == 600 and all(r["prompt"][-1]["role"] == "user" for r in records)


# ----------------------------------------------------------------------------------------------
# Rows against the template and the judge
# ----------------------------------------------------------------------------------------------


def chat_of(template):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


REFUSES_SYSTEM = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
                  "supported') }}{% endif %}" + TEMPLATES["chatml"])
DROPS_SYSTEM = TEMPLATES["chatml"].replace(
    "{{ '<|im_start|>' + m", "{% if m['role'] == 'system' %}{% continue %}{% endif %}"
    "{{ '<|im_start|>' + m", 1)
ONLY_BEFORE_A_QUESTION = TEMPLATES["chatml"].replace(
    "{% for m in messages %}", "{% for m in messages %}{% if m['role'] == 'system' and "
    "messages[-1]['role'] == 'assistant' %}{% continue %}{% endif %}")


@pytest.mark.parametrize("template, reason", [
    (REFUSES_SYSTEM, "System role not supported"), (DROPS_SYSTEM, "leaves out .* system turn"),
    (ONLY_BEFORE_A_QUESTION, "does not begin with its own prompt")])
def test_a_row_that_the_template_cannot_take_is_found_at_the_start(template, reason, load, capsys):
    """A template that fails in hour three, drops a role, or renders prompt and response apart."""
    records, chat = load(row(), row([FRENCH, user("hi")])), chat_of(template)
    with pytest.raises(ValueError, match=f"p.jsonl, line 2: .*{reason}.*--skip-bad-rows"):
        check_rows(records, chat)
    assert check_rows(records, chat, skip_bad_rows=True) == records[:1]
    assert "1 rows dropped" in capsys.readouterr().out
    assert check_rows(records[1:], chat, skip_bad_rows=True) == []


def test_good_rows_pass_with_thoughts_in_their_history_and_whatever_they_answer(load):
    """Rows refused because a template takes old thoughts off, as Qwen3's does."""
    template = TEMPLATES["chatml"].replace(
        "m['content']", "m['content'].split('</think>')[-1] | trim")
    history = [user("a"), answer("<think>b</think>\n\nhello"), user(" more\n")]
    records = load(row(), row(history), row([user("x")], chosen="", rejected=" <|im_end|> "))
    assert check_rows(records, chat_of(template)) == records
    assert check_rows([], chat_of(template)) == []


def test_a_judge_that_cannot_read_a_prompt_is_asked_before_the_run(load):
    """PairRM wants user and assistant in turn, and says so after the sampling; or edits a row."""
    def judge_check(messages):
        messages[0]["content"] = "edited"
        if len(messages) == 1:
            raise ValueError("PairRM wants two turns")
    records = load(row(), row([user("hi")]))
    with pytest.raises(ValueError, match="line 2: PairRM wants two turns.*--skip-bad-rows"):
        check_rows(records, chat_of(TEMPLATES["chatml"]), judge_check)
    assert records[0]["prompt"] == CHAT
