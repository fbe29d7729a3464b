"""--samples-from FILE: samples of the policy that another engine (vLLM, a cluster) has made.

The run writes the prompts of an iteration to iter_K/prompts.jsonl, and stops if FILE is missing:

    {"prompt_id": "...", "prompt": messages, "prompt_ids": [1, 523, ...], "max_new_tokens": 1024}

Sample from the policy that the message names. Use prompt_ids unchanged: another use of the template
would make another prompt. Write FILE, and run the same command again:

    {"prompt_id": "...", "samples": [{"ids": [523, ..., 2], "finished": true}, one a response]}

ids: what was sampled, with the stop token. finished: false if the engine stopped at its limit. An
engine that returns no ids may give "text" instead: the tokenizer makes the ids, and a finished text
gets the end token. Trap: engines leave special tokens out of a text, so a thought or the name of a
channel may run into the answer.

Lines for other prompts are ignored. {k} in the name of FILE means the iteration. FILE is copied into
samples.jsonl; after that is finished, a change of FILE has no effect. A change before that, after a
stopped command has used some rows, is an error.
Test: pytest tests/test_engine_samples.py.
"""

import itertools
from pathlib import Path

import data
from harness.models import weights
from harness.inputs.files import check_file, parse_json
from harness.runs.output_files import write_jsonl, write_text
from harness.runs.run_folder import find_rows
from harness.models.distributed import checksum, only_first, say
from harness.inputs.chat_template import HALF

READ = "samples_from.sha256"  # in iter_K: the checksum of FILE, while its rows are being used


def samples(records, policy, start, s, stream_name=None):
    """The rows of samples.jsonl, as train_loop.sample_responses yields them. Before the first row,
    ValueError says what is missing or wrong, and what to do. stream_name: the random stream of our
    own sampler, not used here."""
    source, chat = file_of(s, s.iteration), start.chat
    here = start.run.path / f"iter_{s.iteration}"
    only_first(ask_for, source, policy, start, s)
    found = read(source, s.responses_per_prompt)
    only_first(check, found, source, policy, start, s)
    only_first(check_unchanged, source, here)
    records = iter(records)
    while chunk := list(itertools.islice(records, 1000)):  # many texts a call are encoded faster
        samples = [found[record["prompt_id"]] for record in chunk]
        texts = [[y["text"] for y in ys if not y.get("ids")] for ys in samples]
        _, encoded = chat.encode([record["prompt"] for record in chunk], texts)
        for row, ys, ids_of_texts in zip(wanted(chunk, chat, s), samples, encoded):
            remaining, responses = iter(ids_of_texts), []
            for y in ys:
                ids = y.get("ids")
                if not ids:
                    ids = next(remaining)[:row["max_new_tokens"]]
                    ids = ids_of_text(ids, y["finished"], chat)
                responses.append({"ids": ids, "text": chat.text(ids),
                                  "finished": ids[-1] in chat.stop_ids})
            yield {"prompt_id": row["prompt_id"], "samples": responses}
    if len(find_rows(here / "samples.jsonl")) == len(start.portions[s.iteration - s.first]):
        (here / READ).unlink(missing_ok=True)  # the last process to finish does this


def file_of(s, k):
    """The FILE of iteration k. ValueError for a pipe or a folder."""
    source = Path(s.samples_from.replace("{k}", str(k)))
    check_file("--samples-from", source)
    if source.is_dir():
        raise ValueError(f"--samples-from {source}: no regular file; name a file of JSON lines")
    return source


def files(s):
    """The FILEs of all iterations."""
    return [file_of(s, k) for k in range(s.first, s.first + s.iterations)] if s.samples_from else []


def wanted(records, chat, s):
    """The rows of prompts.jsonl."""
    for record, ids, room in data.encode_prompts(records, chat, s.max_prompt_length, s.max_length):
        yield {"prompt_id": record["prompt_id"], "prompt": record["prompt"], "prompt_ids": ids,
               "max_new_tokens": min(s.max_new_tokens, room)}


def ask_for(source, policy, start, s):
    """If FILE is missing, writes prompts.jsonl and raises ValueError, which asks for FILE."""
    prompts = start.run.path / f"iter_{s.iteration}" / "prompts.jsonl"
    if not source.exists():
        write_jsonl(prompts, wanted(start.portions[s.iteration - s.first], start.chat, s))
        stops = " ".join(map(str, sorted(start.chat.stop_ids)))
        raise ValueError(f"--samples-from {source} is not there yet: sample the prompts of "
                         f"{prompts} from {policy} (stop tokens {stops}), write the samples to "
                         f"{source}, and run the same command again")


