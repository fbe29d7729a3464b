"""The settings of a run: recipes, the command line, and the checks that need no file.

A recipe is a dictionary of settings, and flags replace single ones. `read(argv)` returns a frozen
`Settings`. A field of `Settings` is the one entry of its setting: the flag, its line in --help, the
numbers that it accepts, and whether a run may be resumed with another value.

`settings.at(k)` is what iteration k uses. `settings.batching` and `settings.compute` are groups of
settings that are passed on together. Of the project's files, this one imports selm.py alone, for
the names of the losses.

Test: pytest tests/test_settings.py.    Legend: s is a Settings.
"""

import argparse
import hashlib
import importlib.util
import math
import os
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch

import selm

# ----------------------------------------------------------------------------------------------
# 1. Recipes: the paper's settings (released code where the paper is silent), and two small ones
# ----------------------------------------------------------------------------------------------

PAPER = dict(data="HuggingFaceH4/ultrafeedback_binarized", ranker="pairrm",
             iterations=3, offline_first=False, beta=0.01, alpha=1e-3, lr=(5e-7, 3e-7, 1e-7),
             batch_size=128, epochs=1, adam_betas=(0.9, 0.999), adam_eps=1e-8, max_grad_norm=1.0,
             max_length=1024, max_prompt_length=512, max_new_tokens=1024, temperature=0.0, slots=64,
             tokens_per_forward=8192, gradient_checkpointing=True, eval_prompts=256,
             prompts_per_iteration=None, seeds=1, baseline=False, variant=None)
KNOWN_PROMPTS = {PAPER["data"]: 61_135}  # train_prefs, after double prompts; for --dry-run
RECIPES = {
    "zephyr-7b-sft": PAPER | dict(
        model="HuggingFaceH4/mistral-7b-sft-beta", iterations=4, offline_first=True, batch_size=256,
        lr=(5e-7, 5e-7, 5e-7, 1e-7)),
    "llama-3-8b-instruct": PAPER | dict(model="meta-llama/Meta-Llama-3-8B-Instruct", alpha=1e-4),
    # Phi-3 has a key and value for every head: 0.4 MB of cache for each token, three times as much.
    "phi-3-mini": PAPER | dict(model="microsoft/Phi-3-mini-4k-instruct", slots=32),
    # Not in the paper: small enough for one CPU. Also the settings of a model without a recipe.
    "smollm2-135m": PAPER | dict(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", lr=(1e-6,), batch_size=16, max_length=512,
        max_prompt_length=256, max_new_tokens=256, slots=16, tokens_per_forward=2048,
        gradient_checkpointing=False, eval_prompts=32, beta=0.1),
    # The toy. A large Adam eps keeps steps proportional to the gradient; with 1e-8 the tiny model
    # stops writing valid answers. alpha is large, because a smaller one has no visible effect
    # (README). The learning rate falls from iteration to iteration, as the paper's does: at a
    # constant 6e-3 and alpha 0.3 some seeds stop writing valid answers, and which ones depends on
    # the processor's rounding (experiments/checks/breakdown.py).
    "toy": PAPER | dict(
        model=None, data=None, ranker="oracle", alpha=0.1, beta=1.0, lr=(6e-3, 3.6e-3, 1.2e-3),
        batch_size=32,
        adam_betas=(0.9, 0.95), adam_eps=0.1, prompts_per_iteration=512,
        max_grad_norm=math.inf,  # clipping would undo what the large eps is for
        max_length=64, max_prompt_length=32, max_new_tokens=8, slots=128, tokens_per_forward=8192,
        gradient_checkpointing=False, eval_prompts=48, seeds=5, baseline=True, variant="default"),
}
# The same world with other hidden tastes, for experiments/evidence/ablation.py.
RECIPES |= {f"toy-{name}": RECIPES["toy"] | dict(variant=name) for name in ("neutral", "rare")}

# ----------------------------------------------------------------------------------------------
# 2. What the entry of a setting says
# ----------------------------------------------------------------------------------------------


