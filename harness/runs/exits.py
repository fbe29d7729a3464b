"""How a command ends: one clear line for what a user can mend, a traceback for what we must.

Commands import it before anything slow: Ctrl-C is one line at any moment. Exit codes: 0 done, 1 an
error, 2 a wrong command line, 130 Ctrl-C, 141 stopped because nobody reads what it prints (`| head
-1`), 143 SIGTERM (training finishes its update).
SELM_TRACEBACK=1 shows where a one-line error arose.
"""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress

GOES_ON = "the same command goes on after the last finished phase"
NO_SPACE = "free some space and run the same command again"
LEAVE_AFTER = 10  # seconds, which a judge's thread has to end when all is done
OUT_OF_MEMORY = ("lower --tokens-per-forward (training) or --slots (sampling), or add "
                 "--gradient-checkpointing or --offload")


def one_line(error):
    """Without control characters: an error may quote a stranger's file, and steer no terminal."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    # Validators put the reason into the next line.
    line = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
    return "".join(character for character in line if character.isprintable())


def out_of_memory(error):
    """Whether it says that memory is short: torch's allocator on a CPU raises a RuntimeError."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in (
        "out of memory", "outofmemory", "can't allocate memory"))


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: files are closed and half-written ones removed on the way out.
    Its text, if it has one, says from where the same command goes on."""


def _terminate(number, frame):
    raise Terminated


@contextmanager
def sigterm_waits():
    """Within it the first SIGTERM waits for a good moment: it fills the list that is handed out. A
    second one, or the end of the block, is the end."""
    asked = []

    def wait(number, frame):
        asked.append(number)
        signal.signal(signal.SIGTERM, _terminate)
    before = signal.signal(signal.SIGTERM, wait)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked:  # it came behind the last good moment
        raise Terminated


def before(module, goes_on=GOES_ON):
    """For the first line of a command: until `run` takes over, Ctrl-C and SIGTERM end it at once.
    module: its __name__; nothing is done where it is only imported."""
    def leave(number, frame):
        """While libraries load there is nothing to close; they make exceptions their own."""
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(f"\nstopped; {goes_on}", file=sys.stderr, flush=True)
        os._exit(128 + number)
    if module == "__main__":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, leave)


def run(main, goes_on=GOES_ON):
    """main(), and an end that fits what happened. SELM_TRACEBACK=1 shows where an error arose.
    goes_on: what Ctrl-C says after "stopped; "; a command that has another has no phases.
    Trap: a job started in the background of a script inherits an ignored Ctrl-C, so it is set."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    kept = ". Finished phases are kept" if goes_on == GOES_ON else ""
    print_anything()
    try:
        code, failure = main(), flush_output()
        if failure and not isinstance(failure, BrokenPipeError):  # all is done, whoever reads it
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
            print(f"\n{'terminated' if terminated else 'stopped'}; {str(stop) or goes_on}",
                  file=sys.stderr)
        sys.exit(143 if terminated else 130)
    except Exception as error:
        if out_of_memory(error):
            sys.exit(f"error: {one_line(error)}" + (f"{kept}: {OUT_OF_MEMORY}" if kept else
                                                    "; do less at a time (--help says how)"))
        print(f"error: a bug of this program, not of your files; what follows says where{kept}.",
              file=sys.stderr)
        raise
    finally:
        flush_output()
        wait_for_no_thread(getattr(sys.exc_info()[1], "code", 1))


def print_anything():
    """No character fails to be printed: one that the terminal's encoding lacks becomes its number
    (\\xe9), for a report or an answer must not be lost over it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (`>&-`), but libraries write to it
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # whoever reads it says what is wrong


def flush_output(end=""):
    """Prints `end` and what is still in the buffer -> None, or the OSError. After one the output
    goes nowhere, or Python would complain once more when it exits."""
    try:
        print(end=end, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return error


def wait_for_no_thread(code):
    """Python waits at its end for every thread that is no daemon: a judge's may never end. This
    watches from a thread that is one, and leaves. code: of SystemExit; a text was an error."""
    def watch():
        time.sleep(LEAVE_AFTER)
        left = [thread.name for thread in threading.enumerate()
                if not thread.daemon and thread is not threading.main_thread()]
        if left and not threading.main_thread().is_alive():
            print(f"left without waiting for a thread that does not end: {one_line(left[0])}",
                  file=sys.stderr)
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code if isinstance(code, int) else 0 if code is None else 1)
    threading.Thread(target=watch, daemon=True).start()
