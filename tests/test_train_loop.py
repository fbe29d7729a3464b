"""The loop itself: the command line, recipes on tiny models of their architectures, resuming."""

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import model as policies
import train_loop
from conftest import ROOT, make_model, make_tokenizer
from harness import scale
from harness.rundir import read_jsonl, write_jsonl
from harness.settings import RECIPES
from test_model import make_trees, plain_logps

WORDS = "hello there how are you the cat sat on mat and looked at moon".split()
SMALL = ("--prompts-per-iteration 6 --batch-size 3 --max-length 48 --eval-prompts 2 "
         "--max-prompt-length 24 --max-new-tokens 6 --tokens-per-forward 128 --slots 4 "
         "--beta 0.1 --dtype fp32 --device cpu").split()


def write_model(folder, architecture="llama", style="chatml"):
    policy = policies.Policy(make_model(architecture, scale=3.0))
    policies.save_policy(policy, make_tokenizer(style), folder)
    return str(folder)


def write_preferences(path, rows=20):
    def text(i, k):
        return " ".join(WORDS[(i * 7 + k * 3 + j * (k + 1)) % len(WORDS)] for j in range(3 + k))
    write_jsonl(path, [{
        "prompt": text(i, 0), "prompt_id": str(i),
        "chosen": [{"role": "user", "content": text(i, 0)},
                   {"role": "assistant", "content": text(i, 1)}],
        "rejected": [{"role": "user", "content": text(i, 0)},
                     {"role": "assistant", "content": text(i, 2)}],
    } for i in range(rows)])
    return str(path)


def write_judge(path):
    path.write_text(
        "def judge(prompts, candidates):\n"
        "    return [[float(sum(map(ord, c)) % 97) for c in cs] for cs in candidates]\n")
    return f"{path}:judge"


@pytest.fixture
def command(tmp_path):
    """The arguments of a tiny real run: a Llama folder, a preference file, a user's judge."""
    return ["--model", write_model(tmp_path / "model"),
            "--data", write_preferences(tmp_path / "p.jsonl"),
            "--ranker", write_judge(tmp_path / "judge.py"),
            "--run-dir", str(tmp_path / "run"), *SMALL,
            "--iterations", "2", "--lr", "1e-3", "--temperature", "1"]


def weights(run_dir, iteration=2):
    folder = Path(run_dir) / f"iter_{iteration}/policy"
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def rows(path):
    return [row for _, row in read_jsonl(path)]


# ----------------------------------------------------------------------------------------------
# The whole loop
# ----------------------------------------------------------------------------------------------


