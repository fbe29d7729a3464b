"""What happens to one preference record? Follows it through the code and writes docs/one_record.md.

    python experiments/checks/one_record.py            (10 seconds)

The record is one of the toy's, the policy is the toy's base model (seed 0). Every number on the
page is printed from the object that the code makes; tests/test_one_record.py makes the page again,
and recomputes its log-probs, loss and signs with textbook.py and plain arithmetic.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import data  # noqa: E402
import rank  # noqa: E402
import sample  # noqa: E402
import selm  # noqa: E402
import train_loop  # noqa: E402
from harness.inputs import preferences, toy  # noqa: E402
from harness.inputs.chat_template import ChatFormat  # noqa: E402
from harness.runs.output_files import write_jsonl, write_text  # noqa: E402
from harness.runs.settings import RECIPES  # noqa: E402
from model import Policy  # noqa: E402

ALPHA, BETA, NUMBER = RECIPES["toy"]["alpha"], RECIPES["toy"]["beta"], 1
LIMITS = dict(max_prompt_length=32, max_length=64)


def trace():
    """name -> what stands on the page under that name; tests read it too."""
    torch.set_num_threads(1)
    lm, tokenizer = toy.train_base(0, progress=False)
    start = copy.deepcopy(lm)
    lm.set_attn_implementation("selm_tree")
    chat = ChatFormat(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        prompts = [toy.question(*pair) for pair in toy.split_prompts()[0][:4]]
        line = toy.preference_rows(prompts, "default", "one record")[NUMBER]
        write_jsonl(Path(folder) / "prefs.jsonl", [line])
        [record] = preferences.load_preferences(Path(folder) / "prefs.jsonl")
    [(_, prompt_ids, given)] = data.encode([record], chat, **LIMITS)
    [y] = sample.generate(lm, [prompt_ids], stop_ids=chat.stop_ids, max_new_tokens=8, slots=1,
                          seeds=[0], progress=False)
    responses = [("data_chosen", given[0]), ("data_rejected", given[1]), ("sampled", y)]
    [row] = data.make_rows([(record, prompt_ids, responses)], chat)
    [scores] = toy.oracle()([row["prompt"]], [[c["text"] for c in row["candidates"]]])
    row = rank.give_roles(row, scores)

    tree = data.make_tree(row, ALPHA)
    batch = data.pack([tree])
    policy = Policy(lm)
    logps = policy(batch)  # (R,)
    roles = train_loop.roles([tree], logps)
    before, _ = selm.selm_loss(*roles, *train_loop.roles([tree], logps.detach()),
                               alpha=ALPHA, beta=BETA)
    slopes, = torch.autograd.grad(before.sum(), logps, retain_graph=True)
    before.sum().backward()
    with torch.no_grad():  # one step of plain gradient descent
        for p in policy.parameters():
            p -= 1e-3 * p.grad
        after = policy(batch)
        loss_after, _ = selm.selm_loss(*train_loop.roles([tree], after),
                                       *train_loop.roles([tree], logps), alpha=ALPHA, beta=BETA)
    return dict(line=line, record=record, row=row, tree=tree, batch=batch, logps=logps.tolist(),
                slopes=slopes.tolist(), loss=before.item(), after=after.tolist(),
                loss_after=loss_after.item(), tokenizer=tokenizer, chat=chat, start=start)


def row_text(row):
    """JSON with a candidate a line."""
    parts = [f'"{name}": {json.dumps(row[name])}' for name in ("prompt_id", "prompt_ids")]
    parts.append('"candidates": [\n  ' + ",\n  ".join(map(json.dumps, row["candidates"])) + "]")
    parts += [f'"{name}": {json.dumps(row[name])}' for name in ("chosen", "rejected", "sampled")]
    return "{" + ",\n ".join(parts) + "}"


def page(t):
    def words(ids):
        return [word.replace("|", "\\|") for word in t["tokenizer"].convert_ids_to_tokens(ids)]

    def cells(*values):
        return "| " + " | ".join(map(str, values)) + " |"
    row, tree, batch = t["row"], t["tree"], t["batch"]
    ids, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    table = [cells("place", *range(len(ids))), "|---" * (len(ids) + 1) + "|",
             cells("token", *(f"`{word}`" for word in words(ids))), cells("id", *ids),
             cells("position", *positions)]
    labels = [cells("predicted from place", *batch.predicted_from.tolist()),
              "|---" * (len(batch.targets) + 1) + "|",
              cells("target", *(f"`{word}`" for word in words(batch.targets.tolist()))),
              cells("response", *batch.response_index.tolist())]
    names = {tree.chosen: ["chosen"], tree.rejected: ["rejected"]}
    for i in tree.sampled:
        names.setdefault(i, []).append("y")
    effects = ["| response | role | log pi | d loss / d log pi | log pi after one step |",
               "|---|---|---|---|---|"]
    for i, response in enumerate(tree.responses):
        effects.append(cells(f"`{' '.join(words(response))}`", " and ".join(names[i]),
                             *(f"{t[name][i]:+.3f}" for name in ("logps", "slopes", "after"))))
    prompt = " ".join(words(row["prompt_ids"])).replace("\\|", "|")
    y = next(c for c in row["candidates"] if "sampled" in c["sources"])
    return f"""# One record, from its line to its gradient