def setting(group, kind, help, *, default=MISSING, above=None, at_least=None, at_most=2**31,
            may_change=False, **options):
    """One entry of `Settings`, which becomes a flag. Without a default, every recipe must have it.

    group: its heading in --help. kind: what turns the flag's text into a value; bool makes a switch
    without a value. above or at_least, and at_most: the numbers that it accepts. may_change: a run
    may be resumed with another value, because no number depends on it, or because `made_from` of
    config.json records what the value names. options: argparse's (choices, nargs, metavar).
    """
    if kind is not bool:
        options["type"] = kind
    elif default is False:
        options["action"] = "store_true"
    else:  # a recipe may turn it on, so --no-... turns it off
        options["action"] = argparse.BooleanOptionalAction
    return field(default=default, metadata={
        "group": group, "help": help, "options": options, "above": above, "at_least": at_least,
        "at_most": at_most, "may_change": may_change})


inputs = partial(setting, "what to train, on what, judged by whom")
method = partial(setting, "the method")
optimiser = partial(setting, "optimiser")
sampling = partial(setting, "lengths and sampling")
speed = partial(setting, "speed and memory")
run = partial(setting, "the run")


def as_text(value):
    """A flag's value that will be written into a file or shown to a model. (Bytes that are not
    UTF-8 reach Python as half characters, which fail only when they are written.)"""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not UTF-8 text") from None
    return value


def as_path(value):
    """A file, folder or hub id. The shell does not expand a ~ after a = or in quotes."""
    return os.path.expanduser(as_text(value))


def as_judge(value):
    """~/judge.py:f, reward:~/model."""
    kind, colon, rest = value.partition(":")
    return as_path(kind) + colon + as_path(rest)


# ----------------------------------------------------------------------------------------------
# 3. Settings, and the groups of them that are passed on together
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batching:
    """How trees become updates and micro-batches."""
    batch_size: int  # prompts an update, over all processes
    epochs: int
    tokens_per_forward: int
    plain_rows: bool


