"""The filter is run here by a small interpreter of classic BPF, over every kind of call."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.services.arms.executor.seccomp import (
    AARCH64,
    ALLOW,
    ERRNO,
    KILL_PROCESS,
    X86_64,
    Architecture,
    build_filter,
    denied_calls,
    detect_architecture,
)

REFUSED, UNKNOWN = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
THREAD_FLAGS = 0x3D0F00  # what pthread_create asks for
FORK_FLAGS = 0x1200011  # what fork asks for


def judge(program: bytes, nr: int, arch: int, *args: int) -> int:
    """Run a filter over one call, as the kernel does."""
    data = struct.pack("<IIQ6Q", nr, arch, 0, *args, *[0] * (6 - len(args)))
    at = accumulator = 0
    while True:
        code, when_true, when_false, value = struct.unpack_from("<HBBI", program, at * 8)
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return value
        else:
            truth = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[code]
            at += when_true if truth else when_false


@pytest.mark.parametrize("machine", [X86_64, AARCH64], ids=lambda m: m.name)
@pytest.mark.parametrize("processes", [True, False])
class TestBothMachines:
    def test_denied_calls_are_refused(self, machine: Architecture, processes: bool) -> None:
        program = build_filter(machine, allow_processes=processes)
        for name, number in denied_calls(machine, allow_processes=processes).items():
            assert judge(program, number, machine.audit) == REFUSED, name

    def test_it_is_a_valid_length(self, machine: Architecture, processes: bool) -> None:
        program = build_filter(machine, allow_processes=processes)
        assert len(program) % 8 == 0
        assert len(program) // 8 <= 4096

    def test_calls_newer_than_the_table_are_unknown(self, machine: Architecture, processes: bool) -> None:
        program = build_filter(machine, allow_processes=processes)
        assert judge(program, 463, machine.audit) == UNKNOWN
        assert judge(program, 435, machine.audit, 0) == UNKNOWN  # clone3

    def test_another_architecture_is_killed(self, machine: Architecture, processes: bool) -> None:
        program = build_filter(machine, allow_processes=processes)
        for arch in (0x40000003, 0xC000003E, 0xC00000B7, 0):
            if arch != machine.audit:
                assert judge(program, 0, arch) == KILL_PROCESS

    def test_everyday_calls_are_allowed(self, machine: Architecture, processes: bool) -> None:
        program = build_filter(machine, allow_processes=processes)
        everyday = {"x86_64": (0, 1, 3, 9, 11, 59, 202, 257, 318), "aarch64": (56, 57, 63, 64, 98, 215, 221, 222)}
        for number in everyday[machine.name]:
            assert judge(program, number, machine.audit) == ALLOW

    def test_threads_only(self, machine: Architecture, processes: bool) -> None:
        program = build_filter(machine, allow_processes=processes)
        clone = {"x86_64": 56, "aarch64": 220}[machine.name]
        assert judge(program, clone, machine.audit, THREAD_FLAGS) == ALLOW
        assert judge(program, clone, machine.audit, FORK_FLAGS) == (ALLOW if processes else REFUSED)
        for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x2000000, 0x4000000, 0x8000000, 0x80):
            assert judge(program, clone, machine.audit, THREAD_FLAGS | flag) == REFUSED

    def test_local_pairs_only(self, machine: Architecture, processes: bool) -> None:
        program = build_filter(machine, allow_processes=processes)
        pair = {"x86_64": 53, "aarch64": 199}[machine.name]
        assert judge(program, pair, machine.audit, 1) == ALLOW
        assert judge(program, pair, machine.audit, 2) == REFUSED

    def test_no_typing_into_a_terminal(self, machine: Architecture, processes: bool) -> None:
        program = build_filter(machine, allow_processes=processes)
        ioctl = {"x86_64": 16, "aarch64": 29}[machine.name]
        assert judge(program, ioctl, machine.audit, 0, 0x5412) == REFUSED
        assert judge(program, ioctl, machine.audit, 0, 0xFFFFFFFF00005412) == REFUSED  # the kernel reads 32 bits
        assert judge(program, ioctl, machine.audit, 0, 0x5413) == ALLOW


@given(st.integers(0, 2**32 - 1))
def test_every_call_has_a_verdict(number: int) -> None:
    program = build_filter(X86_64, allow_processes=False)
    verdict = judge(program, number, X86_64.audit)
    if number & 0xC0000000:
        assert verdict == KILL_PROCESS  # x32 and beyond
    elif number > 462:
        assert verdict == UNKNOWN
    else:
        assert verdict in (ALLOW, REFUSED, UNKNOWN)


def test_the_program_filter_denies_fork() -> None:
    assert {"fork", "vfork"} <= denied_calls(X86_64, allow_processes=False).keys()
    assert not {"fork", "vfork"} & denied_calls(X86_64, allow_processes=True).keys()


def test_machines_by_name() -> None:
    assert detect_architecture("x86_64") is X86_64
    assert detect_architecture("ARM64") is AARCH64
    assert detect_architecture("riscv64") is None
