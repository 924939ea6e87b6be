"""Commands, as the Python SDK runs them: `/bin/bash -l -c COMMAND`, without standard input unless it is asked for."""

import asyncio
import hashlib
import importlib.metadata
import os
import re
import time

from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    TimeoutException,
)

from wait import InThreads, Running, Skip, failure, needs, until

ME = os.environ["ENVD_E2E_USER"]  # the user whom the daemon runs as
OTHER = os.environ["ENVD_E2E_OTHER_USER"]  # another one, empty where the daemon may not act for others
NOBODY = 999_999_999  # no process has that id


class Cases:
    def __init__(self, sandbox):
        self._commands = sandbox.commands

    def _run(self, command, **options):
        return self._commands.run(command, **options)

    def _start(self, command, **options):
        return Running.command(self._commands.run, command, background=True, **options)

    async def _listed(self, pid):
        return next((process for process in await self._commands.list() if process.pid == pid), None)

    async def _unlisted(self, pid):
        return await self._listed(pid) is None

    async def _spares(self, pid):
        return await self._commands.kill(pid) is False

    async def _gone(self, pid):
        """Waits until no process has that id, as the sandbox itself sees it."""
        await until(lambda: self._is_true(f"! kill -0 {pid} 2>/dev/null"), f"process {pid} gone")

    async def _dead(self, pid):
        """Waits until that process is gone or a zombie: who reaps an orphan, and when, is not the daemon's business."""
        lives = f'grep "^State:[[:space:]]*[^ZX[:space:]]" /proc/{pid}/status >/dev/null 2>&1'
        await until(lambda: self._is_true(f"! {lives}"), f"process {pid} dead")

    async def _is_true(self, command):
        return (await self._run(f"if {command}; then echo yes; fi")).stdout == "yes\n"

    async def run(self):
        result = await self._run("echo out; echo err >&2")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "out\n", "err\n"), result
        assert not result.error, result

    async def exit_code(self):
        error = await failure(CommandExitException, self._run("echo out; echo err >&2; exit 3"))
        assert (error.exit_code, error.error) == (3, "exit status 3"), error
        assert (error.stdout, error.stderr) == ("out\n", "err\n"), error

    async def signal(self):
        error = await failure(CommandExitException, self._run("kill -SEGV $$"))
        assert error.exit_code == -1 and error.error.startswith("signal: segmentation fault"), error

    async def not_found(self):
        error = await failure(CommandExitException, self._run("no-such-program-anywhere"))
        assert error.exit_code == 127 and "not found" in error.stderr, error

    async def env(self):
        envs = {"E2E_ONE": "one two", "E2E_EMPTY": "", "E2E_UNICODE": "ünï→😀"}
        show = 'printf "%s|" "${E2E_ONE-unset}" "${E2E_EMPTY-unset}" "${E2E_UNICODE-unset}"'
        assert (await self._run(show, envs=envs)).stdout == "one two||ünï→😀|"
        assert (await self._run(show)).stdout == "unset|unset|unset|"

    async def cwd(self):
        assert (await self._run("pwd", cwd="/usr/bin")).stdout == "/usr/bin\n"
        home = (await self._run(f"getent passwd {ME} | cut -d: -f6", cwd="/")).stdout
        assert (await self._run("pwd")).stdout == home
        assert (await self._run("pwd", cwd="~")).stdout == home

    async def cwd_missing(self):
        error = await failure(InvalidArgumentException, self._run("pwd", cwd="/no/such/directory"))
        assert "cwd '/no/such/directory' does not exist" in str(error), error

    async def user_default(self):
        assert (await self._run("id -un")).stdout == ME + "\n"
        assert (await self._run("id -un", user=ME)).stdout == ME + "\n"

    async def user_other(self):
        if not OTHER:
            raise Skip("needs root: the daemon acts for one user only")
        out = (await self._run('id -un; echo "$USER"; id -G', user=OTHER, cwd="/")).stdout
        assert out == f"{OTHER}\n{OTHER}\n" + (await self._run(f"id -G {OTHER}")).stdout, out

    async def user_unknown(self):
        error = await failure(AuthenticationException, self._run("id", user="no-such-user"))
        assert "invalid username: 'no-such-user'" in str(error), error

    async def stdin_off(self):
        assert (await self._run("cat; readlink /proc/self/fd/0")).stdout == "/dev/null\n"

    async def background(self):
        script = 'echo one; echo two >&2; read line; echo "got $line"; exit 5'
        command = await self._start(script, stdin=True)
        await command.prints("one\n", "two\n")
        await self._commands.send_stdin(command.pid, "line\n")
        error = await failure(CommandExitException, command.ended)
        assert (error.exit_code, command.out, command.err) == (5, "one\ngot line\n", "two\n"), vars(command)
        assert (error.stdout, error.stderr) == (command.out, command.err), error

    async def background_child(self):
        """A command is over when it ends, not when the last child that it left behind closes its output."""
        result = await self._run("sleep 60 & echo $!", timeout=20)
        await self._run(f"kill {result.stdout}")

    async def list(self):
        command = await self._start("exec sleep 60", cwd="/usr", envs={"E2E_LIST": "yes"})
        listed = await self._listed(command.pid)
        assert (listed.cmd, listed.args) == ("/bin/bash", ["-l", "-c", "exec sleep 60"]), listed
        assert (listed.envs, listed.cwd, listed.tag or None) == ({"E2E_LIST": "yes"}, "/usr", None), listed
        assert await command.handle.kill() is True
        await until(lambda: self._unlisted(command.pid), "killed command no longer listed")
        await failure(CommandExitException, command.ended)

    async def connect(self):
        first = await self._start('while read line; do echo "got $line"; done; exit 4', stdin=True)
        await self._commands.send_stdin(first.pid, "one\n")
        await first.prints("got one\n")
        second = await Running.command(self._commands.connect, first.pid)
        assert second.pid == first.pid
        await self._commands.send_stdin(first.pid, "two\n")
        await second.prints("got two\n")
        await first.prints("got one\ngot two\n")
        # The script ends with its input, but not every SDK can close that.
        assert await second.handle.kill() is True
        for command in (first, second):
            assert (await failure(CommandExitException, command.ended)).exit_code == -1

    async def disconnect(self):
        """A command outlives the client, keeps its input, and can be connected to again."""
        first = await self._commands.run("read line; echo $line; exit 4", background=True, stdin=True)
        await first.disconnect()
        second = await Running.command(self._commands.connect, first.pid)
        await self._commands.send_stdin(first.pid, "late\n")
        error = await failure(CommandExitException, second.ended)
        assert (error.exit_code, error.stdout) == (4, "late\n"), error

    async def connect_many(self):
        first = await self._start("read line; seq 1 20000", stdin=True)
        others = [await Running.command(self._commands.connect, first.pid) for _ in range(4)]
        await self._commands.send_stdin(first.pid, "\n")
        expected = "".join(f"{i}\n" for i in range(1, 20001))
        for command in [first, *others]:
            assert (await command.ended).stdout == expected

    async def connect_ended(self):
        """Nobody was connected when it ended; its exit code can still be had."""
        command = await self._commands.run("read line; exit 7", background=True, stdin=True)
        await command.disconnect()
        await self._commands.send_stdin(command.pid, "\n")
        await until(lambda: self._unlisted(command.pid), "command ended")
        again = await self._commands.connect(command.pid)
        assert (await failure(CommandExitException, again.wait())).exit_code == 7

    async def connect_unknown(self):
        await failure(NotFoundException, self._commands.connect(NOBODY))

    async def stdin(self):
        needs(self._commands, "close_stdin")
        command = await self._start("cat", stdin=True)
        await self._commands.send_stdin(command.pid, "")
        await command.handle.send_stdin("one\n")
        await self._commands.send_stdin(command.pid, "ünï→😀\n".encode())
        await command.handle.send_stdin("")
        await command.handle.close_stdin()
        assert (await command.ended).stdout == "one\nünï→😀\n"

    async def stdin_stream(self):
        """Many chunks in one request."""
        needs(self._commands, "stream_input")
        command = await self._start("sha256sum", stdin=True)
        chunk = b"A line of text that goes through a pipe.\n" * 1000
        if isinstance(self._commands, InThreads):
            await self._commands.stream_input(command.pid, [chunk] * 50)
        else:
            async with self._commands.stream_input(command.pid) as stream:
                for _ in range(50):
                    await stream.send(chunk)
        await self._commands.close_stdin(command.pid)
        assert (await command.ended).stdout == hashlib.sha256(chunk * 50).hexdigest() + "  -\n"

    async def stdin_closed(self):
        needs(self._commands, "close_stdin")
        command = await self._start("cat; read line; exec sleep 60", stdin=True)
        await self._commands.close_stdin(command.pid)
        await self._commands.close_stdin(command.pid)
        error = await failure(SandboxException, self._commands.send_stdin(command.pid, "late\n"))
        assert "stdin not enabled or closed" in str(error), error
        await command.handle.kill()
        await failure(CommandExitException, command.ended)

    async def stdin_unknown(self):
        error = await failure(NotFoundException, self._commands.send_stdin(NOBODY, "x"))
        assert f"process with pid {NOBODY} not found" in str(error), error

    async def kill(self):
        command = await self._start('trap "" TERM INT HUP; echo ready; sleep 60; sleep 60')
        await command.prints("ready\n")
        assert await self._commands.kill(command.pid) is True
        error = await failure(CommandExitException, command.ended)
        assert (error.exit_code, error.error) == (-1, "signal: killed"), error
        await self._gone(command.pid)
        # While anything of its tree is left, a kill still has something to kill.
        await until(lambda: self._spares(command.pid), "nothing left to kill")

    async def kill_children(self):
        command = await self._start("sleep 60 & echo $!; wait")
        child = await until(lambda: re.fullmatch(r"(\d+)\n", command.out), "pid of the child")
        assert await command.handle.kill() is True
        await failure(CommandExitException, command.ended)
        await self._dead(child.group(1))

    async def kill_unknown(self):
        assert await self._commands.kill(NOBODY) is False

    async def timeout(self):
        started = time.monotonic()
        command = await self._start("sleep 60 & echo $!; wait", timeout=2)
        await failure(TimeoutException, command.ended)
        assert time.monotonic() - started < 20
        await self._gone(command.pid)
        await self._dead(command.out.strip())

    async def timeout_none(self):
        assert (await self._run("echo out", timeout=0)).stdout == "out\n"

    async def timeout_connect(self):
        """The timeout of a second connection ends that connection, not the command."""
        first = await self._start('read line; echo "got $line"', stdin=True)
        second = await Running.command(self._commands.connect, first.pid, timeout=1)
        await failure(TimeoutException, second.ended)
        await self._commands.send_stdin(first.pid, "line\n")
        assert (await first.ended).stdout == "got line\n"

    async def long_output(self):
        script = "f=$(mktemp); head -c 6000000 /dev/urandom | base64 -w 99 >$f; sha256sum <$f >&2; cat $f; rm $f"
        result = await self._run(script)
        assert len(result.stdout) == 8_080_809
        assert hashlib.sha256(result.stdout.encode()).hexdigest() + "  -\n" == result.stderr

    async def unicode(self):
        """Characters of 1 to 4 bytes, so that every chunk boundary falls into one sooner or later."""
        if importlib.metadata.version("e2b") == "2.10.2":
            raise Skip("needs a newer SDK: this one decodes each chunk on its own")
        assert (await self._run("yes 'aü→😀' | head -n 200000")).stdout == "aü→😀\n" * 200_000

    async def binary(self):
        assert (await self._run(r"printf 'a\377\376\0b\200'")).stdout == "a\ufffd\ufffd\0b\ufffd"

    async def parallel(self):
        async def one(i):
            script = f"echo out {i}; echo err {i} >&2; exit {i}"
            error = await failure(CommandExitException, self._run(script))
            assert (error.exit_code, error.stdout, error.stderr) == (i, f"out {i}\n", f"err {i}\n"), error

        await asyncio.gather(*(one(i) for i in range(1, 51)))
