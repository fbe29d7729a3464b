"""Loads a policy in the form that a phase needs, refuses incomplete weights, and saves a policy.

Test: pytest tests/test_compatibility.py tests/test_gguf.py.
"""

import ctypes
import functools
import gc
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText,
                          GenerationConfig, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel)
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from harness.models import distributed
from harness.runs.exits import one_line
from harness.inputs.files import check_no_pointer, is_special, parse_json
from harness.models.distributed import PROCESS, PROCESSES
from model import Policy

# ----------------------------------------------------------------------------------------------
# 1. A policy in the form that a phase needs
# ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # the reference pass and the training after it share one
def load_policy(path, compute, seed=0):
    """A policy to train: fp32 master weights, sharded by FSDP2 over several processes or for
    --offload. seed: of what is drawn, LoRA's random half."""
    load_frozen.cache_clear()  # to free its memory
    torch.manual_seed(seed)
    sharded = collect_cycles(compute)

    def load():
        return load_model(path, torch.float32, "cpu" if sharded else compute.device,
                          compute.attention)
    # Process 0 alone loads all weights, and the others get them from it, because eight copies could
    # fill a host. The others tie their head if process 0 did: two matrices in the file are loaded
    # as two, whatever the config says.
    model = failure = None
    try:
        model = load() if PROCESS == 0 else None
    except ValueError as error:
        failure = error
    distributed.raise_everywhere(failure)  # or the others would wait for ever
    tied = distributed.broadcast(model and is_tied(model))
    model = model or empty_model(path, compute.attention, tied=tied)
    if compute.lora_rank:
        model = distributed.add_lora(model, compute.lora_rank)
    policy = Policy(model, compute.gradient_checkpointing,
                    torch.bfloat16 if compute.dtype == "bf16" else None,
                    "inductor" if compute.compile else None)
    return distributed.shard(policy, compute.device, compute.offload) if sharded else policy


@functools.lru_cache(maxsize=2)  # an iteration's policy and the start
def load_frozen(path, compute, attention):
    """A model to sample and to evaluate: in the compute dtype, whole on every process."""
    collect_cycles(compute)
    dtype = torch.bfloat16 if compute.dtype == "bf16" else torch.float32
    return load_model(path, dtype, compute.device, attention)


def collect_cycles(compute):
    """Returns whether trained policies are under FSDP, and frees those that are no longer used.
    FSDP's hooks make reference cycles, and so do layers that are checkpointed or compiled. (Other
    policies are freed without the collector, which takes seconds.)"""
    sharded = PROCESSES > 1 or compute.offload
    if sharded or compute.gradient_checkpointing or compute.compile:
        gc.collect()
    return sharded


# ----------------------------------------------------------------------------------------------
# 2. Loading: refuse weights that are not the model's, and never run code of a model folder
# ----------------------------------------------------------------------------------------------


