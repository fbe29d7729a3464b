"""Before a run: everything that can be refused is refused, before anything is deleted or sampled.

`read_inputs` looks at the settings' model, data and judge; `make_start` turns them into what
Algorithm 1 starts from. Where the recipe brings a world of its own (the toy), that world hands in
the same things, and what only a world knows: the true measures. Nothing else asks "is it the toy?".

Test: pytest tests/test_train_loop.py.
"""

import datetime
import functools
import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import data
import model as policies
import sample
from harness.inputs import chat_template, engine_samples, preferences, toy
from harness.judging import judges
from harness.models import compatibility, weights
from harness.runs import run_record, settings as flags
from harness.runs.run_folder import Run
from harness.runs.run_record import fingerprint
from harness.models.distributed import PROCESS, only_first, say

DATE = "date that the chat template writes"


@dataclass(frozen=True)
class Inputs:
    """What a command names, read and checked."""
    judge: judges.Judge
    made_from: dict  # what a run is known by: name -> JSON value
    files: list  # (flag, path) of local files: --fresh must not delete them
    chat: chat_template.ChatFormat | None = None
    sampler: tuple = ()  # (serve, attention), see Start
    records: list = ()
    held_out: list = ()
    eval_judge: judges.Judge | None = None


@dataclass(frozen=True)
class Start:
    """What Algorithm 1 starts from; the arms of a seed share it."""
    run: Run  # records what they share: the unpacked policy, the world, the start's evaluation
    policy: str
    chat: chat_template.ChatFormat
    serve: object  # sample.serve, or what samples an architecture that it would get wrong,
    attention: str  # under this attention
    judge: judges.Judge
    portions: list
    held_out: list
    true_measures: object = None  # (model, start model) -> dict; in a world whose truth is known
    eval_judge: judges.Judge | None = None  # of the held-out answers; None: the same judge

    def judging(self, here, held_out=False):
        """The judge of one phase. Its scores are kept there as they come, so that one which fails
        half way loses nothing."""
        judge = self.judge
        if held_out:  # --length-penalty is for training
            judge = replace(self.eval_judge or judge, length_penalty=0.0)
        kept = judges.Kept(here / f"scores{PROCESS}.jsonl", here.glob("scores*.jsonl"))
        return functools.partial(judge, kept=kept)

    def also_samples(self, temperature):
        """Whether held-out prompts are answered at temperature 1 too, beside greedily: where that
        costs at most a quarter of what sampling for the smallest portion does."""
        return temperature == 0 and 4 * len(self.held_out) <= min(map(len, self.portions))

    def forget_scores(self, here):
        """Once they are in pairs.jsonl and eval.jsonl."""
        for file in here.glob("scores*.jsonl"):
            file.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------
# 1. Reading and refusing
# ----------------------------------------------------------------------------------------------


def read_inputs(s):
    """Inputs of the settings s, cheap ones first; writes nothing. ValueError if it cannot work."""
    chat = None if s.variant else read_model(s)
    if s.variant and s.max_length > toy.CONTEXT:
        raise ValueError(f"--max-length {s.max_length} exceeds the context of the toy's model, "
                         f"{toy.CONTEXT}")
    if s.chat_template and not Path(s.chat_template).is_file():
        raise ValueError(f"--chat-template {s.chat_template}: no such file")
    load = functools.partial(judges.load_judge, device=s.device,
                             progress=PROCESS == 0,
                             oracle=toy.oracle(s.variant) if s.variant else None)
    names = [("--model", s.model), ("--data", s.data), ("--chat-template", s.chat_template)]
    names += [("--samples-from", file) for file in engine_samples.files(s)]
    names += [("--ranker", judges.parse_spec(s.ranker).path),
              ("--eval-ranker", judges.parse_spec(s.eval_ranker or "").path)]
    inputs = Inputs(load(s.ranker), {}, [(f, name) for f, name in names if name], chat,
                    eval_judge=load(s.eval_ranker, flag="--eval-ranker") if s.eval_ranker else None)
    inputs = replace(inputs, made_from=judged_by(s, inputs))
    return inputs if s.variant else with_data(inputs, s)


