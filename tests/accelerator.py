"""An accelerator that is none: it computes on the CPU, but PyTorch takes it for another device.

    python tests/accelerator.py '[["--model", ...], ...]'     train_loop.py on that device, once for
                                                              each list of arguments

A tensor of it and one of the CPU cannot be added or joined, nor one of the CPU be indexed by it, as
with a GPU; `torch.arange(n)` without its device, or weights that were left behind, are errors
here too. `is_cuda` says yes, so that selm.py takes its way with `out_dtype`. What it is not:
fast, asynchronous (a copy that nobody waits for), or of other numbers than the CPU's.

How: torch's slot for devices of strangers ("privateuseone", here "gpu") with no kernels but the few
that make a tensor. An operation on its tensors arrives in `run`, which does it on the CPU tensors
inside. Autograd, autocast and FSDP2 see a device like any other.
"""

import json
import sys
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_init, _fsdp_param, _fsdp_param_group
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

# inference_mode's tensors cannot be wrapped, so it must not decorate the judges.
with mock.patch.object(torch, "inference_mode", torch.no_grad):
    import model as policies
    import train_loop
    from harness.models import distributed, weights
    from harness.runs import settings

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # may have tensors of two devices
STRICT = {aten.cat.default, aten.stack.default, aten.index_select.default, aten.gather.default,
          aten.take.default, aten.embedding.default}  # take no CPU tensor, be it a mere number
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
WIDE = {aten.mm.dtype, aten.mm.dtype_out}  # mm with an output wider than its inputs
used = set()  # the operations that this process has done on the device


class Accelerated(torch.Tensor):
    """A tensor of the device: `inner` is the CPU's that holds its numbers."""
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="gpu:0")
        tensor.inner = inner
        memory.take(inner)
        return tensor

    def tolist(self):
        return self.detach().inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented if foreign(types) else run(function, args, kwargs or {})


class Memory:
    """Bytes of the device: `now`, and at the `peak`. FSDP2 empties storages and fills them again;
    theirs are only counted so, for here the numbers would be gone with them."""

    def __init__(self):
        self.now, self.peak, self.sizes = 0, 0, {}

    def take(self, tensor):
        storage = inner(tensor).untyped_storage()  # a view has its base's
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self._set, storage._cdata, None)
        if not self.sizes.get(storage._cdata):
            self._set(storage._cdata, storage.nbytes())

    def free(self, tensor):
        self._set(inner(tensor).untyped_storage()._cdata, 0)

    def _set(self, key, size):
        self.now += (size or 0) - (self.sizes.pop(key, 0) or 0)
        self.peak = max(self.peak, self.now)
        if size is not None:
            self.sizes[key] = size


memory = Memory()


class Factories(TorchDispatchMode):
    """Catches what makes tensors on the device from none: torch.zeros(3, device="gpu")."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        ours = Accelerated in types or device is not None and torch.device(device).type == "gpu"
        if ours and not foreign(types):
            return run(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def foreign(types):
    """Whether other subclasses (DTensor) take part, which take themselves apart first."""
    return not set(types) <= {Accelerated, torch.Tensor, torch.nn.Parameter}


def run(function, args, kwargs):
    """Does an operation on the CPU. RuntimeError where a GPU would have refused it."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, Accelerated)]
    # Numbers (0-d) are welcome nearly everywhere, and a GPU's tensor may be indexed by the CPU's.
    must_agree = tree_leaves([args[0], *args[2:]]) if function in INDEXING else tensors
    strangers = [x for x in must_agree if isinstance(x, torch.Tensor)
                 and not isinstance(x, Accelerated) and (x.dim() or function in STRICT)]
    if ours and strangers and function not in COPIES:
        raise RuntimeError(f"{function}: tensors on two devices")
    on_device = bool(ours)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == "gpu"
        kwargs = kwargs | {"device": torch.device("cpu")}
    used.add(function)
    args, kwargs = tree_map(inner, (args, kwargs))
    results = (wide_product if function in WIDE else function)(*args, **kwargs)
    known = {id(x): x for x in tensors} | {id(x.inner): x for x in ours}  # in place, or out=

    def wrapped(x):
        if id(x) in known or not isinstance(x, torch.Tensor):
            return known.get(id(x), x)
        return Accelerated(x) if on_device else x
    return tree_map(wrapped, results)


