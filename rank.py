"""Judges: (prompts, candidates) -> scores. PairRM, reward models, your own function, you.

Every judge is a callable  ranker(prompts, candidates) -> list of lists of float:  B message lists,
B lists of K_b strings; K_b scores each, higher is better. Yours takes five lines (my_judge.py):

    def shorter_is_better(prompts, candidates):
        # prompts[b] = [{"role": "user", "content": "Why is the sky blue?"}]
        return [[-len(text) for text in texts] for texts in candidates]

    python rank.py --ranker my_judge.py:shorter_is_better --input some.jsonl --output ranked.jsonl

SELM trains on the best and the worst candidate of each prompt (`choose_pair`).

Leaves PairRM itself to pairrm.py, the policy and the loss to others; the toy's oracle is handed in
by its owner. Test: pytest tests/test_rank.py.  Read next: train_loop.py.

Legend: B prompts, K candidates of one, R rows of a forward pass, T tokens of the longest.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from pairrm import PairRM, distinct, length_batches, local_folder, pad_rows

SPECS = "pairrm[:ID] | reward:ID | FILE.py:FUNCTION | human | oracle (toy world only)"

# ----------------------------------------------------------------------------------------------
# 1. Reward models, your function, you
# ----------------------------------------------------------------------------------------------


class RewardModel:
    """Any sequence-classification reward model: chat-templated prompt + candidate -> one scalar."""

    def __init__(self, name, device="cpu"):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        folder, what = local_folder(name, f"reward:{name}"), f"reward:{name}"
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, output_loading_info=True)
        except Exception as error:
            raise ValueError(f"{what}: no sequence classifier could be loaded from it "
                             f"({type(error).__name__}: {str(error).splitlines()[0]})") from None
        if model.config.num_labels != 1:
            raise ValueError(f"{what}: {model.config.num_labels} outputs; a reward model has 1")
        if info["missing_keys"]:  # a plain language model, to which transformers adds a random head
            raise ValueError(f"{what}: no trained head (missing {sorted(info['missing_keys'])})")
        if not self.tokenizer.chat_template:
            raise ValueError(f"{what}: no chat template; write a FILE.py:FUNCTION that has one")
        self.model, self.tokens_per_forward = model.eval().to(device), 8192
        self.max_length = min(self.tokenizer.model_max_length,
                              getattr(model.config, "max_position_embeddings", None) or math.inf)

    @torch.inference_mode()
    def scores(self, prompts, candidates, progress=False):
        """The ranker: B message lists, B lists of K_b strings -> B lists of K_b floats."""
        rows = [torch.tensor(self.tokenizer.apply_chat_template(
                    [*prompt, {"role": "assistant", "content": text}], return_dict=False))
                for prompt, texts in zip(prompts, candidates, strict=True) for text in texts]
        # Too long a conversation loses its beginning, not the answer that is judged.
        rows = [row[max(0, len(row) - self.max_length):] for row in rows]
        # A decoder's score is read at the last token that is not padding. Where the config names no
        # padding token transformers refuses batches: a budget of 1 sends rows one by one.
        pad = getattr(self.model.config, "pad_token_id", None)
        budget, values = 1 if pad is None else self.tokens_per_forward, [0.0] * len(rows)
        with tqdm(total=len(rows), desc="reward model", unit="text", disable=not progress) as bar:
            for batch in length_batches([len(row) for row in rows], budget):
                ids, mask = pad_rows([rows[i] for i in batch], pad or 0)  # (R, T)
                ids, mask = ids.to(self.model.device), mask.to(self.model.device)
                for i, value in zip(batch, self.model(ids, mask).logits[:, 0].tolist()):  # (R, 1)
                    values[i] = value
                bar.update(len(batch))
        values = iter(values)
        return [[next(values) for _ in texts] for texts in candidates]


class HumanJudge:
    """You, in the terminal: best and worst of each prompt; 'q' stops, the same command goes on.

    Candidates are shown in an order drawn from (seed, prompt, texts), whatever order they come in,
    so that nothing tells their source. Each answer is in the file before the next question. Scores:
    best 1, worst -1, others 0.
    """

    def __init__(self, answers, seed=0):
        self.answers, self.seed, self.known = Path(answers), seed, {}
        for line in self.answers.read_text("utf-8").split("\n") if self.answers.exists() else []:
            try:
                self.known.update(json.loads(line or "{}"))
            except json.JSONDecodeError:
                pass  # cut off by a kill: that one question comes again

    def scores(self, prompts, candidates):
        """The ranker; raises SystemExit with what to do next when you stop."""
        results = []
        for b, (prompt, texts) in enumerate(zip(prompts, candidates, strict=True)):
            shown = sorted(set(texts))
            key = hashlib.sha256(json.dumps([prompt, shown]).encode()).hexdigest()
            random.Random(f"{self.seed} {key}").shuffle(shown)
            if key not in self.known and len(shown) > 1:
                print(f"\n{'=' * 80}\nPrompt {b + 1} of {len(prompts)}\n")
                print("\n".join(f"[{turn['role']}] {turn['content']}" for turn in prompt))
                for number, text in enumerate(shown, 1):
                    print(f"\n--- {number} {'-' * 70}\n{text}")
                best = self._ask("best", shown, None)
                worst = self._ask("worst", shown, best) if len(shown) > 2 else 1 - best
                self._keep({key: [shown[best], shown[worst]]})
            best, worst = self.known.get(key, (None, None))
            results.append([float(text == best) - float(text == worst) for text in texts])
        return results

    def _ask(self, what, shown, taken):
        while True:
            try:
                reply = input(f"\n{what} (1-{len(shown)}, q stops)? ").strip().lower()
            except EOFError:  # no terminal, or ctrl-D
                reply = "q"
            if reply == "q":
                raise SystemExit(f"stopped; {len(self.known)} answers are in {self.answers}, and "
                                 "the same command goes on from there")
            if reply.isdigit() and 1 <= int(reply) <= len(shown) and int(reply) - 1 != taken:
                return int(reply) - 1
            print(f"a number from 1 to {len(shown)}, and not one already taken")

    def _keep(self, answer):
        self.known.update(answer)
        self.answers.parent.mkdir(parents=True, exist_ok=True)
        with open(self.answers, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(answer))  # \n first: it ends a line cut off by a kill
            file.flush()
            os.fsync(file.fileno())


def user_function(path, name):
    """The function `name` of the Python file `path`. ValueError that says what is wrong with it."""
    if not Path(path).is_file():
        raise ValueError(f"--ranker {path}:{name}: no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--ranker {path}:{name}: importing {path} failed, "
                         f"{type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--ranker {path}:{name}: {path} has no function {name}")
    return getattr(module, name)


# ----------------------------------------------------------------------------------------------
# 2. One front door; scores to a pair
# ----------------------------------------------------------------------------------------------


def load_ranker(spec, *, device="cpu", length_penalty=0.0, tokenizer=None, oracle=None, seed=0,
                answers="human_answers.jsonl", tokens_per_forward=8192, progress=False):
    """--ranker -> ranker(prompts, candidates) -> list of lists of float, shapes checked.

    length_penalty: lambda >= 0, the score loses lambda for every token (by `tokenizer`) of the
    candidate: judges like long answers, and a policy learns that first. oracle: the callable behind
    spec "oracle". seed, answers: for "human". tokens_per_forward: for models, memory against speed.
    ValueError with one line for whatever cannot be had.
    """
    kind, _, rest = spec.partition(":")
    if kind == "pairrm":
        model = PairRM.load(rest or "llm-blender/PairRM-hf", device)
        model.tokens_per_forward = tokens_per_forward
        judge = functools.partial(model.scores, progress=progress)
    elif kind == "reward" and rest:
        model = RewardModel(rest, device)
        model.tokens_per_forward = tokens_per_forward
        judge = _each_text_once(functools.partial(model.scores, progress=progress), math.inf)
    elif spec == "human":
        judge = HumanJudge(answers, seed).scores
    elif spec == "oracle":
        if oracle is None:
            raise ValueError(f"--ranker oracle: the oracle belongs to the toy world; use {SPECS}")
        judge = _each_text_once(oracle, progress=progress)
    elif match := re.fullmatch(r"(.+\.py):(\w+)", spec):
        judge = _each_text_once(user_function(*match.groups()), progress=progress)
    else:
        raise ValueError(f"--ranker {spec}: not one of  {SPECS}")
    if length_penalty and tokenizer is None:
        raise ValueError("--length-penalty counts tokens: it needs a tokenizer")

    def ranker(prompts, candidates):
        scores = check_scores(judge(prompts, candidates), candidates)
        if length_penalty:
            tokens = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
            scores = [[score - length_penalty * tokens(text) for score, text in zip(row, texts)]
                      for row, texts in zip(scores, candidates)]
        return scores
    return ranker


def _each_text_once(judge, prompts_a_call=64, progress=False):
    """Shows the judge distinct texts only: even a judge with moods scores identical texts alike.
    Calls it for some prompts at a time, or a slow one would show no progress for hours."""
    def ranker(prompts, candidates):
        texts, places = [[pair[k] for pair in map(distinct, candidates)] for k in (0, 1)]
        scores, size = [], min(prompts_a_call, max(1, len(prompts)))
        with tqdm(total=len(prompts), desc="rank", unit="prompt", disable=not progress) as bar:
            for start in range(0, len(prompts), size):
                part = texts[start:start + size]
                scores += check_scores(judge(prompts[start:start + size], part), part)
                bar.update(len(part))
        return [[row[i] for i in place] for row, place in zip(scores, places)]
    return ranker


def check_scores(scores, candidates, prompt_ids=None):
    """The scores as lists of floats. ValueError that names the prompt where the shape is wrong and,
    given prompt_ids (B strings), where a score is NaN or infinite."""
    try:
        scores = [[float(score) for score in row] for row in scores]
    except (TypeError, ValueError):
        raise ValueError("the judge must return a list of lists of numbers, one a candidate; it "
                         f"returned {scores!r:.80}") from None
    if len(scores) != len(candidates):
        raise ValueError(f"the judge returned {len(scores)} lists for {len(candidates)} prompts")
    for b, (row, texts) in enumerate(zip(scores, candidates)):
        name = f"prompt {b}" if prompt_ids is None else f"prompt_id {prompt_ids[b]}"
        if len(row) != len(texts):
            raise ValueError(f"{name}: {len(row)} scores for {len(texts)} candidates")
        if prompt_ids is not None and not all(map(math.isfinite, row)):
            raise ValueError(f"{name}: the judge's scores are not finite: {row}")
    return scores


def choose_pair(scores, texts):
    """(index of the best, index of the worst) of one prompt's candidates; None: all equal, no pair.

    Ties go by the SHA-256 of the text: among the best the smallest, among the worst the largest. A
    rule by position would favour a source (the data set's answers always stand last), and one by
    alphabet or length a style. The order of the candidates never changes which text wins.
    """
    if not scores or max(scores) == min(scores):
        return None
    rank = lambda i: (-scores[i], hashlib.sha256(texts[i].encode()).digest())
    order = sorted(range(len(scores)), key=rank)
    return order[0], order[-1]


# ----------------------------------------------------------------------------------------------
# 3. Command line
# ----------------------------------------------------------------------------------------------


def read_candidates(path):
    """The records of a candidates file, plus their `messages`; ValueError that names the line."""
    from harness.rundir import read_jsonl
    if not Path(path).is_file():
        raise ValueError(f"--input {path}: no such file")
    records = []
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict) or not {"prompt", "candidates"} <= row.keys():
            raise ValueError(f'{where}: expected {{"prompt": ..., "candidates": [...]}}')
        prompt, texts = row["prompt"], row["candidates"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not (isinstance(messages, list) and messages and all(
                isinstance(turn, dict) and isinstance(turn.get("role"), str)
                and isinstance(turn.get("content"), str) for turn in messages)):
            raise ValueError(f"{where}: prompt must be a string or a list of role/content messages")
        if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
            raise ValueError(f"{where}: candidates must be a list of at least one string")
        records.append({"prompt_id": f"line {number}", **row, "messages": messages})
    return records


def rank_file(args):
    """What the command line does, after its arguments are parsed."""
    from harness.rundir import write_jsonl
    records, tokenizer = read_candidates(args.input), None
    if args.tokenizer:
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    ranker = load_ranker(args.ranker, device=args.device, length_penalty=args.length_penalty,
                         tokenizer=tokenizer, tokens_per_forward=args.tokens_per_forward,
                         seed=args.seed, answers=args.answers or f"{args.output}.answers.jsonl",
                         progress=True)
    candidates = [record["candidates"] for record in records]
    scores = check_scores(ranker([record.pop("messages") for record in records], candidates),
                          candidates, [record["prompt_id"] for record in records])
    pairs = [choose_pair(row, texts) or (None, None) for row, texts in zip(scores, candidates)]
    write_jsonl(args.output, [{**record, "scores": row, "best": best, "worst": worst}
                              for record, row, (best, worst) in zip(records, scores, pairs)])
    equal = pairs.count((None, None))
    print(f"{len(records)} prompts ranked, {equal} of them all equal: {args.output}")


def main():
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Score the candidates of every prompt in a JSONL file with any judge.",
        epilog='input line:   {"prompt": "Why ...?" or messages, "candidates": ["a", "b"], '
               '"prompt_id": optional}\noutput line:  the same with "scores" (higher is better), '
               '"best" and "worst"\n              (indices into candidates; null: all are equal)')
    add = parser.add_argument
    add("--input", required=True, help="JSONL file of prompts and candidates")
    add("--output", required=True, help="JSONL file to write; it appears whole or not at all")
    add("--ranker", default="pairrm", help=f"{SPECS} (default pairrm = llm-blender/PairRM-hf)")
    add("--length-penalty", type=float, default=0.0, help="subtract this for every token (0)")
    add("--tokenizer", help="hub id or folder of the tokenizer that counts for --length-penalty")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--tokens-per-forward", type=int, default=8192, help="halve it when memory runs out")
    add("--answers", help="human only: where your answers are kept (OUTPUT.answers.jsonl)")
    add("--seed", type=int, default=0, help="human only: the order in which candidates are shown")
    try:
        rank_file(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"rank.py: {error}")


if __name__ == "__main__":
    main()
