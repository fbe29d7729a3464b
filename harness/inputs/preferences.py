"""Preference rows as strangers write them -> the records of data.py, or one line that says why not.

    {"prompt": "Why?", "chosen": [user, assistant], "rejected": [user, assistant]}
    {"prompt": "Why?" or [system, user], "chosen": "Because.", "rejected": "No."}

The first is UltraFeedback-binarized; a message is {role, content}. The prompt is what chosen and
rejected share, the response is the assistant's last turn. The rule behind all checks: what a row
says is used, or the row is refused by its line; it is never reduced in silence. Columns are known
by name (SYSTEM is used, ASIDE refused): a text under any other name cannot be told from a note.

A record keeps `where` ("prefs.jsonl, line 3"), so that later errors can name it.
Test: pytest tests/test_preferences.py.
"""

import csv
import hashlib
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

from harness.inputs.files import check_characters, check_file, parse_json
from harness.models.distributed import say
from harness.inputs.chat_template import strip_thought

ROLES = ("system", "user", "assistant", "tool")
SYSTEM = ("system", "system_prompt", "system_message")
ASIDE = ("instruction instructions input inputs question query context history conversation "
         "conversations dialogue document documents passage persona tools functions image images "
         "audio video videos").split()
NOTES = ("role", "content", "id", "model", "source", "date", "timestamp")  # may stand in a message
NOTHING = ("", "[]", "{}", "null")  # what data sets write, as text, where they have no tools
FILES = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = {"train_prefs": "train", "test_prefs": "test"}  # UltraFeedback's name -> most others'
AS_TEXT = re.compile(r"""\s*(\[\s*\{\s*['"](role|content|from|value)['"]|(<s>\s*)?\[INST\]|"""
                     r"<\|?(im_start|start_header_id|system|user)\|?>|"
                     r"(#+ *)?(human|user) *:.*\n\s*(#+ *)?(assistant|ai|bot) *:)", re.I | re.S)


def load_preferences(source, split="train_prefs", skip_bad_rows=False):
    """The records of a JSONL, JSON, CSV or parquet file, or of `split` of a data set, on the hub or
    in a folder (NoSplit where it has none of that name).

    Exact repetitions are left out and counted; prompt_ids are made unique. ValueError, one line,
    for the first row that cannot be used; with skip_bad_rows such rows are dropped and counted.
    """
    records, distinct = keep_good(read_rows(source, split), parse_row, skip_bad_rows), {}
    if not records:
        raise ValueError(f"--data {source}: no preference rows in it")
    for record in records:
        content = json.dumps([record[key] for key in ("prompt", "data_chosen", "data_rejected")])
        distinct.setdefault(hashlib.sha256(content.encode()).hexdigest(), record)
    if len(distinct) < len(records):
        say(f"{source}: {len(records) - len(distinct)} rows repeat a prompt with both responses "
            "and were left out")
    # Rows that share an id are all kept, under ids that do not depend on the order of the file.
    uses = Counter(record["prompt_id"] for record in distinct.values())
    for digest, record in distinct.items():
        if uses[record["prompt_id"]] > 1:
            record["prompt_id"] += f"-{digest[:16]}"
    return list(distinct.values())


