"""Runs the cases of this folder on demand, speaking as js/runner.mjs does: the first line it prints names the SDK and
the cases; after that each line of standard input is the name of a case, and each case that ends prints one line of
JSON: its name and, unless it passed, `error` or `skipped`.

Each case runs twice: as async/... with the SDK's AsyncSandbox, as sync/... with its Sandbox. A case is a method of a
class `Cases` that is made from a sandbox."""

import asyncio
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

from e2b import AsyncSandbox, Sandbox

from wait import InThreads, Skip


def say(**message):
    print(json.dumps(message), flush=True)


async def run(name, case):
    try:
        await case()
        say(name=name)
    except Skip as reason:
        say(name=name, skipped=str(reason))
    except BaseException:
        say(name=name, error=traceback.format_exc())


async def main():
    # A synchronous call keeps its thread until it returns: no case may have to wait for a free one.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(200))

    # Debug mode, in which there is no control plane; E2B_SANDBOX_URL says where the daemon is.
    flavours = {"async": await AsyncSandbox.create(debug=True), "sync": InThreads(Sandbox.create(debug=True))}
    cases = {}
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        module = importlib.import_module(file.stem) if file.stem not in ("runner", "wait") else None
        for flavour, sandbox in flavours.items() if module else ():
            for name, case in vars(module.Cases).items():
                if not name.startswith("_"):
                    full = f"{flavour}/{file.stem}/{name.replace('_', '-')}"
                    cases[full] = case.__get__(module.Cases(sandbox))

    version = importlib.metadata.version("e2b")
    say(sdk=f"e2b {version}, python {platform.python_version()}", cases=list(cases))

    running = set()
    while line := await asyncio.to_thread(sys.stdin.readline):
        task = asyncio.create_task(run(line.strip(), cases[line.strip()]))
        running.add(task)
        task.add_done_callback(running.discard)
    os._exit(0)  # standard input is closed: whatever still runs has been given up


asyncio.run(main())