def inner(x):
    return x.inner if isinstance(x, Accelerated) else x


def wide_product(a, b, out_dtype, out=None):
    """torch.mm(a, b, out_dtype=...), which the CPU does not have, with the checks of CUDA's."""
    assert a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16), (a.dtype, b.dtype)
    assert out_dtype == torch.float32 and (out is None or out.dtype == torch.float32)
    return torch.mm(a.float(), b.float(), out=out)


class Device(backend_registration._DummyBackendModule):
    """What torch and FSDP2 ask a device's module for; with one stream, nothing has to wait."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def stream(self, _):
        return nullcontext()

    def __getattr__(self, name):
        return lambda *args, **more: mock.MagicMock()


def register():
    """Makes the device known to torch, in all of this process and for good."""
    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=Device())
    rest, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    def empty(size, dtype=None, memory_format=None, **_):
        return Accelerated(torch.empty(size, dtype=dtype))

    def empty_strided(size, stride, dtype=None, **_):
        return Accelerated(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        target.inner.copy_(inner(source))
        return target
    # torch.tensor([1, 2], device=...) passes modes by, and ends at these.
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for name in ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"):
        library.impl(name, autocast(getattr(aten, name).default), "AutocastPrivateUse1")
    return rest, library  # they live as long as somebody holds them


def autocast(operation):
    """The operation on inputs of autocast's dtype, as CUDA's autocast does it."""
    def cast(x):
        real = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype("gpu")) if real else x

    def lower(*args, **kwargs):
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = tree_map(cast, (args, kwargs))
            return operation(*args, **kwargs)
    return lower


def move(parameters, buffers, device):
    """FSDP2's way of moving a module to its device sets `.data`, which a subclass refuses."""
    for tensor in (*parameters, *buffers):
        if tensor.device.type != "gpu" and not hasattr(tensor, "placements"):
            moved = Accelerated(tensor.detach().clone())
            if isinstance(tensor, torch.nn.Parameter):
                moved = torch.nn.Parameter(moved, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, moved)


@contextmanager
def pretended():
    """Within it, --device is the pretended one, whatever the flags say."""
    held, read, kernels = register(), settings.read, policies.Policy.kernels
    write = weights._write_policy
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # model.to("gpu")

    def plain_bias(*size):  # a subclass of its own, which no mode may make
        with _disable_current_modes():
            return kernels.causal_bias(*size)

    def write_from_cpu(model, state, *more):  # safetensors would look for the memory itself
        return write(model, {name: value.to("cpu") for name, value in state.items()}, *more)
    with ExitStack() as stack:
        for owner, name, stand_in in (
                (settings, "read", lambda argv: replace(read(argv), device="gpu")),
                (train_loop.command, "finish", lambda *_: None),  # figures need no accelerator
                (policies.Policy, "kernels", kernels._replace(causal_bias=plain_bias)),
                (weights, "_write_policy", write_from_cpu),
                (distributed, "_backend", lambda device: "cpu:gloo,gpu:gloo"),
                (_fsdp_init, "_move_states_to_device", move),
                (_fsdp_param, "free_storage", memory.free),
                (_fsdp_param, "alloc_storage", memory.take),
                (_fsdp_param_group, "alloc_storage", memory.take)):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(Factories())
        yield
    del held


if __name__ == "__main__":
    with pretended():
        for arguments in json.loads(sys.argv[1]):
            train_loop.main(arguments)
    print(f"{len(used)} operations, {len(used & WIDE)} of them wide products", file=sys.stderr)
