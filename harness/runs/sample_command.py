"""The command line of sample.py: answers one prompt, chats, or writes AlpacaEval's model outputs.

    python sample.py --model runs/toy/iter_3/policy --prompt "describe the fox"
    python sample.py --model runs/toy/iter_3/policy --interactive
    python sample.py --model FOLDER --alpaca-eval instructions.json --output outputs.json

The token loop is in sample.py, templates in harness/inputs/chat_template.py, loading in
harness/models/weights.py.
Test: pytest tests/test_sample_command.py.
"""

from harness.runs import exits

exits.before(__name__, "nothing had begun")  # Ctrl-C is one line while libraries load, too

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import torch
import transformers

import sample
from harness.inputs import chat_template
from harness.models import compatibility, weights
from harness.inputs.files import check_characters, check_file, is_special, parse_json
from harness.runs.output_files import check_writable, printable, write_text
from harness.runs.settings import as_path, as_text

MAX_NEW_TOKENS = 512  # if the user gives no limit and the context has room


def main(argv=None):
    args = parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_args(args)
    rows = read_instructions(args.alpaca_eval) if args.alpaca_eval else []
    answer = load_answerer(args)
    if args.interactive:
        interact(answer)
    elif rows:
        texts = answer([user_turn(row["instruction"]) for row in rows], progress=True)
        write_alpaca(args, rows, texts)
    else:
        print(printable(answer([user_turn(args.prompt)])[0]))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Sample from a policy: one prompt, a chat, or AlpacaEval's model outputs.",
        epilog='python sample.py --model runs/toy/iter_3/policy --prompt "describe the fox"')
    add = parser.add_argument
    add("--model", type=as_path, required=True,
        help="hub id, folder (a run's iter_K/policy) or .gguf file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", type=as_text, help="answer this once")
    what.add_argument("--interactive", action="store_true", help="chat with history; Ctrl-D ends")
    what.add_argument("--alpaca-eval", type=as_path, metavar="FILE",
                      help="JSON list of objects with 'instruction' [and 'dataset']")
    add("--output", type=as_path, metavar="FILE",
        help="file to write for --alpaca-eval: instruction, output, generator")
    add("--generator", type=as_text,
        help="name of the model in --output (default: the model folder's name)")
    add("--max-new-tokens", type=int, help="cut responses here (default: what the context has room "
                                           f"for, at most {MAX_NEW_TOKENS})")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy, 1 the model itself")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that have this "
        "probability together")
    add("--slots", type=int, default=16, help="prompts that are answered at a time; more need more "
        "memory")
    add("--seed", type=int, default=0, help="same seed, same samples, with any --slots")
    add("--chat-template", type=as_path, metavar="FILE",
        help="Jinja file, for a tokenizer that has no template")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"),
        help="default: bfloat16 on a GPU, float32 on the CPU")
    return parser.parse_args(argv)


def check_args(args):
    """ValueError for flags that would fail only after the work, or would be misread."""
    checks = [
        (bool(args.alpaca_eval) == bool(args.output), "--alpaca-eval and --output go together"),
        (args.max_new_tokens is None or args.max_new_tokens >= 1,
         f"--max-new-tokens {args.max_new_tokens}: must be at least 1"),
        (args.slots >= 1, f"--slots {args.slots}: must be at least 1"),
        (args.seed >= 0, f"--seed {args.seed}: must be 0 or positive"),
        (0 <= args.temperature < math.inf,  # false for nan as well
         f"--temperature {args.temperature}: must be 0 (greedy) or a positive number"),
        (0 < args.top_p <= 1, f"--top-p {args.top_p}: must be in (0, 1]")]
    for fine, message in checks:
        if not fine:
            raise ValueError(message)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device {args.device}: {exits.one_line(error)}") from None
    if args.output:
        check_characters(generator(args), "--generator (or the name of --model's folder)")
        check_writable(args.output, [(flag, path) for flag, path in (
            ("--alpaca-eval", args.alpaca_eval), ("--chat-template", args.chat_template),
            ("--model", args.model)) if path])


