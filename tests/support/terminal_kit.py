"""A command on a pseudo-terminal, and the screen that a person would see there."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import struct
import termios
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pyte
from command_line import CommandLine

from octollm.testing import wait_until


class Terminal:
    """A process on a pseudo-terminal. ``shown`` is every character that it wrote; ``screen`` is what is visible now."""

    def __init__(self, process: asyncio.subprocess.Process, master: int, columns: int, lines: int) -> None:
        self.process = process
        self._master = master
        self.shown = ""
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)

    @property
    def text(self) -> str:
        """Return the screen's lines."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def read(self) -> None:
        try:
            written = os.read(self._master, 65_536)
        except OSError:  # the process has closed its side
            asyncio.get_running_loop().remove_reader(self._master)
            return
        self.shown += written.decode(errors="replace")
        self._stream.feed(written)

    async def expect(self, words: str) -> None:
        await wait_until(lambda: words in self.shown, description=f"the terminal shows {words!r}", timeout=60)

    async def see(self, *words: str) -> None:
        """Wait until all of the words are on the screen at once."""
        try:
            await wait_until(
                lambda: all(word in self.text for word in words), description=f"the screen shows {words}", timeout=30
            )
        except AssertionError as error:
            error.add_note(self.text)
            raise

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    def press(self, key: str) -> None:
        os.write(self._master, key.encode())

    def resize(self, columns: int, lines: int) -> None:
        set_size(self._master, columns, lines)
        # pyte drops lines at the top and leaves the cursor where it was, even below the screen.
        row = self.screen.cursor.y - max(0, self.screen.lines - lines)
        self.screen.resize(lines, columns)
        self.screen.cursor.y = max(0, min(row, lines - 1))

    async def end(self) -> int:
        code = await asyncio.wait_for(self.process.wait(), 60)
        await wait_until(self._is_drained, description="all of the output is read")
        return code

    def _is_drained(self) -> bool:
        before = len(self.shown)
        self.read()
        return len(self.shown) == before


def set_size(descriptor: int, columns: int, lines: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


@asynccontextmanager
async def terminal(
    command_line: CommandLine, *arguments: str, columns: int = 100, lines: int = 30
) -> AsyncGenerator[Terminal]:
    """Run a command on a terminal of its own, which it controls: what is typed there can interrupt it."""
    master, slave = pty.openpty()
    set_size(master, columns, lines)
    # With COLUMNS and LINES, which a test runner may set, a program does not ask the terminal for its size.
    inherited = {name: value for name, value in command_line.environment().items() if name not in ("COLUMNS", "LINES")}
    process = await asyncio.create_subprocess_exec(
        *command_line.command(*arguments),
        env={**inherited, "TERM": "xterm"},
        cwd=command_line.work,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    os.set_blocking(master, False)
    opened = Terminal(process, master, columns, lines)
    asyncio.get_running_loop().add_reader(master, opened.read)
    try:
        yield opened
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)
