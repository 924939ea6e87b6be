"""What the cases share: waiting, skipping, and one way to use both flavours of the SDK."""

import asyncio
import time


class Skip(Exception):
    """The case does not apply here."""


def needs(part, method):
    """Skips the case where the SDK is too old to have that method."""
    if not hasattr(part, method):
        raise Skip(f"needs a newer SDK: this one has no {method}")


async def until(condition, what):
    """Returns what `condition` returns as soon as that is true, and fails after ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within 10 s: {what() if callable(what) else what}")


class InThreads:
    """The synchronous SDK with each of its calls in a thread, so that the cases can await them."""

    def __init__(self, target):
        self._target = target

    def __getattr__(self, name):
        value = getattr(self._target, name)
        if not callable(value):
            return _in_threads(value)

        async def call(*args, **kwargs):
            return _in_threads(await asyncio.to_thread(value, *args, **kwargs))

        return call


def _in_threads(value):
    return InThreads(value) if type(value).__module__.startswith("e2b.sandbox_sync.") else value


class Running:
    """A command or terminal whose output is collected while it runs. The asynchronous SDK takes callbacks where the
    command is started, the synchronous one where it is waited for."""

    def __init__(self):
        self.out = ""
        self.err = ""
        self.screen = b""

    def _stdout(self, text):
        self.out += text

    def _stderr(self, text):
        self.err += text

    def _pty(self, data):
        self.screen += data

    @classmethod
    async def command(cls, call, *args, **options):
        """`call` is commands.run, with background=True, or commands.connect."""
        self = cls()
        if _is_async(call):
            self.handle = await call(*args, on_stdout=self._stdout, on_stderr=self._stderr, **options)
            self.ended = asyncio.create_task(self.handle.wait())
        else:
            self.handle = await call(*args, **options)
            self.ended = asyncio.create_task(self.handle.wait(on_stdout=self._stdout, on_stderr=self._stderr))
        return self

    @classmethod
    async def terminal(cls, call, *args, **options):
        """`call` is pty.create or pty.connect."""
        self = cls()
        if _is_async(call):
            self.handle = await call(*args, on_data=self._pty, **options)
            self.ended = asyncio.create_task(self.handle.wait())
        else:
            self.handle = await call(*args, **options)
            self.ended = asyncio.create_task(self.handle.wait(on_pty=self._pty))
        return self

    @property
    def pid(self):
        return self.handle.pid

    async def prints(self, out, err=""):
        await until(lambda: (self.out, self.err) == (out, err), lambda: f"{(out, err)}, so far {(self.out, self.err)}")

    async def shows(self, pattern):
        """Waits for a terminal to show what the pattern matches. What it echoes must not match, which is why the cases
        have the shell compute what they wait for."""
        return await until(
            lambda: pattern.search(self.screen.decode(errors="replace")),
            lambda: f"{pattern.pattern!r} in {self.screen!r}",
        )


def _is_async(call):
    return getattr(call, "__self__", None) is not None  # a bound method of the SDK, not a call made by InThreads


async def failure(kind, awaitable):
    """The exception of that kind which the awaitable must raise."""
    try:
        value = await awaitable
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {value!r}")
