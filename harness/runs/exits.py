"""How a command ends: one line for an error that a user can fix, a traceback for a bug of ours.

Commands import this file before the slow libraries, so that Ctrl-C gives one line at any moment.
Exit codes: 0 done, 1 an error, 2 a wrong command line, 130 Ctrl-C, 141 the reader of the output has
closed it (`| head -1`), 143 SIGTERM (training finishes its update).
SELM_TRACEBACK=1 shows where a one-line error was raised.
"""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress

RESUMES = "the same command resumes after the last finished phase"
NO_SPACE = "free some space and run the same command again"
LEAVE_AFTER = 10  # seconds that a judge's thread has to end after all is done
OUT_OF_MEMORY = ("lower --tokens-per-forward (training) or --slots (sampling), or add "
                 "--gradient-checkpointing or --offload")


def one_line(error):
    """The first line of an error, without control characters: it may quote a user's file."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    # Validators write the reason into the next line.
    line = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
    return "".join(character for character in line if character.isprintable())


def out_of_memory(error):
    """Whether the error means too little memory. On a CPU torch raises a RuntimeError for that."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in (
        "out of memory", "outofmemory", "can't allocate memory"))


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that files are closed and unfinished ones removed. Its text, if
    it has one, says where the same command resumes."""


def _terminate(number, frame):
    raise Terminated


@contextmanager
def sigterm_waits():
    """In this context the first SIGTERM is only added to the list that the context yields. A second
    one raises Terminated at once. After a first one, so does the end of the context."""
    asked = []

    def wait(number, frame):
        asked.append(number)
        signal.signal(signal.SIGTERM, _terminate)
    before = signal.signal(signal.SIGTERM, wait)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked:  # it came after the last look at the list
        raise Terminated


def before(module, hint=RESUMES):
    """For the first line of a command: until `run` is called, Ctrl-C and SIGTERM end it at once.
    module: the command's __name__; if it is only imported, nothing is done. hint: see `run`."""
    def leave(number, frame):
        """Raises no exception: a library that is being imported might catch it."""
        if os.environ.get("RANK", "0") == "0":  # only the first of several processes prints
            print(f"\nstopped; {hint}", file=sys.stderr, flush=True)
        os._exit(128 + number)
    if module == "__main__":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, leave)


def run(main, hint=RESUMES):
    """Calls main(), and exits with the code and the line for what happened.

    hint: what Ctrl-C prints after "stopped; ". A command with another hint has no phases.
    Trap: a job in the background of a script inherits an ignored Ctrl-C, so the handler is set.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    kept = ". Finished phases are kept" if hint == RESUMES else ""
    print_anything()
    try:
        code, failure = main(), flush_output()
        if failure and not isinstance(failure, BrokenPipeError):  # else only the reader is gone
            raise failure
        sys.exit(code)
    except BrokenPipeError as error:  # standard output, or another pipe?
        sys.exit(141 if flush_output("\n") else f"error: {one_line(error)}")
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("SELM_TRACEBACK"):
            raise
        hint = f"{kept}: {NO_SPACE}" if "No space left" in str(error) else ""
        sys.exit(f"error: {one_line(error)}{hint}")
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{'terminated' if terminated else 'stopped'}; {str(stop) or hint}",
                  file=sys.stderr)
        sys.exit(143 if terminated else 130)
    except Exception as error:
        if out_of_memory(error):
            sys.exit(f"error: {one_line(error)}" + (f"{kept}: {OUT_OF_MEMORY}" if kept else
                                                    "; do less at a time (--help says how)"))
        print(f"error: a bug of this program, not of your files; the traceback follows{kept}.",
              file=sys.stderr)
        raise
    finally:
        flush_output()
        wait_for_no_thread(getattr(sys.exc_info()[1], "code", 1))


def print_anything():
    """Lets every character be printed: one that the terminal's encoding lacks becomes its number
    (\\xe9). Otherwise a report or an answer would be lost."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (`>&-`), but libraries write to it
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # the code that reads it checks it


def flush_output(end=""):
    """Prints `end` and what is still in the buffer -> None, or the OSError. After an OSError the
    output is discarded; otherwise Python would print another error when it exits."""
    try:
        print(end=end, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return error


def wait_for_no_thread(code):
    """Python's exit waits for all threads but daemons, and a judge's thread may never end. So this
    starts a daemon that ends the process. code: of SystemExit; a text means an error."""
    def watch():
        time.sleep(LEAVE_AFTER)
        left = [thread.name for thread in threading.enumerate()
                if not thread.daemon and thread is not threading.main_thread()]
        if left and not threading.main_thread().is_alive():
            print(f"exited without waiting for a thread that does not end: {one_line(left[0])}",
                  file=sys.stderr)
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code if isinstance(code, int) else 0 if code is None else 1)
    threading.Thread(target=watch, daemon=True).start()
