"""Terminals, as the Python SDK opens them: `/bin/bash -i -l` with TERM, LANG and LC_ALL set."""

import os
import re

from e2b import CommandExitException, InvalidArgumentException, NotFoundException, PtySize, TimeoutException

from wait import InThreads, Running, Skip, failure, until

OTHER = os.environ["ENVD_E2E_OTHER_USER"]
NOBODY = 999_999_999  # no process has that id


class Cases:
    def __init__(self, sandbox):
        self._commands = sandbox.commands
        self._pty = sandbox.pty

    def _open(self, **options):
        return Running.terminal(self._pty.create, PtySize(rows=24, cols=80), **options)

    async def _type(self, terminal, text):
        await self._pty.send_stdin(terminal.pid, text.encode())

    async def create(self):
        terminal = await self._open(cwd="/usr", envs={"E2E_PTY": "mine"})
        await self._type(terminal, 'echo "$TERM|$LANG|$LC_ALL|$E2E_PTY|$PWD"; tty; stty size\n')
        await terminal.shows(
            re.compile(r"xterm-256color\|C\.UTF-8\|C\.UTF-8\|mine\|/usr\r\n/dev/pts/\d+\r\n24 80\r\n")
        )
        await self._type(terminal, "exit\n")
        result = await terminal.ended
        assert result.exit_code == 0 and not result.error, result

    async def exit_code(self):
        terminal = await self._open()
        await self._type(terminal, "exit 9\n")
        assert (await failure(CommandExitException, terminal.ended)).exit_code == 9

    async def resize(self):
        terminal = await self._open()
        await self._pty.resize(terminal.pid, PtySize(rows=45, cols=123))
        await self._type(terminal, 'stty size; echo "columns=$(tput cols)"\n')
        await terminal.shows(re.compile(r"45 123\r\ncolumns=123\r\n"))
        await self._type(terminal, "exit\n")
        await terminal.ended

    async def unicode(self):
        terminal = await self._open()
        await self._type(terminal, "stty -echo; echo sil''ent\n")
        await terminal.shows(re.compile("silent\r\n"))
        await self._type(terminal, "cat; exit\n")
        await self._type(terminal, "ünï→😀\n")
        await terminal.shows(re.compile("ünï→😀\r\n"))
        await self._type(terminal, "\x04")
        await terminal.ended

    async def user(self):
        if not OTHER:
            raise Skip("needs root: the daemon acts for one user only")
        terminal = await self._open(user=OTHER, cwd="/")
        await self._type(terminal, 'echo "I am $(id -un), $(stat -c %U $(tty))"\n')
        await terminal.shows(re.compile(f"I am {OTHER}, {OTHER}\r\n"))
        await self._type(terminal, "exit\n")
        await terminal.ended

    async def connect(self):
        options = {} if isinstance(self._pty, InThreads) else {"on_data": lambda data: None}
        first = await self._pty.create(PtySize(rows=24, cols=80), **options)
        await first.disconnect()
        second = await Running.terminal(self._pty.connect, first.pid)
        assert second.pid == first.pid
        await self._type(second, "echo sec$((2))ond\n")
        await second.shows(re.compile("sec2ond\r\n"))
        await self._type(second, "exit\n")
        assert (await second.ended).exit_code == 0

    async def list(self):
        terminal = await self._open()
        (listed,) = [process for process in await self._commands.list() if process.pid == terminal.pid]
        assert (listed.cmd, listed.args, listed.envs["TERM"]) == ("/bin/bash", ["-i", "-l"], "xterm-256color"), listed
        await terminal.handle.kill()
        await failure(CommandExitException, terminal.ended)

    async def kill(self):
        terminal = await self._open()
        await self._type(terminal, """sh -c 'echo "child=$$"; exec sleep 60'\n""")
        child = (await terminal.shows(re.compile(r"child=(\d+)\r\n"))).group(1)
        assert await self._pty.kill(terminal.pid) is True
        error = await failure(CommandExitException, terminal.ended)
        assert (error.exit_code, error.error) == (-1, "signal: killed"), error
        sleeps = f'grep "^State:[[:space:]]*[^ZX[:space:]]" /proc/{child}/status >/dev/null 2>&1'

        async def gone():
            script = f"if kill -0 {terminal.pid} 2>/dev/null || {sleeps}; then echo no; else echo yes; fi"
            return (await self._commands.run(script)).stdout == "yes\n"

        async def spared():
            return await self._pty.kill(terminal.pid) is False

        await until(gone, "shell and child gone")
        await until(spared, "nothing left to kill")

    async def timeout(self):
        terminal = await self._open(timeout=2)
        await failure(TimeoutException, terminal.ended)

        async def unlisted():
            return terminal.pid not in [process.pid for process in await self._commands.list()]

        await until(unlisted, "terminal ended")

    async def unknown(self):
        assert await self._pty.kill(NOBODY) is False
        await failure(NotFoundException, Running.terminal(self._pty.connect, NOBODY))
        await failure(NotFoundException, self._pty.send_stdin(NOBODY, b"x"))
        # Not every SDK maps the error of this one.
        error = await failure(Exception, self._pty.resize(NOBODY, PtySize(rows=1, cols=1)))
        assert f"process with pid {NOBODY} not found" in getattr(error, "message", str(error)), error
        await failure(InvalidArgumentException, self._open(cwd="/no/such"))
