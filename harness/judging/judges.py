"""Judges, seen from outside: PairRM, reward models, your own function.

A judge gets B prompts (message lists) and B lists of K_b candidates (strings). It returns K_b
scores for each, in the candidates' order; higher is better. Your own takes three lines
(my_judge.py):

    def shorter_is_better(prompts, candidates):
        # prompts[b] = [{"role": "user", "content": "Why is the sky blue?"}]
        return [[-len(text) for text in texts] for texts in candidates]

    python rank.py --ranker my_judge.py:shorter_is_better --input some.jsonl --output ranked.jsonl

A call has up to 64 prompts; `shorter_is_better.prompts_a_call = 8` makes that 8. No prompt has the
same text twice. The file may import its neighbours. Scores are lists, tuples, arrays or tensors of
finite numbers (True is 1).

  - A judge that costs money yields one list a prompt, in the prompts' order: each is saved as it
    comes. In place of a list it may yield the exception that this prompt met; the others are saved
    (examples/judge_http.py).
  - A judge that raises KeyboardInterrupt ends the run, like Ctrl-C. The text of the exception is
    printed, and the scores of the calls before it are saved (examples/by_hand.py).
  - The run first tries a judge on two short prompts of the data. `shorter_is_better.try_first =
    False` leaves that out.

The run does not rely on a judge's behaviour, and judges are slow. `Judge` is between the two. The
judge gets copies, which it must leave in their order. What it returns is checked. An exception
becomes one line that names judge and prompt. All finished scores are on disk before the next call,
so a judge that fails loses none.

PairRM itself, and the rule that turns scores into a pair, are in rank.py. Judges see candidates
unchanged: callers remove a thought (<think>...</think>) first. The toy world hands in its oracle.
Test: pytest tests/test_judges.py.

Legend: B prompts, K candidates of one prompt, R rows of a forward pass, T tokens of the longest.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

from tqdm import tqdm

from harness.runs.output_files import keep_rows, kept_rows
from harness.judging.judge_models import RewardModel, load_pairrm
from harness.judging.user_function import END, PROMPTS_A_CALL, UserFunction, explain, one_line
from rank import pairrm_texts

LARGEST = 1e100  # score; the variance of larger ones may be infinite
SPECS = "pairrm[:ID] | reward:ID | FILE.py:FUNCTION | oracle (toy world only)"

# ----------------------------------------------------------------------------------------------
# 1. Any judge, seen from outside
# ----------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """What --ranker names. kind: pairrm, reward, oracle, "file", or an unknown word."""
    kind: str
    path: str  # a model's folder or hub id, a function's file, or ""
    function: str = ""


def parse_spec(text):
    """FILE.py:FUNCTION is split at its last colon, because a path may contain others
    (C:\\jobs\\a.py:f, a:b/judge.py:f). All other values are split at their first."""
    own_file = re.fullmatch(r"(.+\.py):(\w+)", text, re.DOTALL)
    if own_file:
        return Spec("file", *own_file.groups())
    kind, _, path = text.partition(":")
    return Spec(kind, path)


def load_judge(spec, device="cpu", tokens_per_forward=8192, oracle=None, progress=False,
               flag="--ranker"):
    """The value of --ranker, or of another `flag` -> Judge. ValueError, one line, if there is no
    such judge or it cannot be loaded.

    tokens_per_forward: for models, memory against speed. oracle: the callable that "oracle" means.
    progress: draw a bar.
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
            return judge(function, prompts_a_call=function.prompts_a_call,
                         try_first=function.try_first, file=function.path)
    except Exception as error:  # a damaged file, a missing GPU, a config of another class, ...
        raise ValueError(one_line(f"{flag} {spec}: {explain(error)}")) from error
    if spec == "oracle" and oracle:
        return judge(oracle, prompts_a_call=1000)
    why = {"oracle": "the oracle belongs to the toy world; use",
           "human": "to judge by hand use examples/by_hand.py:judge; all judges are"}
    raise ValueError(one_line(f"{flag} {spec}: {why.get(spec, 'not one of')} {SPECS}"))


class Question(NamedTuple):
    """A prompt and its candidates. key: the name of its scores in the file that keeps them."""
    prompt_id: str
    prompt: list  # messages
    texts: list  # K candidates
    key: str


