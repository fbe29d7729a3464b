"""Many processes that act as one: broadcast, gather, agree; FSDP2, LoRA, checkpoints.

torchrun starts PROCESSES copies of the command. Each one works on its share of every list,
`items[PROCESS::PROCESSES]`. A question that decides what happens next (does a file exist? is a
number finite?) must have one answer for all processes. Otherwise one process continues and the
others wait for it for ever. With a single process every function here returns at once.

Imports no other file of the project: callers pass in what is sharded or saved.
Test: pytest tests/test_distributed.py.
"""

import ctypes
import gc
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm


def _whole_number(name, default, least):
    """A number that torchrun has set in the environment. Anything else ends the command with one
    line and exit code 1: it is read while modules load, where nothing catches an error yet."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,6}", text, re.ASCII) or int(text) < least:
        sys.exit(f"error: the environment variable {name} is {text!r}; torchrun sets it to a whole "
                 f"number, at least {least}. Without torchrun, unset it")
    return int(text)


PROCESSES = _whole_number("WORLD_SIZE", 1, 1)
PROCESS = _whole_number("RANK", 0, 0)
if PROCESS >= PROCESSES:
    sys.exit(f"error: the environment variable RANK is {PROCESS}, and WORLD_SIZE {PROCESSES}: RANK "
             "must be below it. Without torchrun, unset both")
COMING = timedelta(minutes=5)  # for all processes to join
PATIENCE = timedelta(hours=6)  # afterwards: a judge or a disk may be slow while the others wait
FILE = 2**30  # bytes of a checkpoint's file, about

# ----------------------------------------------------------------------------------------------
# 1. Acting as one
# ----------------------------------------------------------------------------------------------


def start(device):
    """Joins the other processes; device: "cpu" or "cuda". ValueError if one does not join."""
    if PROCESSES == 1:
        return
    with suppress(AttributeError, OSError):  # Linux only: PR_SET_PDEATHSIG
        # A launcher that is killed could not tell its processes: they would wait for ever.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    dist.init_process_group(_backend(device), store=_meet(), rank=PROCESS, world_size=PROCESSES,
                            timeout=PATIENCE)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _meet():
    """torchrun's store, after all processes have connected to it. init_process_group alone would
    wait for a process that never comes as long as for a slow judge."""
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=COMING))
        store.set(f"process {PROCESS}", "is here")
        store.wait([f"process {p}" for p in range(PROCESSES)], COMING)
    except dist.DistError as error:
        raise ValueError(f"process {PROCESS} waited {COMING} for the other {PROCESSES - 1}, and "
                         f"not all came ({_reason(error)})") from None
    return store


def _backend(device):
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def stop():
    """Leaves the other processes. FSDP leaves objects in cycles that hold threads of the process
    group. If these threads lived until the interpreter ends, they could abort a run that has
    succeeded."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


def say(text):
    """Process 0 prints a line, without breaking a progress bar."""
    if PROCESS == 0:
        tqdm.write(text, file=sys.stdout)


def gather(value):
    """[the value of process 0, of process 1, ...], on every process."""
    if PROCESSES == 1:
        return [value]
    values = [None] * PROCESSES
    dist.all_gather_object(values, value)
    return values


def broadcast(answer):
    """Process 0's answer, on every process: `broadcast(path.exists())`. If each process looked for
    itself, a slow one might see what process 0 has just written, skip the phase, and leave the
    others waiting."""
    answer = [answer]
    if PROCESSES > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def raise_everywhere(failure):
    """An error of one process (None: it has none) is raised by all, so that none waits for it."""
    failures = [error for error in gather(failure) if error]
    if failures:
        raise failure or failures[0]


def only_first(action, *args):
    """Process 0 calls action(*args), the others wait. All return its result, or raise its error."""
    result = failure = None
    if PROCESS == 0:
        try:
            result = action(*args)
        except (ValueError, OSError) as error:
            failure = error
    failure = broadcast(failure)
    if failure:
        raise failure
    return broadcast(result)


# ----------------------------------------------------------------------------------------------
# 2. Weights: LoRA, FSDP2
# ----------------------------------------------------------------------------------------------


def add_lora(model, width):
    """LoRA (arXiv 2106.09685) of this width on every linear layer but the head; scale 2."""
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(
        r=width, lora_alpha=2 * width, target_modules="all-linear", task_type="CAUSAL_LM"))


