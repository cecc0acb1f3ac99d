"""Redisson on the backing Redis, and clients in three languages on Holdfast, add to one number in a file under one lock.

Reading and writing the file are two steps: two holders at once would lose a count. LOCK_RACE=10000 makes it as long as it is promised.
Arguments: the programs of each side, as SIDE=COMMAND with its words separated by spaces; sides that are left out are named so.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TOTAL = int(os.environ.get("LOCK_RACE", "2000"))
# How many clients each side has; java's are threads.
CLIENTS = {"java": 4, "python": 14, "node": 13, "go": 13}
PATIENCE = 240


def main():
    sides = dict(argument.split("=", 1) for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "number"
        file.write_text("0")
        started = {}
        for side, command in sides.items():
            port = os.environ["REDIS_PORT" if side == "java" else "PORT"]
            words = [*command.split(" "), port, str(file), "race", str(CLIENTS[side]), str(TOTAL)]
            started[side] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            for side, program in started.items():
                line = program.stdout.readline()
                assert line == "ready\n", f"{side} said {line!r}"
            for program in started.values():
                program.stdin.write("go\n")
                program.stdin.flush()
            counts = {side: int(program.communicate(timeout=PATIENCE)[0]) for side, program in started.items()}
        finally:
            for program in started.values():
                program.kill()
        number = int(file.read_text())
    clients = sum(CLIENTS[side] for side in sides)
    says = ", ".join(f"{side} {count} by {CLIENTS[side]}" for side, count in counts.items())
    report(number == TOTAL == sum(counts.values()), f"one lock for all of them: the number is exact ({number} of {TOTAL}: {says})")
    for side, count in counts.items():
        share = TOTAL * CLIENTS[side] / clients
        report(share / 4 <= count <= share * 4, f"one lock for all of them: {side} had {count / share:.2f} of its share")


def report(good, what):
    print(f"{'ok  ' if good else 'FAIL'} {what}", flush=True)


main()