@dataclasses.dataclass(frozen=True)
class Judge:
    """judge(prompts, candidates, prompt_ids, kept) -> B lists of K_b finite floats.

    score: the function or the model. check(prompt): ValueError for a prompt that the judge can
    never score.
    is_model: one of our models. It sees repeated texts, because PairRM's mean counts them. It gets
    the longest prompts first: too little memory shows at once, and texts of a call are about
    equally long.
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
    try_first: bool = True  # call it before the run, see `dry_call`

    def __call__(self, prompts, candidates, prompt_ids=None, kept=None):
        """Scores in the candidates' order; identical texts of a prompt score alike.

        prompt_ids: B names, for errors. kept: a Kept or its path (None: no file). The scores of
        every call are added to it at once, and no question in it is asked again.
        ValueError, one line, names judge and prompt. KeyboardInterrupt passes through, so a handler
        of another signal must raise it, or a subclass; any other exception is the judge's error.
        """
        if prompt_ids is None:
            prompt_ids = range(len(prompts))
        if not isinstance(kept, Kept):
            kept = Kept(kept)
        questions = []
        for prompt_id, prompt, texts in zip(map(str, prompt_ids), prompts, candidates, strict=True):
            key = digest(self.name, prompt_id, prompt, sorted(texts))
            questions.append(Question(prompt_id, prompt, texts, key))

        waiting = [question for question in questions if kept.scores.get(question.key) is None]
        if self.is_model:
            waiting.sort(key=lambda question: len(str(question)), reverse=True)
        with tqdm(total=len(questions), initial=len(questions) - len(waiting), desc="judge",
                  unit="prompt", leave=False, disable=not self.progress) as bar:
            for start in range(0, len(waiting), self.prompts_a_call):
                part = waiting[start:start + self.prompts_a_call]
                self._ask(part, kept)
                bar.update(len(part))
        self.afterwards()
        return [self._scores(question, kept) for question in questions]

    def _ask(self, part, kept):
        """Asks some questions in one call. If the call fails as a whole, asks them one by one: that
        keeps the good scores, and names the prompt that fails."""
        try:
            self._call(part, kept)
        except CallFailed:
            for question in part:
                if kept.scores.get(question.key) is None:
                    self._call([question], kept)
            raise  # each prompt succeeds alone, but the call is an error all the same

    def _scores(self, question, kept):
        by_text = dict(zip(sorted(set(question.texts)), kept.scores[question.key]))
        return [by_text[text] - self._penalty(text) for text in question.texts]

    def _call(self, part, kept):
        """One call. Keeps the scores as they come: those of a list together, those of a generator
        one prompt at a time."""
        texts = [list(question.texts if self.is_model else dict.fromkeys(question.texts))
                 for question in part]
        done, faults = 0, []
        try:
            for rows in self._rows(part, texts):
                good = []
                for row in rows:
                    question, asked = part[done], texts[done]
                    done += 1
                    try:
                        by_text = dict(zip(asked, check_row(row, asked, self.file)))
                    except ValueError as error:
                        faults.append(f"judge {self.name}, prompt_id {question.prompt_id}: {error}")
                        continue
                    good.append({"prompt_id": question.prompt_id, "question": question.key,
                                 "scores": [by_text[text] for text in sorted(by_text)]})
                kept.add(good)
        except Mismatch:  # which scores belong to which prompt is unknown
            kept.forget(part)
            raise
        if faults:
            raise ValueError(one_line(faults[0]))

    def _rows(self, part, texts):
        """Calls the judge with copies, and yields lists of rows, one row for each question in its
        order. The rows are not checked yet; how many there are is."""
        who = f"judge {self.name}, prompt_id {part[0].prompt_id}"
        if len(part) > 1:
            who += f" to {part[-1].prompt_id}"
        guard = functools.partial(self._guarded, who, CallFailed if len(part) > 1 else ValueError)
        prompts, count = [question.prompt for question in part], 0
        given = copy.deepcopy([prompts, texts])
        scores = guard(self.score, *given)
        for rows in rows_of(scores, guard):
            if not unchanged(given, prompts, texts):
                raise Mismatch(one_line(
                    f"{who}: the judge changed the lists that it was given (did it sort or edit "
                    "them in place?), so it is unknown which score belongs to which candidate; let "
                    "it change a copy"))
            count += len(rows)
            if count > len(part):  # of a generator that may have no end
                break
            yield rows
        if count != len(part):
            got = f"{count} lists" if count else shown(scores)
            raise Mismatch(one_line(f"{who}: a judge must return a list of lists of numbers; "
                                    f"it returned {got} for {len(part)} prompts"))

    def _guarded(self, who, kind, function, *arguments):
        """function(*arguments). Whatever it raises becomes one line of the exception class `kind`,
        but for KeyboardInterrupt: Ctrl-C, or a judge that ends the run."""
        try:
            return function(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also sys.exit(0), which would end the run as a success
            raise kind(one_line(f"{who}: {explain(error, self.file)}")) from error

    def _penalty(self, text):
        if not self.length_penalty:
            return 0.0
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.length_penalty * len(ids)

    def dry_call(self, records):
        """Before the run: judges the data's own responses to the two shortest of `records`, and an
        empty text, because a sample may be empty. ValueError if that fails."""
        if not self.try_first:
            return
        size = lambda row: len(str([row["prompt"], row["data_chosen"], row["data_rejected"]]))
        short = sorted(records, key=size)[:2]
        texts = [[row["data_chosen"], row["data_rejected"]] for row in short]
        texts[-1].append("")  # and lists of different lengths, as in the run
        try:
            dataclasses.replace(self, progress=False)(
                [row["prompt"] for row in short], texts, [row["prompt_id"] for row in short])
        except ValueError as error:
            raise ValueError(f"{error} [a call before the run, on two short prompts of the data; "
                             "one candidate is empty, as a sample may be]") from error


def with_length_penalty(judge, weight, tokenizer):
    """The same judge, which subtracts `weight` >= 0 for every token of the candidate (by
    `tokenizer`): judges prefer long answers, and a policy learns that first."""
    if not 0 <= weight <= LARGEST:
        raise ValueError(f"--length-penalty {weight}: must be 0 or a positive number, at most "
                         f"{LARGEST:g}")
    if weight and tokenizer is None:
        raise ValueError("--length-penalty counts tokens: it needs a tokenizer")
    return dataclasses.replace(judge, length_penalty=weight, tokenizer=tokenizer)


class CallFailed(ValueError):
    """A call for several prompts failed, and it is not known yet for which of them."""


class Mismatch(ValueError):
    """It is unknown which scores of a call belong to which candidates."""


def rows_of(scores, guard):
    """Yields lists of rows: the whole list once, or the rows of a generator one by one. All code of
    the judge runs by guard(function, ...)."""
    rows = guard(as_list, scores)
    if rows is not None:
        yield rows
    elif isinstance(scores, Iterator):
        while (row := guard(next, scores, END)) is not END:
            yield [row]


def unchanged(given, prompts, texts):
    """Whether a judge has left what it was given as it was. New keys in a message are allowed."""
    given_prompts, given_texts = given
    try:
        if given_texts != texts:
            return False
        for given_turns, turns in zip(given_prompts, prompts, strict=True):
            for given_turn, turn in zip(given_turns, turns, strict=True):
                if {**given_turn, **turn} != given_turn:
                    return False
        return True
    except Exception:  # other lengths, or no longer lists of messages
        return False


def check_row(row, texts, file=None):
    """The scores of one prompt's texts, as finite floats. ValueError for anything else. file: the
    judge's, to name the line of an exception that it returned in place of scores."""
    if isinstance(row, Exception):
        raise ValueError(explain(row, file))
    try:
        scores = as_list(row) or []
        scores = [score.item() if hasattr(score, "item") else score for score in scores]
        if any(isinstance(score, (str, bytes, bytearray, complex)) for score in scores):
            scores = []  # float("12") would be a number
        scores = list(map(float, scores))
    except KeyboardInterrupt:
        raise
    except BaseException:  # no numbers; a number class of the judge's own may raise anything
        scores = []
    if len(scores) != len(texts):
        raise ValueError("a judge must return a list of lists of numbers, one for each candidate; "
                         f"it returned {shown(row)} for {len(texts)} candidates")
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"the judge's scores are not finite: {scores}")
    if any(abs(score) > LARGEST for score in scores):
        raise ValueError(f"the judge's scores {scores} are too large to be averaged; divide them "
                         f"by a constant, so that none exceeds {LARGEST:g}")
    return scores


def as_list(values):
    """A list, tuple, array or tensor as a list. None for a string, a dict, a set or a generator,
    which Python would count and convert just as well."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, (list, tuple)) else None


def shown(value):
    """Its repr. That is code of the judge, too, and may raise."""
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
        """part: questions that will be asked again."""
        self.add([{"prompt_id": question.prompt_id, "question": question.key, "scores": None}
                  for question in part if self.scores.get(question.key) is not None])

    def add(self, rows):
        """Rows of prompt_id, question and scores; on disk on return."""
        self.scores |= {row["question"]: row["scores"] for row in rows}
        if self.path is not None and rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_rows(self.path, rows)
