"""Runs code that a model wrote: in a process of its own, with little time and memory, without network or other programs.

Decisions: it protects against mistakes of small models (endless loops, memory, files left behind, `input()`), not against an
attacker. CPU seconds, address space and file size are limited by the kernel. An audit hook rejects everything that reaches out:
sockets, other processes, changes to files. Where the system allows it (Linux), the process also has an empty network namespace.
Modules that such code usually imports are loaded before the hook is set.
"""

import functools
import shutil
import subprocess
import sys
import tempfile


SECONDS, MEGABYTES = 5, 512
_GUARD = """
import sys
import bisect, collections, copy, cmath, datetime, decimal, fractions, functools, heapq, itertools, math, operator
import queue, random, re, statistics, string, typing
try:
    import resource
    for kind, most in (("RLIMIT_CPU", {seconds}), ("RLIMIT_AS", {megabytes} << 20), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        resource.setrlimit(getattr(resource, kind), (most, most))
except (ImportError, ValueError, OSError):
    pass  # no such limit on this system: the parent's clock remains
refused = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "pty.", "signal.", "webbrowser.", "urllib.", "ftplib.", "http.")
allowed = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
def hook(event, args):
    writes = event == "open" and (args[1] is None or set(str(args[1])) & set("wxa+"))
    if writes or (event.startswith(refused) and event not in allowed):
        raise PermissionError(event + " is refused")
source = sys.stdin.read()
sys.addaudithook(hook)
exec(compile(source, "answer", "exec"), {{"__name__": "__main__"}})
print({token!r}, flush=True)
"""


@functools.cache
def _without_network() -> tuple[str, ...]:
    """A command prefix that removes the network, if this system supports it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-root-user", "--net")
    done = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if done.returncode == 0 else ()


def passes(source: str) -> bool:
    """Whether `source` runs to its end without an error, in a process of its own."""
    token = "ran to its end"
    guard = _GUARD.format(seconds=SECONDS, megabytes=MEGABYTES, token=token)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*_without_network(), sys.executable, "-I", "-S", "-c", guard],
                input=source.encode("utf-8", "replace"),
                capture_output=True,
                timeout=4 * SECONDS,
                cwd=folder,
                env={},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.decode("utf-8", "replace").rstrip().endswith(token)
