"""A warm Python: a server that has imported torch, transformers and the families once and forks a process for each command.

Starting a script costs seconds of imports; killing one 30 times, on four ranks, costs minutes of them. `client` writes
an executable that stands in for `python`: same arguments, environment, working directory, standard streams, exit code
and signals. The process that runs the script is a real one. It dies with its stand-in.
"""

import contextlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import threading
from pathlib import Path

CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
server.sendmsg([len(request).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(request)
answers = server.makefile("r")
child = int(answers.readline())
for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"):
    signal.signal(getattr(signal, name), lambda number, frame: os.kill(child, number))
code = os.waitstatus_to_exitcode(int(answers.readline()))
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -9 else None
    os.kill(os.getpid(), -code)
sys.stdout = sys.stderr = None
os._exit(code)
"""


def client(directory: Path, address: str) -> Path:
    """Write the executable that stands in for `python`."""
    path = directory / "python"
    path.write_text(CLIENT.format(python=sys.executable, address=address))
    path.chmod(0o755)
    return path


def serve(address: str) -> None:
    """Fork a process for each connection until the parent dies."""
    import torch.distributed.checkpoint.hf_storage
    import torch.distributed.fsdp
    import torch.distributed.run  # noqa: F401

    import families.codes
    import families.janus
    import families.showo  # noqa: F401
    import model  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    parent, children = os.getppid(), {}
    ended_one, bell = socket.socketpair()  # rings when a child has ended, so that nothing has to be asked all the time
    bell.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
    while os.getppid() == parent:
        for connection in select.select([listener, ended_one, *children.values()], [], [], 1)[0]:
            if connection is ended_one:
                ended_one.recv(4096)
            elif connection is listener:
                connection = listener.accept()[0]
                if pid := fork(connection, listener):
                    children[pid] = connection
                    with contextlib.suppress(OSError):  # it may be dead already: seen at the next turn
                        connection.sendall(f"{pid}\n".encode())
            else:  # a stand-in that was killed; it never says a word
                pid = next(pid for pid, other in children.items() if other is connection)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                children.pop(pid).close()
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if connection := children.pop(ended[0], None):
                    with contextlib.suppress(OSError):
                        connection.sendall(f"{ended[1]}\n".encode())
                    connection.close()


def fork(connection: socket.socket, listener: socket.socket) -> int:
    """Read a request and start its process; returns the process id, 0 if the stand-in died while it spoke."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(head, "little"):
        request += (more := connection.recv(2**16))
        if not more:
            break
    if len(head) < 8 or len(request) < int.from_bytes(head, "little"):
        return 0
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        connection.close()
        listener.close()
        os._exit(execute(*json.loads(request)))
    for stream in streams:
        os.close(stream)
    return pid


def execute(argv: list[str], environment: dict[str, str], cwd: str) -> int:
    """Run `python ARGV` in this process; returns its exit code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    limit(environment)
    argv = [word for word in argv if word != "-u"]
    code = 0
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            sys.modules.pop(argv[1], None)
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            exec(argv[1], {"__name__": "__main__"})
        else:
            sys.argv = argv
            sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    threading._shutdown()  # as the interpreter does at its end: idle pools are told, busy threads waited for
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def limit(environment: dict[str, str]) -> None:
    """WARM_FILE_BYTES: no file may grow beyond it. WARM_MORE_BYTES: memory that may be asked for beyond today's."""
    if size := environment.get("WARM_FILE_BYTES"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    if more := environment.get("WARM_MORE_BYTES"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(more),) * 2)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    serve(sys.argv[1])
