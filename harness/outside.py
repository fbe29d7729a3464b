"""--samples-from: samples that another engine (vLLM, a cluster) has drawn from the policy.

The run writes the prompts of an iteration to iter_K/prompts.jsonl, and stops if FILE is not there:

    {"prompt_id": "...", "prompt": messages, "prompt_ids": [1, 523, ...], "max_new_tokens": 1024}

Sample behind prompt_ids as they are (a template applied once more would be another prompt), from
the policy that the message names. FILE, read by the same command when it is run again:

    {"prompt_id": "...", "samples": [{"text": "...", "finished": true}, one a response]}

finished: false where the engine stopped at its limit; such a text gets no end token. Lines for
other prompts are ignored. {k} in the name of FILE stands for the iteration.
Test: pytest tests/test_outside.py.
"""

import itertools
from pathlib import Path

import data
from harness.files import check_file
from harness.rundir import read_jsonl, write_jsonl
from harness.scale import only_first


def samples(records, policy, start, s):
    """The rows of samples.jsonl, as train_loop.sample_responses yields them. ValueError names what
    is missing, and what to do about it."""
    source = Path(str(s.samples_from).replace("{k}", str(s.iteration)))
    only_first(ask_for, source, policy, start, s)
    found = read(source, s.responses_per_prompt)
    for prompt_id in (record["prompt_id"] for record in start.portions[s.iteration - s.first]):
        if prompt_id not in found:  # before the first of them is used
            raise ValueError(f"--samples-from {source} has no line for prompt_id {prompt_id}")
    records = iter(records)
    while chunk := list(itertools.islice(records, 1000)):
        samples = [found[record["prompt_id"]] for record in chunk]
        _, answers = start.chat.encode([record["prompt"] for record in chunk],
                                       [[y["text"] for y in ys] for ys in samples])
        for row, ys, responses in zip(wanted(chunk, start.chat, s), samples, answers):
            yield {"prompt_id": row["prompt_id"], "samples": [
                sampled(ids[:row["max_new_tokens"]], y["finished"], start.chat)
                for y, ids in zip(ys, responses)]}


def wanted(records, chat, s):
    """The rows of prompts.jsonl."""
    for record, ids, room in data.encode_prompts(records, chat, s.max_prompt_length, s.max_length):
        yield {"prompt_id": record["prompt_id"], "prompt": record["prompt"], "prompt_ids": ids,
               "max_new_tokens": min(s.max_new_tokens, room)}


def ask_for(source, policy, start, s):
    """Writes prompts.jsonl; ValueError where nobody has answered it."""
    prompts = start.run.folder / f"iter_{s.iteration}" / "prompts.jsonl"
    if not source.exists():
        write_jsonl(prompts, wanted(start.portions[s.iteration - s.first], start.chat, s))
        stops = " ".join(map(str, sorted(start.chat.stop_ids)))
        raise ValueError(f"--samples-from {source} is not there yet: sample the prompts of "
                         f"{prompts} from {policy} (stop tokens {stops}), write the samples to "
                         f"{source}, and run the same command again")


def read(source, count):
    """{prompt_id: [{text, finished}]} of a FILE. ValueError that names its line."""
    found = {}
    check_file("--samples-from", source)
    for number, row in read_jsonl(source):
        where = f"--samples-from {source}, line {number}"
        if not isinstance(row, dict) or not isinstance(row.get("samples"), list):
            raise ValueError(f"{where}: expected an object with prompt_id and samples")
        if row.get("prompt_id") in found:
            raise ValueError(f"{where}: prompt_id {row['prompt_id']} stands there twice")
        if len(row["samples"]) != count:
            raise ValueError(f"{where}: {len(row['samples'])} samples; --responses-per-prompt is "
                             f"{count}")
        for y in row["samples"]:
            if not (isinstance(y, dict) and isinstance(y.get("text"), str)
                    and isinstance(y.get("finished"), bool)):
                raise ValueError(f'{where}: a sample must be {{"text": a string, "finished": true '
                                 "or false}")
        found[row.get("prompt_id")] = row["samples"]
    return found


def sampled(ids, finished, chat):
    """A sample as our own sampler would have left it. Its ids are the tokenizer's, not the
    engine's: log-probs are those of the text as the template writes it."""
    if not finished and len(ids) > 1 and ids[-1] == chat.end_id:
        ids = ids[:-1]
    return {"ids": ids, "text": chat.text(ids), "finished": ids[-1] in chat.stop_ids}
