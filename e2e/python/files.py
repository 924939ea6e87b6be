"""Files and watching, as the Python SDK does them."""

import inspect
import os
import uuid

from e2b import FileNotFoundException, FilesystemEventType, FileType
from wait import failure, until

ME = os.environ["ENVD_E2E_USER"]  # the user whom the daemon runs as


class Cases:
    def __init__(self, sandbox):
        self._files = sandbox.files
        self._commands = sandbox.commands

    async def _dir(self):
        path = f"/tmp/envd-e2e-{uuid.uuid4()}"
        await self._files.make_dir(path)
        return path

    async def write_read(self):
        dir = await self._dir()
        info = await self._files.write(f"{dir}/new/x.txt", "content")
        assert (info.name, info.path, info.type) == ("x.txt", f"{dir}/new/x.txt", FileType.FILE), info
        assert await self._files.read(f"{dir}/new/x.txt") == "content"
        data = bytes(range(256)) * 8192
        await self._files.write(f"{dir}/bytes", data)
        assert await self._files.read(f"{dir}/bytes", format="bytes") == data
        await self._files.write(f"{dir}/bytes", "")
        assert await self._files.read(f"{dir}/bytes") == ""
        await self._files.remove(dir)

    async def write_files(self):
        dir = await self._dir()
        infos = await self._files.write_files([{"path": f"{dir}/{name}", "data": name} for name in ("b", "a", "sub/c")])
        assert [info.path for info in infos] == [f"{dir}/b", f"{dir}/a", f"{dir}/sub/c"], infos
        assert await self._files.read(f"{dir}/sub/c") == "sub/c"
        await self._files.remove(dir)

    async def missing(self):
        dir = await self._dir()
        await failure(FileNotFoundException, self._files.read(f"{dir}/none"))
        await failure(FileNotFoundException, self._files.list(f"{dir}/none"))
        await failure(FileNotFoundException, self._files.rename(f"{dir}/none", f"{dir}/x"))
        assert await self._files.exists(f"{dir}/none") is False
        await self._files.remove(f"{dir}/none")
        await self._files.remove(dir)

    async def list(self):
        dir = await self._dir()
        await self._commands.run("mkdir -p a/b/c; touch f a/f1; ln -s a l", cwd=dir)
        assert [e.name for e in await self._files.list(dir)] == ["a", "f", "l"]
        assert [e.name for e in await self._files.list(dir, depth=2)] == ["a", "b", "f1", "f", "l"]
        await self._files.remove(dir)

    async def make_dir(self):
        dir = await self._dir()
        assert await self._files.make_dir(f"{dir}/x/y") is True
        assert await self._files.make_dir(f"{dir}/x/y") is False
        await self._files.remove(dir)

    async def info(self):
        dir = await self._dir()
        await self._commands.run("echo 12345 > f; chmod 640 f; ln -s f l", cwd=dir)
        info = await self._files.get_info(f"{dir}/f")
        assert (info.name, info.type, info.size, info.mode, info.permissions, info.owner) == (
            "f", FileType.FILE, 6, 0o640, "-rw-r-----", ME), info
        assert (await self._files.get_info(f"{dir}/l")).symlink_target == f"{dir}/f"
        assert (await self._files.rename(f"{dir}/f", f"{dir}/sub/g")).path == f"{dir}/sub/g"
        await self._files.remove(dir)

    async def watch(self):
        dir = await self._dir()
        seen = []
        pushed = "on_event" in inspect.signature(self._files.watch_dir).parameters  # the synchronous SDK polls
        handle = await self._files.watch_dir(dir, **({"on_event": seen.append} if pushed else {}), recursive=True)
        await self._files.write(f"{dir}/sub/f", "x")

        async def created():
            if not pushed:
                seen.extend(await handle.get_new_events())
            return any(e.name == "sub/f" and e.type == FilesystemEventType.CREATE for e in seen)

        await until(created, "CREATE sub/f")
        await handle.stop()
        await self._files.remove(dir)