def split_portions(records, portions, limit=None, seed=0):
    """`portions` disjoint lists of records, shuffled by `seed`: no two share a prompt.

    A prompt takes all its pairs along. Portions hold equally many records where whole prompts allow
    it, at most `limit`; records for which no portion has room are left out.
    """
    shuffled, groups = random.Random(seed).sample(records, len(records)), by_prompt(records)
    if len(groups) < portions:
        raise ValueError(f"{len(records)} preference rows of {len(groups)} prompts cannot be split "
                         f"into {portions} iterations")
    # A prompt waits where the file's first record of it fell in the shuffle. Were it where any of
    # its records comes up first, prompts with many pairs would crowd into the early portions.
    waiting = [key for record in shuffled if record is groups[key := prompt_key(record)][0]]
    share, limit, result = len(records) // portions, limit or len(records), []
    waiting.sort(key=lambda key: len(groups[key]) <= share)  # what exceeds a share has it alone
    for left in range(portions, 0, -1):
        room = min(share, sum(len(groups[key]) for key in waiting) // left)
        most = min(limit, len(waiting) - (left - 1))  # prompts: one at least for each that follows
        taken, size = set(), 0
        for key in waiting:
            if len(taken) < most and (not taken or size + len(groups[key]) <= room):
                taken.add(key)
                size += len(groups[key])
        waiting = [key for key in waiting if key not in taken]
        result.append([record for record in shuffled if prompt_key(record) in taken][:limit])
    return result


def hold_out(records, count, seed=0):
    """(training records, held-out records): `count` prompts, one record of each, as long as they
    take no more than a fifth of the records with them (a small file is mostly for training)."""
    shuffled, held_out, gone = random.Random(seed).sample(records, len(records)), [], 0
    for group in by_prompt(shuffled).values():
        if len(held_out) < count and gone + len(group) <= len(records) // 5:
            held_out.append(group[0])
            gone += len(group)
    return leave_out(shuffled, held_out), held_out


def leave_out(records, held_out):
    """The records whose prompt is not held out, whatever their ids say."""
    known = set(map(prompt_key, held_out))
    return [record for record in records if prompt_key(record) not in known]


def by_prompt(records):
    """{prompt_key: its records}, both in order of appearance."""
    groups = {}
    for record in records:
        groups.setdefault(prompt_key(record), []).append(record)
    return groups


def prompt_key(record):
    """Who says what, without outer spaces. NOT prompt_id: real files give one prompt many ids, and
    one id to all, and portions that are disjoint by id alone train twice on one prompt."""
    return tuple((turn["role"], turn["content"].strip()) for turn in record["prompt"])


def check_rows(records, chat, judge_check=None, skip_bad_rows=False):
    """The records that the model's chat template and the judge can take: found at the start, not
    hours later. judge_check(messages) raises ValueError for a prompt that the judge cannot read."""
    def check(record):
        for name in ("data_chosen", "data_rejected"):
            prompt, _ = chat.render(record["prompt"], record[name])
        for turn in record["prompt"]:  # a template may drop a role that it does not know
            if strip_thought(turn["content"]).strip() not in prompt:
                raise ValueError(f"the chat template leaves out or changes a {turn['role']} turn")
        if judge_check:
            judge_check([dict(turn) for turn in record["prompt"]])
        return record
    return keep_good(((record["where"], record) for record in records), check, skip_bad_rows)


def keep_good(rows, parse, skip_bad_rows):
    """[parse(row)] of (where, row) pairs; `where` goes into the records and into the errors."""
    good, bad = [], {}
    for where, row in rows:
        try:
            good.append(parse(row) | {"where": where})
        except ValueError as error:  # "what is wrong; remedy"
            if not skip_bad_rows:
                raise ValueError(
                    f"{where}: {error}, or drop such rows with --skip-bad-rows") from None
            bad.setdefault(str(error).partition("; ")[0], []).append(where)
    for reason, places in bad.items():
        say(f"{len(places)} rows dropped, the first is {places[0]}: {reason}")
    return good


class NoSplit(ValueError):
    """A data set has no such split."""


def read_rows(source, split):
    """(where, row) pairs; a row is a dict, or a line of JSON that is still to be parsed."""
    path, name = Path(source), str(source)
    check_file("--data", path)
    if path.is_file():
        return read_file(path)
    if not path.is_dir() and (
            name.endswith(FILES) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)):
        raise ValueError(f"--data {name}: no such file")
    missing = None
    for wanted in dict.fromkeys((split, SPLITS.get(split, split))):
        try:
            rows = load_split(name, wanted)
        except NoSplit as error:
            missing = error
            continue
        if wanted != split:
            say(f"{name}: no split {split} in it; {wanted} is taken")
        return ((f"{name}[{wanted}], row {i}", row) for i, row in enumerate(rows, 1))
    raise missing


