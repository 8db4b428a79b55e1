"""The system-call filter of a run: a classic BPF program (seccomp(2), linux/filter.h), built by hand.

The *base* filter applies to everything in the sandbox. The *program* filter is added for the untrusted program: it
denies new processes as well and allows only threads.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

# linux/bpf_common.h, linux/filter.h
_LD_ABS, _JEQ, _JGT, _JGE, _JSET, _RET = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
# linux/seccomp.h
KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
# struct seccomp_data: nr, arch, instruction pointer, six 64-bit arguments; both machines are little-endian.
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24

_X32_BIT = 0x40000000
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080
"""Every CLONE_NEW* flag (linux/sched.h)."""
_AF_UNIX = 1
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_NEWEST = 462
"""The newest system call reviewed for this table (mseal, Linux 6.10). From 424 on, numbers are the same everywhere."""

# name: (x86_64, aarch64); None where the machine has no such call.
_DENIED_CALLS: dict[str, tuple[int | None, int | None]] = {
    # namespaces, roots and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # parts of the kernel with many known vulnerabilities
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
    "lookup_dcookie": (212, 18),
    "vmsplice": (278, 75),
    # the machine itself
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "acct": (163, 89),
    "vhangup": (153, 58),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "adjtimex": (159, 171),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    # memory that no limit of address space counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    # the network
    "socket": (41, 198),
    "bind": (49, 200),
    "listen": (50, 201),
    "connect": (42, 203),
    "accept": (43, 202),
    "accept4": (288, 242),
}
_PROCESS_CALLS: dict[str, tuple[int | None, int | None]] = {"fork": (57, None), "vfork": (58, None)}
_CLONE, _CLONE3 = (56, 220), 435
_IOCTL, _SOCKETPAIR = (16, 29), (53, 199)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A processor architecture: its AUDIT_ARCH_* number (linux/audit.h) and its column in the tables."""

    name: str
    audit: int
    column: int


X86_64 = Architecture("x86_64", 0xC000003E, 0)
AARCH64 = Architecture("aarch64", 0xC00000B7, 1)


def detect_architecture(name: str | None = None) -> Architecture | None:
    """Return the architecture called ``name`` (by default this machine's), or ``None`` when it has no filter."""
    name = name or platform.machine()
    return {"x86_64": X86_64, "amd64": X86_64, "aarch64": AARCH64, "arm64": AARCH64}.get(name.lower())


def denied_calls(architecture: Architecture, *, allow_processes: bool) -> dict[str, int]:
    """Return the numbers of the denied calls by name; ``fork`` and ``vfork`` only without ``allow_processes``."""
    table = _DENIED_CALLS if allow_processes else _DENIED_CALLS | _PROCESS_CALLS
    numbers = {name: columns[architecture.column] for name, columns in table.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def build_filter(architecture: Architecture, *, allow_processes: bool) -> bytes:
    """Return the filter as an array of ``struct sock_filter``.

    Without ``allow_processes`` the filter denies fork, and permits clone only for threads. A call of another
    architecture, or of the x32 ABI, kills the process. Denied calls fail with ``EPERM``. ``clone3`` and calls newer
    than this table fail with ``ENOSYS``, so that the C library falls back to older calls: the flags of clone3 are in
    memory, which a filter cannot read.
    """
    refuse, unknown = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
    column = architecture.column
    # The architecture first, because the same number is another call on another architecture.
    program = [_op(_LD_ABS, _ARCH), _op(_JEQ, architecture.audit, 1, 0), _op(_RET, KILL_PROCESS), _op(_LD_ABS, _NR)]
    if architecture is X86_64:
        # x32 reports the architecture of x86-64, but its call numbers have bit 30 set, so the list would not match.
        program += [_op(_JGE, _X32_BIT, 0, 1), _op(_RET, KILL_PROCESS)]
    program += [_op(_JGT, _NEWEST, 0, 1), _op(_RET, unknown)]
    for number in sorted(denied_calls(architecture, allow_processes=allow_processes).values()):
        program += [_op(_JEQ, number, 0, 1), _op(_RET, refuse)]
    program += [_op(_JEQ, _CLONE3, 0, 1), _op(_RET, unknown)]
    clone = [_op(_LD_ABS, _ARG0), _op(_JSET, _CLONE_NEW, 0, 1), _op(_RET, refuse)]
    if not allow_processes:
        clone += [_op(_JSET, _CLONE_THREAD, 1, 0), _op(_RET, refuse)]
    program += _for_call(_CLONE[column], clone)
    # A pair of connected Unix sockets reaches nothing outside, and every asyncio event loop needs one.
    program += _for_call(_SOCKETPAIR[column], [_op(_LD_ABS, _ARG0), _op(_JEQ, _AF_UNIX, 1, 0), _op(_RET, refuse)])
    terminal = [_op(_LD_ABS, _ARG1)]  # TIOCSTI inserts characters into a terminal's input
    for request in (_TIOCSTI, _TIOCLINUX):
        terminal += [_op(_JEQ, request, 0, 1), _op(_RET, refuse)]
    program += _for_call(_IOCTL[column], terminal)
    return b"".join([*program, _op(_RET, ALLOW)])


def _op(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, when_true, when_false, value)


def _for_call(number: int, body: list[bytes]) -> list[bytes]:
    """Return ``body``, executed only for the call ``number``; reaching its end allows the call."""
    # The body overwrites the accumulator with an argument, so the call number cannot be compared after it.
    return [_op(_JEQ, number, 0, len(body) + 1), *body, _op(_RET, ALLOW)]