def load_model(path, dtype=torch.float32, device="cpu", attention="selm_tree"):
    """A causal LM from a hub id, a folder or a .gguf file, in eval mode. ValueError if it fails.

    attention: "eager" for --plain-rows. An architecture with attention of its own keeps that.
    """
    try:
        name, options = _source(path)
        config = _model_config(name, options)
        # Straight to a GPU, because eight copies in host memory could fill it.
        place = torch.device(device)
        if place == torch.device("cuda"):  # the GPU of this process
            place = torch.device("cuda", torch.cuda.current_device())
        place = {} if place.type == "cpu" else {"device_map": {"": place}}
        # ignore_mismatched_sizes: so that _check_weights can name the tensors.
        model, info = _auto_class(config, options).from_pretrained(
            name, **options, **place, dtype=dtype, attn_implementation="eager",
            use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
        _check_weights(model, info)
    except Exception as error:
        raise ValueError(f"--model {path}: could not be loaded as a causal language model "
                         f"({type(error).__name__}: {one_line(error)})") from None
    # Two matrices in the file are loaded as two, even where the config says that they are tied.
    model.config.get_text_config().tie_word_embeddings = is_tied(model)
    if "gguf_file" in options:  # or transformers would refuse to save it, as it was quantised
        model.is_quantized, model.hf_quantizer = False, None
        for name in ("quantization_config", "_pre_quantization_dtype"):
            vars(model.config).pop(name, None)
    if not model.generation_config.do_sample:
        # Many hub models say "greedy, temperature 0.6". save_pretrained would refuse that after the
        # training.
        for name in ("temperature", "top_p", "top_k"):
            setattr(model.generation_config, name, None)
    return _ready(model.to(device), attention)


def empty_model(path, attention, dtype=torch.float32, tied=None):
    """The same architecture with uninitialised weights, for which the system provides no memory
    before they are written. Buffers are computed as usual. tied: whether head and embeddings are
    one matrix; None: what the config says."""
    name, options = _source(path)
    config = _model_config(name, options)
    if tied is not None:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = tied
    with no_init_weights():
        model = _auto_class(config, options).from_config(
            config, dtype=dtype, attn_implementation="eager")
    model.tie_weights()
    return _ready(model, attention)


def is_tied(model):
    """Whether a model's head and its embeddings are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def check_saved_form(model, path):
    """ValueError if a saved policy of this model could not be loaded: transformers may load weights
    in another form than a new model of the same config has (gpt-oss from MXFP4)."""
    ours, fresh = ({name: tuple(value.shape) for name, value in m.state_dict().items()}
                   for m in (model, empty_model(path, "eager", tied=is_tied(model))))
    other = sorted(name for name in {*ours, *fresh} if ours.get(name) != fresh.get(name))
    if other:
        raise ValueError(
            f"--model {path}: {len(other)} of its tensors have other names or shapes in memory "
            f"than in a new model of its config.json, {other[0]} is the first. A trained policy "
            "could not be loaded again; save the model unquantised with transformers, and load "
            "that copy")


def _ready(model, attention):
    model.set_attn_implementation(attention)
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # for a loss that we do not use; fails with our masks
    return model.eval()


def stored_dtype(path):
    """The widest floating dtype of a model's weights on disk: float32, bfloat16 or float16. Read
    from the weights, because config.json may be wrong."""
    folder = Path(path) if Path(path).exists() else Path(cached_file(path, "config.json")).parent
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}
    found -= {"BOOL", "U8", "I8", "I16", "I32", "I64"}
    return {("BF16",): torch.bfloat16, ("F16",): torch.float16}.get(tuple(found), torch.float32)


def load_config(path):
    """The configuration of the text model that load_model would load. ValueError if that or its
    stop ids cannot be read."""
    try:
        config = _model_config(*_source(path)).get_text_config()
        for named in (config, _generation_config(path)):
            _stop_ids_of(named)
        return config
    except Exception as error:
        raise ValueError(f"--model {path}: no model configuration could be loaded "
                         f"({type(error).__name__}: {one_line(error)})") from None


def model_stop_ids(model):
    """The set of ids that end a text, by the model's own configurations. model: a loaded one, or
    the value of --model. ValueError if a configuration is damaged, as its ids would be lost."""
    if isinstance(model, PreTrainedModel):
        configs = [model.config.get_text_config(), model.generation_config]
    else:
        configs = [load_config(model), _generation_config(model)]
    return set().union(*map(_stop_ids_of, configs))


def _stop_ids_of(config):
    named = getattr(config, "eos_token_id", None)
    ids = [i for i in (named if isinstance(named, (list, tuple)) else [named]) if i is not None]
    if wrong := [i for i in ids if type(i) is not int or i < 0]:
        raise ValueError(f"eos_token_id {wrong[0]!r} of {type(config).__name__} is no token id; "
                         "correct it in the model's folder")
    return set(ids)


def _generation_config(path):
    """generation_config.json, or None if the model has no such file. ValueError if it is damaged:
    transformers would treat it as missing."""
    file = None
    if not str(path).endswith(".gguf"):
        with suppress(OSError):  # an optional file
            file = cached_file(str(path), "generation_config.json",
                               _raise_exceptions_for_missing_entries=False)
    return file and GenerationConfig.from_dict(_json_object(Path(file)))


def _json_object(file):
    """The object in a JSON file of a model's folder. ValueError, with the file's name, if there is
    none."""
    try:
        value = parse_json(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read as JSON ({one_line(error)}); copy the "
                         "model's folder again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds no JSON object; copy the model's folder again")
    return value


def _source(path):
    """(name, options) for from_pretrained. No code of a model folder is ever run: pickles, which
    can contain code, are refused, and trust_remote_code=False keeps transformers from asking (it
    would take a "y" on stdin for a yes)."""
    folder, options = Path(path), {"trust_remote_code": False}
    _check_files(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError("a LoRA adapter; merge it first: peft.AutoPeftModelForCausalLM"
                         ".from_pretrained(THIS).merge_and_unload().save_pretrained(FOLDER)")
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ValueError("its weights are a pickle (.bin), which is not read; convert one that you "
                         "trust: AutoModelForCausalLM.from_pretrained(THIS, use_safetensors=False)"
                         ".save_pretrained(FOLDER)")
    if str(path).endswith(".gguf"):
        return str(folder.parent), {"gguf_file": folder.name, **options}
    return str(path), options


def _check_files(folder):
    """ValueError if a file of a model's folder does not hold what its name says."""
    if not folder.is_dir():
        return
    for kind in ("json", "safetensors", "model", "jinja"):
        for file in folder.glob(f"*.{kind}"):
            if is_special(file):  # to read a pipe may take for ever
                raise ValueError(f"{file} is no regular file")
            check_no_pointer(file)
    for file in folder.glob("*.safetensors"):
        packed, found = [], {}
        with suppress(SafetensorError), safe_open(file, "pt") as tensors:  # a damaged file: later
            found = {name: tensors.get_slice(name) for name in tensors.keys()}
            packed = [name for name, tensor in found.items() if len(tensor.get_shape()) > 1
                      and not re.fullmatch("F(16|32|64)|BF16|BOOL", tensor.get_dtype())]
        if packed and ".weight" in packed[0]:
            raise ValueError(f"{file.name} holds {packed[0]} in {found[packed[0]].get_dtype()}: it "
                             "is quantised and cannot be trained; load the unquantised model")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _json_object(folder / name)


def _model_config(name, options):
    """The configuration. ValueError if its model cannot be trained and saved."""
    config = AutoConfig.from_pretrained(name, **options)
    quantised = getattr(config, "quantization_config", None)
    if quantised and "gguf_file" not in options:  # a .gguf file is unpacked as it is loaded
        said = quantised if isinstance(quantised, dict) else getattr(quantised, "__dict__", {})
        method = getattr(said.get("quant_method"), "value", said.get("quant_method"))
        raise ValueError(f"its weights are quantised ({method or 'unnamed method'}) and cannot be "
                         "trained; load the unquantised model")
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise ValueError("its config.json says num_hidden_layers 0; correct it")
    return config


def _auto_class(config, options):
    """transformers' class that loads it. LLaVA and Qwen2-VL have no causal one; their text model is
    trained."""
    known = "gguf_file" in options or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def _check_weights(model, info):
    """ValueError if weights do not fit their config. transformers would only warn, and fill missing
    weights with random numbers or leave out layers that it does not expect."""
    def kind(name):
        return re.sub(r"\d+", "#", name)

    known = {kind(name) for name in model.state_dict()}
    layers = {name.rpartition(".#.")[0] for name in known if ".#." in name}

    def is_surplus(name):
        """It has a place in the model: in a layer, or beside a weight. Others (a value head) do no
        harm, nor do buffers that older versions have saved."""
        module = kind(name).rpartition(".")[0]
        return not name.endswith(("inv_freq", "position_ids", "masked_bias", ".attn.bias")) and (
            kind(name) in known or f"{module}.weight" in known
            or any(kind(name).startswith(f"{layer}.#.") for layer in layers))

    for fault, names in (
            ("missing", info["missing_keys"]),
            ("of another shape", {name for name, *_ in info["mismatched_keys"]}),
            ("too many", set(filter(is_surplus, info["unexpected_keys"])))):
        if names:
            raise ValueError(f"its weights do not fit its config.json: {len(names)} {fault}, "
                             f"{min(names)} the first")
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"its weights hold NaN or infinite numbers ({len(bad)} tensors, {bad[0]} "
                         "the first); copy or convert the model again")


