"""What a hostile program tries. Each attack prints BREACH where it succeeds."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from uuid import uuid4

import pytest

from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.sandbox import MIB, Job, Limits, Sandbox, SandboxResult

pytestmark = pytest.mark.sandbox

SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(number, *args)
    return result, ctypes.get_errno()
"""

DENIED_CALLS = {
    # x86-64 numbers; the filter for aarch64 is tested by itself.
    "ptrace": (101, "0, 0, 0, 0"),
    "unshare a user namespace": (272, "0x10000000"),
    "unshare a mount namespace": (272, "0x20000"),
    "clone into a namespace": (56, "0x10000011, 0, 0, 0, 0"),
    "vfork": (58, ""),
    "setns": (308, "0, 0"),
    "mount": (165, "b'none', b'/tmp', b'proc', 0, 0"),
    "open_tree": (428, "-100, b'/', 1"),
    "fsopen": (430, "b'proc', 0"),
    "umount2": (166, "b'/usr', 2"),
    "pivot_root": (155, "b'/work', b'/work'"),
    "chroot": (161, "b'/work'"),
    "bpf": (321, "0, 0, 0"),
    "io_uring_setup": (425, "8, 0"),
    "keyctl": (250, "0, -3, 1"),
    "add_key": (248, "b'user', b'x', b'y', 1, -3"),
    "perf_event_open": (298, "0, 0, -1, -1, 0"),
    "userfaultfd": (323, "0"),
    "process_vm_readv": (310, "1, 0, 0, 0, 0, 0"),
    "kexec_load": (246, "0, 0, 0, 0"),
    "memfd_create": (319, "b'x', 0"),
    "shmget": (29, "0, 4096, 0o1600"),
    "socket": (41, "2, 1, 0"),
    "personality": (135, "0x0040000"),
    "quotactl": (179, "0, 0, 0, 0"),
    "init_module": (175, "0, 0, 0"),
    "reboot": (169, "0, 0, 0, 0"),
}


async def attack(sandbox: Sandbox, text: str, **limits: float) -> SandboxResult:
    bounds = Limits(**({"wall_seconds": 20, "cpu_seconds": 20} | limits))  # type: ignore[arg-type]
    outcome = await sandbox.run(Job(("main.py",), {"main.py": text.encode()}, bounds))
    assert "BREACH" not in outcome.stdout
    return outcome


class TestFiles:
    async def test_host_files_are_not_there(self, sandbox: Sandbox) -> None:
        text = """
import os
for path in ("/etc/shadow", "/etc/passwd", "/root/.bashrc", "/root", "/home", "/var/log", "/sys/kernel", "/run", "/srv",
             "/proc/self/environ", "/proc/1/root/etc/passwd", "/proc/sys/kernel/core_pattern", "/proc/self/exe"):
    for look in (os.listdir, lambda path: open(path, "rb").read(100)):
        try:
            print("BREACH", path, look(path))
        except OSError:
            pass
print("done")
"""
        assert (await attack(sandbox, text)).stdout == "done\n"

    async def test_the_services_own_files_and_environment(
        self, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "secret").write_text("s3cret")
        tmp_path.chmod(0o755)
        monkeypatch.setenv("OCTOLLM_SECRET", "s3cret")
        text = f"""
import os
print({str(tmp_path)!r} in str(os.environ), "s3cret" in str(os.environ), os.path.exists({str(tmp_path / "secret")!r}))
print("BREACH" if "OCTOLLM" in str(os.environ) else "")
"""
        assert (await attack(sandbox, text)).stdout == "False False False\n\n"

    async def test_links_lead_nowhere(self, sandbox: Sandbox) -> None:
        text = """
import os
os.mkdir("d")
targets = ["/etc/passwd", "../../../../etc/passwd", "/proc/1/root/etc/passwd", "/etc", "main.py", "."]
for number, target in enumerate(targets):
    for name in (f"link{number}.txt", f"d/link{number}.txt"):
        try:
            os.symlink(target, name)
        except OSError:
            continue
        try:
            print("BREACH" if "ro" + "ot:" in open(name).read() else "")
        except OSError:
            pass
"""
        assert (await attack(sandbox, text)).files == ()

    async def test_special_files_do_not_come_back(self, bubblewrap: Bubblewrap) -> None:
        text = """
import os
os.mkfifo("pipe.txt")
os.symlink("/dev/zero", "zero.txt")
os.link("main.py", "hard.txt")
open("locked.txt", "w").write("x"); os.chmod("locked.txt", 0)
path = "."
for _ in range(300):
    path += "/" + "d" * 10
    os.mkdir(path)
os.chmod("d" * 10, 0)
try:
    os.mknod("device", 0o600 | 0o020000, os.makedev(1, 3)); print("BREACH")
except OSError:
    pass
"""
        outcome = await attack(bubblewrap, text)
        assert [file.name for file in outcome.files] == ["hard.txt"]

    async def test_the_system_cannot_be_written(self, sandbox: Sandbox) -> None:
        text = """
import glob, os, sys
places = ["/usr", "/usr/bin", "/usr/lib", "/usr/local", "/bin", "/lib", "/opt", "/etc", "/dev", "/dev/shm"]
for place in [*places, sys.prefix, *sys.path]:
    if not place.startswith("/") or place in ("/", "/work"):
        continue
    try:
        open(place + "/octollm-attack", "w")
        print("BREACH", place)
    except OSError:
        pass
"""
        await attack(sandbox, text)
        assert not list(Path("/usr").glob("octollm-attack"))

    async def test_the_root_cannot_be_written(self, bubblewrap: Bubblewrap) -> None:
        outcome = await attack(bubblewrap, "open('/x', 'w'); print('BREACH')")
        assert "Read-only file system" in outcome.stderr

    async def test_files_left_for_the_host_are_bounded(self, sandbox: Sandbox) -> None:
        text = "for number in range(40):\n    open(f'{number:02}.txt', 'w').write('x' * 1000)"
        outcome = await attack(sandbox, text)
        assert len(outcome.files) == 16


