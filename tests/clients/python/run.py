"""redis-py against Holdfast."""

import asyncio
import os
import re
from pathlib import Path

import redis
import redis.asyncio

import cells
from cases import CASES, REFUSED_ONCE, ErrorReply, Failure, Report, drops, run_cases

HOST, PORT, PROXY = "127.0.0.1", int(os.environ["PORT"]), int(os.environ["PROXY_PORT"])
README = (Path(__file__).parent.parent.parent.parent / "README.md").read_text()
# These end the server, or what they need there is once: tests/it has them.
NOT_HERE = {
    ("HOLDFAST.AWAIT", "LOST"),
    ("HOLDFAST.DRAIN", "OK"),
    ("HOLDFAST.DRAIN", "PENDING"),
    ("HOLDFAST.DEADLETTER RETRY", "OK"),
    ("HOLDFAST.DEADLETTER DROP", "OK"),
}
report = Report()


def plain(reply):
    """A reply as the cases have it: text for bytes, lists, and error replies in full."""
    if isinstance(reply, bytes):
        return reply.decode()
    if isinstance(reply, (list, tuple, set)):
        return [plain(item) for item in reply]
    if isinstance(reply, dict):
        return {plain(key): plain(value) for key, value in reply.items()}
    if isinstance(reply, redis.ResponseError):
        # redis-py keeps the error's word apart where it knows it, and in the text where it does not.
        word = f"{reply.status_code} " if reply.status_code else ""
        return ErrorReply(word + str(reply))
    if isinstance(reply, Exception):
        raise reply
    return reply


def one_by_one(client):
    def send(commands):
        replies = []
        for command in commands:
            try:
                reply = client.execute_command(*command)
            except redis.ResponseError as error:
                reply = error
            replies.append(plain(reply))
        return replies

    return send


def pipelined(client):
    def send(commands):
        with client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return [plain(reply) for reply in pipeline.execute(raise_on_error=False)]

    return send


def check_that(is_so, what):
    if not is_so:
        raise Failure(what)


def methods(client):
    """What redis-py makes of the replies to Redis's own commands."""
    text = plain(client.info())
    check_that(text["loading"] == 0 and text["redis_version"] == "7.2.0", text)
    check_that(client.ping() is True, "ping")
    check_that(client.echo("x") in ("x", b"x"), "echo")
    check_that(all(isinstance(part, int) for part in client.time()), "time")
    check_that(plain(client.config_get("timeout")) == {"timeout": "0"}, client.config_get("timeout"))
    check_that(client.client_setname("shop") is True and plain(client.client_getname()) == "shop", "client_getname")
    own = client.client_id()
    check_that(any(entry["id"] == str(own) for entry in client.client_list()), client.client_list())
    check_that(client.client_info()["lib-name"] == "redis-py", client.client_info())
    check_that("stock.decr" in client.command(), "command")
    check_that(client.command_count() == len(client.command()), "command_count")
    check_that("stock.get" in plain(client.command_list()), "command_list")
    check_that(client.dbsize() == 0 and isinstance(client.slowlog_get(), list) and plain(client.acl_whoami()) == "default", "dbsize, slowlog, acl")


def dropped(options, prefix):
    """The connection is lost twice after the command was executed; redis-py itself sends it again."""
    direct = redis.Redis(HOST, PORT, **options)
    product, request = f"{prefix}lost", f"{prefix}lost-1"
    direct.execute_command("STOCK.SET", product, 10)
    command = ("STOCK.DECR", product, 1, "REQUEST", request)
    with redis.Redis(HOST, PROXY, **options) as client:
        reply = client.execute_command(*command)
    check_that(plain(reply)[:2] == ["OK", 9], reply)
    check_that(drops(request) == 2, f"{drops(request)} replies were dropped")
    check_that(direct.execute_command(*command) == reply, "the repeated REQUEST has another reply")
    check_that(direct.execute_command("STOCK.GET", product) == 9, "more than one effect")
    direct.close()


