# Runs a command with the E2B SDK: python3 run.py [URL]
import sys
from e2b import Sandbox

url = sys.argv[1] if len(sys.argv) > 1 else None  # http://localhost:49983
sandbox = Sandbox.create(debug=True, sandbox_url=url)
result = sandbox.commands.run("echo hello from $(uname -s)", on_stdout=lambda text: print(text, end=""))
print("exit code", result.exit_code)