def read_instructions(path, flag="--alpaca-eval"):
    """AlpacaEval's list of objects. ValueError names the wrong entry."""
    check_file(flag, path)
    try:
        rows = parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {path}: cannot be read as JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{flag} {path}: expected a list of objects, one or more")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
            raise ValueError(f"{flag} {path}: entry {i} has no string 'instruction'")
        check_characters(row, f"{flag} {path}: entry {i}")
    return rows


def load_answerer(args):
    """Returns a function from message lists to texts."""
    weights.load_config(args.model)  # first: it has the clearest error if this is not a model
    tokenizer = chat_template.load_tokenizer(args.model, args.chat_template)
    chat = chat_template.ChatFormat(tokenizer, weights.model_stop_ids(args.model))
    dtype = args.dtype or ("bfloat16" if torch.device(args.device).type == "cuda" else "float32")
    model = weights.load_model(args.model, getattr(torch, dtype), args.device)
    seeds = itertools.count(args.seed * 1_000_003)  # each turn of a chat gets new ones
    sampler, probed = None, 0

    def answer(conversations, progress=False):
        nonlocal sampler, probed
        prompt_ids = [chat.prompt_ids(messages) for messages in conversations]
        limits = response_limits(args.max_new_tokens, prompt_ids, model.config)
        longest = max(len(ids) + limit for ids, limit in zip(prompt_ids, limits))
        probe = compatibility.probe_length(model.config, longest)
        if probe > probed:  # the first turn, or one longer than an attention window
            sampler, probed = compatibility.choose_sampler(model, prompt_ids[0], probe, note), probe
        responses = sample.generate(
            model, prompt_ids, by=sampler, stop_ids=chat.stop_ids, max_new_tokens=limits,
            slots=args.slots, temperature=args.temperature, top_p=args.top_p, progress=progress,
            seeds=list(itertools.islice(seeds, len(prompt_ids))))
        cut = sum(ids[-1] not in chat.stop_ids for ids in responses)
        if cut:
            note(f"note: {cut} of {len(responses)} cut, the longest at {max(map(len, responses))} "
                 "tokens")
        return chat.texts(responses)  # what a judge would read
    return answer


def response_limits(max_new_tokens, prompt_ids, config):
    """One limit for each prompt, so that a long prompt does not shorten the others' answers."""
    context = sample.context_length(config)
    if (max_new_tokens or 0) >= context:
        raise ValueError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the "
                         f"model's context of {context}")
    for i, ids in enumerate(prompt_ids):
        if len(ids) >= context:
            raise ValueError(f"prompt {i} has {len(ids)} tokens, and the model's context of "
                             f"{context} leaves no room for an answer; shorten it")
    return [min(max_new_tokens or MAX_NEW_TOKENS, context - len(ids)) for ids in prompt_ids]


def interact(answer):
    history = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        try:
            check_characters(text, "what you wrote")
        except ValueError as error:
            note(str(error))
            continue
        history += user_turn(text)
        reply = answer([history])[0]
        history.append({"role": "assistant", "content": reply})
        print(printable(reply))


def write_alpaca(args, rows, texts):
    write_text(args.output, json.dumps([
        {**{key: row[key] for key in ("dataset", "instruction") if key in row},
         "output": text, "generator": generator(args)} for row, text in zip(rows, texts)],
        ensure_ascii=False, indent=2))
    log = note if is_special(args.output) else print  # --output may be the standard output
    log(f"wrote {len(rows)} outputs to {args.output}")


def generator(args):
    """The name of the model in --output."""
    return args.generator or Path(args.model).resolve().name


def user_turn(text):
    return [{"role": "user", "content": text}]


def note(text):
    print(printable(text), file=sys.stderr)


if __name__ == "__main__":
    exits.run(main, "nothing was written")
