"""The command line of sampling, on a tiny random model."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import sample
from conftest import ROOT, VOCABULARY, make_model, make_tokenizer
from harness.runs import exits, sample_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny-policy"
    model = make_model()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(path)
    make_tokenizer("chatml").save_pretrained(path)
    return path


def test_the_prompt_command_prints_one_answer(folder, capsys):
    """Decoding the prompt with the answer, or special tokens in it; a default that does not fit."""
    sample_command.main(["--model", str(folder), "--prompt", "hello there"])
    first = capsys.readouterr().out
    assert first.strip() and "<|im_" not in first and "hello there" not in first
    sample_command.main(["--model", str(folder), "--prompt", "hello there", "--slots", "3"])
    assert capsys.readouterr().out == first


def test_an_answer_is_what_a_judge_reads_of_it(folder, tmp_path, capsys, monkeypatch):
    """The name of a channel, or a thought, in outputs for AlpacaEval: no judge has read them."""
    said = make_tokenizer("chatml")("<think>so</think>\n\nthe moon<|im_end|>",
                                    add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(sample, "generate", lambda *_, **__: [said])
    sample_command.main(["--model", str(folder), "--prompt", "hello", "--device", "cpu:0"])
    assert capsys.readouterr().out == "the moon\n"


def test_interactive_chat_keeps_the_history(folder, monkeypatch, capsys):
    """A chat that forgets: the second answer must be that to the whole conversation."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nthe moon\n"))
    args = ["--model", str(folder), "--max-new-tokens", "8"]
    sample_command.main(args + ["--interactive"])
    talk = capsys.readouterr().out
    sample_command.main(args + ["--prompt", "hello"])
    hello = capsys.readouterr().out.rstrip("\n")
    sample_command.main(args + ["--prompt", "the moon"])
    moon = capsys.readouterr().out.rstrip("\n")
    first, second = (answer.strip() for answer in talk.split("> ")[1:3])
    assert first == hello.strip() and second != moon.strip()