Made by `python experiments/checks/one_record.py`; every number is checked by `tests/test_one_record.py`.
The record is one of the toy world's, the policy its base model, alpha = {ALPHA}, beta = {BETA}.

## 1. A line of the preference file (`harness/inputs/preferences.py`)

```json
{json.dumps(t['line'])}
```

The prompt is what chosen and rejected share; the responses are the assistant's last turns, from here
on `data_chosen` = "{t['record']['data_chosen']}" and `data_rejected` = "{t['record']['data_rejected']}".

## 2. Ids (`harness/inputs/chat_template.py`, `data.encode`)

The model's own chat template writes the prompt up to where the answer begins,
`{prompt}`, as {row['prompt_ids']},
and each response with its end token, once.

## 3. A sample (`sample.serve`)

A slot of the sampler takes the prompt. Its last token, `{prompt.split()[-1]}`, is fed at position
{len(row['prompt_ids']) - 1}; the likeliest next token (temperature 0) is picked, then fed at the position behind it, and so on until an end token:
y = {y['ids']}, "{y['text']}". `samples.jsonl` keeps these ids.

## 4. Candidates, scores, roles (`data.make_rows`, `rank.give_roles`)

One row of `pairs.jsonl` (without `prompt` and `dropped`). The candidates are the responses with DISTINCT
ids; scores are the judge's; roles are indices into the candidates, all that the rest of the code uses:

```json
{row_text(row)}
```

## 5. One packed line (`data.make_tree`, `data.pack`)

The prompt stands there once, then each response that the loss needs, at the positions of its own
sequence. Attention lets a response see the prompt and itself (`model.tree_attention`).

{chr(10).join(table)}

The state at a place predicts the NEXT token of its own sequence: the first token of every response is
predicted from the last prompt token, place {len(tree.prompt_ids) - 1}.

{chr(10).join(labels)}

## 6. Log-probs, loss, gradient (`selm.token_logps`, `selm.selm_loss`)

A response's log-prob is the sum over its targets. The reference is the policy itself before the first
update, so the loss, {t['loss']:.3f}, is ln 2. Its slope is -beta/2 for chosen, +beta/2 for rejected, and
+alpha beta for y, added up where a response has several roles. Minimising goes against the slope. (Had y
won here, its slope would be -beta/2 + alpha beta = {-0.5 * BETA + ALPHA * BETA:+.3f}, and it would still be pushed up; above
alpha = 1/2 even a winner is pushed down at first.)

{chr(10).join(effects)}

One step of 1e-3 down the gradient takes the loss from {t['loss']:.3f} to {t['loss_after']:.3f}. The responses share their weights, so
a log-prob may move against its own slope where another response's pull is stronger.
"""


if __name__ == "__main__":
    (ROOT / "docs").mkdir(exist_ok=True)
    write_text(ROOT / "docs" / "one_record.md", page(trace()))
    print("wrote docs/one_record.md")