def load_split(name, split):
    """One split of a data set: of the hub, of a folder of parquet files, or what save_to_disk has
    left. ValueError; NoSplit where only the split is missing."""
    folder = Path(name)
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    shards = sorted(folder.rglob("*.parquet"))
    for shard in shards:
        check_file("--data", shard)
    if folder.is_dir() and not saved and not shards:
        raise ValueError(f"--data {name}: a folder without parquet files; name a file in it "
                         f"({', '.join(FILES)})")
    import datasets  # slow to import, and most runs do not need it
    try:
        if not saved:
            return datasets.load_dataset(name, split=split)
        splits = datasets.load_from_disk(name)
        splits = splits if isinstance(splits, dict) else {"train": splits}
        if split in splits:
            return splits[split]
        why = f"Unknown split. Should be one of {list(splits)}"
    except Exception as error:  # the hub raises a dozen kinds; all mean the same to the user
        why = f"{type(error).__name__}: {error}"
    if "Unknown split" in why:
        raise NoSplit(f"--data {name}: no split {split} in it ({why.rpartition('. ')[2]})")
    raise ValueError(f"--data {name}: neither a file here nor a data set that could be loaded "
                     f"from {'it' if folder.is_dir() else 'the hub'} ({why})")


def read_file(path):
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet  # comes with datasets
            columns_once(parquet.read_schema(path).names)
            table = parquet.read_table(path).to_pylist()
            return [(f"{path}, row {i}", row) for i, row in enumerate(table, 1)]
        text = path.read_text("utf-8-sig")  # with or without the mark that Windows puts first
        if path.suffix == ".csv":
            csv.field_size_limit(2 ** 31 - 1)
            table = csv.DictReader(io.StringIO(text), strict=True)
            columns_once(table.fieldnames or ())
            return [(f"{path}, line {table.line_num}", row) for row in table]
        if text.lstrip().startswith("["):
            return [(f"{path}, row {i}", row) for i, row in enumerate(parse_json(text), 1)]
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: not UTF-8 (byte {error.start}); unpack it if it is "
                         "packed, and save it as UTF-8") from None
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"--data {path}: cannot be read as {path.suffix[1:] or 'JSON'} "
                         f"({str(error).splitlines()[0]})") from None
    lines = enumerate(text.split("\n"), 1)
    return [(f"{path}, line {i}", line) for i, line in lines if line.strip()]


def columns_once(names):
    """ValueError for a table with two columns of one name: only the last would be used."""
    for name, count in Counter(names).items():
        if name and count > 1:
            raise ValueError(f"its header has {count} columns {name!r}; rename or remove one")


def parse_row(row):
    """A dict or a line of JSON -> a record without `where`."""
    try:
        row = parse_json(row) if isinstance(row, str) else row
    except (ValueError, RecursionError) as error:
        why = "too deep" if isinstance(error, RecursionError) else getattr(error, "msg", error)
        raise ValueError(f"not valid JSON ({why}); write one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}; mend it")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(f"no field '{name}' (need prompt, chosen, rejected; found "
                             f"{', '.join(sorted(map(str, row))) or 'none'}); rename the columns")
    *context, chosen = turns("chosen", row["chosen"], "assistant")
    *other, rejected = turns("rejected", row["rejected"], "assistant")
    if context and other and context != other:
        raise ValueError("'chosen' and 'rejected' answer different conversations; mend them: only "
                         "their last turns may differ")
    prompt = with_system(row, find_prompt(row, context or other))
    prompt_id = row.get("prompt_id")
    if prompt_id in (None, ""):
        prompt_id = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
    record = {"prompt_id": str(prompt_id), "prompt": prompt,
              "data_chosen": chosen["content"], "data_rejected": rejected["content"]}
    check_characters(record)
    return record


