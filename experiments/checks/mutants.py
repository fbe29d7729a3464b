"""Would the tests notice? Breaks one line at a time and runs the test that has to fail.

    python experiments/checks/mutants.py                 all faults: ten minutes on two cores
    python experiments/checks/mutants.py --only data.py  those of a file, or with a word in their
                                                         description
    python experiments/checks/mutants.py --textbook      how many tests/test_textbook.py finds alone

Each mutant is (what goes wrong, file, the line's text, its broken text, the test that must fail).
A copy of the repository is broken; yours is not touched. Ends with `N mutants, N killed`, and with
exit code 1 if one survives: a surviving mutant is a missing test. A fault whose text no longer
stands in the file exactly once is an error, so the list cannot rot in silence.

A newcomer reads it as a list of the ways in which preference training goes wrong without a sign.
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SELM, DATA, MODEL, SAMPLE, RANK, BOOK, LOOP, GPU = (f"tests/test_{name}.py" for name in (
    "selm", "data", "model", "sample", "rank", "textbook", "train_loop", "accelerator"))

MUTANTS = [
    # --- selm.py: the objective -----------------------------------------------------------------
    ("the reference's log-ratio is added", "selm.py",
     "margin = policy_logratios - ref_logratios", "margin = policy_logratios + ref_logratios",
     SELM),
    ("the DPO loss has its sign turned", "selm.py",
     "return -F.logsigmoid(beta * margin)", "return -F.logsigmoid(-beta * margin)", SELM),
    ("beta is dropped from DPO", "selm.py",
     "return -F.logsigmoid(beta * margin)", "return -F.logsigmoid(margin)", SELM),
    ("IPO's margin has twice its target", "selm.py", "return (margin - 1 / (2 * beta)) ** 2",
     "return (margin - 1 / beta) ** 2", SELM),
    ("chosen and rejected are swapped in DPO", "selm.py",
     "policy_logratios = policy_chosen_logps - policy_rejected_logps",
     "policy_logratios = policy_rejected_logps - policy_chosen_logps", SELM),
    ("chosen and rejected of the reference are swapped", "selm.py",
     "ref_logratios = ref_chosen_logps - ref_rejected_logps",
     "ref_logratios = ref_rejected_logps - ref_chosen_logps", SELM),
    ("optimism pulls y up", "selm.py",
     "return alpha * beta * (policy_sampled_logps - ref_sampled_logps)",
     "return -alpha * beta * (policy_sampled_logps - ref_sampled_logps)", SELM),
    ("beta is dropped from the optimism term", "selm.py",
     "return alpha * beta * (policy_sampled_logps - ref_sampled_logps)",
     "return alpha * (policy_sampled_logps - ref_sampled_logps)", SELM),
    ("alpha is dropped", "selm.py",
     "return alpha * beta * (policy_sampled_logps - ref_sampled_logps)",
     "return beta * (policy_sampled_logps - ref_sampled_logps)", SELM),
    ("the reference of y is dropped", "selm.py",
     "return alpha * beta * (policy_sampled_logps - ref_sampled_logps)",
     "return alpha * beta * policy_sampled_logps", SELM),
    ("the reference learns", "selm.py",
     "ref_chosen_logps, ref_rejected_logps = ref_chosen_logps.detach(), "
     "ref_rejected_logps.detach()", "pass", SELM),
    ("the reference of y learns", "selm.py",
     "ref_sampled_logps = ref_sampled_logps.detach()", "pass", SELM),
    ("XPO's term has a beta", "selm.py", "return alpha * policy_sampled_logps",
     "return alpha * beta * policy_sampled_logps", SELM),
    ("POPO's term is not zero at the start", "selm.py", "ref_sampled_logps)) - 0.5)",
     "ref_sampled_logps)))", SELM),
    ("a tie counts as right", "selm.py", "+ 0.5 * (chosen_rewards == rejected_rewards)",
     "+ 1.0 * (chosen_rewards == rejected_rewards)", SELM),
    ("implicit rewards have no beta", "selm.py",
     "chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)",
     "chosen_rewards = (policy_chosen_logps - ref_chosen_logps)", SELM),
    ("log-probs are means over tokens", "selm.py",
     "return token_logps.new_zeros(responses).index_add(0, response_index, token_logps)",
     "return token_logps.new_zeros(responses).index_add(0, response_index, token_logps) "
     "/ response_index.bincount(minlength=responses)", SELM),
    ("the largest logit is not given back to the logsumexp", "selm.py",
     "(exp_sum.log() + largest)", "exp_sum.log()", SELM),
    ("the gradient forgets the target token", "selm.py",
     "grad_logits.scatter_add_(1, targets[rows, None], g)", "pass", SELM),
    ("the gradient of the softmax has its sign turned", "selm.py", "exps.mul_(-g / exp_sum[rows])",
     "exps.mul_(g / exp_sum[rows])", SELM),
    ("the derivative of the capped logits is dropped", "selm.py", "grad_logits *= cap_slope",
     "pass", SELM),

    # --- data.py: rows, trees, packing, planning ------------------------------------------------
    ("the shift by one token is forgotten", "data.py",
     "predicted_from += [prompt_start + p - 1, *range(start, start + n - 1)]",
     "predicted_from += range(start, start + n)", DATA),
    ("the last token of a response is no label", "data.py", "            targets += response\n"
     "            response_index += [r] * n", "            targets += response[:-1] + [0]\n"
     "            response_index += [r] * n", DATA),
    ("the header counts as response", "data.py",
     "predicted_from += [prompt_start + p - 1, *range(start, start + n - 1)]",
     "predicted_from += [prompt_start + p - 2, *range(start, start + n - 1)]", DATA),
    ("the positions of the second response go on behind the first", "data.py",
     "positions += range(p, p + n)", "positions += range(start - prompt_start, start - "
     "prompt_start + n)", DATA),
    ("all responses of a line are one", "data.py", "            r += 1\n", "            r += 0\n",
     DATA),
    ("plain rows forget the shift", "data.py",
     "range(i * width + len(p) - 1, i * width + length - 1)",
     "range(i * width + len(p), i * width + length)", DATA),
    ("a prompt is cut on the wrong side", "data.py", "return bos + prompt_ids[over + len(bos):]",
     "return prompt_ids[:len(prompt_ids) - over]", DATA),
    ("a cut prompt loses its BOS", "data.py", "return bos + prompt_ids[over + len(bos):]",
     "return prompt_ids[over:]", DATA),
    ("one response has more room than the other", "data.py",
     "yield record, prompt, [response[:room] for response in responses]",
     "yield record, prompt, [responses[0][:room], responses[1]]", DATA),
    ("the data's two responses are swapped", "data.py",
     '[[record["data_chosen"], record["data_rejected"]] for',
     '[[record["data_rejected"], record["data_chosen"]] for', DATA),
    ("a cut response passes for a finished one", "data.py", '"finished": ids[-1] in chat.stop_ids}',
     '"finished": True}', DATA),
    ("chosen and rejected are swapped where a tree is made", "data.py",
     'used.index(row["chosen"]), used.index(row["rejected"]),',
     'used.index(row["rejected"]), used.index(row["chosen"]),', DATA),
    ("plain DPO computes y, too", "data.py", 'sampled = row["sampled"] if alpha > 0 else []',
     'sampled = row["sampled"]', DATA),
    ("y is left out of the trees", "data.py", 'sampled = row["sampled"] if alpha > 0 else []',
     "sampled = []", DATA),
    ("reference log-probs of other candidates", "data.py",
     "[logps[c] for c in tree.candidate_indices]",
     "logps[:len(tree.candidate_indices)]", DATA),
    ("the last, smaller batch is left out", "data.py",
     "for start in range(0, len(order), batching.batch_size):",
     "for start in range(0, len(order) - batching.batch_size + 1, batching.batch_size):", DATA),
    ("every process trains on the same trees", "data.py",
     "plan_micro_batches(batch[p::processes], batching)",
     "plan_micro_batches(batch[::processes], batching)", DATA),
    ("a process has fewer micro-batches than the others", "data.py",
     "[trees[:1]] * missing", "[]", DATA),
    ("examples are not shuffled", "data.py",
     "order = random.Random(seed).sample(trees, len(trees))", "order = trees", DATA),
    ("the token budget is a wish", "data.py", "if sizes[i].tokens <= space:", "if True:", DATA),
    ("portions are disjoint by id, not by content", "harness/inputs/preferences.py",
     'return tuple((turn["role"], turn["content"].strip()) for turn in record["prompt"])',
     'return record["prompt_id"]', DATA),
    ("of two columns with one name the last is used", "harness/inputs/preferences.py",
     "if name and count > 1:", "if False:", "tests/test_preferences.py"),
    ("a column without tools, as text, is refused", "harness/inputs/preferences.py",
     "str(value).strip() not in NOTHING", "bool(value)", "tests/test_preferences.py"),
    ("a data set without train_prefs cannot be read", "harness/inputs/preferences.py",
     "dict.fromkeys((split, SPLITS.get(split, split)))", "[split]", "tests/test_preferences.py"),
    ("a data set without a test split cannot be trained on", "harness/runs/setup.py",
     "except preferences.NoSplit:", "except ZeroDivisionError:", "tests/test_preferences.py"),
    ("a pipe in place of an input is waited for", "harness/inputs/files.py",
     "return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)",
     "return False", "tests/test_files.py"
     "::test_an_input_that_is_no_file_to_be_read_is_refused"),
    ("a pointer of git-LFS is read as data", "harness/inputs/files.py",
     "if file.read(len(LFS)) == LFS:", "if False:", "tests/test_files.py"),
    ("of two keys with one name the last is used", "harness/inputs/files.py",
     "if len(found) < len(pairs):", "if False:", "tests/test_files.py"),
    ("half a character is found when it is written", "harness/inputs/files.py",
     "json.dumps(value, ensure_ascii=False).encode()", "pass", "tests/test_sample_command.py"
     "::test_text_that_is_not_utf_8_is_refused_before_anything_runs"),
    ("an input that has another name is written over", "harness/inputs/files.py",
     "if same_file(path, file):", "if path == file:", "tests/test_files.py"),
    ("a recipe beats a flag", "harness/runs/settings.py", "recipe | given |", "given | recipe |",
     "tests/test_settings.py"),
    ("a number without an upper end", "harness/runs/settings.py",
     'if not (fits and number <= allowed["at_most"]):', "if not fits:", "tests/test_settings.py"),
    ("~ is the name of a folder", "harness/runs/settings.py",
     "return os.path.expanduser(as_text(value))", "return as_text(value)",
     "tests/test_settings.py"),
    ("a name that is not UTF-8 is found when it is written", "harness/runs/settings.py",
     'raise argparse.ArgumentTypeError("not UTF-8 text") from None', "pass",
     "tests/test_settings.py"),
    ("a report is lost where the terminal lacks a character", "harness/runs/exits.py",
     'stream.reconfigure(errors="backslashreplace")', "pass", "tests/test_exits.py"),
    ("`| head -1` is an error", "harness/runs/exits.py",
     'sys.exit(141 if flush_output("\\n") else f"error: {one_line(error)}")',
     'sys.exit(f"error: {one_line(error)}")', "tests/test_exits.py"),
    ("a response is tokenised by itself", "harness/inputs/chat_template.py",
     "return prompt[max(0, prompt.rfind(self.cut)) if self.cut else 0:]", 'return ""',
     "tests/test_chat_template.py"),
    ("scores are kept in what is ranked", "harness/runs/output_files.py",
     'check_writable(path, inputs, "--scores")', "pass", "tests/test_judges.py"
     "::test_no_output_takes_the_place_of_what_the_command_reads"),
    ("an end token that the template leaves out is always eos", "harness/inputs/chat_template.py",
     "if end_id in stops and rest.startswith(after):", "if False:",
     "tests/test_chat_template.py::test_where_the_template_leaves_the_end_out_an_answer_ends_as_the_"
     "models_own_do"),
    ("the saved policy's template opens a thought again", "harness/inputs/chat_template.py",
     "            self.note = (f\"", "            tokenizer.chat_template = self.own_template\n"
     "            self.note = (f\"",
     "tests/test_chat_template.py::test_a_saved_policy_has_the_switch_in_its_template"),
    ("a template that changes some answers goes unnoticed", "harness/inputs/chat_template.py",
     "if rendered != answer:", "if False:",
     "tests/test_chat_template.py::test_a_template_that_changes_some_answers_is_refused_by_the_row"),
    ("samples of another engine go on after their end", "harness/inputs/engine_samples.py",
     "if not stop_ids.isdisjoint(ids[:-1]):", "if False:", "tests/test_engine_samples.py"
     "::test_ids_that_the_policy_cannot_have_said_are_refused_before_the_first_is_used"),
    ("text of another engine that lost its channel is taken without a word",
     "harness/inputs/engine_samples.py",
     "if only_text and special:", "if False:", "tests/test_engine_samples.py"
     "::test_text_that_lost_the_channel_before_the_answer_is_reported"),
    ("rows of two versions of another engine's file are joined", "harness/inputs/engine_samples.py",
     "if used and before.exists()", "if False and before.exists()", "tests/test_engine_samples.py"
     "::test_a_file_that_changes_between_a_kill_and_the_next_command_is_noticed"),
    ("--fresh deletes the samples that it reads", "harness/runs/setup.py",
     'names += [("--samples-from", file) for file in engine_samples.files(s)]',
     "pass",
     "tests/test_engine_samples.py::test_fresh_does_not_delete_the_files_that_the_run_reads"),
    ("scores of another judge are taken for this one's", "harness/judging/judges.py",
     "for file in {self.path, *others} - {None}:",
     "for file in {self.path, *(self.path.parent.glob('*') if self.path else ())} - {None}:",
     "tests/test_judges.py"
     "::test_scores_that_a_user_names_are_not_mixed_with_their_neighbours"),
    ("rewards are rounded to bf16", "harness/judging/judge_models.py",
     "head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))", "pass",
     "tests/test_judges.py::test_scores_of_a_bf16_body_are_not_rounded_to_bf16"),
    ("a quantised model is loaded", "harness/models/weights.py",
     'if quantised and "gguf_file" not in options:', "if False:",
     "tests/test_compatibility.py::test_a_damaged_file_is_named_before_anything_runs"),
    ("the pointers of a model's folder are not looked at", "harness/models/weights.py",
     "        check_no_pointer(file)", "        pass",
     "tests/test_compatibility.py::test_a_damaged_file_is_named_before_anything_runs"),
    ("the end tokens of a damaged generation_config.json are lost", "harness/models/weights.py",
     "for named in (config, _generation_config(path)):", "for named in (config,):",
     "tests/test_compatibility.py::test_a_damaged_file_is_named_before_anything_runs"),
    ("a NaN in an unused embedding is found after the training", "harness/models/weights.py",
     "in model.state_dict().items() if not value.isfinite().all()]", "in ()]",
     "tests/test_compatibility.py::test_weights_that_are_not_whole_are_named"),
    ("a policy is saved in a form that nothing loads", "harness/models/weights.py",
     "if ours.get(name) != fresh.get(name))", "if False)",
     "tests/test_compatibility.py::test_a_model_whose_saved_policy_nothing_could_load_is_refused"),
    ("processes tie a head that process 0 has not tied", "harness/models/weights.py",
     "if tied is not None:", "if False:",
     "tests/test_compatibility.py::test_two_matrices_stay_two_whatever_the_config_says"),
    ("a judge's path ends at its first colon", "harness/judging/judges.py",
     're.fullmatch(r"(.+\\.py):(\\w+)"',
     're.fullmatch(r"([^:]+\\.py):(\\w+)"',
     "tests/test_judges.py"
     "::test_a_ranker_is_taken_apart_at_the_right_colon"),
    ("a judge that sorts its list gives scores to others", "harness/judging/judges.py",
     "if not unchanged(given, prompts, texts):",
     "if False:",
     "tests/test_judges.py"
     "::test_a_judge_that_changes_the_lists_it_was_given_is_refused"),
    ("a judge's seed, dtype or autocast stays", "harness/judging/user_function.py",
     "            write_state(ours)",
     "            pass",
     "tests/test_judges.py"
     "::test_a_judge_leaves_the_process_as_it_was"),
    ("a judge loses what it has set when it was imported", "harness/judging/user_function.py",
     "                write_state(self.state)",
     "                pass",
     "tests/test_judges.py"
     "::test_what_a_judge_sets_when_it_is_imported_holds_when_it_is_called"),
    ("sys.exit in a score ends the run as a success", "harness/judging/judges.py",
     "    except BaseException:  # no numbers;",
     "    except Exception:  # no numbers;",
     "tests/test_judges.py"
     "::test_a_result_that_exits_when_it_is_looked_at_is_an_error"),
    ("a score that overflows is let in", "harness/judging/judges.py",
     "if any(abs(score) > LARGEST for score in scores):",
     "if False:",
     "tests/test_judges.py"
     "::test_a_score_too_large_to_be_averaged_is_refused_and_smaller_ones_are_not"),
    ("paid answers of a call that fails are asked for again", "harness/judging/judges.py",
     "if kept.scores.get(question.key) is None:",
     "if True:",
     "tests/test_judges.py"
     "::test_an_answer_that_was_paid_for_is_never_asked_for_again"),
    ("scores of a generator that left out a prompt are kept", "harness/judging/judges.py",
     "            kept.forget(part)",
     "            pass",
     "tests/test_judges.py"
     "::test_of_a_generator_that_leaves_out_a_prompt_nothing_is_kept"),
    ("a reward model's surplus weights are left out in silence", "harness/judging/judge_models.py",
     "        if surplus:\n            raise ValueError",
     "        if False:\n            raise ValueError",
     "tests/test_judges.py"
     "::test_a_reward_model_that_is_not_whole_is_refused_with_a_remedy"),
    ("a reward model is cut at its tokenizer's number", "harness/judging/judge_models.py",
     "limit = min(named, positions) if table else max(named, positions)",
     "limit = min(named, positions)",
     "tests/test_judges.py"
     "::test_a_reward_model_reads_as_much_as_it_can_and_says_what_it_cuts"),
    ("a finished run waits for a judge's thread", "harness/runs/exits.py",
     "if left and not threading.main_thread().is_alive():",
     "if False:",
     "tests/test_judges.py"
     "::test_a_thread_that_never_ends_keeps_no_command_alive"),
    ("an edited judge is accepted where its path has a colon", "harness/runs/setup.py",
     'if kind == "file":', 'if kind == "file" and ":" not in path:', "tests/test_duel.py"
     "::test_a_judge_whose_path_has_a_colon_is_known_by_its_content"),
    ("--fresh deletes a judge in the run's folder", "harness/runs/setup.py",
     '("--ranker", judges.parse_spec(s.ranker).path)', '("--ranker", "")', "tests/test_duel.py"
     "::test_a_judge_whose_path_has_a_colon_is_known_by_its_content"),
    ("--ranker is blamed for --eval-ranker",
     "harness/runs/setup.py", ', flag="--eval-ranker")', ")",
     "tests/test_duel.py::test_an_error_of_the_judge_of_the_evaluation_names_its_own_flag"),
    ("answers that are all empty are found after sampling", "harness/runs/setup.py",
     "        check_answers(portions, s)", "        pass", LOOP
     + "::test_data_whose_answers_are_all_empty_are_refused_before_sampling"),
    ("a checkpointed policy outlives its iteration", "harness/models/weights.py",
     "if sharded or compute.gradient_checkpointing or compute.compile:", "if sharded:", LOOP
     + "::test_no_trained_policy_outlives_its_iteration"),
    ("--offload is turned on where the host is too small for it", "harness/models/memory.py",
     "if chosen.offload and host > host_memory():", "if False:", "tests/test_memory.py"
     "::test_offload_is_turned_on_where_it_alone_makes_a_gpu_large_enough"),
    ("weights that stay whole under --offload are counted twice", "harness/models/memory.py",
     "layers * (not whole)", "layers", "tests/test_memory.py"
      "::test_the_estimate_for_offload_is_what_the_device_holds_within_15_percent"),
    ("an output takes the place of a link", "harness/runs/output_files.py",
     "path = os.path.realpath(path)", "pass", "tests/test_files.py"),
    ("an output takes the place of a pipe or a device", "harness/runs/output_files.py",
     "if is_special(path):", "if False:", "tests/test_files.py"
     "::test_a_pipe_is_written_to_and_stays_one"),
    ("an output takes the place of what the command reads", "harness/runs/output_files.py",
     "check_apart(flag, name, inputs)", "pass", "tests/test_files.py"),
    ("somebody's file that ends in .tmp is removed", "harness/runs/output_files.py",
     "if os.path.exists(temporary):", "if False:", "tests/test_files.py"),
    ("a damaged file of an evaluation voids what was trained after it",
     "harness/runs/run_folder.py",
     "depend = next((kind for kind in (SCORED, EVALUATED) if kind.search(name)), ANY)",
     "depend = ANY", "tests/test_run_folder.py"),
    ("all of a checkpoint is in memory once more while it is written", "harness/models/distributed.py",
     "1 + size // FILE", "1", "tests/test_distributed.py"),
    ("rows that another number of processes has finished are lost", "harness/runs/run_folder.py",
     "return {key_of(row): (part, begin) for part in parts_in(path.parent, path.name)",
     "return {key_of(row): (part, begin) for part in path.parent.glob("
     "f'{path.name}.part{PROCESS}of{PROCESSES}')", "tests/test_run_folder.py"),
    ("a process that was killed has another share when it resumes", "harness/runs/run_folder.py",
     "mine = [i for i in range(PROCESS, len(keys), PROCESSES) if keys[i] not in kept]",
     "mine = [i for i, key in enumerate(keys) if key not in kept][PROCESS::PROCESSES]",
     "tests/test_run_folder.py"),
    ("updates after the last checkpoint stay in metrics.jsonl", "harness/runs/run_folder.py",
     "kept = {name: groups[name] for name in groups if name not in damaged} | {group: rows}",
     "kept = {group: rows} | {name: groups[name] for name in groups if name not in damaged}",
     "tests/test_run_folder.py"),
    ("a training's updates are logged when it has ended", "harness/runs/run_folder.py",
     "                file.write(line_of(rows[-1]))\n", "                pass\n",
     "tests/test_run_folder.py"),
    ("a line of metrics.jsonl that has changed is drawn", "harness/runs/run_folder.py",
     "if digest_of(groups.get(name, [])) != digest}", "if name not in groups}",
     "tests/test_run_folder.py"),
    ("a line of metrics.jsonl that is gone is not missed", "harness/runs/run_folder.py",
     "if digest_of(groups.get(name, [])) != digest}",
     "if name in groups and digest_of(groups[name]) != digest}", "tests/test_run_folder.py"),
    ("an unfinished row of which a token has changed is used", "harness/models/distributed.py",
     'if row.pop("check") == _digest(row):', 'if row.pop("check"):',
     "tests/test_run_folder.py"),
    ("an unfinished row is used for its neighbour's prompt", "harness/models/distributed.py",
     "json.dumps([row], sort_keys=True)",
     "json.dumps([{**row, 'prompt_id': ''}], sort_keys=True)",
     "tests/test_run_folder.py"),
    ("a checkpoint's history is believed as it is", "harness/models/distributed.py",
     'unseal((Path(folder) / "history.json").read_bytes())',
     'json.loads((Path(folder) / "history.json").read_bytes())', "tests/test_distributed.py"),
    ("one bad byte in a record costs the run", "harness/runs/run_record.py",
     "    files = path, copy_of(path)\n", "    files = path,\n", "tests/test_run_folder.py"),
    ("--fresh deletes by pattern", "harness/runs/run_record.py",
     "if OURS.fullmatch(name)\n             or (folder", "if OURS.match(name) or 'iter_' in name\n"
     "             or (folder", "tests/test_run_folder.py"),
    ("a README in a policy's folder voids the policy", "harness/runs/run_folder.py",
     "for name, value in entry.items()) and path.is_dir()",
     "for name, value in entry.items()) and describe(path) == entry", "tests/test_run_folder.py"),
    ("a README in a policy's folder is deleted with it", "harness/runs/run_folder.py",
     "only_first(self._make_room, path)", "pass", "tests/test_run_folder.py"),
    ("a judge that failed and was mended is refused", "harness/runs/run_record.py",
     "return failed or not any(", "return not any(", "tests/test_run_folder.py"),
    ("a judge that was mended leaves its old scores", "harness/runs/run_record.py",
     "write_record(folder / FINISHED, finished | again)", "pass", "tests/test_run_folder.py"),
    ("a run goes into a folder in which no model can be saved", "harness/runs/run_record.py",
     "os.fspath(folder).encode()", "pass", "tests/test_run_folder.py"),

    # --- model.py: the packed forward pass ------------------------------------------------------
    ("a response sees what follows", "model.py", "kernels.causal_bias if window is None",
     "(lambda n, m: None) if window is None", MODEL),
    ("a sliding window is ignored", "model.py",
     "window = sliding_window if sliding_window and sliding_window < tree_layout.longest else None",
     "window = None", MODEL),
    ("a window is one token too wide", "model.py", "(distance >= 0) & (distance < window)",
     "(distance >= 0) & (distance <= window)", MODEL),
    ("a response does not see its prompt", "model.py",
     "attend(q, torch.cat((prompt_k, k), 2), torch.cat((prompt_v, v), 2))", "attend(q, k, v)",
     MODEL),
    ("attention scores are scaled by torch's default", "model.py",
     "scale=scaling, enable_gqa=True", "enable_gqa=True", MODEL),
    ("positions count through the packed line", "model.py",
     "position_ids=batch.position_ids,\n                               attention_mask=mask",
     "position_ids=None,\n                               attention_mask=mask", MODEL),
    ("the final cap of the logits is dropped", "model.py",
     'softcap=getattr(config, "final_logit_softcapping", None),', "softcap=None,", MODEL),
    ("padding is attended to", "model.py", "attention_mask=batch.attention_mask,",
     "attention_mask=None,", "tests/test_compatibility.py"),
    ("bf16 is switched off", "model.py", "if self.autocast_dtype else nullcontext())",
     "if False else nullcontext())", MODEL),
    ("the self-check lets everything pass", "harness/models/compatibility.py",
     "if not error <= tolerance:", "if False:", MODEL),

    # --- sample.py: y ---------------------------------------------------------------------------
    ("sampling does not stop at the end token", "sample.py", "if tokens[row] in stop_ids or len(",
     "if len(", SAMPLE),
    ("a response is one token longer than its limit", "sample.py",
     "len(slot.response) == slot.limit:", "len(slot.response) == slot.limit + 1:", SAMPLE),
    ("the new token stands where the last one stood", "sample.py",
     "slot.last, slot.position = tokens[row], slot.position + 1",
     "slot.last, slot.position = tokens[row], slot.position", SAMPLE),
    ("all prompts share one random stream", "sample.py", "limit, random.Random(seed))",
     "limit, random.Random(0))", SAMPLE),
    ("a slot that moves leaves its cache behind", "sample.py",
     "cache.move(len(live) - 1, row)", "pass", SAMPLE),
    ("temperature is ignored", "sample.py", "probs = (lm_logits / temperature).softmax(-1)",
     "probs = lm_logits.softmax(-1)", SAMPLE),
    ("top-p leaves out the token that reaches it", "sample.py",
     "(ranked.cumsum(-1) - ranked < top_p)", "(ranked.cumsum(-1) < top_p)", SAMPLE),
    ("a token of probability zero can be drawn", "sample.py", "searchsorted(cdf, u, right=True)",
     "searchsorted(cdf, u, right=False)", SAMPLE),
    ("greedy takes the unlikeliest token", "sample.py", "return lm_logits.argmax(-1)",
     "return lm_logits.argmin(-1)", BOOK),
    ("a step's window is one token too wide", "sample.py", "(distance >= 0) & (distance < window)",
     "(distance >= 0) & (distance <= window)", SAMPLE),
    ("a response goes to another prompt", "sample.py", "yield slot.index, slot.response",
     "yield ended - 1, slot.response", SAMPLE),
    ("a prompt's samples are in the order in which they ended", "sample.py",
     "[found[j] for j in range(count)]", "list(found.values())", SAMPLE),
    ("slots are refilled by the tokens of all responses", "sample.py",
     "sampled / max(ended, 1)", "sampled", SAMPLE),
    ("most slots wait for a few slow responses", "sample.py", "min(slots // 2, round",
     "min(slots, round", SAMPLE),
    ("a prompt's cache begins one position late", "sample.py",
     "positions = torch.arange(length, device=model.device).expand(len(rows), -1)",
     "positions = torch.arange(1, length + 1, device=model.device).expand(len(rows), -1)", SAMPLE),

    # --- rank.py: the judge ---------------------------------------------------------------------
    ("ties go by position", "rank.py", "key=lambda i: (-scores[i], digest(texts[i])))",
     "key=lambda i: -scores[i])", RANK),
    ("best and worst are swapped", "rank.py", "return order[0], order[-1]",
     "return order[-1], order[0]", RANK),
    ("y is taken from the data", "rank.py", 'if source == "sampled"]',
     'if source == "data_chosen"]', BOOK),
    ("the ranking is ignored", "rank.py",
     "= choose_pair(scores, texts) or equal",
     '= index["data_chosen"], index["data_rejected"]', BOOK),
    ("best and worst change places on their way into a row", "rank.py",
     'row["chosen"], row["rejected"] = choose_pair', 'row["rejected"], row["chosen"] = choose_pair',
     RANK),
    ("an empty sample drops its row", "rank.py",
     'for source, i in index.items() if source in ("data_chosen", "data_rejected")]',
     "for i in index.values()]", LOOP
     + "::test_a_sample_that_ends_at_once_is_a_response_like_any_other_and_may_lose"),
    ("PairRM is believed to be antisymmetric", "rank.py", "(M - M.T)[place]", "(2 * M)[place]",
     RANK),
    ("PairRM's second candidate has the first one's marker", "rank.py",
     "ids[each, markers[:, 2]] = self.marker_ids[2]", "pass", RANK),
    ("PairRM compares only half of the ordered pairs", "rank.py", "itertools.permutations(",
     "itertools.combinations(", RANK),

    # --- train_loop.py: Algorithm 1 -------------------------------------------------------------
    ("the reference stays the first policy", "train_loop.py",
     'reference_path = policy_path if s.reference == "previous" else start.policy',
     "reference_path = start.policy", BOOK),
    ("the next iteration begins at the first policy again", "train_loop.py",
     'policy_path = run.folder(here / "policy", train', 'run.folder(here / "policy", train', BOOK),
    ("y comes from the first policy", "train_loop.py",
     "draw, portion, policy_path, start, s, s.iteration)",
     "draw, portion, start.policy, start, s, s.iteration)", BOOK),
    ("the gradient is not divided by the batch", "train_loop.py",
     "(losses.sum() * PROCESSES / batch.examples).backward()",
     "(losses.sum() * PROCESSES).backward()", BOOK),
    ("the loss is a mean over each micro-batch", "train_loop.py",
     "(losses.sum() * PROCESSES / batch.examples).backward()",
     "losses.mean().backward()", LOOP
     + "::test_accumulated_micro_batches_equal_one_full_batch"),
    ("XPO pushes the policy's own sample down", "rank.py",
     'row["sampled"], equal = [index["reference"]],', 'row["sampled"], equal = [index["policy"]],',
     "tests/test_xpo.py"),
    ("XPO's tie goes to the first model", "rank.py", '(index["policy"], index["reference"])',
     '(index["reference"], index["policy"])', "tests/test_xpo.py"),
    ("XPO's two samples change places", "train_loop.py", 'zip(("policy", "reference"), (y',
     'zip(("reference", "policy"), (y', "tests/test_xpo.py"),
    ("XPO's second sample is the policy's, too", "train_loop.py",
     '"reference_samples.jsonl", draw, portion, start.policy,',
     '"reference_samples.jsonl", draw, portion, policy,', "tests/test_xpo.py"),
    ("roles are swapped where they are picked", "train_loop.py",
     "return logps[chosen], logps[rejected], sampled",
     "return logps[rejected], logps[chosen], sampled", BOOK),
    ("y is taken from the neighbour's tree", "train_loop.py",
     "logps[[begin + y for y in tree.sampled]].mean()", "logps[tree.sampled].mean()", BOOK),
    ("of several samples only the first counts", "train_loop.py",
     "logps[[begin + y for y in tree.sampled]].mean()", "logps[begin + tree.sampled[0]]", LOOP
     + "::test_roles_are_picked_from_the_flat_log_probs_of_trees_of_many_sizes"),
    ("gradients of all updates add up", "train_loop.py",
     "    optimizer.step()\n    optimizer.zero_grad()\n", "    optimizer.step()\n", BOOK),
    ("the term's own gradient is added twice", "train_loop.py",
     "        optimism_norm = clip(parameters, math.inf)\n        optimizer.zero_grad()\n",
     "        optimism_norm = clip(parameters, math.inf)\n", BOOK),
    ("the schedule is not applied", "train_loop.py",
     'optimizer.param_groups[0]["lr"] = lr = s.lr * lr_factor(u, len(batches))', "lr = s.lr", BOOK),
    ("the first update has a rate of zero", "train_loop.py", "return (u + 1) / warmup",
     "return u / warmup", BOOK),
    ("the schedule ends at half the rate", "train_loop.py", "return 0.5 * (1 + math.cos(",
     "return 0.5 + 0.25 * (1 + math.cos(", BOOK),
    ("weights decay", "train_loop.py", "weight_decay=0.0", "weight_decay=0.1", BOOK),
    ("gradients are not clipped", "train_loop.py", "norm = clip(parameters, s.max_grad_norm)",
     "norm = clip(parameters, math.inf)", BOOK),
    ("log-probs of the reference go to other candidates", "train_loop.py",
     "known[tree.prompt_id] = dict(zip(tree.candidate_indices, logps))",
     "known[tree.prompt_id] = dict(zip(tree.candidate_indices[::-1], logps))", BOOK),
    ("prompts of an iteration share their random stream", "train_loop.py",
     'stream(s.seed, stream_name, record["prompt_id"], j)', "stream(s.seed, stream_name, j)", LOOP
     + "::test_prompts_and_iterations_have_random_streams_of_their_own"),
    ("y may be longer than its prompt leaves room for", "train_loop.py",
     "limit = min(s.max_new_tokens, room)", "limit = s.max_new_tokens", LOOP
     + "::test_the_samplers_limit_is_what_the_prompt_leaves"),
    ("equal pairs lose their optimism term", "data.py",
     'and (row["chosen"] != row["rejected"] or alpha > 0)]',
     'and row["chosen"] != row["rejected"]]', LOOP
     + "::test_equal_pairs_keep_their_optimism_term_and_empty_data_is_dropped"),
    ("a checkpoint of another iteration is resumed from", "train_loop.py",
     'if {row["iteration"] for row in history} != {s.iteration}:', "if False:", LOOP
     + "::test_a_checkpoint_of_another_iteration_is_refused"),
    ("kept rows of another file are used", "harness/runs/run_folder.py",
     "if row.get(FILE) == name_of(path)}", "}", "tests/test_run_folder.py"
     "::test_a_part_of_another_iterations_file_is_not_used"),
    ("weights that belong into a layer are left out", "harness/models/weights.py",
     "set(filter(is_surplus, info[\"unexpected_keys\"]))", "set()", "tests/test_compatibility.py"
     "::test_weights_that_would_be_left_out_of_a_layer_are_named"),
    ("integers are trained as weights", "harness/models/weights.py",
     'if packed and ".weight" in packed[0]:', "if False:", "tests/test_compatibility.py"
     "::test_weights_in_eight_bits_are_refused_whatever_the_config_says"),
    ("a response goes on after a stop token", "harness/inputs/chat_template.py",
     "return ids[:ends[0]] if ends else ids", "return ids", "tests/test_chat_template.py"
     "::test_a_response_ends_with_its_first_stop_token_whichever_that_is"),
    ("a wrong reference is not noticed", "train_loop.py",
     "max(1, agreed) and farthest < allowed):", "max(1, agreed)):", LOOP
     + "::test_a_wrong_reference_is_stopped_before_the_first_update"),
    ("a loss that is not the one of log-probs that agree is not noticed", "train_loop.py",
     "if not (abs(preference_loss - agreed) < 1e-3 * max(1, agreed) and", "if not (", LOOP
     + "::test_a_wrong_reference_is_stopped_before_the_first_update"),
    ("update 0 must have DPO's loss, whatever the loss is", "train_loop.py",
     "agreed = selm.PREFERENCE_LOSS[s.loss](", 'agreed = selm.PREFERENCE_LOSS["dpo"](', BOOK),
    ("--loss is ignored", "train_loop.py", "selm.selm_loss, loss=s.loss, **terms",
     "selm.selm_loss, **terms", BOOK),

    # --- what only a GPU would notice -----------------------------------------------------------
    ("the mask of a sampling step is made on the CPU", "sample.py",
     "torch.arange(length, device=positions.device)  # (n, length)", "torch.arange(length)", GPU),
    ("the mask of a window is made on the CPU", "model.py", "torch.arange(m, device=device)\n",
     "torch.arange(m)\n", GPU),
    ("reference log-probs stay on the CPU", "train_loop.py",
     "for x in tree.ref_logps],\n                                 device=logps.device)",
     "for x in tree.ref_logps])", GPU),
    ("the matrix product of CUDA gets inputs of two dtypes", "selm.py",
     "h, g = hidden[rows].to(compute_dtype), grad_logps[rows, None].to(sum_dtype)",
     "h, g = hidden[rows].float(), grad_logps[rows, None].to(sum_dtype)", GPU),
]


def broken_copy(folder, mutant=None):
    """A copy of the repository's files in `folder`, with one fault. ValueError if the fault's text
    does not stand in its file exactly once."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True,
                           capture_output=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file() and name.endswith((".py", ".ini", ".html")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if mutant:
        what, name, old, new, _ = mutant
        text = (folder / name).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{name}: '{old}' stands there {text.count(old)} times ({what})")
        (folder / name).write_text(text.replace(old, new))


def run(mutant, tests, seconds=300):
    """Whether `tests` pass in a copy with the fault; what takes far too long does not pass."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        broken_copy(Path(folder), mutant)
        try:
            return subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests],
                cwd=folder, capture_output=True, timeout=seconds,
                env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="a file, or a word of the description")
    parser.add_argument("--textbook", action="store_true",
                        help="run tests/test_textbook.py against every fault, and count")
    parser.add_argument("--jobs", type=int, default=2, help="so many at a time (2)")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if args.only in m[1] or args.only in m[0]]
    tests = [BOOK if args.textbook else m[4] for m in mutants]
    survivors, used = [], sorted(set(tests))
    with ThreadPoolExecutor(args.jobs) as pool:
        for test, passes in zip(used, pool.map(functools.partial(run, None), used)):
            if not passes:
                sys.exit(f"{test} fails without any fault")
        for mutant, survives in zip(mutants, pool.map(run, mutants, tests)):
            print(f"{'SURVIVES' if survives else 'killed':9}{mutant[1]:26}{mutant[0]}", flush=True)
            survivors += [mutant] * survives
    print(f"{len(mutants)} mutants, {len(mutants) - len(survivors)} killed")
    if survivors and not args.textbook:
        sys.exit(1)


if __name__ == "__main__":
    main()
