"""A judge over HTTP: any server that speaks OpenAI's protocol (vLLM, Ollama, a paid one). Copy it.

    pip install openai
    OPENAI_API_KEY=... OPENAI_BASE_URL=... JUDGE_MODEL=gpt-4.1-mini \
        python train_loop.py --ranker examples/judge_http.py:judge ...

Retries with growing pauses (429, 5xx, lost connections), the timeout and the connections are the
client's. Each prompt's scores are on disk as soon as they are there, and a prompt that failed for
good loses no other's: the same command asks for that one again, and for what was not asked yet.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import openai

client = openai.OpenAI(max_retries=6, timeout=60)


def judge(prompts, candidates):
    with ThreadPoolExecutor(8) as pool:  # 8 questions at a time; `map` keeps their order
        yield from pool.map(ask, prompts, candidates)


judge.prompts_a_call = 64  # so many are asked before a fault ends the run


def ask(prompt, texts):
    """One number a candidate, or the exception that this prompt met."""
    question = {"conversation": prompt, "answers": texts}
    task = (f"How good is each of these {len(texts)} last answers to the conversation? Reply with "
            "a JSON list of one number from 0 to 10 for each, in their order, and nothing else.\n")
    try:
        reply = client.chat.completions.create(
            model=os.environ["JUDGE_MODEL"], temperature=0,
            messages=[{"role": "user", "content": task + json.dumps(question)}])
        return json.loads(reply.choices[0].message.content)
    except (openai.OpenAIError, ValueError, TypeError) as error:
        return error