def turns(name, value, role):
    """A checked copy of a message list that ends with `role`'s; a string is one turn of `role`."""
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not (isinstance(value, list) and value and all(
            isinstance(turn, dict) and turn.get("role") in ROLES for turn in value)
            and (value[-1]["role"] == role or (role, value[-1]["role"]) == ("user", "tool"))):
        raise ValueError(f"'{name}' must be a string, or a list of messages {{role, content}} that "
                         f"ends with the {role}'s; mend it (roles: {', '.join(ROLES)})")
    for turn in value:
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"'{name}' has a turn whose content is missing or no string; write "
                             "its text as one string")
        for key, more in turn.items():  # data sets fill in None for what other rows have
            if key not in NOTES and says_something(more):
                raise ValueError(f"'{name}' has a turn with '{key}', which would be lost; write it "
                                 "into the content, or remove it")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def find_prompt(row, context):
    """What comes before the response: what the transcripts share (`context`, or []), or `prompt`,
    which must not contradict it. UltraFeedback's `prompt` is the user's turn alone."""
    prompt = turns("prompt", row["prompt"], "user") if row.get("prompt") else []
    if context:
        told, said = ([bare(turn) for turn in part][has_system(part):]
                      for part in (prompt, context))
        if told and told != said and not (len(told) == 1 and told[0] in said):
            raise ValueError("'prompt' says something else than the conversation in 'chosen' and "
                             "'rejected'; remove or mend it")
        return turns("chosen", context, "user")
    if not prompt:
        raise ValueError("no field 'prompt' that is a string or messages ending with the user's; "
                         "add what chosen and rejected answer")
    # A conversation written as text would be rendered as one turn, or trained on as an answer.
    question = prompt[-1]["content"].strip()
    texts = [row[name] for name in ("chosen", "rejected") if isinstance(row[name], str)]
    repeats = len(question.split()) > 2 and all(t.strip().startswith(question) for t in texts)
    if texts and (repeats or all(map(AS_TEXT.match, texts))) or (
            AS_TEXT.match(question) and question.endswith((":", "]", ">", "assistant"))):
        raise ValueError("a conversation is written as text, or the responses repeat the prompt; "
                         "write messages, or the answers alone")
    return prompt


def with_system(row, prompt):
    """The prompt with the row's system turn, wherever it stands. Refuses a row that has several, or
    other text beside the conversation."""
    found = [(name, row[name]) for name in SYSTEM if str(row.get(name) or "").strip()]
    listed = [(name, turn) for name in ("prompt", "messages") if isinstance(row.get(name), list)
              for turn in row[name]]
    found += [(name, turn.get("content")) for name, turn in listed
              if isinstance(turn, dict) and turn.get("role") == "system"]
    for name, text in found:
        [system] = turns(name, text if isinstance(text, str) else None, "system")
        if bare(system) in map(bare, prompt):
            continue
        if has_system(prompt):
            raise ValueError(f"'{name}' has another system turn than the conversation; mend one")
        prompt = [system, *prompt]
    said = "\n".join(turn["content"] for turn in prompt)
    for name, value in row.items():
        if name is None:
            raise ValueError("the row has more cells than the header; mend it")
        if name.lower() in ASIDE and says_something(value) and str(value).strip() not in said:
            raise ValueError(f"the column '{name}' would change the conversation and is not used; "
                             "write it into the messages, or remove it")
    return prompt


def says_something(value):
    """Whether a column or a key beside the conversation has a text, or a structure."""
    return isinstance(value, (str, list, dict)) and str(value).strip() not in NOTHING


def has_system(messages):
    return bool(messages) and messages[0]["role"] == "system"


def bare(turn):
    return turn["role"], turn["content"].strip()
