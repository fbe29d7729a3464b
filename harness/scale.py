"""Many processes that act as one: who am I, barrier, gather, agree; FSDP2, LoRA and checkpoints.

torchrun starts PROCESSES copies of the command; each one works on its share, `items[PROCESS::
PROCESSES]`, of every list. Whatever decides what happens next (does a file exist? is a number
finite?) must be answered once and told to all, or one process goes on while the others wait for it
for ever. With a single process every function here returns at once.

The ground of the harness: imports nothing local; what it shards or checkpoints is handed to it.
Test: pytest tests/test_scale.py.
"""

import gc
import hashlib
import json
import os
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

PROCESS = int(os.environ.get("RANK", 0))  # torchrun's names
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))

# ----------------------------------------------------------------------------------------------
# 1. Acting as one
# ----------------------------------------------------------------------------------------------


def start(device):
    """Joins the other processes; device: "cpu" or "cuda"."""
    if PROCESSES == 1:
        return
    # Long, for a judge or a disk may be slow while the others wait.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                            timeout=timedelta(hours=6))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def stop():
    """Leaves the other processes. What FSDP has left in cycles holds threads of the process group;
    alive at the interpreter's end, they would now and then abort a run that has succeeded."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


def say(text):
    """Prints a line without breaking a progress bar; only one process speaks."""
    if PROCESS == 0:
        tqdm.write(text, file=sys.stdout)


def barrier():
    if PROCESSES > 1:
        dist.barrier()


def gather(value):
    """[the value of process 0, of process 1, ...], on every process."""
    if PROCESSES == 1:
        return [value]
    values = [None] * PROCESSES
    dist.all_gather_object(values, value)
    return values


def told(answer):
    """Process 0's answer, on every process: `told(path.exists())`. Were each to look by itself, a
    slow one might see what process 0 has just written, skip the phase, and hang the others."""
    answer = [answer]
    if PROCESSES > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def only_first(action, *args):
    """Process 0 acts, the others wait; an error of it is an error of all. Returns its result."""
    result = failure = None
    if PROCESS == 0:
        try:
            result = action(*args)
        except (ValueError, OSError) as error:
            failure = error
    failure = told(failure)
    if failure:
        raise failure
    return told(result)


# ----------------------------------------------------------------------------------------------
# 2. Weights: LoRA, FSDP2
# ----------------------------------------------------------------------------------------------


def add_lora(model, width):
    """LoRA (arXiv 2106.09685) of this width on every linear layer but the head; scale 2."""
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(
        r=width, lora_alpha=2 * width, target_modules="all-linear", task_type="CAUSAL_LM"))


def shard(policy, device="cpu"):
    """FSDP2 over all processes: each layer, then the rest (embedding, norm, head) as the root.

    The root is Policy, whose own forward reads the head's weight: it is whole exactly then.
    Trap: by default the root stays whole after a forward. After the reference pass, which has no
    backward, policy.parameters() would be the whole tensors, and an optimiser made of them would
    train copies that nobody reads. Hence reshard_after_forward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=policy.autocast_dtype, reduce_dtype=torch.float32)
    for layer in policy.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def all_finite(parameters):
    """Whether no weight is NaN or infinite, on any process."""
    with torch.no_grad():
        local = (p.to_local() if hasattr(p, "to_local") else p for p in parameters)
        return all(gather(all(bool(p.isfinite().all()) for p in local)))


# ----------------------------------------------------------------------------------------------
# 3. A checkpoint inside a training phase
# ----------------------------------------------------------------------------------------------


def save_checkpoint(folder, policy, optimizer, history):
    """Everything that training needs to go on after an update; replaces the folder's siblings.

    The folder appears whole. All processes call this together and each writes its own shards, as
    safetensors: nothing in a checkpoint can run code when it is read, as a pickle could. Any number
    of processes can read it. history: what the caller wants back, as JSON. Errors: OSError.
    """
    from torch.distributed import checkpoint
    folder, temporary, failure = Path(folder), Path(f"{folder}.tmp"), None
    only_first(shutil.rmtree, temporary, True)
    try:
        with warnings.catch_warnings(action="ignore"):  # it finds one process worth a warning
            checkpoint.save(_state(policy, optimizer), storage_writer=(
                checkpoint.HuggingFaceStorageWriter(str(temporary), save_distributed=True)))
    except (checkpoint.CheckpointException, OSError) as error:
        failure = _reason(error)
    failure = next(filter(None, gather(failure)), None)

    def finish():
        try:
            if failure:
                raise OSError(failure)
            sums = {}
            for file in sorted(temporary.iterdir()):
                safe_open(file, "pt")  # the writer may swallow an error: a cut file fails here
                sums[file.name] = checksum(file)
            (temporary / "history.json").write_text(json.dumps([sums, history]))
            for file in temporary.iterdir():
                flush(file)
            os.replace(temporary, folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)  # half of it may be what fills the disk
            raise OSError(f"no checkpoint could be written to {folder}: {error}") from None
        for path in set(folder.parent.iterdir()) - {folder}:
            shutil.rmtree(path, ignore_errors=True)
    only_first(finish)


def try_checkpoint(folder, policy, optimizer, history):
    """The same, where a failure is no reason to lose the training."""
    try:
        save_checkpoint(folder, policy, optimizer, history)
    except OSError as error:
        say(f"warning: {error}")


def load_checkpoint(folder, policy, optimizer):
    """Puts a checkpoint's state into policy and optimiser, in place -> its history.

    Errors: ValueError if it cannot be read.
    """
    from torch.distributed import checkpoint
    try:
        sums, history = json.loads((Path(folder) / "history.json").read_text())
        if any(checksum(Path(folder) / name) != value for name, value in sums.items()):
            raise ValueError("it is damaged")
        with warnings.catch_warnings(action="ignore"):
            checkpoint.load(_state(policy, optimizer), storage_reader=(
                checkpoint.HuggingFaceStorageReader(str(folder))))
    except (checkpoint.CheckpointException, OSError, ValueError) as error:
        raise ValueError(f"the checkpoint {folder} cannot be read ({_reason(error)}); delete it to "
                         "repeat this iteration's training") from None
    return history


def newest_checkpoint(folder):
    """The last whole one, or None; the same answer on all processes."""
    return told(max(Path(folder).glob("*[0-9]"), default=None))


def _state(policy, optimizer):
    """The trained weights and AdamW's moments (zeros before its first update), by name. Named
    parameters, and not a state dict: that names a tied weight twice, and frozen ones too."""
    flat = {}
    for name, weight in policy.named_parameters():
        if weight.requires_grad:
            moments = optimizer.state[weight]
            if not moments:
                moments["step"] = torch.zeros((), device=weight.device)
                moments |= {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
            flat |= {name: weight.detach(), **{f"{name}.{key}": moments[key] for key in moments}}
    return flat


def checksum(path):
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path):
    """Waits until a written file is on the disk itself."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _reason(error):
    """The first line of what happened, also inside a CheckpointException; a Ctrl-C is raised."""
    for reason, _ in getattr(error, "failures", {}).values():
        if not isinstance(reason, Exception):
            raise reason from None
        error = reason
    return (str(error) or repr(error)).splitlines()[0]