@dataclass(frozen=True)
class Compute:
    """The device of a policy, and how it computes there."""
    device: str
    dtype: str  # "fp32", or "bf16": autocast over fp32 master weights
    gradient_checkpointing: bool
    compile: bool
    lora_rank: int
    plain_rows: bool
    offload: bool

    @property
    def attention(self):
        """The attention of training: ours (model.py); for --plain-rows transformers' eager."""
        return "eager" if self.plain_rows else "selm_tree"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run. Read-only: an arm, a seed or an iteration that differs is a copy with
    that difference (`dataclasses.replace`)."""
    # None: the toy world makes its own model and data
    model: str | None = inputs(
        as_path, f"a recipe ({', '.join(RECIPES)}), a hub id org/name, a folder, or a .gguf file",
        default="toy", may_change=True)
    data: str | None = inputs(
        as_path, "preferences in UltraFeedback-binarized format: a JSONL, JSON, csv or parquet "
        "file, a folder of datasets, or a hub id", may_change=True)
    ranker: str = inputs(
        as_judge, "pairrm[:ID] | reward:ID | file.py:function | oracle (toy)",
        may_change=True)
    eval_ranker: str | None = inputs(
        as_judge, "the judge of the held-out answers, named as --ranker is. Without it --ranker "
        "judges them too, and win rates say how well training pleased that judge", default=None,
        may_change=True)
    chat_template: str | None = inputs(
        as_path, "Jinja chat template, for a model without one", default=None, metavar="FILE",
        may_change=True)
    skip_bad_rows: bool = inputs(
        bool, "leave out and count rows that cannot be used, instead of stopping at the first",
        default=False)
    run_dir: Path = inputs(as_path, "the folder of the run's files (runs/NAME)", may_change=True)

    alpha: float = method(
        float, "weight of optimism; 0 is iterative DPO; the paper takes 1e-3 or 1e-4 out of "
        "5e-3 .. 1e-4", at_least=0, at_most=1e3)
    beta: float = method(float, "strength of the KL anchor; the paper: 0.01", above=0, at_most=1e3)
    loss: str = method(
        str, "loss of a pair, from selm.PREFERENCE_LOSS; ipo (arXiv 2310.12036) needs another "
        "--alpha and --lr", default="dpo", choices=list(selm.PREFERENCE_LOSS))
    optimism: str = method(
        str, "the term that alpha scales: alpha beta r(y), r = log pi/pi_ref (SELM); "
        "alpha log pi(y) (XPO); alpha / beta (sigmoid(beta r) - 1/2) (POPO)", default="selm",
        choices=list(selm.OPTIMISM))
    reference: str = method(
        str, "previous: the policy of the last iteration, as in Algorithm 1; initial: the start "
        "model, in all iterations", default="previous", choices=["previous", "initial"])
    pairs: str = method(
        str, "data: best and worst of {y, y_w, y_l}; reference: a sample of the policy against one "
        "of the first model, which optimism pushes down (XPO, with --optimism xpo)",
        default="data", choices=["data", "reference"])
    iterations: int = method(int, "number of portions into which the prompts are split",
                             at_least=1, at_most=1000)
    offline_first: bool = method(
        bool, "train the first portion by plain offline DPO, as the Zephyr recipe does")
    prompts_per_iteration: int | None = method(int, "largest number of prompts in a portion",
                                               at_least=1)
    responses_per_prompt: int = method(int, "fresh samples beside the data's two responses",
                                       default=1, at_least=1, at_most=1000)
    length_penalty: float = method(float, "subtracted from a score for each token", default=0.0,
                                   at_least=0, at_most=1e3)

    lr: tuple = optimiser(float, "one learning rate, or one for each iteration", nargs="+",
                          above=0, at_most=10)
    batch_size: int = optimiser(int, "prompts of an update, over all processes", at_least=1)
    epochs: int = optimiser(int, "passes over a portion", at_least=1, at_most=1000)
    adam_betas: tuple = optimiser(float, "AdamW's betas", nargs=2, at_least=0, at_most=0.999999)
    adam_eps: float = optimiser(float, "AdamW's eps", above=0, at_most=1)
    max_grad_norm: float = optimiser(
        float, "larger gradients are clipped to this norm; inf: no clipping", above=0,
        at_most=math.inf)
    lora_rank: int = optimiser(int, "rank of the LoRA adapters to train; 0: train all weights",
                               default=0, at_least=0, at_most=2**16)
    seed: int = optimiser(int, "of shuffling and sampling", default=0, at_least=0, at_most=2**62)
    seeds: int = optimiser(int, "how many seeds to run, for confidence intervals", at_least=1,
                           at_most=1000, may_change=True)

    max_length: int = sampling(int, "tokens of prompt + response", at_least=1)
    max_prompt_length: int = sampling(int, "tokens of the prompt, cut from the left", at_least=1)
    max_new_tokens: int = sampling(
        int, "most tokens of a sampled response; --max-length limits it too", at_least=1)
    temperature: float = sampling(
        float, "0: greedy, as the authors' code; 1: as the paper writes", at_least=0, at_most=100)
    top_p: float = sampling(float, "nucleus sampling", default=1.0, above=0, at_most=1)
    samples_from: str | None = sampling(
        as_path, "samples of another engine (vLLM); {k} is the number of the iteration. The first "
        "run writes the prompts; harness/inputs/engine_samples.py has the format", default=None,
        metavar="FILE")

    tokens_per_forward: int = speed(
        int, "tokens of a micro-batch; more tokens take more memory", at_least=1, may_change=True)
    slots: int = speed(int, "responses sampled at the same time", at_least=1, may_change=True)
    gradient_checkpointing: bool = speed(bool, "compute layers again in backward, to save memory",
                                         may_change=True)
    compile: bool = speed(bool, "torch.compile the layers", default=False, may_change=True)
    plain_rows: bool = speed(
        bool, "pad rows instead of packing them, for architectures that cannot be packed",
        default=False)
    offload: bool | None = speed(
        bool, "fp32 master weights and optimiser in host memory; without either flag this is done "
        "where a GPU is too small otherwise", default=None, may_change=True)
    device: str = speed(str, "without it a GPU if there is one; the toy: cpu",
                        choices=["cuda", "cpu"])
    dtype: str = speed(
        str, "bf16: autocast over fp32 master weights; without it bf16 on a GPU, fp32 on a CPU",
        choices=["fp32", "bf16"])

    save_dtype: str = run(
        str, "dtype of saved policies. start: that of the start model, half the disk if it is "
        "bf16, but changes below 1/512 of a weight are lost between iterations: most changes, at "
        "the paper's learning rates", default="float32", choices=["float32", "start"])
    save_every: int = run(
        int, "save a checkpoint inside the training phase every so many updates (12 bytes a "
        "parameter, twice while one replaces another); 0: after a kill the phase starts again",
        default=0, at_least=0, metavar="UPDATES", may_change=True)
    eval_prompts: int = run(int, "held-out prompts for the evaluation; 0: no evaluation",
                            at_least=0)
    baseline: bool = run(bool, "also run alpha = 0 from the same start model and seeds",
                         may_change=True)
    track: str | None = run(
        str, "also show the rows of metrics.jsonl in this tracker, if it is installed",
        default=None, choices=["trackio", "wandb", "tensorboard"], may_change=True)
    dry_run: bool = run(
        bool, "print all settings and estimates of memory and time, then stop; loads no weights. "
        "Estimates for a GPU, unless --device cpu", default=False, may_change=True)
    processes: int | None = run(int, "processes of torchrun that --dry-run assumes", default=None,
                                at_least=1, may_change=True)
    fresh: bool = run(bool, "delete the run in --run-dir and start again", default=False,
                      may_change=True)

    # No flags: a recipe, `complete` or `at` sets them.
    variant: str | None  # of the toy world
    name: str = field(metadata={"may_change": True})  # of the recipe or the model
    iteration: int | None = None

    @property
    def first(self):
        """The first iteration's number: the Zephyr recipe has an iteration 0."""
        return 0 if self.offline_first else 1

    def at(self, iteration):
        """The settings of one iteration: its learning rate; iteration 0 is plain offline DPO."""
        changes = {"iteration": iteration}
        if iteration >= self.first:
            changes["lr"] = self.lr[iteration - self.first]
        if iteration == 0:
            changes |= {"alpha": 0.0, "responses_per_prompt": 0, "pairs": "data",
                        "samples_from": None}
        return replace(self, **changes)

    def _group(self, kind):
        return kind(**{entry.name: getattr(self, entry.name) for entry in fields(kind)})

    batching = property(lambda self: self._group(Batching))
    compute = property(lambda self: self._group(Compute))

    def as_dict(self):
        return asdict(self)


