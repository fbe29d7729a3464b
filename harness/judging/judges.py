"""Judges: PairRM, reward models, your own function, you.

A judge gets B prompts (message lists) and B lists of K_b candidates (strings), and gives K_b scores
for each, higher is better, in the candidates' order. Yours takes three lines (my_judge.py):

    def shorter_is_better(prompts, candidates):
        # prompts[b] = [{"role": "user", "content": "Why is the sky blue?"}]
        return [[-len(text) for text in texts] for texts in candidates]

    python rank.py --ranker my_judge.py:shorter_is_better --input some.jsonl --output ranked.jsonl

It is called with up to 64 prompts (`shorter_is_better.prompts_a_call = 8`: with up to 8), never
with the same text twice for one prompt, and may import its neighbour files. Lists, tuples, arrays
and tensors of finite numbers (True is 1) are scores. A judge that costs money yields one list a
prompt, in the prompts' order: each is kept as it comes, whatever happens next. In place of a list
it may give the exception that this prompt met, and the others are kept (examples/judge_http.py).

The run trusts no judge, and judges are slow. `Judge` is between them and the run: they get copies,
which they must leave in their order, what they return is checked, whatever they raise becomes one
line that names judge and prompt, and each finished score is on disk before the next call, so that
a judge that fails loses nothing.

Leaves PairRM itself and the pair to rank.py, and the thought: candidates are judged as they come,
so callers take a <think>...</think> off first. The toy's oracle is handed in by its owner.
Test: pytest tests/test_judges.py.

Legend: B prompts, K candidates of one, R rows of a forward pass, T tokens of the longest.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import random
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

from tqdm import tqdm

from harness.runs.output_files import keep_rows, kept_rows, printable
from harness.judging.judge_models import RewardModel, load_pairrm
from harness.judging.user_function import (
    END, PROMPTS_A_CALL, UserFunction, explain, one_line)
from rank import pairrm_texts

LARGEST = 1e100  # score: beyond it a variance is no finite number
SPECS = "pairrm[:ID] | reward:ID | FILE.py:FUNCTION | human | oracle (toy world only)"

# ----------------------------------------------------------------------------------------------
# 1. Any judge, from outside
# ----------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """What --ranker names: kind is pairrm, reward, human, oracle, "file" or an unknown word."""
    kind: str
    path: str  # a model's folder or hub id, a function's file, or ""
    function: str = ""


def parse_spec(text):
    """FILE.py:FUNCTION is split at its last colon, for a path may have others (C:\\jobs\\a.py:f,
    a:b/judge.py:f); everything else at its first."""
    own_file = re.fullmatch(r"(.+\.py):(\w+)", text, re.DOTALL)
    if own_file:
        return Spec("file", *own_file.groups())
    kind, _, path = text.partition(":")
    return Spec(kind, path)


def load_judge(spec, device="cpu", tokens_per_forward=8192, oracle=None, seed=0, progress=False,
               flag="--ranker"):
    """The value of --ranker, or of another `flag` -> Judge. ValueError with one line for whatever
    cannot be had.

    tokens_per_forward: for models, memory against speed. oracle: the callable behind "oracle".
    seed: for "human", the order in which candidates are shown. progress: draw a bar.
    """
    judge = functools.partial(Judge, spec, progress=progress)
    kind, path, name = parse_spec(spec)
    try:
        if kind == "pairrm":
            model = load_pairrm(path or "llm-blender/PairRM-hf", device)
            model.tokens_per_forward = tokens_per_forward
            return judge(model.scores, lambda prompt: pairrm_texts(prompt, []), 32, is_model=True)
        if kind == "reward" and path:
            model = RewardModel(path, device, tokens_per_forward)
            return judge(model.scores, model.check, 32, is_model=True, afterwards=model.report)
        if kind == "file":
            function = UserFunction(path, name)
            return judge(function, prompts_a_call=function.prompts_a_call, file=function.path)
    except Exception as error:  # a damaged file, a missing GPU, a config of another class, ...
        raise ValueError(one_line(f"{flag} {spec}: {explain(error)}")) from error
    if spec == "human":
        return judge(functools.partial(ask_you, seed=seed), prompts_a_call=1)
    if spec == "oracle" and oracle:
        return judge(oracle, prompts_a_call=1000)
    why = "the oracle belongs to the toy world; use" if spec == "oracle" else "not one of"
    raise ValueError(one_line(f"{flag} {spec}: {why} {SPECS}"))


class Question(NamedTuple):
    prompt_id: str
    prompt: list  # messages
    texts: list  # K candidates


@dataclasses.dataclass(frozen=True)
class Judge:
    """judge(prompts, candidates, prompt_ids, kept) -> B lists of K_b finite floats.

    score: the function or the model. check(prompt): ValueError for a prompt that it will never be
    able to judge.
    is_model: one of ours. It sees repeated texts (PairRM's mean counts them), and the longest
    prompts first: memory that is too small shows at once, and a call holds texts of like length.
    """
    name: str
    score: Callable
    check: Callable = lambda prompt: None
    prompts_a_call: int = PROMPTS_A_CALL
    is_model: bool = False
    afterwards: Callable = lambda: None  # called when all are judged
    progress: bool = False
    length_penalty: float = 0.0
    tokenizer: Any = None
    file: Path | None = None  # of your own function

    def __call__(self, prompts, candidates, prompt_ids=None, kept=None):
        """Scores in the candidates' order; identical texts of a prompt score alike.

        prompt_ids: B names, for errors. kept: a Kept or its path (None: nowhere), to which every
        call's scores are added at once; what is in it is not asked for again.
        ValueError, one line, names judge and prompt. KeyboardInterrupt passes through: a handler
        of another signal must raise that (or a subclass), or the judge is blamed for it.
        """
        ids = map(str, range(len(prompts)) if prompt_ids is None else prompt_ids)
        questions = [Question(*parts) for parts in zip(ids, prompts, candidates, strict=True)]
        kept = kept if isinstance(kept, Kept) else Kept(kept)
        keys = list(map(self._key, questions))
        todo = [(question, key) for question, key in zip(questions, keys)
                if kept.scores.get(key) is None]
        if self.is_model:
            todo.sort(key=lambda item: -len(str(item[0])))
        with tqdm(total=len(questions), initial=len(questions) - len(todo), desc="judge",
                  unit="prompt", leave=False, disable=not self.progress) as bar:
            for start in range(0, len(todo), self.prompts_a_call):
                part = todo[start:start + self.prompts_a_call]
                try:
                    self._ask(part, kept)
                except WholeCall:
                    for one in part:  # keeps what is good alone, and names what is not
                        if kept.scores.get(one[1]) is None:
                            self._ask([one], kept)
                    raise  # all are good alone: an error it remains
                bar.update(len(part))
        self.afterwards()
        rows = [dict(zip(sorted(set(question.texts)), kept.scores[key]))
                for question, key in zip(questions, keys)]
        return [[row[text] - self._penalty(text) for text in texts]
                for row, texts in zip(rows, candidates)]

    def _key(self, question):
        return digest(self.name, question.prompt_id, question.prompt, sorted(question.texts))

    def _ask(self, part, kept):
        """One call for some (question, key). Scores go into `kept` as they come: those of a list
        together, those of a generator prompt by prompt."""
        texts = [list(question.texts) if self.is_model else list(dict.fromkeys(question.texts))
                 for question, _ in part]
        waiting, faults = zip(part, texts), []
        try:
            for rows in self._call(part, texts):
                good = []
                for row, ((question, key), asked) in zip(rows, waiting):
                    try:
                        by_text = dict(zip(asked, check_row(row, asked, self.file)))
                        good.append({"prompt_id": question.prompt_id, "question": key,
                                     "scores": [by_text[text] for text in sorted(by_text)]})
                    except ValueError as error:
                        faults.append(f"judge {self.name}, prompt_id {question.prompt_id}: {error}")
                kept.add(good)
        except Mismatch:  # nobody knows which scores are whose
            kept.forget(part)
            raise
        if faults:
            raise ValueError(one_line(faults[0]))

    def _call(self, part, texts):
        """What the judge says about copies, not yet looked into: yields lists of rows, one row for
        each (question, key) in their order."""
        who = f"judge {self.name}, prompt_id {part[0][0].prompt_id}"
        if len(part) > 1:
            who += f" to {part[-1][0].prompt_id}"
        guard = functools.partial(self._guarded, who, WholeCall if len(part) > 1 else ValueError)
        prompts, count = [question.prompt for question, _ in part], 0
        given = copy.deepcopy([prompts, texts])
        scores = guard(self.score, *given)
        for rows in rows_of(scores, guard):
            if not unchanged(given, prompts, texts):
                raise Mismatch(one_line(
                    f"{who}: the judge changed the lists that it was given (did it sort or edit "
                    "them in place?), so nobody knows which score is whose; let it change a copy"))
            count += len(rows)
            if count > len(part):  # of a generator that may have no end
                break
            yield rows
        if count != len(part):
            got = f"{count} lists" if count else shown(scores)
            raise Mismatch(one_line(f"{who}: a judge must return a list of lists of numbers; "
                                    f"it returned {got} for {len(part)} prompts"))

    def _guarded(self, who, kind, function, *arguments):
        try:
            return function(*arguments)
        except (KeyboardInterrupt, Stopped):
            raise
        except BaseException as error:  # sys.exit(0) too: it would end the run as a success
            raise kind(one_line(f"{who}: {explain(error, self.file)}")) from error

    def _penalty(self, text):
        if not self.length_penalty:
            return 0.0
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.length_penalty * len(ids)

    def dry_call(self, records):
        """Before anything costs: judges the data's own responses to the two shortest of `records`,
        and an empty one, as a sample may be. ValueError if that fails. You are not asked."""
        if self.name == "human":
            return
        size = lambda row: len(str([row["prompt"], row["data_chosen"], row["data_rejected"]]))
        short = sorted(records, key=size)[:2]
        texts = [[row["data_chosen"], row["data_rejected"]] for row in short]
        texts[-1].append("")  # and not all of one length, as in the run
        try:
            dataclasses.replace(self, progress=False)(
                [row["prompt"] for row in short], texts, [row["prompt_id"] for row in short])
        except ValueError as error:
            raise ValueError(f"{error} [a call before the run, on two short prompts of the data; "
                             "an empty candidate is among them, as a sample may be]") from error


def with_length_penalty(judge, weight, tokenizer):
    """The same judge, whose scores lose `weight` >= 0 for every token (by `tokenizer`) of the
    candidate: judges like long answers, and a policy learns that first."""
    if not 0 <= weight <= LARGEST:
        raise ValueError(f"--length-penalty {weight}: must be 0 or a positive number, at most "
                         f"{LARGEST:g}")
    if weight and tokenizer is None:
        raise ValueError("--length-penalty counts tokens: it needs a tokenizer")
    return dataclasses.replace(judge, length_penalty=weight, tokenizer=tokenizer)


class WholeCall(ValueError):
    """A call for several prompts raised something: which of them was it?"""


class Mismatch(ValueError):
    """Nobody knows which scores of a call belong to which candidates."""


def rows_of(scores, guard):
    """Lists of rows: one list, or a generator's rows one by one. guard(function, ...) calls it."""
    rows = guard(as_list, scores)
    if rows is not None:
        yield rows
    elif isinstance(scores, Iterator):
        while (row := guard(next, scores, END)) is not END:
            yield [row]


def unchanged(given, prompts, texts):
    """Whether what a judge was given is still in its order, and says the same. Keys that it has
    added to a message do no harm."""
    try:
        return given[1] == texts and all(
            {**now, **turn} == now for messages, turns in zip(given[0], prompts, strict=True)
            for now, turn in zip(messages, turns, strict=True))
    except Exception:  # other lengths, or other things than lists of messages
        return False


def check_row(row, texts, file=None):
    """The scores of one prompt's texts, as finite floats. ValueError for anything else. file: of
    the judge, to name the line where an exception arose that it gives in place of scores."""
    if isinstance(row, Exception):
        raise ValueError(explain(row, file))
    try:
        scores = as_list(row) or []
        if any(isinstance(score, (str, bytes, bytearray)) for score in scores):
            scores = []  # float("12") would be a number
        scores = list(map(float, scores))
    except KeyboardInterrupt:
        raise
    except BaseException:  # no numbers; or whatever somebody's own kind of number raises
        scores = []
    if len(scores) != len(texts):
        raise ValueError("a judge must return a list of lists of numbers, one a candidate; it "
                         f"returned {shown(row)} for {len(texts)} candidates")
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"the judge's scores are not finite: {scores}")
    if any(abs(score) > LARGEST for score in scores):
        raise ValueError(f"the judge's scores {scores} are too large to be averaged; divide them "
                         f"by a constant, so that none is beyond {LARGEST:g}")
    return scores