def shard(policy, device="cpu", offload=False):
    """FSDP2 over all processes: each layer, then the rest (embedding, norm, head) as the root. The
    weights are process 0's; what the others have is never read. In place; returns the policy.

    The root is Policy, whose own forward reads the head's weight: it is whole exactly then.

    offload: fp32 master weights and AdamW's moments live in host memory, where torch's fused AdamW
    updates them; the device holds weights in the compute dtype, and the gradient. With one process
    both stay there from the first micro-batch of an update to the last (`last_micro_batch`), and
    once an update the gradient, summed in fp32, goes to the host, and new weights come back.
    Why not plainly train bf16 weights: at lr 5e-7 a step is about 5e-5 of a weight, and bf16 rounds
    away whatever is less than 4e-3 of it (tests/test_processes.py has both). torchao's
    CPUOffloadOptimizer, looked at first, does just that: its host copy has the device's dtype, and
    it takes the gradient away before it could be clipped or summed. FSDP2's policy keeps masters,
    sums and clips, and one process with it computes bit for bit what plain training does.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_tensor
    from torch.distributed import fsdp
    if not dist.is_initialized():  # FSDP wants a group, be it of one
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy.device, policy.stays_whole = torch.device(device), offload and mesh.size() == 1
    options = dict(
        mesh=mesh, reshard_after_forward=not policy.stays_whole,
        mp_policy=fsdp.MixedPrecisionPolicy(policy.autocast_dtype, reduce_dtype=torch.float32),
        offload_policy=(fsdp.CPUOffloadPolicy(pin_memory=device == "cuda") if offload
                        else fsdp.OffloadPolicy()))
    for buffer in policy.buffers() if mesh.size() > 1 else ():
        dist.broadcast(buffer, 0)
    for module in (*policy.layers, policy):
        whole = {name: weight.detach() for name, weight in module.named_parameters()
                 if mesh.size() > 1 and not isinstance(weight, DTensor)}
        fsdp.fully_shard(module, **options)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                if name in whole:  # process 0's, each process its slice
                    part = distribute_tensor(whole.pop(name), mesh, weight.placements)
                    weight.to_local().copy_(part.to_local())
    return policy


def trained(policy):
    """The parameters to train. Trap: FSDP's weights may still be whole after the reference pass,
    which has no backward; an optimiser made of those would train copies that nobody reads."""
    for module in policy.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def last_micro_batch(policy, last):
    """Before each micro-batch of an update: is it the last? Until then --offload on one process
    leaves weights and gradient on the device."""
    if getattr(policy, "stays_whole", False):
        policy.set_requires_gradient_sync(last)
        policy.set_reshard_after_backward(last)


def all_finite(parameters):
    """Whether no weight is NaN or infinite, on any process."""
    with torch.no_grad():
        local = (p.to_local() if hasattr(p, "to_local") else p for p in parameters)
        return all(gather(all(bool(p.isfinite().all()) for p in local)))


# ----------------------------------------------------------------------------------------------
# 3. A checkpoint inside a training phase
# ----------------------------------------------------------------------------------------------


def save_checkpoint(folder, policy, optimizer, history):
    """Saves what training needs to resume after an update; replaces the folder's siblings.

    The folder appears whole. All processes call this together, and each writes its own shards as
    safetensors: unlike a pickle, these can run no code when they are loaded. Any number of
    processes can load them. history: what the caller wants back, as JSON. Errors: OSError.
    """
    from torch.distributed import checkpoint
    folder, temporary, failure = Path(folder), Path(f"{folder}.tmp"), None
    only_first(shutil.rmtree, temporary, True)
    state = _state(policy, optimizer)
    # The writer makes all bytes of a file before it writes them, so that one file would take as
    # much memory as the whole checkpoint.
    sizes = itertools.accumulate(value.numel() * value.element_size() for value in state.values())
    files = {name: 1 + size // FILE for name, size in zip(state, sizes)}
    try:
        with warnings.catch_warnings(action="ignore"):  # it finds one process worth a warning
            checkpoint.save(state, storage_writer=checkpoint.HuggingFaceStorageWriter(
                str(temporary), files, save_distributed=True))
    except (checkpoint.CheckpointException, OSError) as error:
        failure = _reason(error)
    failure = next(filter(None, gather(failure)), None)

    def finish():
        try:
            if failure:
                raise OSError(failure)
            for file in temporary.iterdir():
                safe_open(file, "pt")  # the writer may swallow an error: a cut file fails here
            sums = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
            whole = seal({"files": sums, "history": history})
            (temporary / "history.json").write_text(json.dumps(whole))
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
    """The same, but an error is only a warning: the training continues without a checkpoint."""
    try:
        save_checkpoint(folder, policy, optimizer, history)
    except OSError as error:
        say(f"warning: {error}")


def load_checkpoint(folder, policy, optimizer):
    """Loads a checkpoint into policy and optimiser, in place -> its history. ValueError if it
    cannot be read."""
    from torch.distributed import checkpoint
    try:
        saved = unseal((Path(folder) / "history.json").read_bytes())
        if any(checksum(Path(folder) / name) != value for name, value in saved["files"].items()):
            raise ValueError("it is damaged")
        with warnings.catch_warnings(action="ignore"):
            checkpoint.load(_state(policy, optimizer), storage_reader=(
                checkpoint.HuggingFaceStorageReader(str(folder))))
    except (checkpoint.CheckpointException, OSError, ValueError) as error:
        raise ValueError(f"the checkpoint {folder} cannot be read ({_reason(error)}); delete it to "
                         "repeat this iteration's training") from None
    return saved["history"]


def newest_checkpoint(folder):
    """The last one, or None; the same answer on all processes."""
    return broadcast(max(Path(folder).glob("*[0-9]"), default=None))


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


def seal(row):
    """A JSON object with its own digest as its last entry, "check"."""
    return {**row, "check": _digest(row)}


def unseal(line):
    """The object of a line (str or bytes) that `seal` made, without its digest. ValueError where
    one bit has changed."""
    try:
        row = json.loads(line)
        if row.pop("check") == _digest(row):
            return row
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise ValueError("it is damaged")


def _digest(row):
    return hashlib.sha256(json.dumps([row], sort_keys=True).encode()).hexdigest()[:24]


def flush(path):
    """Waits until a written file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _reason(error):
    """The first line of what happened, also inside a CheckpointException; a Ctrl-C is raised."""
    for reason, _ in getattr(error, "failures", {}).values():
        if not isinstance(reason, Exception):
            raise reason from None
        error = reason
    return (str(error) or repr(error)).splitlines()[0]
