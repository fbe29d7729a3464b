"""Preference rows of a user's file -> the records of data.py, or one line that says what is wrong.

    {"prompt": "Why?", "chosen": [user, assistant], "rejected": [user, assistant]}
    {"prompt": "Why?" or [system, user], "chosen": "Because.", "rejected": "No."}

The first form is UltraFeedback-binarized; a message is {role, content}. The prompt is what chosen
and rejected share, the response is the assistant's last turn. All checks follow one rule: what a
row says is used, or an error names the row; nothing is dropped silently. Columns are known by name:
SYSTEM is used, ASIDE is refused. A text in any other column may be a note, and is ignored.

A record keeps `where` ("prefs.jsonl, line 3") for later errors.
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
NOTES = ("role", "content", "id", "model", "source", "date", "timestamp")  # allowed in a message
NOTHING = ("", "[]", "{}", "null")  # what data sets write for "no tools", as text
FILES = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = {"train_prefs": "train", "test_prefs": "test"}  # UltraFeedback's name -> the usual one
AS_TEXT = re.compile(r"""\s*(\[\s*\{\s*['"](role|content|from|value)['"]|(<s>\s*)?\[INST\]|"""
                     r"<\|?(im_start|start_header_id|system|user)\|?>|"
                     r"(#+ *)?(human|user) *:.*\n\s*(#+ *)?(assistant|ai|bot) *:)", re.I | re.S)


def load_preferences(source, split="train_prefs", skip_bad_rows=False):
    """The records of a JSONL, JSON, CSV or parquet file, or of `split` of a data set, on the hub or
    in a folder (NoSplit if it has no split of that name).

    Exact repetitions are left out and counted; prompt_ids are made unique. ValueError, one line,
    for the first row that cannot be used; with skip_bad_rows such rows are dropped and counted.
    """
    records = keep_good(read_rows(source, split), parse_row, skip_bad_rows)
    if not records:
        raise ValueError(f"--data {source}: no preference rows in it")
    distinct = {}  # digest of the content -> record
    for record in records:
        content = json.dumps([record[key] for key in ("prompt", "data_chosen", "data_rejected")])
        distinct.setdefault(hashlib.sha256(content.encode()).hexdigest(), record)
    if len(distinct) < len(records):
        say(f"{source}: {len(records) - len(distinct)} rows repeat a prompt with both responses "
            "and were left out")
    # Different rows that share an id get new ids, which do not depend on the order of the file.
    uses = Counter(record["prompt_id"] for record in distinct.values())
    for digest, record in distinct.items():
        if uses[record["prompt_id"]] > 1:
            record["prompt_id"] += f"-{digest[:16]}"
    return list(distinct.values())


def split_portions(records, portions, limit=None, seed=0):
    """`portions` disjoint lists of records, shuffled by `seed`: no two share a prompt.

    All pairs of a prompt go into the same portion. The portions have equally many records as far as
    whole prompts allow, and at most `limit`. Records that no portion has room for are left out.
    """
    shuffled = random.Random(seed).sample(records, len(records))
    groups, limit = by_prompt(records), limit or len(records)
    if len(groups) < portions:
        raise ValueError(f"{len(records)} preference rows of {len(groups)} prompts cannot be split "
                         f"into {portions} iterations")
    waiting = []
    for record in shuffled:
        key = prompt_key(record)
        # A prompt is placed where the file's first record of it is. If the first one in the shuffle
        # counted, prompts with many pairs would crowd into the early portions.
        if record is groups[key][0]:
            waiting.append(key)
    # Prompts that exceed a share come first: each fills a portion alone.
    share = len(records) // portions
    waiting.sort(key=lambda key: len(groups[key]) > share, reverse=True)

    result = []
    for left in range(portions, 0, -1):
        room = min(share, sum(len(groups[key]) for key in waiting) // left)
        most = len(waiting) - (left - 1)  # leaves one prompt for each later portion
        taken = first_that_fit(waiting, groups, room, min(limit, most))
        waiting = [key for key in waiting if key not in taken]
        result.append([record for record in shuffled if prompt_key(record) in taken][:limit])
    return result


def first_that_fit(keys, groups, room, most):
    """The first prompts, at most `most`, whose records fit into `room`; at least one prompt."""
    taken, size = set(), 0
    for key in keys:
        fits = size + len(groups[key]) <= room
        if len(taken) < most and (fits or not taken):
            taken.add(key)
            size += len(groups[key])
    return taken


def hold_out(records, count, seed=0):
    """(training records, held-out records). Held out are `count` prompts, one record of each. They
    are fewer in a small file: all records of these prompts are at most a fifth of it."""
    shuffled = random.Random(seed).sample(records, len(records))
    held_out, gone = [], 0
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
    """Who says what, without outer spaces. Not prompt_id: some files give a prompt several ids, or
    all prompts the same one. Portions that are disjoint by id would train twice on one prompt."""
    return tuple((turn["role"], turn["content"].strip()) for turn in record["prompt"])


def check_rows(records, chat, judge_check=None, skip_bad_rows=False):
    """The records that the model's chat template and the judge accept; a run finds the others
    before it begins. judge_check(messages) raises ValueError for a prompt that the judge cannot
    read."""
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
    """[parse(row)] of (where, row) pairs. `where` is added to records and errors."""
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
    """(where, row) pairs; a row is a dict, or a line of JSON that is not parsed yet."""
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
            say(f"{name}: no split {split} in it; {wanted} is used")
        return ((f"{name}[{wanted}], row {i}", row) for i, row in enumerate(rows, 1))
    raise missing


def load_split(name, split):
    """One split of a data set: of the hub, of a folder of parquet files, or written by
    save_to_disk. NoSplit if only the split is missing, otherwise ValueError."""
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
    except Exception as error:  # the hub raises many kinds; for the user all mean the same
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
        text = path.read_text("utf-8-sig")  # with or without a byte order mark
        if path.suffix == ".csv":
            csv.field_size_limit(2 ** 31 - 1)
            table = csv.DictReader(io.StringIO(text), strict=True)
            columns_once(table.fieldnames or ())
            return [(f"{path}, line {table.line_num}", row) for row in table]
        if text.lstrip().startswith("["):
            return [(f"{path}, row {i}", row) for i, row in enumerate(parse_json(text), 1)]
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: not UTF-8 (byte {error.start}); decompress it if "
                         "it is compressed, and save it as UTF-8") from None
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
        raise ValueError(f"expected a JSON object, found {type(row).__name__}; fix it")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(f"no field '{name}' (need prompt, chosen, rejected; found "
                             f"{', '.join(sorted(map(str, row))) or 'none'}); rename the columns")
    *context, chosen = turns("chosen", row["chosen"], "assistant")
    *other, rejected = turns("rejected", row["rejected"], "assistant")
    if context and other and context != other:
        raise ValueError("'chosen' and 'rejected' answer different conversations; fix them: only "
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
    """A checked copy of a message list that ends with a turn of `role`. A string is such a turn."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    last = ("user", "tool") if role == "user" else (role,)
    if not (isinstance(value, list) and value and all(map(has_role, value))
            and value[-1]["role"] in last):
        raise ValueError(f"'{name}' must be a string, or a list of messages {{role, content}} that "
                         f"ends with the {role}'s; fix it (roles: {', '.join(ROLES)})")
    for turn in value:
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"'{name}' has a turn whose content is missing or no string; write "
                             "its text as one string")
        for key, more in turn.items():  # data sets fill in None for what other rows have
            if key not in NOTES and says_something(more):
                raise ValueError(f"'{name}' has a turn with '{key}', which would be lost; write it "
                                 "into the content, or remove it")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def has_role(turn):
    return isinstance(turn, dict) and turn.get("role") in ROLES


def find_prompt(row, context):
    """What comes before the response: the turns that the transcripts share (`context`, or []), else
    `prompt`. The two must not contradict each other."""
    prompt = turns("prompt", row["prompt"], "user") if row.get("prompt") else []
    if context:
        if not agrees(prompt, context):
            raise ValueError("'prompt' says something else than the conversation in 'chosen' and "
                             "'rejected'; remove or fix it")
        return turns("chosen", context, "user")
    if not prompt:
        raise ValueError("no field 'prompt' that is a string or messages ending with the user's; "
                         "add what chosen and rejected answer")
    if is_dialogue(prompt[-1]["content"].strip(), row["chosen"], row["rejected"]):
        raise ValueError("a conversation is written as text, or the responses repeat the prompt; "
                         "write messages, or the answers alone")
    return prompt


def agrees(prompt, context):
    """Whether `prompt` is empty, all of the context, or one turn of it, as in UltraFeedback. A
    system turn may be missing in either."""
    asked = [bare(turn) for turn in prompt][has_system(prompt):]
    shared = [bare(turn) for turn in context][has_system(context):]
    if not asked or asked == shared:
        return True
    return len(asked) == 1 and asked[0] in shared


def is_dialogue(question, *responses):
    """Whether a conversation is written as text, which would be rendered as one turn, or trained on
    as an answer. Responses that are message lists do not count."""
    texts = [text for text in responses if isinstance(text, str)]
    if texts and all(map(AS_TEXT.match, texts)):
        return True
    if texts and len(question.split()) > 2 and all(
            text.strip().startswith(question) for text in texts):
        return True
    return AS_TEXT.match(question) and question.endswith((":", "]", ">", "assistant"))


def with_system(row, prompt):
    """The prompt with the row's system turn, from whatever column. ValueError for a row that has
    several, or other text beside the conversation."""
    found = [(name, row[name]) for name in SYSTEM if str(row.get(name) or "").strip()]
    for name in ("prompt", "messages"):
        listed = row[name] if isinstance(row.get(name), list) else []
        found += [(name, turn.get("content")) for turn in listed
                  if isinstance(turn, dict) and turn.get("role") == "system"]
    for name, text in found:
        [system] = turns(name, text if isinstance(text, str) else None, "system")
        if bare(system) in map(bare, prompt):
            continue
        if has_system(prompt):
            raise ValueError(f"'{name}' has another system turn than the conversation; fix one")
        prompt = [system, *prompt]
    check_columns(row, "\n".join(turn["content"] for turn in prompt))
    return prompt


def check_columns(row, said):
    """ValueError for a column of ASIDE whose text is not in `said`, the prompt."""
    for name, value in row.items():
        if name is None:
            raise ValueError("the row has more cells than the header; fix it")
        if name.lower() in ASIDE and says_something(value) and str(value).strip() not in said:
            raise ValueError(f"the column '{name}' would change the conversation and is not used; "
                             "write it into the messages, or remove it")


def says_something(value):
    """Whether the value of a column, or of a message's other key, has a text or a structure."""
    return isinstance(value, (str, list, dict)) and str(value).strip() not in NOTHING


def has_system(messages):
    return bool(messages) and messages[0]["role"] == "system"


def bare(turn):
    return turn["role"], turn["content"].strip()