def test_the_default_command_runs_as_a_newcomer_would_run_it(tmp_path):
    """An import that only tests have; a figure, table or policy that the last line promises."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_loop.py"), "--run-dir", str(tmp_path / "toy"),
         "--seeds", "1", "--iterations", "1", "--prompts-per-iteration", "64",
         "--eval-prompts", "6"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    run = tmp_path / "toy"
    for name in ("report.md", "figures/evaluation.png", "figures/training.png", "config.json",
                 "iter_1/samples.jsonl", "iter_1/pairs.jsonl", "iter_1/policy/config.json",
                 "baseline/iter_1/policy/config.json"):
        assert (run / name).exists(), name
    assert "| SELM | 1 |" in result.stdout and "| DPO | 1 |" in result.stdout
    assert str(run / "report.md") in result.stdout
    sampled = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--model", str(run / "iter_1/policy"),
         "--prompt", "describe the fox"], capture_output=True, text=True, timeout=120)
    assert sampled.returncode == 0 and len(sampled.stdout.split()) >= 1


@pytest.mark.parametrize("recipe, architecture, style", [
    ("zephyr-7b-sft", "mistral", "zephyr"), ("llama-3-8b-instruct", "llama", "llama3"),
    ("phi-3-mini", "phi3", "phi3")])
def test_each_paper_recipe_runs_on_a_tiny_model_of_its_architecture(
        recipe, architecture, style, tmp_path, monkeypatch, capsys):
    """A recipe whose first real try is on eight GPUs: its template, iteration 0, learning rates."""
    monkeypatch.setitem(RECIPES, recipe, RECIPES[recipe] | {
        "model": write_model(tmp_path / "model", architecture, style)})
    train_loop.main(["--model", recipe, "--data", write_preferences(tmp_path / "p.jsonl", 30),
                     "--ranker", write_judge(tmp_path / "judge.py"),
                     "--run-dir", str(tmp_path / "run"), *SMALL])
    offline = recipe == "zephyr-7b-sft"
    for k in range(0 if offline else 1, 4):
        pairs = rows(tmp_path / f"run/iter_{k}/pairs.jsonl")
        assert all(bool(row["sampled"]) == (k > 0) for row in pairs)
        if k == 0:  # plain offline DPO on the data's own pairs
            assert all("data_chosen" in row["candidates"][row["chosen"]]["sources"] for row in pairs)
    steps = rows(tmp_path / "run/metrics.jsonl")
    peaks = [max(r["lr"] for r in steps if r["phase"] == "train" and r["iteration"] == k)
             for k in range(0 if offline else 1, 4)]
    assert peaks == pytest.approx([5e-7, 5e-7, 5e-7, 1e-7] if offline else [5e-7, 3e-7, 1e-7])
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run/iter_3/policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/iter_3/policy")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_tensors="pt",
                                        add_generation_prompt=True, return_dict=False)
    assert final.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_iterations_chain_and_the_reference_is_the_previous_policy(command, tmp_path):
    """Reference log-probs from the wrong policy: here each is recomputed in plain transformers."""
    train_loop.main(command)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "run/iter_1/policy")
    checked = 0
    for row in rows(tmp_path / "run/iter_2/pairs.jsonl"):
        for candidate in row["candidates"]:
            if "ref_logp" in candidate:
                tree = data.Tree(row["prompt_ids"], [candidate["ids"]], 0, 0, [])
                expected = plain_logps(before, [tree]).item()
                assert candidate["ref_logp"] == pytest.approx(expected, abs=1e-3)
                checked += 1
    assert checked >= 6
    first_losses = [r["dpo_loss"] for r in rows(tmp_path / "run/metrics.jsonl")
                    if r["phase"] == "train" and r["step"] == 0]
    assert first_losses == pytest.approx([math.log(2)] * 2, abs=1e-6)


def test_reference_initial_keeps_the_first_model_as_the_anchor(command, tmp_path):
    """--reference initial that is previous after all."""
    train_loop.main([*command, "--reference", "initial"])
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    row = next(r for r in rows(tmp_path / "run/iter_2/pairs.jsonl") if not r["dropped"])
    candidate = row["candidates"][row["chosen"]]
    tree = data.Tree(row["prompt_ids"], [candidate["ids"]], 0, 0, [])
    assert candidate["ref_logp"] == pytest.approx(plain_logps(start, [tree]).item(), abs=1e-3)


@pytest.mark.parametrize("extra", [
    ["--plain-rows"], ["--lora-rank", "2"], ["--gradient-checkpointing"], ["--dtype", "bf16"],
    ["--responses-per-prompt", "2"], ["--length-penalty", "0.1", "--epochs", "2"],
    ["--alpha", "0"]], ids=" ".join)
def test_every_option_takes_effect_and_runs_the_whole_loop(extra, command, tmp_path, monkeypatch):
    """An option that is parsed and then forgotten, or fails after an hour of sampling."""
    made, padded, loras = [], [], []
    policy, pad, load_ranker = policies.Policy, data.pad, train_loop.rank.load_ranker
    add_lora = scale.add_lora
    monkeypatch.setattr(scale, "add_lora", lambda lm, r: loras.append(r) or add_lora(lm, r))
    monkeypatch.setattr(policies, "Policy", lambda *a: made.append(a) or policy(*a))
    monkeypatch.setattr(data, "pad", lambda trees: padded.append(trees) or pad(trees))
    monkeypatch.setattr(train_loop.rank, "load_ranker", lambda *a, length_penalty, **k: (
        made.append(length_penalty) or load_ranker(*a, length_penalty=length_penalty, **k)))
    train_loop.main([*command, *extra])
    assert (0.1 in made) == ("--length-penalty" in extra)
    made = [a for a in made if isinstance(a, tuple) and len(a) > 1]  # those to be trained
    assert all(a[1] == ("--gradient-checkpointing" in extra) for a in made)
    assert all((a[2] is not None) == ("bf16" in extra) for a in made)
    assert loras == ([2] * len(made) if "--lora-rank" in extra else [])
    assert bool(padded) == ("--plain-rows" in extra)
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "run", 1))
    pairs = [r for r in rows(tmp_path / "run/iter_1/pairs.jsonl") if not r["dropped"]]
    if "--responses-per-prompt" in extra:
        assert all(len(row["sampled"]) == 2 for row in pairs)
    steps = [r for r in rows(tmp_path / "run/metrics.jsonl") if r["phase"] == "train"]
    assert all(("sampled_logratio" in r) == ("--alpha" not in extra) for r in steps)
    assert len(steps) == (8 if "--epochs" in extra else 4)


def test_two_processes_draw_the_same_samples_and_take_the_same_steps(command, tmp_path):
    """Samples that depend on the number of GPUs; gradients off by the number of processes; a rank
    that waits for another's micro-batch for ever (5 pairs do not divide by 2)."""
    train_loop.main(command)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", "29533", str(ROOT / "train_loop.py"),
         *[a.replace("/run", "/run2") for a in command]],
        capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (rows(tmp_path / "run/iter_1/samples.jsonl")
            == rows(tmp_path / "run2/iter_1/samples.jsonl"))
    # Not the weights: Adam turns a gradient of rounding errors into a full step. (test_model.py
    # compares sharded weights, with SGD.)
    one, two = ([r for r in rows(tmp_path / f"{run}/metrics.jsonl") if r["phase"] == "train"]
                for run in ("run", "run2"))
    assert len(one) == len(two) == 4
    for a, b in zip(one[:2], two[:2]):
        for name in ("loss", "grad_norm", "accuracy", "sampled_logratio"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("extra", [["--gradient-checkpointing", "--dtype", "bf16"],
                                   ["--lora-rank", "2"]], ids=" ".join)
def test_two_processes_run_what_the_recipes_use(extra, command, tmp_path):
    """Sharding that works for plain fp32 only: the paper's run is bf16 with checkpointing."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", "29535", str(ROOT / "train_loop.py"), *command, *extra,
         "--iterations", "1"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not same(weights(tmp_path / "run", 1), AutoModelForCausalLM.from_pretrained(
        tmp_path / "model").state_dict())


def test_a_hub_data_set_is_read_by_its_two_splits(command, tmp_path, monkeypatch, capsys):
    """Training on the test split; rows of the hub's schema that the parser does not know."""
    import datasets
    preferences = rows(tmp_path / "p.jsonl")
    splits = {"train_prefs": preferences[:16] + preferences[:2], "test_prefs": preferences[16:]}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda name, split: asked.append((name, split)) or splits[split])
    command[command.index("--data") + 1] = "org/prefs"
    train_loop.main([*command, "--iterations", "1"])
    assert asked == [("org/prefs", "train_prefs"), ("org/prefs", "test_prefs")]
    assert "2 rows repeat a prompt" in capsys.readouterr().out
    held_out = {r["prompt_id"] for r in rows(tmp_path / "run/iter_1/eval.jsonl")}
    assert held_out == {"16", "17"}