def with_data(inputs, s):
    """inputs with the checked rows, the sampler, and what the run is known by."""
    chat = inputs.chat
    records, held_out = read_data(s)
    records = preferences.check_rows(records, chat, inputs.judge.check, s.skip_bad_rows)
    held_out = preferences.check_rows(held_out, chat, (inputs.eval_judge or inputs.judge).check,
                               s.skip_bad_rows)
    portions = preferences.split_portions(records, s.iterations, s.prompts_per_iteration, s.seed)
    if s.pairs == "data":  # else the data's answers are in no pair
        check_answers(portions, s)
    judge = judges.with_length_penalty(inputs.judge, s.length_penalty, chat.tokenizer)
    judge.dry_call(records)
    if inputs.eval_judge and held_out:
        inputs.eval_judge.dry_call(held_out)
    sampler = check_model(s, chat, records)
    template = hashlib.sha256(chat.own_template.encode()).hexdigest()[:16]
    made_from = {"model": source(s.model), "data": digest(records, held_out),
                 "chat template": template, **judged_by(s, inputs)}
    if "strftime_now" in chat.tokenizer.chat_template:
        made_from[DATE] = chat.today.isoformat()
    return replace(inputs, judge=judge, made_from=made_from, sampler=sampler, records=records,
                   held_out=held_out)


def check_answers(portions, s):
    """ValueError where no row of an iteration has two answers that say something: such rows are
    dropped when pairs are made, and the iteration would have nothing to train on."""
    for k, portion in enumerate(portions, s.first):
        if all(any(not chat_template.strip_thought(row[name]).strip()
                   for name in ("data_chosen", "data_rejected")) for row in portion):
            raise ValueError(f"--data {s.data}: in iteration {k} every row has an empty answer "
                             f"({portion[0]['where']} is one), and such rows are dropped; give "
                             "rows whose chosen and rejected both say something")


def read_model(s):
    """The chat format of the start model, whose tokenizer and limits fit. ValueError."""
    config = weights.load_config(s.model)
    context = sample.context_length(config)
    if s.max_length > context:
        raise ValueError(f"--max-length {s.max_length} exceeds the context of {s.model}, {context}")
    tokenizer = chat_template.load_tokenizer(s.model, s.chat_template)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{s.model}: the tokenizer knows {len(tokenizer)} tokens, the model only "
            f"{config.vocab_size}; if tokens were added to it, call model.resize_token_embeddings("
            "len(tokenizer)) once and save the model, else the two do not belong together")
    day = None if s.fresh else run_record.made_from(s.run_dir).get(DATE)
    chat = chat_template.ChatFormat(tokenizer, weights.model_stop_ids(s.model),
                               day and datetime.date.fromisoformat(day))
    if chat.note:
        say(f"{s.model}: {chat.note}")
    return chat


def read_data(s):
    """(training records, held-out records): the data's own test split, the toy's, or rows set
    aside; no prompt is in both."""
    read = functools.partial(preferences.load_preferences, skip_bad_rows=s.skip_bad_rows)
    records = read(s.data)
    if s.variant:
        held_out = read(Path(s.data).with_name("test.jsonl"))[:s.eval_prompts]
    elif Path(s.data).is_file():
        return preferences.hold_out(records, s.eval_prompts, s.seed)
    else:
        try:
            held_out = read(s.data, "test_prefs")[:s.eval_prompts] if s.eval_prompts else []
        except preferences.NoSplit:
            return preferences.hold_out(records, s.eval_prompts, s.seed)
    left = preferences.leave_out(records, held_out)
    if len(left) < len(records):
        say(f"{len(records) - len(left)} rows have a held-out prompt and are left out of training")
    return left, held_out


