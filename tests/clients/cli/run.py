"""redis-cli against Holdfast."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "python"))
from cases import REFUSED_ONCE, ErrorReply, Failure, Report, check_event, drops, run_cases, selling  # noqa: E402

PORT, PROXY, USERS = os.environ["PORT"], os.environ["PROXY_PORT"], os.environ["USERS_PORT"]
# For a machine where something hangs; nothing here takes longer than two seconds.
PATIENCE = 60
MARK = "-- end of reply --"
report = Report()


def run(*args, stdin="", port=PORT):
    return subprocess.run(
        ["redis-cli", "-p", port, *args], input=stdin, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False
    )


def cli(*args, stdin=""):
    """What redis-cli prints, where it must succeed."""
    done = run(*args, stdin=stdin)
    if done.returncode or done.stderr:
        raise Failure(f"redis-cli {' '.join(args)}: exit code {done.returncode}, {done.stderr}")
    return done.stdout


def check_that(is_so, what):
    if not is_so:
        raise Failure(what)


def quoted(word):
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def in_json(*flags):
    """Sends a list of commands as lines typed into one redis-cli."""

    def send(commands):
        lines = [f"{' '.join(map(quoted, command))}\nECHO {quoted(MARK)}\n" for command in commands]
        printed = cli(*flags, stdin="".join(lines)).split(json.dumps(MARK) + "\n")
        return [reply(text.removesuffix("\n")) for text in printed[:-1]]

    return send


def reply(text):
    if text.startswith("error:"):
        return ErrorReply(json.loads(text.removeprefix("error:")))
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # What is text for people, as of INFO, redis-cli prints as it is.
        return text


def for_people():
    """What somebody at a terminal sees."""
    check_that(re.fullmatch(r'1\) "OK"\n2\) \(integer\) 5\n3\) "\d+-\d+"\n', cli("--no-raw", "STOCK.SET", "cli-eye", "5")), "an array")
    check_that(cli("--no-raw", "STOCK.GET", "cli-eye") == "(integer) 5\n", "an integer")
    check_that(cli("--no-raw", "STOCK.GET", "cli-none") == "(nil)\n", "nil")
    check_that(cli("--no-raw", "STOCK.INCR", "cli-none", "1") == "(error) NOTFOUND no product 'cli-none'\n", "an error")
    shown = cli("--no-raw", "STOCK.INFO", "cli-eye")
    check_that(' 1) "product"\n 2) "cli-eye"\n 3) "available"\n 4) (integer) 5\n' in shown, "a map")
    shown = cli("-3", "--no-raw", "STOCK.INFO", "cli-eye")
    check_that('1# "product" => "cli-eye"\n2# "available" => (integer) 5\n' in shown, "a RESP3 map")
    check_that(re.fullmatch(r"OK\n6\n\d+-\d+\n", cli("STOCK.INCR", "cli-eye", "1")), "raw")
    check_that(re.fullmatch(r"OK\n7\n\d+-\d+\n", cli("-3", "STOCK.INCR", "cli-eye", "1")), "raw, RESP3")
    check_that(cli("-x", "ECHO", stdin="from stdin") == "from stdin\n", "-x")
    check_that(cli("-r", "3", "-i", "0.01", "PING") == "PONG\n" * 3, "-r and -i")
    check_that(run("-e", "STOCK.GET").returncode == 1, "-e")
    url = subprocess.run(["redis-cli", "-u", f"redis://127.0.0.1:{PORT}/0", "PING"], capture_output=True, text=True, check=True)
    check_that(url.stdout == "PONG\n", "-u")


def without_colours(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def documentation():
    """`help` in interactive mode: redis-cli asks COMMAND DOCS for it."""
    names = json.loads(cli("--json", "COMMAND", "LIST"))
    for flags in ((), ("-3",)):
        shown = without_colours(cli(*flags, stdin="".join(f"help {name}\n" for name in names)))
        entry = r"^  {}( .*)?\n  summary: .+\n  since: "
        missing = [name for name in names if not re.search(entry.format(re.escape(name.upper())), shown, re.MULTILINE)]
        check_that(not missing, f"no help on {missing}")
        usage = "  STOCK.DECR product quantity [product quantity ...]"
        check_that(any(line.startswith(usage) for line in shown.splitlines()), "help stock.decr")
    check_that("  CLIENT KILL filter" in without_colours(cli(stdin="help client kill\n")), "help client kill")


def latency():
    check_that(re.fullmatch(r"\d+ \d+ \d+\.\d+ \d+\n", cli("--latency")), "--latency")


def stat():
    """It prints a line a second until it is stopped, and only a terminal gets it at once."""
    ours, its = pty.openpty()
    child = subprocess.Popen(["redis-cli", "-p", PORT, "--stat"], stdin=subprocess.DEVNULL, stdout=its, stderr=its)
    os.close(its)
    shown = ""
    try:
        while not re.search(r"^0 +\d+\.\d+[KMG] +\d+ +\d+ +\d+ ", shown, re.MULTILINE):
            shown += os.read(ours, 4096).decode()
    except OSError as error:
        raise Failure(f"--stat has ended: {shown}") from error
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    check_that("clients" in shown.splitlines()[1], shown)


def hints():
    """Somebody who types is told what may follow, and TAB completes names: redis-cli has both from the server's COMMAND DOCS."""
    ours, its = pty.openpty()
    # Wide enough for a hint, and rows of no account.
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "REDISCLI_HISTFILE": "/dev/null"}
    child = subprocess.Popen(["redis-cli", "-p", PORT], stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)

    def sees(what):
        shown = ""
        while what not in shown:
            if not select.select([ours], [], [], PATIENCE)[0]:
                raise Failure(f"no {what!r} in {shown!r}")
            shown += os.read(ours, 4096).decode(errors="replace")

    try:
        sees("> ")
        os.write(ours, b"stock.decr ")
        sees("product quantity [product quantity ...] [ORDER order] [REQUEST request]")
        # Ctrl-U empties the line.
        os.write(ours, b"\x15holdfast.st\t")
        sees("HOLDFAST.STATUS")
    except OSError as error:
        raise Failure("redis-cli has ended") from error
    finally:
        child.kill()
        child.wait()
        os.close(ours)