def as_list(values):
    """A list, tuple, array or tensor as a list. None for a string, a dict, a set or a generator,
    which Python would count and convert just as well."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, (list, tuple)) else None


def shown(value):
    """Its repr, which is code of the judge's as well."""
    try:
        return reprlib.repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"a {type(value).__name__}"


# ----------------------------------------------------------------------------------------------
# 2. Finished scores, on disk
# ----------------------------------------------------------------------------------------------


def digest(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Kept:
    """A file of finished scores, to which one process appends, and which is read once. path: None
    keeps nothing beyond this object. others: files of other processes, which are read, too.
    scores: question -> scores of its sorted distinct texts, or None: not to be trusted."""

    def __init__(self, path, others=()):
        self.path, self.scores = path and Path(path), {}
        for file in {self.path, *others} - {None}:
            for _, row in kept_rows(file) if file.exists() else ():
                if "question" in row:  # else it is another file
                    self.scores[row["question"]] = row["scores"]

    def forget(self, part):
        """part: some (question, key), whose scores are asked for again."""
        self.add([{"prompt_id": question.prompt_id, "question": key, "scores": None}
                  for question, key in part if self.scores.get(key) is not None])

    def add(self, rows):
        """Rows of prompt_id, question and scores; on disk on return."""
        self.scores |= {row["question"]: row["scores"] for row in rows}
        if self.path is not None and rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_rows(self.path, rows)


# ----------------------------------------------------------------------------------------------
# 3. You
# ----------------------------------------------------------------------------------------------


class Stopped(SystemExit):
    """You said 'q': the one exit that is no error of the judge."""


def ask_you(prompts, candidates, seed=0):
    """The human judge, in the terminal: best scores 1, worst -1, others 0.

    Candidates are shown in an order drawn from (seed, prompt, texts), whatever order they come in,
    so that nothing tells their source. Raises Stopped with what to do next when you stop.
    """
    scores = []
    for prompt, texts in zip(prompts, candidates, strict=True):
        shown = sorted(texts)
        random.Random(digest(seed, prompt, shown)).shuffle(shown)
        best = worst = 0
        if len(shown) > 1:
            print(f"\n{'=' * 80}\n")
            print(printable("\n".join(f"[{turn['role']}] {turn['content']}" for turn in prompt)))
            for number, text in enumerate(shown, 1):
                print(f"\n--- {number} {'-' * 70}\n{printable(text)}")
            best = ask_number("best", len(shown), None)
            worst = ask_number("worst", len(shown), best) if len(shown) > 2 else 1 - best
        scores.append([float(text == shown[best]) - float(text == shown[worst]) for text in texts])
    return scores


def ask_number(what, count, taken):
    """Your choice, 0 .. count - 1, and not the one already taken."""
    while True:
        try:
            reply = input(f"\n{what} (1-{count}, q stops)? ").strip().lower()
        except EOFError:  # no terminal, or ctrl-D
            reply = "q"
        if reply == "q":
            raise Stopped("stopped; your answers are kept, and the same command goes on from there")
        if reply.isdecimal() and 1 <= int(reply) <= count and int(reply) - 1 != taken:
            return int(reply) - 1
        print(f"a number from 1 to {count}, and not one already taken")