# ----------------------------------------------------------------------------------------------
# 3. Saving, and settings of the process
# ----------------------------------------------------------------------------------------------


def save_policy(policy, tokenizer, folder, stop_ids=(), dtype=torch.float32):
    """Writes a plain Hugging Face folder (LoRA merged in). It appears complete or not at all.

    stop_ids: the ids that end a response in our sampler, so that plain `model.generate` ends there
    too; empty: those that the model names. dtype: of the weights on disk. All processes must save a
    sharded policy together, and the first one writes. FloatingPointError or OSError: on all of
    them, and the old folder stays.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    sharded = any(hasattr(p, "full_tensor") for p in policy.parameters())  # DTensors
    model = (policy.model.merge_and_unload() if hasattr(policy.model, "merge_and_unload")
             else policy.model)
    if stop_ids:
        ids = sorted(stop_ids)
        model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    state, failure = None, [None]
    if sharded:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
    if not sharded or torch.distributed.get_rank() == 0:
        state = {name: value.to(dtype) if value.is_floating_point() else value
                 for name, value in (state or model.state_dict()).items()}
        failure = [_write_policy(model, state, tokenizer, Path(folder), dtype)]
    if sharded:
        torch.distributed.broadcast_object_list(failure)
    if failure[0]:
        raise failure[0]


def _write_policy(model, state, tokenizer, folder, dtype):
    """Returns the error that stopped the writing, or None."""
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        return FloatingPointError(f"{len(bad)} weight tensors are not finite after training, "
                                  f"{bad[0]} the first; nothing was saved; lower --lr")
    temporary = Path(f"{folder}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=state)
        config = temporary / "config.json"  # it names the dtype of the model in memory
        config.write_text(re.sub(r'("dtype": )"float32"', rf'\1"{str(dtype).split(".")[1]}"',
                                 config.read_text()))
        tokenizer.save_pretrained(temporary)
        for file in filter(Path.is_file, temporary.rglob("*")):
            distributed.flush(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except Exception as error:  # safetensors has a class of its own for a full disk
        return OSError(f"{folder} could not be saved ({one_line(error)}); what was there stays. "
                       "Free some space and run the same command again")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # half a policy may fill the disk


def spare_housekeeping():
    """Changes two settings of this process, for speed alone.

    Python's collector looks for reference cycles every 20,000 new objects instead of every 700. It
    would visit every young list of token ids each time (a tenth of ranking's time).
    glibc (CPU, Linux) keeps freed memory for the next micro-batch. By default it returns large
    blocks to the system, and the next layer's activations cause page faults again (several percent
    of a training step).
    """
    gc.set_threshold(20_000)
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