# Settings in which a run and the command that resumes it may differ.
NO_DIFFERENCE = tuple(entry.name for entry in fields(Settings) if entry.metadata.get("may_change"))

# ----------------------------------------------------------------------------------------------
# 4. The command line
# ----------------------------------------------------------------------------------------------


def read(argv=None):
    """The command line -> Settings, complete and checked. Errors: ValueError."""
    given = vars(make_parser().parse_args(argv))
    given = {name: value for name, value in given.items() if value is not None}
    settings = complete(given)
    check(settings, own_data="data" in given)
    return settings


def make_parser():
    """argparse's parser, with a flag for each entry of Settings. No flag has a default there: a
    flag that is not given leaves the value to the recipe, and then to the entry's default."""
    parser = argparse.ArgumentParser(
        description="Self-Exploring Language Models (arXiv 2405.19332): online preference "
                    "optimisation that explores. Without flags: the toy world, SELM against "
                    "iterative DPO (alpha = 0), in a minute or two.",
        epilog="Settings that are not given come from the recipe; --dry-run prints them all. "
               "SELM_TRACEBACK=1 shows where a one-line error arose.", allow_abbrev=False)
    groups = {}
    for entry in fields(Settings):
        if title := entry.metadata.get("group"):
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            text = entry.metadata["help"]
            if entry.default is not MISSING and entry.default:
                text += f" (default: {entry.default})"
            groups[title].add_argument(flag_of(entry.name), default=None, help=text,
                                       **entry.metadata["options"])
    return parser


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def complete(given):
    """The flags that are given (name -> value), and the recipe -> Settings. Errors: ValueError."""
    model = given.get("model", Settings.model)
    if model not in RECIPES and "/" not in model and not Path(model).exists():
        raise ValueError(f"--model {model}: no such recipe, folder or file; the recipes are "
                         f"{', '.join(RECIPES)}, and a hub id has the form org/name")
    recipe = RECIPES.get(model, RECIPES["smollm2-135m"] | {"model": model})
    values = recipe | given | {"model": recipe["model"]}
    check_numbers(values)
    rates = tuple(values["lr"])
    if len(given.get("lr", [0])) == 1:  # a recipe's rates: cut, or the last one is repeated
        rates = (rates + rates[-1:] * values["iterations"])[:values["iterations"]]
    if "device" not in values:
        wanted = torch.cuda.is_available() or values.get("dry_run")
        values["device"] = "cuda" if wanted and not values["variant"] else "cpu"
    on_gpu = values["device"] == "cuda"
    if not on_gpu:
        values["offload"] = values.get("offload", False)
    values.setdefault("dtype", "bf16" if on_gpu else "fp32")
    name = name_of(model, given)
    return Settings(**values | {
        "name": name, "run_dir": Path(given.get("run_dir", Path("runs") / name)), "lr": rates,
        "adam_betas": tuple(values["adam_betas"])})


