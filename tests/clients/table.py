"""The README's table of clients, from the lines `client | column` or `client | column=number` of the checks that have passed, in the file that is named. With UPDATE=1 it is
written, otherwise it must be there. The second argument says how many clients were left out: then only the lines of the others must be there."""

import os
import sys
from pathlib import Path

COLUMNS = (
    "connects",
    "RESP2",
    "RESP3",
    "pool of 50",
    "pipeline of 10,000",
    "reconnects",
    "pub/sub",
    "error words",
    "logs in",
    "one effect",
    "without REQUEST",
)
README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- clients -->\n", "<!-- /clients -->"

passed = {}
for line in Path(sys.argv[1]).read_text().splitlines():
    client, column = line.split(" | ")
    column, _, number = column.partition("=")
    passed.setdefault(client, {})[column] = number or "yes"
table = f"| client | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}\n"
for client, columns in passed.items():
    table += f"| {client} | {' | '.join(columns.get(column, '–') for column in COLUMNS)} |\n"
text = README.read_text()
head, rest = text.split(BEGIN)
shown, tail = rest.split(END)
left_out = int(sys.argv[2])
if shown == table or (left_out and set(table.splitlines()) <= set(shown.splitlines())):
    raise SystemExit(0)
if left_out and os.environ.get("UPDATE") == "1":
    print("FAIL the README's table of clients is written only where none is left out")
    raise SystemExit(1)
if os.environ.get("UPDATE") != "1":
    print(f"FAIL the README's table of clients is another one: UPDATE=1 tests/clients/run writes\n{table}")
    raise SystemExit(1)
README.write_text(head + BEGIN + table + END + tail)