def mass_insertion():
    """`--pipe` loads a whole catalogue."""

    def command(*words):
        return f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)

    catalogue = "".join(command("STOCK.SET", f"cli-bulk-{number}", str(number), "ACK", "redis") for number in range(500))
    shown = cli("--pipe", stdin=catalogue)
    check_that(shown.endswith("errors: 0, replies: 500\n"), shown)
    last = cli("STOCK.GET", "cli-bulk-499")
    check_that(last == "499\n", f"the last one: {last}")


def dropped():
    """The connection is lost twice after the command was executed; redis-cli says so, and its user sends it again."""
    cli("STOCK.SET", "cli-lost", "10")
    command = ("STOCK.DECR", "cli-lost", "1", "REQUEST", "cli-lost-1")
    for lost in (1, 2):
        failed = run(*command, port=PROXY)
        check_that(failed.returncode == 1 and drops("cli-lost-1") == lost, failed)
    again = run(*command, port=PROXY)
    check_that(again.returncode == 0 and again.stdout.startswith("OK\n9\n"), again)
    check_that(cli(*command) == again.stdout, "the repeated REQUEST has another reply")
    check_that(cli("STOCK.GET", "cli-lost") == "9\n", "more than one effect")


name = subprocess.run(["redis-cli", "--version"], capture_output=True, text=True, check=True).stdout.strip()
run_cases(report, f"{name} --json", "cli3-", "map", in_json("--json"))
run_cases(report, f"{name} -2 --json", "cli2-", "flat", in_json("-2", "--json"))
report.check(f"{name}: for people", for_people)
report.check(f"{name}: help", documentation)
report.check(f"{name}: hints and completion", hints)
report.check(f"{name}: --latency", latency)
report.check(f"{name}: --stat", stat)
report.check(f"{name}: --pipe", mass_insertion)
report.check(f"{name}: a dropped connection, one effect", dropped)