def read(source, count):
    """{prompt_id: [{ids or text, finished}]} of a FILE. ValueError that names its line."""
    try:
        lines = source.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--samples-from {source}: not UTF-8 (byte {error.start}); save it as "
                         "UTF-8") from None
    except OSError as error:
        raise ValueError(f"--samples-from {source}: cannot be read ({error.strerror})") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompt_id, ys = parse(line, count)
                if prompt_id in found:
                    raise ValueError(f"prompt_id {prompt_id} occurs twice")
            except ValueError as error:
                raise ValueError(f"--samples-from {source}, line {number}: {error}") from None
            found[prompt_id] = ys
    return found


def parse(line, count):
    """(prompt_id, samples) of a line."""
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:
        why = "too deep" if isinstance(error, RecursionError) else getattr(error, "msg", error)
        raise ValueError(f"not valid JSON ({why}); write one object a line") from None
    if not isinstance(row, dict) or not isinstance(row.get("samples"), list):
        raise ValueError("expected an object with prompt_id and samples")
    if not isinstance(row.get("prompt_id"), str):
        raise ValueError("prompt_id must be the string that prompts.jsonl has")
    if len(row["samples"]) != count:
        raise ValueError(f"{len(row['samples'])} samples; --responses-per-prompt is {count}")
    for y in row["samples"]:
        if not (isinstance(y, dict) and isinstance(y.get("finished"), bool)
                and (is_ids(y["ids"]) if y.get("ids") is not None else is_text(y.get("text")))):
            raise ValueError('a sample must be {"ids": [token ids, one or more], "finished": true '
                             'or false}, or have "text", a string of whole characters, instead of '
                             "ids")
        if not y.get("ids") and not y["text"] and not y["finished"]:
            raise ValueError("a sample is empty and not finished: the engine gave no text, perhaps "
                             'none after a thought; give its "ids"')
    return row["prompt_id"], row["samples"]


def is_ids(value):
    return isinstance(value, list) and value != [] and all(type(i) is int for i in value)


def is_text(value):
    return isinstance(value, str) and not HALF.search(value)


def check(found, source, policy, start, s):
    """ValueError for the first prompt whose samples are missing, or could not be our sampler's."""
    chat, portion = start.chat, start.portions[s.iteration - s.first]
    vocabulary, only_text = weights.load_config(policy).vocab_size, False
    for row in wanted(portion, chat, s):
        where = f"prompt_id {row['prompt_id']}"
        if row["prompt_id"] not in found:
            raise ValueError(f"--samples-from {source} has no line for {where}")
        for y in found[row["prompt_id"]]:
            try:
                if y.get("ids"):
                    check_ids(y, row["max_new_tokens"], vocabulary, chat.stop_ids)
                else:
                    chat.render(row["prompt"], y["text"])
                    only_text = True
            except ValueError as error:
                raise ValueError(f"--samples-from {source}, {where}: {error}") from None
    special = [token.content for token in chat.tokenizer.added_tokens_decoder.values()
               if token.special and (token.content in chat.lead or "think>" in token.content)]
    if only_text and special:
        say(f'note: {source} has samples without "ids"; an engine leaves {", ".join(special)} out '
            "of a text, so that a thought or a channel's name may be read as the answer")


def check_ids(y, limit, vocabulary, stop_ids):
    """ValueError for ids that the policy could not sample, or after which it would have stopped."""
    ids, remedy = y["ids"], f"stop at one of {' '.join(map(str, sorted(stop_ids)))}, and keep it"
    ended = ids[-1] in stop_ids
    outside = [i for i in ids if not 0 <= i < vocabulary]
    if outside:
        raise ValueError(f"id {outside[0]} is not in the policy's vocabulary of {vocabulary}")
    if len(ids) > limit:
        raise ValueError(f"{len(ids)} ids; its max_new_tokens is {limit}")
    if not stop_ids.isdisjoint(ids[:-1]):
        raise ValueError(f"the ids continue after a stop token; {remedy}")
    if y["finished"] and not ended:
        raise ValueError(f"finished, but the last id, {ids[-1]}, is no stop token; {remedy}")
    # At the limit an engine may check the length first.
    if ended and not y["finished"] and len(ids) < limit:
        raise ValueError("not finished, but the last id is a stop token; fix one of the two")


def check_unchanged(source, here):
    """ValueError if FILE has changed after a stopped command has used rows of it."""
    before, now = here / READ, checksum(source)
    used = any(part.stat().st_size for part in parts(here))
    if used and before.exists() and before.read_text("utf-8") != now:
        raise ValueError(f"--samples-from {source} has changed since a stopped command used rows "
                         f"of it; put the old one back, or delete {here}/samples.jsonl.part* to "
                         "use this one")
    write_text(before, now)


def parts(here):
    """The files with the rows that processes have used so far; see run_folder.py."""
    return here.glob("samples.jsonl.part*of*")


def ids_of_text(ids, finished, chat):
    """Ids of a text, which end with the end token -> without it if the text is not finished."""
    return ids[:-1] if not finished and len(ids) > 1 and ids[-1] == chat.end_id else ids
