"""The command line of rank.py: scores the candidates of every prompt in a file with any judge.

    python rank.py --input candidates.jsonl --ranker pairrm --output ranked.jsonl

The judges are in harness/judging/judges.py; rank.py chooses the best and the worst.
Test: pytest tests/test_judges.py.
"""

from harness.runs import exits

exits.before(__name__, "nothing had begun")  # Ctrl-C is one line while libraries load, too

import argparse
import json
import sys
from pathlib import Path

import torch

from harness.inputs.files import check_file, is_special, parse_json
from harness.judging.judges import (
    SPECS, Judge, Kept, explain, load_judge, parse_spec, with_length_penalty)
from harness.runs.output_files import check_scores, check_writable, write_jsonl
from harness.runs.settings import as_judge, as_path
from rank import choose_pair


def main():
    parser = argparse.ArgumentParser(
        prog="rank.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Score the candidates of every prompt in a JSONL file with any judge.",
        epilog='input line:   {"prompt": "Why ...?" or messages, "candidates": ["a", "b"], '
               '"prompt_id": optional}\noutput line:  the same with "scores" (higher is better), '
               '"best" and "worst"\n              (indices into candidates; null: all are equal)\n'
               "Candidates are judged unchanged; remove thoughts (<think>...</think>) first.")
    add = parser.add_argument
    add("--input", type=as_path, required=True, help="JSONL file of prompts and candidates")
    add("--output", type=as_path, required=True,
        help="JSONL file to write; it appears whole or not at all")
    add("--ranker", type=as_judge, default="pairrm",
        help=f"{SPECS} (default pairrm = llm-blender/PairRM-hf)")
    add("--length-penalty", type=float, default=0.0, help="subtract this for every token (0)")
    add("--tokenizer", type=as_path,
        help="hub id or folder of the tokenizer that counts for --length-penalty")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--tokens-per-forward", type=int, default=8192, help="halve it when memory runs out")
    add("--scores", "--answers", type=as_path, metavar="FILE", help="keeps finished scores; the "
        "same command resumes from them (default: OUTPUT.scores.jsonl, deleted when OUTPUT is "
        "written)")
    args = parser.parse_args()
    rank_file(args)


def rank_file(args):
    """What the command line does after its arguments are parsed."""
    if args.tokens_per_forward < 1:
        raise ValueError(f"--tokens-per-forward {args.tokens_per_forward}: must be at least 1")
    with_length_penalty(Judge("", None), args.length_penalty, args.tokenizer)  # refuses bad values
    records = read_candidates(args.input)
    kept = check_outputs(args)
    judge = load_judge(args.ranker, args.device, args.tokens_per_forward, progress=True)
    if args.length_penalty:
        judge = with_length_penalty(judge, args.length_penalty, load_tokenizer(args.tokenizer))
    prompts = [record.pop("messages") for record in records]
    for record, prompt in zip(records, prompts):
        where = record.pop("where")
        try:
            judge.check(prompt)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if Kept(kept).scores:
        print(f"finished scores are in {kept}; delete it to judge all prompts again")
    candidates = [record["candidates"] for record in records]
    scores = judge(prompts, candidates, [record["prompt_id"] for record in records], kept)

    equal = 0
    for record, row in zip(records, scores):
        pair = choose_pair(row, record["candidates"])
        equal += pair is None
        best, worst = pair or (None, None)
        record |= {"scores": row, "best": best, "worst": worst}
    write_jsonl(args.output, records)
    if kept and not args.scores:
        Path(kept).unlink(missing_ok=True)
    print(f"{len(records)} prompts ranked, {equal} of them all equal: {args.output}",
          file=sys.stderr if is_special(args.output) else sys.stdout)


def check_outputs(args):
    """The path of the scores, or None if the output is a pipe or a device and no path is given.
    ValueError if they or the output cannot be written, or would replace what the command reads."""
    inputs = [("--input", args.input), ("--ranker", parse_spec(args.ranker).path)]
    inputs += [("--tokenizer", args.tokenizer)] if args.tokenizer else []
    check_writable(args.output, inputs)
    if not args.scores and is_special(args.output):
        return None
    kept = args.scores or f"{args.output}.scores.jsonl"
    check_scores(kept, [*inputs, ("--output", args.output), ("--output", f"{args.output}.tmp")])
    return kept


def load_tokenizer(name):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"--tokenizer {name}: {explain(error)}") from error


def read_candidates(path):
    """The records of a candidates file, with `messages` and `where`. ValueError names the line."""
    check_file("--input", path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--input {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ValueError(f"--input {path}: not UTF-8 text; save it as UTF-8, one JSON object a "
                         "line") from None
    if text.lstrip().startswith("["):
        raise ValueError(f"--input {path}: a JSON array; write one object a line, for "
                         f"example with  jq -c '.[]' {path}")
    records = [read_line(line, f"{path}, line {number}", number)
               for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not records:
        raise ValueError(f"--input {path}: no line in it")
    return records


def read_line(line, where, number):
    """One record. ValueError for a line that is none."""
    try:
        row = parse_json(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half a surrogate pair (\\ud800 ..) is no text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); one object a line") from None
    if not isinstance(row, dict) or not {"prompt", "candidates"} <= row.keys():
        raise ValueError(f'{where}: expected {{"prompt": ..., "candidates": [...]}}')
    messages, texts = row["prompt"], row["candidates"]
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise ValueError(f"{where}: prompt must be a string or a list of role/content messages")
    if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
        raise ValueError(f"{where}: candidates must be a list of at least one string")
    return {"prompt_id": f"line {number}", **row, "messages": messages, "where": where}


def is_message(turn):
    return (isinstance(turn, dict) and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str))


if __name__ == "__main__":
    exits.run(main, "finished scores are kept, and the same command resumes from them")
