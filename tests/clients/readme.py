"""Runs the examples of the README, in their order: code between ```python and ```js, and commands of redis-cli between ```sh."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REDIS_CLI = re.compile(r"^(?:\$ )?redis-cli -p 6380 (?!--stat|--latency|-i)\S.*$", re.MULTILINE)
# For an example that waits for what never comes.
PATIENCE = 60


def examples(text):
    """Each as its name, the words that run it, and where it is written to."""
    scratch = HERE / "node" / ".readme"
    scratch.mkdir(exist_ok=True)
    for fence in FENCE.finditer(text):
        kind, code = fence[1], fence[2].replace("6380", os.environ["PORT"])
        line = text.count("\n", 0, fence.start()) + 1
        if kind == "python":
            yield f"README.md:{line}: Python", [sys.executable, "-c", code]
        elif kind in ("js", "javascript"):
            # Below node/, where the libraries are.
            file = scratch / f"line-{line}.{'cjs' if 'require(' in code else 'mjs'}"
            file.write_text(code)
            yield f"README.md:{line}: JavaScript", ["node", str(file)]
        elif kind in ("sh", "bash", "console"):
            for number, command in enumerate(REDIS_CLI.findall(fence[2]), 1):
                command = command.removeprefix("$ ").replace("6380", os.environ["PORT"])
                yield f"README.md:{line}: redis-cli {number}", ["bash", "-c", command]


def run(words):
    """Why it has failed, or nothing."""
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"has not ended within {PATIENCE} s"
    return f"exit code {done.returncode}\n{done.stdout}{done.stderr}" if done.returncode else None


if not README.exists():
    print("there is no README.md, so no examples of it")
    raise SystemExit(0)
failed = False
for name, words in examples(README.read_text()):
    why = run(words)
    failed = failed or why is not None
    print(f"ok   {name}" if why is None else f"FAIL {name}: {why}", flush=True)
raise SystemExit(failed)