# ----------------------------------------------------------------------------------------------
# Pieces
# ----------------------------------------------------------------------------------------------


def settings(**changes):
    values = dict(seed=0, epochs=1, batch_size=6, tokens_per_forward=10**6, adam_betas=(0.9, 0.999),
                  adam_eps=1e-8, beta=0.5, max_grad_norm=1.0, plain_rows=False, device="cpu",
                  dtype="fp32")
    return Namespace(**(values | changes))


def ready_trees(policy):
    trees = make_trees(3, ((5, (4, 7)), (3, (6, 2, 9)), (11, (1, 3)),
                           (4, (4, 4)), (2, (8, 3)), (6, (5, 2))))
    for tree in trees:
        tree.chosen, tree.rejected, tree.sampled = 0, 1, [len(tree.responses) - 1]
        with torch.no_grad():
            tree.ref_logps = policy(data.pack([tree])).tolist()
    return trees


def test_accumulated_micro_batches_equal_one_full_batch():
    """A loss that is averaged over micro-batches of different sizes."""
    results = []
    for budget in (10**6, 25, 1):
        policy = policies.Policy(make_model(scale=2.0))
        trees = ready_trees(policy)
        args = settings(tokens_per_forward=budget, adam_eps=1e-3)
        history = train_loop.train(args, policy, trees, 1, 1e-3, 0.3, check_start=True)
        results.append((history[0]["grad_norm"], policy.causal_lm.state_dict()))
    for norm, state in results[1:]:
        assert norm == pytest.approx(results[0][0], rel=1e-4)
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_wrong_reference_is_stopped_at_step_zero():
    """Reference log-probs of another model, dtype or tokenisation: every later number is off."""
    policy = policies.Policy(make_model())
    trees = ready_trees(policy)
    trees[0].ref_logps[0] += 0.5  # at the paper's beta this moves the loss by 4e-4 only
    with pytest.raises(RuntimeError, match="0.5 nats off"):
        train_loop.train(settings(beta=0.01), policy, trees, 1, 1e-3, 0.3, check_start=True)