def test_alpaca_eval_outputs_have_its_format(folder, tmp_path, capsys):
    """Outputs in another order than the instructions (the sampler sorts by length)."""
    rows = [{"instruction": "the moon and the cat and the mat", "dataset": "d"},
            {"instruction": "hello"}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    args = ["--model", str(folder), "--max-new-tokens", "8"]
    sample_command.main(args + ["--alpaca-eval", str(tmp_path / "in.json"),
                             "--output", str(tmp_path / "out.json")])
    outputs = json.loads((tmp_path / "out.json").read_text())
    assert [o["instruction"] for o in outputs] == [row["instruction"] for row in rows]
    assert [o["generator"] for o in outputs] == ["tiny-policy"] * 2
    assert outputs[0]["dataset"] == "d"
    assert set(outputs[1]) == {"instruction", "output", "generator"}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.json", "out.json"]
    capsys.readouterr()
    sample_command.main(args + ["--prompt", "hello"])
    assert capsys.readouterr().out == sample_command.printable(outputs[1]["output"]) + "\n"


def test_python_sample_py_hands_over_to_this_command_line(folder):
    """The command of the README, from another folder, with its exit code."""
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(folder), "--prompt", "hello"]
    result = subprocess.run([*command, "--max-new-tokens", "4"], capture_output=True, text=True,
                            cwd=folder, timeout=120)
    assert result.returncode == 0 and result.stdout.strip()
    result = subprocess.run([*command, "--slots", "0"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr == "error: --slots 0: must be at least 1\n"


def test_each_turn_of_a_chat_has_random_numbers_of_its_own(folder, monkeypatch, capsys):
    """The same random stream in every turn: the same question gets the same answer for ever."""
    used = []
    monkeypatch.setattr(sample, "generate", lambda model, prompts, *, seeds, **kwargs: (
        used.extend(seeds) or [[5]] * len(prompts)))
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\n"))
        sample_command.main(["--model", str(folder), "--interactive", "--temperature", "1"])
    assert len(set(used[:3])) == 3 and used[:3] == used[3:]


def test_a_long_instruction_does_not_shorten_the_other_answers(folder, tmp_path, monkeypatch):
    """One limit for all, the longest prompt's: 805 answers cut for one long instruction."""
    rows = [{"instruction": "hello"}, {"instruction": "the moon " * 60}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    limits, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args, max_new_tokens, **kwargs: (
        limits.extend(max_new_tokens) or generate(*args, max_new_tokens=4, **kwargs)))
    args = ["--model", str(folder), "--alpaca-eval", str(tmp_path / "in.json"),
            "--output", str(tmp_path / "out.json")]
    sample_command.main(args)
    tokenizer = make_tokenizer("chatml")
    turns = [sample_command.user_turn(row["instruction"]) for row in rows]
    lengths = [len(tokenizer.apply_chat_template(turn, tokenize=True, add_generation_prompt=True,
                                                 return_dict=False)) for turn in turns]
    assert limits == [256 - length for length in lengths] and limits[0] > limits[1] > 0


def test_it_stops_at_the_stop_tokens_of_the_model_too(tmp_path):
    """Llama-3's <|eom_id|>, which neither template nor tokenizer names: a dialogue with itself."""
    model = make_model()
    ids = make_tokenizer("chatml").apply_chat_template(
        sample_command.user_turn("hello"), add_generation_prompt=True, return_tensors="pt",
        return_dict=False)
    with torch.no_grad():
        model.generation_config.eos_token_id = [2, model(ids).logits[0, -1].argmax().item()]
    model.save_pretrained(tmp_path)
    make_tokenizer("chatml").save_pretrained(tmp_path)
    args = sample_command.parse_args(["--model", str(tmp_path), "--prompt", "hello"])
    answer = sample_command.load_answerer(args)
    assert len(make_tokenizer("chatml").encode(answer([sample_command.user_turn("hello")])[0])) <= 1


def test_a_model_that_slots_do_not_fit_is_sampled_by_its_own_generate_and_says_so(tmp_path, capsys):
    """GPT-Neo's local window counts from the longest row: other answers, without a word."""
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=5,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256, bos_token_id=1,
        eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model.save_pretrained(tmp_path)
    tokenizer = make_tokenizer("chatml")
    tokenizer.save_pretrained(tmp_path)
    args = ["--model", str(tmp_path), "--prompt", "the cat", "--max-new-tokens", "9"]
    sample_command.main(args)
    output = capsys.readouterr()
    assert output.err.count("one prompt at a time") == 1
    ids = tokenizer.apply_chat_template(
        sample_command.user_turn("the cat"), add_generation_prompt=True, return_tensors="pt",
        return_dict=False)
    text = model.eval().generate(
        ids, max_new_tokens=9, do_sample=False, pad_token_id=0,
        eos_token_id=[2, tokenizer.convert_tokens_to_ids("<|im_end|>")])
    expected = tokenizer.decode(text[0, ids.shape[1]:], skip_special_tokens=True)
    assert output.out == sample_command.printable(expected) + "\n"


def test_a_chat_that_outgrows_an_attention_window_is_checked_again(tmp_path, monkeypatch):
    """A first turn shorter than the window, checked, and later ones beyond it, which are not."""
    make_model("gemma3").save_pretrained(tmp_path)  # a window of 7
    make_tokenizer("chatml").save_pretrained(tmp_path)
    lengths = []

    def choose_sampler(model, ids, length, say):
        lengths.append(length)
        return lambda model, requests, **options: [(i, [5]) for i in range(len(requests))]
    monkeypatch.setattr(sample_command.compatibility, "choose_sampler", choose_sampler)
    monkeypatch.setattr(sample_command.compatibility, "probe_length",
                        lambda config, longest: 1 + longest // 50)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n" * 9))
    sample_command.main(["--model", str(tmp_path), "--interactive", "--max-new-tokens", "5"])
    assert lengths == sorted(set(lengths)) and len(lengths) > 1


def test_a_models_text_cannot_steer_the_terminal():
    """An escape sequence in an answer or a file's name: a cleared screen, a forged prompt."""
    text = "a\x1b[2J\x1b]0;title\x07b\r\x9b31m\x7f\x00 tab\tnew\nline \U0001f44d\u200d\xe9"
    assert sample_command.printable(text) == "a[2J]0;titleb31m tab\tnew\nline \U0001f44d\u200d\xe9"


@pytest.mark.parametrize("flags, message", [
    ("--slots 0", "--slots 0"), ("--slots -3", "--slots -3"), ("--seed -1", "--seed -1"),
    ("--max-new-tokens 0", "--max-new-tokens 0"), ("--max-new-tokens -5", "--max-new-tokens -5"),
    ("--max-new-tokens 999", "of 256"), ("--max-new-tokens 256", "of 256"),
    ("--temperature nan", "--temperature nan"), ("--temperature inf", "--temperature inf"),
    ("--temperature -1", "--temperature -1"), ("--top-p nan", "--top-p nan"),
    ("--top-p 0", "--top-p 0"), ("--top-p 1.1", "--top-p 1.1"), ("--top-p inf", "--top-p inf"),
    ("--device abacus", "--device abacus"), ("--output x.json", "go together"),
    ("--chat-template nowhere", "--chat-template nowhere"), ("--model nowhere", "--model nowhere")])
def test_flags_that_cannot_be_meant_are_refused(folder, flags, message):
    """A traceback, a run with other numbers than were asked for, or an error after an hour."""
    with pytest.raises(ValueError, match=message):
        sample_command.main(["--model", str(folder), "--prompt", "x", *flags.split()])


def test_text_that_is_not_utf_8_is_refused_before_anything_runs(folder, tmp_path, capsys):
    """A traceback of the tokenizer; 805 answers that cannot be written for the generator's name."""
    for flags in (["--prompt", "a\udcff"], ["--prompt", "a", "--generator", "\udcff"]):
        with pytest.raises(SystemExit) as end:
            sample_command.main(["--model", str(folder), *flags])
        assert end.value.code == 2 and f"{flags[-2]}: not UTF-8" in capsys.readouterr().err
    (tmp_path / "in.json").write_text('[{"instruction": "x"}]')
    (tmp_path / "\udcff").mkdir()
    (tmp_path / "link").symlink_to("\udcff")  # the name of what --model is in the end
    with pytest.raises(ValueError, match="--generator .*half of a character"):
        sample_command.main(["--model", str(tmp_path / "link"), "--alpaca-eval",
                             str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json")])


def test_a_turn_that_is_not_utf_8_does_not_end_a_chat(folder, monkeypatch, capsys):
    """A conversation that is lost over a mistyped character."""
    monkeypatch.setattr("sys.stdin", io.StringIO("a\udcff\nhello\n"))
    sample_command.main(["--model", str(folder), "--max-new-tokens", "8", "--interactive"])
    output = capsys.readouterr()
    assert "half of a character" in output.err and output.out.split("> ")[2].strip()


def test_a_home_folder_is_found_where_the_shell_does_not_expand_it(folder, monkeypatch, capsys):
    """`--model=~/policy`, asked of the hub."""
    monkeypatch.setenv("HOME", str(folder.parent))
    sample_command.main([f"--model=~/{folder.name}", "--prompt", "hello", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.strip()


def test_bad_files_are_refused_before_a_model_is_loaded(folder, tmp_path):
    """An output that cannot be written, found out after the sampling of 805 answers."""
    files = {"bad": b'[{"text": "x"}]', "good": b'\xef\xbb\xbf[{"instruction": "x"}]',
             "latin": '[{"instruction": "\xe9"}]'.encode("latin-1"), "none": b"[]", "half": b"[{"}
    files |= {"half character": b'[{"instruction": "x"}, {"instruction": "\\ud800"}]',
              "twice": b'[{"instruction": "x", "instruction": "y"}]', "deep": b"[" * 100_000}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    for source, output, message in [
            ("half character", "o.json", "entry 1 holds half of a character"),
            ("twice", "o.json", "'instruction' occurs twice"), ("deep", "o.json", "cannot be read"),
            ("pipe", "o.json", "pipe: a pipe or a device"),
            ("good", "good", "the same file as .*good, which --alpaca-eval names"),
            ("bad", "o.json", "entry 0 has no string"), (".", "o.json", "cannot be read"),
            ("latin", "o.json", "latin: cannot be read"), ("none", "o.json", "one or more"),
            ("half", "o.json", "cannot be read"), ("absent", "o.json", "absent: cannot be read"),
            ("good", "no/o.json", "a folder that exists"), ("good", ".", "it is a folder"),
            ("good", "x" * 300, "cannot be written"), ("good", "o.json", "--model nowhere")]:
        with pytest.raises(ValueError, match=message):
            sample_command.main(["--model", "nowhere", "--alpaca-eval", str(tmp_path / source),
                       "--output", str(tmp_path / output)])
    with pytest.raises(ValueError, match="--chat-template .*pipe: a pipe or a device"):
        sample_command.main(["--model", str(folder), "--prompt", "x", "--chat-template",
                   str(tmp_path / "pipe")])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, "pipe"])


def test_a_prompt_that_fills_the_context_is_refused_by_its_number(folder, tmp_path):
    """Sampling beyond the positions that the model was trained on, or a limit of -44 tokens."""
    rows = [{"instruction": "hello"}, {"instruction": "the moon " * 300}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="^prompt 1 has .*context of 256"):
        sample_command.main(["--model", str(folder), "--alpaca-eval", str(tmp_path / "in.json"),
                   "--output", str(tmp_path / "out.json")])


def test_ctrl_c_is_one_line_and_exit_code_130(folder):
    """A traceback at the end of every chat, or a promise that the same command goes on."""
    chat_command = [sys.executable, str(ROOT / "sample.py"), "--model", str(folder),
                    "--interactive"]
    with subprocess.Popen(chat_command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # it has begun to talk
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.splitlines()[-1] == "stopped; nothing was written"
    assert "Traceback" not in stderr


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError(28, "No space left"),
                                   TypeError("a bug")])
def test_a_command_without_phases_does_not_say_that_they_are_kept(error, monkeypatch, capsys):
    """Advice for training (--offload) where somebody samples, and a promise that is not kept."""
    def fails():
        raise error
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises((SystemExit, TypeError)) as end:
        exits.run(fails, "nothing was written")
    said = f"{end.value} {capsys.readouterr().err}"
    assert "error: " in said and "phases" not in said and "--offload" not in said
