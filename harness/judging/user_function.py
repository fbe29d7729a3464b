"""A judge of the user's: a function of a Python file, which leaves the process unchanged.

The file may change what the whole process shares: torch's default dtype, an autocast, a seed, the
working directory, ... The run must not be affected: its log-probs would change silently. But what
the file sets when it is imported (a key in os.environ, a seed) must still be set when the function
is called. So the run and the judge have a state each, and `UserFunction.room` swaps them. STATE
lists what belongs to it.

Test: pytest tests/test_judges.py.
"""

import contextlib
import os
import pickle
import random
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import backends
from torch.utils import _device

from harness.inputs.files import check_no_pointer
from harness.runs.output_files import printable

PROMPTS_A_CALL = 64
END = object()


class UserFunction:
    """The function `name` of the Python file `path`, run in a room of its own.

    In the room, `import` looks first in the file's folder, also for a data.py or a model.py, which
    are names of our files too. After it, everything in STATE is as before.
    """

    def __init__(self, path, name):
        self.path = Path(path).resolve()
        if not self.path.is_file():
            raise ValueError(f"no file {path}")
        check_no_pointer(self.path)
        folder, self.names = self.path.parent, {self.path.stem}  # what `import` finds here
        if not any(Path(place).resolve() == folder for place in sys.path):  # else we use it, too
            self.names |= {file.stem for file in folder.glob("*.py")}
            self.names |= {file.parent.name for file in folder.glob("*/__init__.py")}
        # It is in sys.modules under its own name, so that dataclasses and pickle find its classes.
        module = types.ModuleType(self.path.stem)
        module.__file__ = str(self.path)
        self.modules = {module.__name__: module}
        self.state = {"sys.path": [str(folder), *sys.path]}  # where the judge's differs
        try:
            with self.room():  # compiled here, because a .pyc of the same second may be outdated
                exec(compile(self.path.read_bytes(), str(self.path), "exec"), vars(module))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ValueError(f"importing {path} failed, {explain(error, self.path)}") from error
        self.function = getattr(module, name, None)
        if not callable(self.function):
            raise ValueError(f"{path} has no function {name}")
        self.prompts_a_call = getattr(self.function, "prompts_a_call", PROMPTS_A_CALL)
        if type(self.prompts_a_call) is not int or self.prompts_a_call < 1:
            raise ValueError(f"{name}.prompts_a_call is {self.prompts_a_call!r:.80}; it must be a "
                             "whole number, at least 1")
        self.try_first = bool(getattr(self.function, "try_first", True))

    def __call__(self, prompts, candidates):
        with self.room():
            scores = self.function(prompts, candidates)
        return self._each(scores) if isinstance(scores, Iterator) else scores

    def _each(self, scores):
        """A generator's code runs when its next row is requested, so that is in the room, too."""
        while True:
            with self.room():
                row = next(scores, END)
            if row is END:
                return
            yield row

    @contextlib.contextmanager
    def room(self):
        own = lambda: [name for name in sys.modules if name.partition(".")[0] in self.names]
        hidden = {name: sys.modules.pop(name) for name in own()}
        sys.modules.update(self.modules)
        ours = read_state()
        try:
            # The end of these two restores the run's modes, even if the judge has entered others.
            with torch.inference_mode(False), torch.enable_grad():
                write_state(self.state)
                entered = ours | self.state
                try:
                    yield
                finally:
                    self.state |= {name: value for name, value in read_state().items()
                                   if value != entered[name]}
        finally:
            write_state(ours)
            self.modules = {name: sys.modules.pop(name) for name in own()}
            sys.modules.update(hidden)


def one_line(text):
    """Any text as one line that steers no terminal."""
    return " ".join(printable(str(text)).split())


def explain(error, file=None):
    """An exception as text, with the line of the user's `file` where it was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(file)]
    where = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
    text = "".join(traceback.format_exception_only(error)).removeprefix("ValueError: ").strip()
    return f"{text:.500}{where}"


# ----------------------------------------------------------------------------------------------
# What the whole process shares
# ----------------------------------------------------------------------------------------------


def read_state():
    return {name: read() for name, (read, _) in STATE.items()}


def write_state(wanted):
    """Writes only what differs, because a write may have side effects. Reads each value again just
    before, because one setting of torch's can change another."""
    for name, value in wanted.items():
        read, write = STATE[name]
        if read() != value:
            write(value)


