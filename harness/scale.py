"""Processes: who am I among them, barrier, gather, broadcast; FSDP2, LoRA and checkpoints."""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    if RANK == 0:
        tqdm.write(text, file=sys.stdout)


def barrier():
    if WORLD > 1:
        dist.barrier()


def gather(rows):
    """Each process holds rows[RANK::WORLD] of a list; all get the whole list, in its order."""
    if WORLD == 1:
        return rows
    shares = [None] * WORLD
    dist.all_gather_object(shares, rows)
    return [shares[i % WORLD][i // WORLD] for i in range(sum(map(len, shares)))]


def missing(path):
    """Whether `path` is still to be made: rank 0 looks, all ranks agree. Were each to look by
    itself, a slow one might see what rank 0 has just written, skip the phase, and hang the rest."""
    answer = [not Path(path).exists()]
    if WORLD > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def add_lora(model, rank):
    """LoRA (arXiv 2106.09685) on every linear layer but the head; scale alpha / rank = 2."""
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def shard(policy, device="cpu"):
    """FSDP2 over all processes: each layer, then the rest (embedding, norm, head) as the root.

    The root is Policy, whose own forward reads the head's weight: it is whole exactly then.
    Trap: by default the root stays whole after a forward. After the reference pass, which has no
    backward, policy.parameters() would be the whole tensors, and an optimiser made of them would
    train copies that nobody reads. Hence reshard_after_forward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=policy.autocast_dtype, reduce_dtype=torch.float32)
    for layer in policy.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def save_checkpoint(folder, policy, optimizer, history):
    """Everything that training needs to go on after an update; replaces the folder's siblings.

    The folder appears whole. All processes call this together and each writes its own shards; any
    number of processes can read them. history: what the caller wants back, as JSON. Errors:
    OSError, on all processes alike.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict
    several, folder, temporary = torch.distributed.is_initialized(), Path(folder), f"{folder}.tmp"
    weights, moments = get_state_dict(policy, optimizer)
    state = {"policy": weights, "optimizer": moments, "history": json.dumps(history)}
    failure = None
    with warnings.catch_warnings(action="ignore"):  # it finds a single process worth a warning
        try:
            checkpoint.save(state, checkpoint_id=temporary)
        except checkpoint.CheckpointException as error:  # on all processes, if on one
            failure = _first_failure(error)
    if not several or torch.distributed.get_rank() == 0:
        try:
            if not failure:
                os.replace(temporary, folder)
        except OSError as error:
            failure = str(error)
        useless = [temporary] if failure else set(folder.parent.iterdir()) - {folder}
        for path in useless:  # half a checkpoint may be what fills the disk
            shutil.rmtree(path, ignore_errors=True)
    failure = [failure]
    if several:
        torch.distributed.broadcast_object_list(failure)
    if failure[0]:
        raise OSError(f"no checkpoint could be written to {folder}: {failure[0]}")


def _first_failure(error):
    """The reason inside a CheckpointException, as text; a Ctrl-C in it is raised again."""
    reason = next(iter(error.failures.values()))[0]
    if not isinstance(reason, Exception):
        raise reason from None
    return str(reason)


def load_checkpoint(folder, policy, optimizer):
    """Puts a checkpoint's state into policy and optimiser, in place -> its history.

    Errors: ValueError if it cannot be read.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    weights, moments = get_state_dict(policy, optimizer)
    state = {"policy": weights, "optimizer": moments, "history": ""}
    with warnings.catch_warnings(action="ignore"):
        try:
            checkpoint.load(state, checkpoint_id=folder)
        except checkpoint.CheckpointException as error:
            raise ValueError(f"the checkpoint {folder} cannot be read ({_first_failure(error)}); "
                             "delete it to repeat this iteration's training") from None
    set_state_dict(policy, optimizer, model_state_dict=state["policy"],
                   optim_state_dict=state["optimizer"])
    return json.loads(state["history"])
