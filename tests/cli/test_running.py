"""A command ends after a signal, whatever it was doing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

import pytest

from octollm.cli.runtime import exit_code_for, run_command
from octollm.contracts.problems import ERROR_KINDS
from octollm.errors import OctoError

STUBBORN = """
import asyncio, sys, time
from octollm.cli.runtime import run_command

async def work():
    print("began", flush=True)
    while True:
        try:
            await asyncio.to_thread(time.sleep, 3600)
        except asyncio.CancelledError:
            print("refused", flush=True)

sys.exit(run_command(work))
"""


async def ignore_cancellation():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", STUBBORN, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"began\n"
    return process


async def ended(process):
    async with asyncio.timeout(30):
        return await process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_what_does_not_stop_is_ended(number):
    process = await ignore_cancellation()
    process.send_signal(number)
    assert await ended(process) == 130


async def test_a_second_signal_ends_at_once():
    process = await ignore_cancellation()
    process.send_signal(signal.SIGINT)
    assert await process.stdout.readline() == b"refused\n"
    process.send_signal(signal.SIGINT)
    assert await ended(process) == 130


def test_the_exit_code_is_the_works():
    async def work():
        return 7

    assert run_command(work) == 7


@pytest.mark.parametrize(("code", "expected"), [("file_invalid", 2), ("setting_invalid", 2), ("port_taken", 1)])
def test_a_failure_is_printed_and_has_its_code(capsys, code, expected):
    async def work():
        raise OctoError("because of octo_abcdefgh12345678", code=code)

    assert run_command(work) == expected
    said = capsys.readouterr().err
    assert "because of ***" in said
    assert code in said


def test_an_interruption_hides_what_the_work_died_of(capsys):
    async def work():
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(30)
        finally:
            raise OctoError("torn")

    assert run_command(work) == 130
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert capsys.readouterr().err == ""


def test_a_fault_of_our_own_is_not_hidden():
    async def work():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(work)


@pytest.mark.parametrize("code", ERROR_KINDS)
def test_every_code_has_an_exit_code(code):
    assert exit_code_for(OctoError("x", code=code)) in (1, 2)