def name_of(model, given):
    """What the run is called: its recipe, or its model's folder or file. Errors: ValueError."""
    path = Path(model).resolve()
    if model in RECIPES:
        name = model
    elif path.name == "policy":  # runs/x/iter_3/policy -> x-iter_3-policy
        name = "-".join(path.parts[-3:]).lower()
    else:
        name = path.name.removesuffix(".gguf").lower()
    if given.get("run_dir") == "":
        raise ValueError("--run-dir: the name is empty")
    if "run_dir" not in given and name != name.encode(errors="ignore").decode():
        raise ValueError("--model: its folder's name, by which the run is called, is not UTF-8 "
                         "text; give --run-dir")
    return name


def check_numbers(values):
    """Compares every number with its range, before it is used. Errors: ValueError."""
    for entry in fields(Settings):
        value, allowed = values.get(entry.name), entry.metadata
        if value is None or "group" not in allowed:
            continue
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if allowed["above"] is not None:
                fits, words = number > allowed["above"], f"above {allowed['above']}"
            elif allowed["at_least"] is not None:
                fits, words = number >= allowed["at_least"], f"at least {allowed['at_least']}"
            else:  # no number
                continue
            if not (fits and number <= allowed["at_most"]):  # NaN fits nowhere
                if allowed["at_most"] < math.inf:
                    words += f" and at most {allowed['at_most']:g}"
                raise ValueError(f"{flag_of(entry.name)} {number:g}: must be {words}")