def every_command_has_a_case():
    client = redis.Redis(HOST, PORT, decode_responses=True)
    there = client.command_list(module="holdfast")
    client.close()
    # A subcommand is listed as command|subcommand.
    tried = {"|".join(map(str, step["send"][:words])).lower() for case in CASES for step in case["steps"] for words in (1, 2)}
    check_that(set(there) <= tried, f"none has {sorted(set(there) - tried)}: add to cases.json")


def every_outcome_has_a_case():
    """Of each command, as the README's table of commands has them."""
    table = README.split("<!-- commands -->")[1].split("<!-- /commands -->")[0]
    rows = [re.split(r"(?<!\\)\|", row) for row in table.splitlines() if row.startswith("| `")]
    replies = {re.match(r" `([A-Z.]+( (LIST|RETRY|DROP|HELP))?)", row[1])[1]: row[3] for row in rows}
    promised = {(name, outcome) for name, reply in replies.items() for outcome in re.findall(r"`([A-Z]+)[,`]", reply)}
    tried = set()
    for case in CASES:
        for step in case["steps"]:
            expected = step.get("expect")
            if isinstance(expected, list) and expected and isinstance(expected[0], str):
                name = " ".join(step["send"][:2]).upper()
                tried.add((name if name in replies else name.split(" ")[0], expected[0]))
    check_that(promised - NOT_HERE <= tried, f"none has {sorted(promised - NOT_HERE - tried)}: add to cases.json")


def every_error_word_is_met():
    """In a case or, as what the proxy says and what is said to who has not logged in, in a cell of each client."""
    table = {row[0] for row in re.findall(r"^\| `([A-Z]+)( <[a-z ]+>)?` \|", README, re.MULTILINE)}
    promised = table | set(re.findall("[A-Z]+", re.search("^(`NOAUTH`.*) are as in Redis", README, re.MULTILINE)[1]))
    met = {step["error"].split(" ")[0] for case in CASES for step in case["steps"] if "error" in step} | {*REFUSED_ONCE, *cells.OF_LOGINS}
    check_that(len(promised) > 10 and promised <= met, f"nobody meets {sorted(promised - met)}")


def synchronous(name, prefix, maps, options):
    # As in a first program: with nothing but an address.
    client = redis.Redis(HOST, PORT, **options)
    report.check(f"{name}: methods", lambda: methods(client))
    # From here on the replies as they come: redis-py makes other values of those of Redis's own commands.
    client.response_callbacks.clear()
    run_cases(report, name, f"{prefix}-", maps, one_by_one(client))
    run_cases(report, f"{name}, pipelined", f"{prefix}-pipe-", maps, pipelined(client))
    report.check(f"{name}: a dropped connection, one effect", lambda: dropped(options, f"{prefix}-"))
    report.check(f"{name}: disconnects", client.close)


async def asynchronous(name, prefix):
    client = redis.asyncio.Redis(host=HOST, port=PORT)
    client.response_callbacks.clear()
    loop = asyncio.get_running_loop()

    async def ask(commands):
        replies = []
        for command in commands:
            try:
                reply = await client.execute_command(*command)
            except redis.ResponseError as error:
                reply = error
            replies.append(plain(reply))
        return replies

    def send(commands):
        return asyncio.run_coroutine_threadsafe(ask(commands), loop).result()

    await asyncio.to_thread(run_cases, report, name, f"{prefix}-", "map", send)
    await client.aclose()


version = redis.__version__
report.check("every command of Holdfast has a case", every_command_has_a_case)
report.check("every outcome of a command has a case", every_outcome_has_a_case)
report.check("every error word is met", every_error_word_is_met)
synchronous(f"redis-py {version}", "py3", "map", {})
synchronous(f"redis-py {version} decoding", "py3d", "map", {"decode_responses": True})
synchronous(f"redis-py {version} RESP2", "py2", "flat", {"protocol": 2})
synchronous(f"redis-py {version} RESP2 decoding", "py2d", "flat", {"protocol": 2, "decode_responses": True})
asyncio.run(asynchronous(f"redis-py {version} asyncio", "pya"))
cells.synchronous(report, "redis-py")
asyncio.run(cells.asynchronous(report, "redis-py asyncio"))
raise SystemExit(report.failed)