def test_the_schedule_warms_up_over_a_tenth_and_ends_near_zero():
    """A first or last update at rate 0; a warm-up in epochs; a division by zero for one step."""
    factors = [train_loop.lr_factor(s, 100) for s in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-3
    middle = 0.5 * (1 + math.cos(math.pi * 46 / 91))  # by hand: step 55 is the 46th of 90 decays
    assert factors[55] == pytest.approx(middle)
    assert [train_loop.lr_factor(0, 1)] == [1.0]


def test_a_killed_run_goes_on_and_ends_in_the_same_weights(command, tmp_path, monkeypatch):
    """A finished phase that is repeated with other random numbers, or a half-written one that is
    taken for finished."""
    train_loop.main(command)
    expected = weights(tmp_path / "run")
    again = [a.replace("/run", "/killed") for a in command]
    # Where to die, and in which call counted from the last resume.
    for name, call in [("reference_log_probs", 2), ("train", 1), ("evaluate", 1),
                       ("rank_candidates", 1), ("train", 1)]:
        original, calls = getattr(train_loop, name), []

        def dies(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)
        monkeypatch.setattr(train_loop, name, dies)
        with pytest.raises(KeyboardInterrupt):
            train_loop.main(again)
        monkeypatch.setattr(train_loop, name, original)
    train_loop.main(again)
    assert same(weights(tmp_path / "killed"), expected)
    metrics = [(r["iteration"], r["phase"], r.get("step"))
               for r in rows(tmp_path / "killed/metrics.jsonl")]
    assert sorted(metrics, key=str) == sorted(
        [(r["iteration"], r["phase"], r.get("step"))
         for r in rows(tmp_path / "run/metrics.jsonl")], key=str)

    def never(*args, **kwargs):
        raise AssertionError("a finished run must not train again")
    monkeypatch.setattr(train_loop, "train", never)
    train_loop.main(again)


@pytest.mark.parametrize("extra", [[], ["--lora-rank", "2"]], ids=" ".join)
def test_a_run_killed_between_two_updates_goes_on_from_its_checkpoint(
        extra, command, tmp_path, monkeypatch):
    """A checkpoint without Adam's moments, a schedule that starts over, an update taken twice."""
    command += [*extra, "--iterations", "1", "--epochs", "3", "--save-every", "2"]
    train_loop.main(command)
    assert not (tmp_path / "run/iter_1/state").exists()
    again = [a.replace("/run", "/killed") for a in command]
    save, group_loss, updates = scale.save_checkpoint, train_loop.group_loss, []

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(scale, "save_checkpoint", save_and_die)
    for _ in range(2):  # after updates 2 and 4 of 6
        with pytest.raises(KeyboardInterrupt):
            train_loop.main(again)
    assert [f.name for f in (tmp_path / "killed/iter_1/state").iterdir()] == ["000004"]
    monkeypatch.setattr(scale, "save_checkpoint", save)
    monkeypatch.setattr(train_loop, "group_loss",
                        lambda *args: updates.append(args) or group_loss(*args))
    train_loop.main(again)
    assert len(updates) == 2
    assert same(weights(tmp_path / "killed", 1), weights(tmp_path / "run", 1))
    one, two = ([r for r in rows(tmp_path / f"{run}/metrics.jsonl") if r["phase"] == "train"]
                for run in ("run", "killed"))
    assert one == two


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_training(command, tmp_path, capsys):
    """Hours of training lost to a full disk, for the sake of not losing them."""
    (tmp_path / "run/iter_1").mkdir(parents=True)
    (tmp_path / "run/iter_1/state").write_text("in the way")
    train_loop.main([*command, "--iterations", "1", "--save-every", "1"])
    assert "warning: no checkpoint could be written" in capsys.readouterr().out
    assert (tmp_path / "run/iter_1/policy").exists()


def test_drops_are_counted_by_reason(command, tmp_path, capsys):
    """Examples that vanish: an empty response, or candidates that the judge cannot tell apart."""
    preferences = rows(tmp_path / "p.jsonl")
    for row in preferences[::3]:
        row["rejected"][-1]["content"] = " "
    write_jsonl(tmp_path / "p.jsonl", preferences)
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, candidates):\n"
        "    return [[float(len(c) if 'the' in p[-1]['content'] else 0) for c in cs]"
        " for p, cs in zip(prompts, candidates)]\n")
    train_loop.main(command)
    dropped = [row["dropped"] for k in (1, 2)
               for row in rows(tmp_path / f"run/iter_{k}/pairs.jsonl")]
    assert {"empty response", "best and worst are equal", None} <= set(dropped)
    out = capsys.readouterr().out
    assert f"{sum(d == 'empty response' for d in dropped[:6])} empty response" in out