def stream(*key):
    """A 63-bit seed that depends on all of key: every prompt has a random stream of its own."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def check(s, own_data):
    """Refuses settings that cannot work, whatever the files hold. own_data: whether --data was
    given. Errors: ValueError."""
    for wrong, message in faults(s, own_data):
        if wrong:
            raise ValueError(message)


def faults(s, own_data):
    """Yields (whether it is so, what is wrong and what to do)."""
    yield s.variant and own_data, "--data: the toy makes its own data; give --model as well"
    yield len(s.lr) != s.iterations, (
        f"--lr: {len(s.lr)} rates for {s.iterations} iterations; give one, or one an iteration")
    yield s.max_prompt_length >= s.max_length, (
        "--max-prompt-length must be below --max-length, or no room is left for a response")
    yield s.responses_per_prompt > 1 and s.temperature == 0, (
        "--responses-per-prompt > 1 needs --temperature > 0: greedy samples would all be the same")
    if s.pairs == "reference":
        yield s.reference != "initial", (
            "--pairs reference: its pairs hold a sample of the first model; give --reference "
            "initial as well")
        yield s.temperature == 0, (
            "--pairs reference needs --temperature > 0: both greedy samples would be the same in "
            "the first iteration")
        yield s.responses_per_prompt > 1, (
            "--pairs reference takes one sample of each model; leave --responses-per-prompt at 1")
    if s.samples_from:
        yield s.pairs == "reference", (
            "--samples-from has no sample of the first model, which --pairs reference needs")
        yield s.seeds > 1 or s.baseline, (
            "--samples-from is for one arm, because each arm has a policy of its own; give "
            "--seeds 1 --no-baseline")
        yield "{k}" not in s.samples_from and s.iterations > 1, (
            "--samples-from: every iteration has its own samples; write {k} in the name, where "
            "the iteration's number belongs")
    yield s.track and not importlib.util.find_spec(s.track), (
        f"--track {s.track}: it is not installed; pip install {s.track}")
    if not s.dry_run:
        yield s.processes, ("--processes is for --dry-run; to start N processes: torchrun "
                            "--nproc-per-node N")
        yield s.device == "cuda" and not torch.cuda.is_available(), (
            "--device cuda: this machine has no GPU that torch can use")


# ----------------------------------------------------------------------------------------------
# 5. What --dry-run prints (harness/models/memory.py adds memory and time)
# ----------------------------------------------------------------------------------------------


def prompts_of_iteration(s, prompts):
    """How many prompts a portion has, or None. prompts: how many there are, or None."""
    limits = [prompts // s.iterations if prompts else None, s.prompts_per_iteration]
    return min([limit for limit in limits if limit], default=None)


def dry_run_text(s, prompts, source):
    """The numbers of each iteration, all settings, and the names of the files. prompts: how many
    there are, or None; source: where that number comes from."""
    lines = [f"model   {s.model or 'made by the toy'}",
             f"data    {s.data or 'made by the toy'}: {prompts or '?'} prompts ({source})",
             f"ranker  {s.ranker}; of the evaluation: {s.eval_ranker or 'the same'}",
             f"loss    {s.loss}, beta {s.beta:g}, reference: {s.reference}", "",
             "iteration  prompts  samples  alpha   lr       updates  warm-up  tokens at most"]
    portion = prompts_of_iteration(s, prompts)
    lines += [iteration_line(s, k, portion) for k in range(s.first, s.first + s.iterations)]
    all_settings = [f"{name} {value}" for name, value in s.as_dict().items() if value is not None]
    return "\n".join(lines + [
        "",
        f"batch   {s.batch_size} prompts an update, in micro-batches of {s.tokens_per_forward} "
        "tokens",
        f"sample  temperature {s.temperature:g} (0 = greedy), at most {s.max_new_tokens} new "
        f"tokens, {s.slots} slots",
        f"rows    prompt {s.max_prompt_length}, with response {s.max_length} tokens",
        f"seeds   {s.seeds}; baseline alpha = 0: {'yes' if s.baseline else 'no'}",
        f"files   {s.run_dir}/iter_K/{{samples.jsonl, pairs.jsonl, reference.jsonl, policy/, "
        f"eval.jsonl}}, {s.run_dir}/metrics.jsonl, report.md, figures/",
        f"all     {', '.join(all_settings)}"])


def iteration_line(s, k, portion):
    """A row of the table: iteration k on `portion` prompts (None: their number is unknown)."""
    at = s.at(k)
    n, lr = at.responses_per_prompt, f"{at.lr:g}"
    note = "   offline DPO on the data's own pairs" if n == 0 else ""
    if portion is None:
        return f"{k:<10} {'?':<8} {'?':<8} {at.alpha:<7g} {lr:<8} {'?':<8} {'?':<8} ?{note}"
    updates = math.ceil(portion / s.batch_size) * s.epochs
    warmup = math.ceil(0.1 * updates)
    longest = s.max_prompt_length + (2 + n) * (s.max_length - s.max_prompt_length)
    return (f"{k:<10} {portion:<8} {portion * n:<8} {at.alpha:<7g} {lr:<8} {updates:<8} "
            f"{warmup:<8} {portion * longest}{note}")
