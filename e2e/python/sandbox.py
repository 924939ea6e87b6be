"""The sandbox as a whole: is it there, and the access token. For the cases with a token the SDK is not in debug mode:
it asks a control plane, which the test plays, for the daemon's version and token, as it does in production."""

import asyncio
import inspect
import json
import os
import urllib.error
import urllib.request
import uuid

from e2b import AsyncSandbox, AuthenticationException, PtySize, Sandbox

from wait import InThreads, Running, failure

ME = os.environ["ENVD_E2E_USER"]  # the user whom the daemon runs as
URL = os.environ["ENVD_E2E_SECURE_URL"]  # a daemon with an access token set
API = os.environ["ENVD_E2E_API_URL"]  # the control plane that knows the token


class Cases:
    def __init__(self, sandbox):
        self._sandbox = sandbox

    async def _create(self, debug):
        if isinstance(self._sandbox, InThreads):
            return InThreads(await asyncio.to_thread(Sandbox.create, sandbox_url=URL, debug=debug))
        return await AsyncSandbox.create(sandbox_url=URL, debug=debug)

    def _secure(self):
        os.environ["E2B_API_URL"] = API  # not every SDK takes it as an option
        return self._create(debug=False)

    def _without_token(self):
        return self._create(debug=True)

    async def is_running(self):
        assert await self._sandbox.is_running() is True

    async def token(self):
        sandbox = await self._secure()
        assert (await sandbox.commands.run("echo out")).stdout == "out\n"
        terminal = await Running.terminal(sandbox.pty.create, PtySize(rows=24, cols=80))
        await sandbox.pty.send_stdin(terminal.pid, b"exit\n")
        assert (await terminal.ended).exit_code == 0

    async def signed_urls(self):
        """Links that stand for the token: for one file, one operation, one user, until they expire."""
        sandbox = await self._secure()
        path = f"/tmp/envd-e2e-signed ü+{uuid.uuid4()}"

        async def fetch(url, body=None):
            url = await url if inspect.isawaitable(url) else url
            kind = {"Content-Type": "application/octet-stream"}
            try:
                with await asyncio.to_thread(urllib.request.urlopen, urllib.request.Request(url, body, kind)) as response:
                    return response.status, response.read().decode()
            except urllib.error.HTTPError as refused:
                return refused.code, json.load(refused)["message"]

        for options in ({}, {"user": ME}, {"user": ME, "use_signature_expiration": 60}):
            assert (await fetch(sandbox.upload_url(path, **options), b"signed"))[0] == 200
            assert await fetch(sandbox.download_url(path, **options)) == (200, "signed")
        expired = sandbox.download_url(path, use_signature_expiration=-10)
        assert await fetch(expired) == (401, "signature is already expired")
        assert await fetch(sandbox.upload_url(path)) == (401, "invalid signature")  # GET is another operation
        await sandbox.files.remove(path)

    async def login_env(self):
        commands = (await self._secure()).commands
        script = 'printf "\\n%s\\n" "$USER $LOGNAME $HOME"; getent passwd "$USER"; command -v bash'
        names, passwd, bash = (await commands.run(script)).stdout.splitlines()[-3:]
        assert names == f"{ME} {ME} {passwd.split(':')[5]}", (names, passwd)
        assert bash.endswith("/bash"), bash

    async def token_missing(self):
        commands = (await self._without_token()).commands
        await failure(AuthenticationException, commands.run("echo out"))
        await failure(AuthenticationException, commands.list())
        await failure(AuthenticationException, commands.kill(1))

    async def token_health(self):
        assert await (await self._without_token()).is_running() is True

    async def version_gates(self):
        """What the SDK leaves out for an old daemon works with the version that the daemon really reports."""
        commands = (await self._secure()).commands
        assert (await commands.run("id -un")).stdout == ME + "\n"
        assert (await commands.run("cat", stdin=False)).stdout == ""
        command = await Running.command(commands.run, "cat", background=True, stdin=True)
        await commands.send_stdin(command.pid, "x")
        if not hasattr(commands, "close_stdin"):
            await command.handle.kill()
            return
        await commands.close_stdin(command.pid)
        assert (await command.ended).stdout == "x"