# ----------------------------------------------------------------------------------------------
# The command line: recipes and bad input
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, expected", [
    # 61,135 // 4 = 15,283 prompts; / 256 = 60 updates; a tenth = 6
    ("zephyr-7b-sft", [("0", "15283", "0", "0", "5e-07", "60", "6"),
                       ("3", "15283", "15283", "0.001", "1e-07", "60", "6")]),
    # 61,135 // 3 = 20,378; / 128 = 160 updates
    ("llama-3-8b-instruct", [("1", "20378", "20378", "0.0001", "5e-07", "160", "16")]),
    ("phi-3-mini", [("2", "20378", "20378", "0.001", "3e-07", "160", "16")])])
def test_a_dry_run_prints_the_papers_numbers_and_loads_nothing(
        recipe, expected, capsys, monkeypatch):
    """Recipe figures that drift from the paper; a plan that loads 14 GB of weights to print."""
    monkeypatch.setattr(policies, "load_model", None)
    train_loop.main(["--model", recipe, "--dry-run"])
    lines = [tuple(line.split()[:7]) for line in capsys.readouterr().out.splitlines()
             if line[:1].isdigit()]
    for row in expected:
        assert row in lines


@pytest.mark.parametrize("flags, words", [
    ("--model zefyr", "no such recipe.*zephyr-7b-sft"), ("--alpha -1", "--alpha -1.0"),
    ("--beta 0", "--beta 0.0"), ("--lr 1 2", "2 rates for 3"),
    ("--batch-size 0", "--batch-size must"), ("--max-prompt-length 64", "no room is left"),
    ("--responses-per-prompt 2", "--temperature > 0"),
    ("--top-p 1.5", "--top-p 1.5"), ("--data mine.jsonl", "the toy makes its own")])