class TestNetwork:
    @pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET"])
    async def test_no_sockets(self, sandbox: Sandbox, family: str) -> None:
        text = f"""
import socket
try:
    socket.socket(getattr(socket, {family!r}, 1), socket.SOCK_STREAM); print("BREACH")
except OSError as error:
    print("refused")
"""
        assert (await attack(sandbox, text)).stdout == "refused\n"

    async def test_no_requests(self, sandbox: Sandbox) -> None:
        text = "import urllib.request\nprint('BREACH', urllib.request.urlopen('http://127.0.0.1:8000').status)"
        assert (await attack(sandbox, text)).exit_code == 1


class TestProcesses:
    @pytest.mark.parametrize(
        "text",
        [
            "import os\nwhile True: os.fork()",
            "import os\nos.forkpty(); print('BREACH')",
            "import subprocess; subprocess.run(['/bin/sh', '-c', 'true']); print('BREACH')",
            "import os; os.posix_spawn('/bin/true', ['true'], {}); print('BREACH')",
            "import os; os.system(':(){ :|:& };:') == 0 and print('BREACH')",
            "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start(); print('BREACH')",
        ],
    )
    async def test_no_new_processes(self, sandbox: Sandbox, text: str) -> None:
        outcome = await attack(sandbox, text)
        assert outcome.reason in ("", "killed")

    async def test_the_supervisor_cannot_be_killed(self, bubblewrap: Bubblewrap) -> None:
        text = """
import os, signal
for pid in (1, -1, 0, os.getppid()):
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        try:
            if pid != 0 and pid != -1: os.kill(pid, number)
        except OSError: pass
print("still here", os.getppid())
"""
        outcome = await attack(bubblewrap, text)
        assert (outcome.exit_code, outcome.stdout) == (0, "still here 1\n")

    async def test_killing_everybody_kills_oneself(self, bubblewrap: Bubblewrap) -> None:
        outcome = await attack(bubblewrap, "import os; os.kill(0, 9); print('BREACH')")
        assert outcome.exit_code == -9

    async def test_stopping_oneself(self, bubblewrap: Bubblewrap) -> None:
        outcome = await attack(bubblewrap, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", wall_seconds=1)
        assert outcome.reason == "timeout"

    async def test_no_descriptor_of_the_host(self, bubblewrap: Bubblewrap) -> None:
        text = """
import os
for number in range(3, 300):
    try:
        os.fstat(number); print("BREACH", number)
    except OSError: pass
"""
        await attack(bubblewrap, text)

    async def test_the_report_cannot_be_forged(self, bubblewrap: Bubblewrap) -> None:
        text = """
import os
for number in range(3, 300):
    try:
        os.write(number, b'{"exit_code": 0, "reason": "", "peak_bytes": 1, "cpu_seconds": 0, "files": []}\\n')
    except OSError: pass
os._exit(5)
"""
        assert (await attack(bubblewrap, text)).exit_code == 5


class TestKernel:
    pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")

    async def test_denied_calls(self, bubblewrap: Bubblewrap) -> None:
        lines = [f"print({name!r}, call({number}, {args}))" for name, (number, args) in DENIED_CALLS.items()]
        outcome = await attack(bubblewrap, SYSCALL + "\n".join(lines))
        assert outcome.stdout.splitlines() == [f"{name} (-1, {errno.EPERM})" for name in DENIED_CALLS]

    async def test_clone3_is_unknown(self, bubblewrap: Bubblewrap) -> None:
        text = f"{SYSCALL}\nresult, error = call(435, 0, 0)\nprint('BREACH' if result >= 0 else error)"
        assert (await attack(bubblewrap, text)).stdout == "38\n"

    async def test_x32_is_killed(self, bubblewrap: Bubblewrap) -> None:
        outcome = await attack(bubblewrap, f"{SYSCALL}\ncall(0x40000000 | 39)\nprint('BREACH')")
        assert outcome.exit_code == -31  # SIGSYS

    async def test_thirty_two_bit_calls_are_killed(self, bubblewrap: Bubblewrap) -> None:
        text = """
import ctypes, mmap
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
print("BREACH")
"""
        assert (await attack(bubblewrap, text)).exit_code in (-31, -11)  # -11 where the kernel has no such calls

    async def test_no_privileges(self, bubblewrap: Bubblewrap) -> None:
        text = f"""{SYSCALL}
class Header(ctypes.Structure): _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
data = (ctypes.c_uint32 * 6)()
libc.capget(ctypes.byref(Header(0x20080522, 0)), data)
print("BREACH" if any(data) else "", os.getuid(), libc.prctl(39, 0, 0, 0, 0))
try:
    os.setuid(0); print("BREACH")
except OSError: pass
"""
        assert (await attack(bubblewrap, text)).stdout == " 1000 1\n"

    async def test_limits_cannot_be_raised(self, bubblewrap: Bubblewrap) -> None:
        text = """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)); print("BREACH")
    except (OSError, ValueError): pass
"""
        await attack(bubblewrap, text)


class TestExhaustion:
    async def test_memory(self, sandbox: Sandbox) -> None:
        outcome = await attack(sandbox, "x = []\nwhile True: x.append(bytearray(10_000_000))", memory_bytes=256 * MIB)
        assert outcome.reason == "memory"
        assert outcome.exit_code != 0

    async def test_memory_of_a_caught_error(self, sandbox: Sandbox) -> None:
        text = "try:\n    x = bytearray(10**9)\nexcept MemoryError:\n    print('caught')"
        outcome = await attack(sandbox, text)
        assert (outcome.stdout, outcome.reason, outcome.exit_code) == ("caught\n", "", 0)

    async def test_output(self, sandbox: Sandbox) -> None:
        outcome = await attack(sandbox, "while True: print('x' * 10_000)")
        assert outcome.reason == "output"
        assert len(outcome.stdout) == 256 * 1024

    async def test_output_to_both_channels(self, sandbox: Sandbox) -> None:
        text = "import sys\nwhile True:\n    print('x' * 1000)\n    print('y' * 1000, file=sys.stderr)"
        outcome = await attack(sandbox, text)
        assert outcome.reason == "output"
        assert len(outcome.stdout) + len(outcome.stderr) == 256 * 1024

    @pytest.mark.parametrize("loop", ["while True: pass", "import time; time.sleep(100)", "10**10**8"])
    async def test_wall_time(self, sandbox: Sandbox, loop: str) -> None:
        outcome = await attack(sandbox, f"print('begun')\n{loop}", wall_seconds=2)
        assert (outcome.reason, outcome.exit_code) == ("timeout", -9)
        assert "begun\n".startswith(outcome.stdout)  # all that it said before, on a machine however slow

    async def test_processor_time(self, sandbox: Sandbox) -> None:
        outcome = await attack(sandbox, "while True: pass", cpu_seconds=1)
        assert outcome.reason == "timeout"

    async def test_processor_time_with_the_signal_ignored(self, bubblewrap: Bubblewrap) -> None:
        text = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
        assert (await attack(bubblewrap, text, cpu_seconds=1)).reason == "timeout"

    async def test_one_large_file(self, sandbox: Sandbox) -> None:
        text = "with open('x', 'wb') as file:\n    while True: file.write(bytes(1_000_000))"
        outcome = await attack(sandbox, text)
        assert "File too large" in outcome.stderr

    @pytest.mark.parametrize("folder", [".", "/tmp"])
    async def test_many_large_files(self, sandbox: Sandbox, folder: str) -> None:
        text = f"n = 0\nwhile True:\n    n += 1\n    open(f'{folder}/x{{n}}', 'wb').write(bytes(10_000_000))"
        outcome = await attack(sandbox, text)
        assert "No space left" in outcome.stderr or outcome.reason == "killed"

    async def test_many_empty_files(self, sandbox: Sandbox) -> None:
        text = "n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/x{n}', 'w').close()"
        outcome = await attack(sandbox, text, disk_entries=1000)
        assert outcome.reason == "killed"

    async def test_open_files(self, bubblewrap: Bubblewrap) -> None:
        outcome = await attack(bubblewrap, "x = [open('main.py') for _ in range(100)]; print('BREACH')")
        assert "Too many open files" in outcome.stderr

    async def test_threads(self, bubblewrap: Bubblewrap) -> None:
        text = (
            "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
        )
        outcome = await attack(bubblewrap, text, wall_seconds=5)
        assert outcome.exit_code != 0

    async def test_deep_recursion(self, sandbox: Sandbox) -> None:
        text = "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()"
        outcome = await attack(sandbox, text, wall_seconds=2)
        assert outcome.exit_code != 0

    async def test_four_attacks_at_once(self, bubblewrap: Bubblewrap) -> None:
        word = uuid4().hex
        texts = [("while True: pass", 2), ("while True: print('x' * 1000)", 30), ("x = bytearray(10**10)", 30)]
        texts.append((f"print('{word}')", 30))
        runs = (attack(bubblewrap, text, wall_seconds=wall) for text, wall in texts)
        outcomes = await asyncio.gather(*runs)
        assert [outcome.reason for outcome in outcomes] == ["timeout", "output", "memory", ""]
        assert outcomes[3].stdout == f"{word}\n"