def attribute(owner, name):
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def handler(number):
    return lambda: signal.getsignal(number), lambda value: (
        value is not None and signal.signal(number, value))  # None: set from C


def autocast(device):
    def write(value):
        torch.set_autocast_enabled(device, value[0])
        torch.set_autocast_dtype(device, value[1])
    return lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), write


def autocasts_entered():
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def leave_autocasts(depth):
    """Trap: only the end of the outermost autocast empties the cache of cast weights. If a judge
    left one open, the run would use the weights of an earlier update."""
    while autocasts_entered() > depth:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def default_device():
    """The default device, or None. `with torch.device(...)` sets one as well, which only the stack
    of modes shows."""
    stack = [torch._C._get_function_stack_at(i)
             for i in range(torch._C._len_torch_function_stack())]
    return next((m.device for m in reversed(stack) if isinstance(m, _device.DeviceContext)), None)


def set_default_device(device):
    modes = [torch._C._pop_torch_function_stack()
             for _ in range(torch._C._len_torch_function_stack())]
    for mode in reversed(modes):
        if not isinstance(mode, _device.DeviceContext):
            torch._C._push_on_torch_function_stack(mode)
    _device.CURRENT_DEVICE = torch._GLOBAL_DEVICE_CONTEXT.device_context = None
    if device is not None:
        torch.set_default_device(device)


def old_flag(read, write):
    """One of torch's older flags. It cannot be read (None here) while newer flags contradict it:
    the fp32_precision of each backend, which is in STATE as well."""
    def read_if_possible():
        try:
            return read()
        except RuntimeError:
            return None
    return read_if_possible, lambda value: value is not None and write(value)


def set_environment(wanted):
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update(wanted)


def set_warnings(filters):
    warnings.resetwarnings()  # also forgets which ones were shown
    warnings.filters.extend(filters)


def set_deterministic(value):
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


# name -> (read it, write it)
STATE = {
    "sys.path": (lambda: sys.path[:], lambda value: sys.path.__setitem__(slice(None), value)),
    "working directory": (os.getcwd, os.chdir),
    "environment": (lambda: dict(os.environ), set_environment),
    "stdin": attribute(sys, "stdin"),
    "stdout": attribute(sys, "stdout"),
    "stderr": attribute(sys, "stderr"),
    "warnings": (lambda: warnings.filters[:], set_warnings),
    "Ctrl-C": handler(signal.SIGINT),
    "SIGTERM": handler(signal.SIGTERM),
    "seed of random": (random.getstate, random.setstate),
    "seed of numpy": (lambda: pickle.dumps(numpy.random.get_state()),
                      lambda value: numpy.random.set_state(pickle.loads(value))),
    "seed of torch": (lambda: torch.get_rng_state().numpy().tobytes(), lambda value: (
        torch.set_rng_state(torch.frombuffer(bytearray(value), dtype=torch.uint8)))),
    "numpy's errors": (numpy.geterr, lambda value: numpy.seterr(**value)),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (default_device, set_default_device),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "anomaly mode": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "deterministic": (lambda: (torch.are_deterministic_algorithms_enabled(),
                               torch.is_deterministic_algorithms_warn_only_enabled()),
                      set_deterministic),
    "autocasts entered": (autocasts_entered, leave_autocasts),
    "autocast on the CPU": autocast("cpu"),
    "autocast on a GPU": autocast("cuda"),
    "autocast's cache": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "matmul precision": old_flag(torch.get_float32_matmul_precision,
                                 torch.set_float32_matmul_precision),
    "cudnn's TF32": old_flag(*attribute(backends.cudnn, "allow_tf32")),
} | {  # the general ones first: a backend's own may be a copy of them
    f"fp32 precision, {number}": attribute(owner, "fp32_precision") for number, owner in enumerate((
        backends, backends.cudnn, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
        backends.mkldnn, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn))
} | {
    f"sums in {kind}": attribute(
        backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction")
    for kind in ("fp16", "bf16")
} | {
    f"cudnn.{name}": attribute(backends.cudnn, name)
    for name in ("enabled", "benchmark", "deterministic")
} | {
    f"{kind} attention": (getattr(backends.cuda, f"{kind}_sdp_enabled"),
                          getattr(backends.cuda, f"enable_{kind}_sdp"))
    for kind in ("flash", "mem_efficient", "math", "cudnn")
}