def test_flags_that_cannot_work_are_refused_before_anything_runs(flags, words):
    """A run that fails after an hour on what was known at its first second."""
    with pytest.raises(ValueError, match=words):
        train_loop.main(flags.split())


@pytest.mark.parametrize("change, words", [
    (["--data", "absent.jsonl"], "absent.jsonl: no such file"),
    (["--ranker", "pairrrm"], "pairrrm"),
    (["--ranker", "absent.py:f"], "absent.py"), (["--ranker", "oracle"], "toy"),
    (["--max-length", "100000"], "exceeds the context .* 256"),
    (["--max-new-tokens", "250"], "exceeds the context of .*, 256"),
    (["--prompts-per-iteration", "6", "--iterations", "50"], "cannot be split into 50")])
def test_inputs_that_cannot_work_are_refused_before_sampling(change, words, command, monkeypatch):
    """The same, for what only a look at the files can tell."""
    monkeypatch.setattr(train_loop.sample, "generate", None)
    with pytest.raises(ValueError, match=words):
        train_loop.main([*command, *change])


def test_a_tokenizer_of_another_model_is_refused(command, tmp_path):
    """Token ids beyond the embedding: an index error deep inside, or on CUDA a dead process."""
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ValueError, match=r"knows \d+ tokens, the model only 100"):
        train_loop.main(command)


def test_a_nan_of_the_judge_stops_with_the_prompts_id_and_keeps_the_samples(command, tmp_path):
    """NaN sorts anywhere: a random pair that is trained on."""
    (tmp_path / "judge.py").write_text(
        "def judge(p, c):\n    return [[float('nan')] * len(x) for x in c]\n")
    with pytest.raises(ValueError, match=r"prompt_id \d+.*not finite"):
        train_loop.main([*command, "--eval-prompts", "0"])
    assert len(rows(tmp_path / "run/iter_1/samples.jsonl")) == 6


def test_other_settings_for_the_same_folder_are_named_and_fresh_starts_over(command, tmp_path):
    """A resumed run that mixes two alphas."""
    train_loop.main(command)
    with pytest.raises(ValueError, match="alpha was 0.001, is 0.5.*--fresh"):
        train_loop.main([*command, "--alpha", "0.5"])
    train_loop.main([*command, "--alpha", "0.5", "--fresh", "--iterations", "1"])
    assert not (tmp_path / "run/iter_2").exists()


def test_a_mistyped_flag_does_not_claim_the_folder(command, tmp_path):
    """A first try that fails at once, and a corrected second one that is told to use --fresh."""
    with pytest.raises(ValueError, match="absent.py"):
        train_loop.main([*command, "--ranker", "absent.py:f"])
    train_loop.main([*command, "--iterations", "1"])


def test_an_error_on_the_command_line_is_one_line_and_a_nonzero_exit(command):
    """A traceback for a typing mistake; exit code 0 for a run that did not happen."""
    result = subprocess.run([sys.executable, str(ROOT / "train_loop.py"), *command, "--beta", "-1"],
                            capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert result.stderr.strip() == "error: --beta -1.0: must be positive"


def test_a_full_disk_is_named_and_loses_nothing(command, tmp_path, monkeypatch):
    """Hours of samples gone because the policy did not fit."""
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train_loop.policies, "save_policy", full)
    with pytest.raises(OSError):
        train_loop.main(command)
    monkeypatch.undo()
    assert (tmp_path / "run/iter_1/samples.jsonl").exists()
    train_loop.main(command)
    assert (tmp_path / "run/iter_2/policy").exists()
