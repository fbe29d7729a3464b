"""A .gguf file as start model: written here tensor by tensor, trained from, and saved again."""

import gguf
import pytest
import torch

import train_loop
from conftest import make_model, make_tokenizer
from harness.inputs import chat_template
from harness.models import weights
from test_train_loop import SMALL, weights_of, write_judge, write_preferences


def write_gguf(path, model, tokenizer, eos_token_id=None):
    """A Llama in fp32, as llama.cpp stores it: queries and keys with their rotary halves woven."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    core = __import__("json").loads(tokenizer.backend_tokenizer.to_str())["model"]
    by_id = sorted({**core["vocab"], **tokenizer.get_added_vocab()}.items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in by_id])
    writer.add_token_types([3 if i in special else 1 for _, i in by_id])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in core["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(eos_token_id or tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    def woven(weight, heads):
        return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name:
            tensor = woven(tensor, config.num_attention_heads)
        if "k_proj" in name:
            tensor = woven(tensor, config.num_key_value_heads)
        name = name.replace("model.layers", "blk")
        for theirs, llama_cpp in names.items():
            name = name.replace(f"{theirs}.weight", f"{llama_cpp}.weight")
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def start(tmp_path):
    model, tokenizer = make_model(scale=3.0), make_tokenizer()
    return write_gguf(tmp_path / "start.gguf", model, tokenizer), model, tokenizer


def test_a_gguf_file_is_loaded_with_its_weights_template_and_stop_tokens(start):
    """Woven queries and keys taken as they are; a tokenizer without its template; F32 that is
    rounded on the way. Oracle: the model that was written."""
    path, model, tokenizer = start
    loaded = weights.load_model(path)
    ids = torch.tensor([[5, 6, 7, 99]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    own = chat_template.load_tokenizer(path)
    text = [{"role": "user", "content": "hello there, the cat"}]
    ours, theirs = chat_template.ChatFormat(own), chat_template.ChatFormat(tokenizer)
    assert ours.prompt_ids(text) == theirs.prompt_ids(text)
    assert ours.response_ids(text, "sat on") == theirs.response_ids(text, "sat on")
    assert 2 in weights.model_stop_ids(path)


def test_a_run_starts_from_a_gguf_file_and_another_one_in_its_place_is_refused(start, tmp_path):
    """b.gguf that silently trains a.gguf's unpacked weights."""
    path, model, tokenizer = start
    command = ["--model", str(path), "--data", write_preferences(tmp_path / "p.jsonl"), "--ranker",
               write_judge(tmp_path / "judge.py"), "--run-dir", str(tmp_path / "run"), *SMALL,
               "--iterations", "1", "--lr", "1e-3"]
    train_loop.main(command)
    trained = weights_of(tmp_path / "run", 1)
    moved = max((trained[n] - w).abs().max() for n, w in model.state_dict().items())
    assert 0 < moved < 0.05  # from these weights, not from others
    write_gguf(path, make_model(scale=3.0, seed=5), tokenizer)
    with pytest.raises(ValueError, match="the model has changed"):
        train_loop.main(command)