def monitor():
    """It shows what others send, without secrets."""
    child = subprocess.Popen(["redis-cli", "-p", PORT, "MONITOR"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        check_that(child.stdout.readline() == "OK\n", "OK")
        cli("ECHO", "seen")
        run("AUTH", "default", "s3cret")
        cli("ECHO", "last")
        shown = ""
        while '"last"' not in shown:
            shown += child.stdout.readline()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    check_that('"ECHO" "seen"' in shown and "s3cret" not in shown, shown)


def benchmark():
    """`redis-benchmark` runs as against a Redis."""
    done = subprocess.run(["redis-benchmark", "-p", PORT, "-t", "ping", "-n", "1000", "-q"], capture_output=True, text=True, timeout=PATIENCE)
    check_that(done.returncode == 0 and "PING_MBULK" in done.stdout, done)


def deep():
    cli("STOCK.SET", "cli-deep", "10000")
    command = "*3\r\n$10\r\nSTOCK.DECR\r\n$8\r\ncli-deep\r\n$1\r\n1\r\n"
    shown = cli("--pipe", stdin=command * 10_000)
    check_that("errors: 0, replies: 10000" in shown and cli("STOCK.GET", "cli-deep") == "0\n", shown)


def one_effect():
    cli("STOCK.SET", "cli-once", "100")
    for number in range(100):
        command = ("STOCK.DECR", "cli-once", "1", "REQUEST", f"cli-once-{number}")
        check_that([run(*command, port=PROXY).returncode for _ in range(3)] == [1, 1, 0], command)
    check_that(cli("STOCK.GET", "cli-once") == "0\n", "another number of sales")


def effects():
    for number in range(100):
        product = f"bare-cli-{number}"
        cli("STOCK.SET", product, "10", "ACK", "redis")
        check_that(run("STOCK.DECR", product, "1", port=PROXY).returncode == 1, product)
        check_that(cli("STOCK.GET", product) == "9\n", "another number of sales")
        cli("STOCK.DEL", product, "ACK", "redis")


def reconnects():
    shown = run(stdin="CLIENT KILL SKIPME no\nPING\nPING\n").stdout
    check_that(shown.endswith("PONG\n"), shown)


def pool():
    clients = [subprocess.Popen(["redis-cli", "-p", PORT, "PING"], stdout=subprocess.PIPE, text=True) for _ in range(50)]
    replies = [client.communicate(timeout=PATIENCE)[0] for client in clients]
    check_that(replies == ["PONG\n"] * 50, replies)


def subscribes():
    command = ["redis-cli", "-p", PORT, "SUBSCRIBE", "stock:events:cli-event"]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        confirmed = [child.stdout.readline() for _ in range(3)]
        with selling("cli-event"):
            shown = [child.stdout.readline() for _ in range(3)]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    check_that(confirmed == ["subscribe\n", "stock:events:cli-event\n", "1\n"], confirmed)
    check_that(shown[:2] == ["message\n", "stock:events:cli-event\n"], shown)
    check_event(shown[2], "cli-event")


def error_words():
    shown = run("STOCK.INCR", "cli-unknown", "1").stdout
    check_that(shown.startswith("NOTFOUND no product"), shown)
    for word in REFUSED_ONCE:
        product = f"{word.lower()}-cli"
        cli("STOCK.SET", product, "1")
        command = ("STOCK.DECR", product, "1", "REQUEST", product)
        shown = run(*command, port=PROXY).stdout
        check_that(shown.startswith(f"{word} "), shown)
        shown = run(*command, port=PROXY).stdout
        check_that(shown.startswith("OK\n0\n"), shown)


def logs_in():
    right = ("--no-auth-warning", "--user", os.environ["LOGIN_USER"], "--pass", os.environ["LOGIN_PASSWORD"])
    for flags in ((), ("-3",)):
        shown = run(*flags, *right, "STOCK.INCR", "users", "1", port=USERS)
        check_that(shown.stdout.startswith("OK\n"), shown)
        shown = run(*flags, *right, "STOCK.SET", "users", "1", port=USERS)
        check_that(shown.stdout.startswith("NOPERM "), shown)
        shown = run(*flags, "STOCK.GET", "users", port=USERS)
        check_that("NOAUTH " in shown.stdout + shown.stderr, shown)
        shown = run(*flags, *right[:-1], "wrong", "STOCK.GET", "users", port=USERS)
        check_that("WRONGPASS " in shown.stdout + shown.stderr, shown)


report.check(f"{name}: MONITOR", monitor)
report.check(f"{name}: redis-benchmark", benchmark)
for column, check in (
    ("connects", lambda: check_that(cli("PING") == "PONG\n", "PING")),
    ("RESP2", lambda: check_that(" resp=2 " in cli("-2", "CLIENT", "INFO"), "-2")),
    ("RESP3", lambda: check_that(" resp=3 " in cli("-3", "CLIENT", "INFO"), "-3")),
    ("pool of 50", pool),
    ("pipeline of 10,000", deep),
    ("reconnects", reconnects),
    ("pub/sub", subscribes),
    ("error words", error_words),
    ("logs in", logs_in),
    ("one effect", one_effect),
    ("without REQUEST=1", effects),
):
    report.check(f"cell redis-cli | {column}", check)
raise SystemExit(report.failed)