def check_model(s, chat, records):
    """(serve, attention) that sample this model rightly. ValueError for a model whose log-probs
    or samples we would get wrong."""
    trees = [data.Tree(chat.prompt_ids(row["prompt"])[-16:],
                       [chat.response_ids(row["prompt"], row["data_chosen"])[:16],
                        chat.response_ids(row["prompt"], row["data_rejected"])[:12]], 0, 1, [])
             for row in records[:2]]
    dtype = torch.bfloat16 if s.dtype == "bf16" else torch.float32
    model = weights.load_model(s.model, dtype, s.device, s.compute.attention)
    weights.check_saved_form(model, s.model)
    compatibility.self_check(policies.Policy(model), data.pad if s.plain_rows else data.pack, trees,
                        s.max_length, packed=not s.plain_rows)
    serve = compatibility.choose_sampler(
        model, trees[0].prompt_ids, compatibility.probe_length(model.config, s.max_length), say)
    return serve, model.config._attn_implementation


def count_prompts(s):
    """(how many rows a run would train on, or None; where the number comes from), for --dry-run."""
    if s.variant:
        return toy.TRAIN_ROWS, "made on the spot"
    if Path(s.data).exists():
        return len(read_data(s)[0]), "counted, without held-out rows"
    if s.data in flags.KNOWN_PROMPTS:
        return flags.KNOWN_PROMPTS[s.data], "the paper's count"
    return None, "unknown before it is loaded"


# ----------------------------------------------------------------------------------------------
# 2. What a run is known by
# ----------------------------------------------------------------------------------------------


def digest(records, held_out):
    """Rows and checksum of the ordered records, whatever file they came from."""
    text = json.dumps([[record[name] for name in ("prompt_id", "prompt", "data_chosen",
                                                  "data_rejected")]
                       for record in (*records, *held_out)])
    return {"rows": len(records) + len(held_out),
            "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}


def source(name):
    """Of a local file or folder, its content; of a hub id, the name and the commit in the cache."""
    if Path(name).exists():
        return fingerprint(name)
    return {name: getattr(weights.load_config(name), "_commit_hash", None)}


def judged_by(s, inputs):
    return {"judge": judge_source(s.ranker, inputs.judge), "judge of the evaluation": (
        judge_source(s.eval_ranker, inputs.eval_judge) if s.eval_ranker else None)}


def judge_source(spec, judge):
    """The same of a judge: file.py:function and what it has imported from beside it, pairrm[:ID],
    reward:ID, or a name."""
    kind, path, function = judges.parse_spec(spec)
    if kind == "file":
        imported = {name: fingerprint(module.__file__)[""] for name, module in
                    sorted(judge.score.modules.items()) if name != Path(path).stem
                    and getattr(module, "__file__", None)}
        return fingerprint(path) | {"function": function} | imported
    return {kind: fingerprint(path) if path and Path(path).exists() else path}


# ----------------------------------------------------------------------------------------------
# 3. What the arms of a seed share
# ----------------------------------------------------------------------------------------------


def make_start(inputs, s, run):
    """Start of the settings s; run: the home of the seed, where what must be made is made once."""
    truth, policy = None, s.model
    if s.variant:
        world = run.folder(run.path / "world", build_world, s.seed, s.variant)
        s = replace(s, model=str(world / "base"), data=str(world / "train.jsonl"))
        inputs, policy = with_data(replace(inputs, chat=read_model(s)), s), s.model
        truth = functools.partial(toy.true_measures, tokenizer=inputs.chat.tokenizer,
                                  prompts=[row["prompt"] for row in inputs.held_out],
                                  variant=s.variant, seed=s.seed)
    elif policy.endswith(".gguf"):  # unpacked once, not at every load
        policy = str(run.folder(run.path / "start_policy", unpack, policy, inputs.chat))
    portions = preferences.split_portions(inputs.records, s.iterations, s.prompts_per_iteration, s.seed)
    return Start(run, policy, inputs.chat, *inputs.sampler, inputs.judge, portions,
                 inputs.held_out, truth, inputs.eval_judge)


def build_world(path, seed, variant):
    def build():
        shutil.rmtree(path, ignore_errors=True)  # a damaged one
        toy.build_world(path, seed, variant=variant, progress=PROCESS == 0)
    only_first(build)


def unpack(path, gguf, chat):
    only_first(lambda: weights.save_policy(policies.Policy(weights.load_model(gguf)),
                                            chat.tokenizer, path, chat.stop_ids))
