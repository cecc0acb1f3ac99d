"""Clients in compiled languages against Holdfast. Each is a program of clients/ that takes commands line by line and prints replies as JSON,
so that the cases and what is expected of them stand in one place.

Arguments: the client's name, whether it shows maps as `map` or `flat` in its own choice of protocol, the protocols it can be told to speak
(`2`, `3`, both or neither, as `23` and `-`), and the program's words, in which PORT and PROTOCOL stand for these. It logs in as $CLIENT_USER
with $CLIENT_PASSWORD, if there is one.
"""

import json
import os
import subprocess
import sys

from cases import REFUSED_ONCE, ErrorReply, Failure, Report, check_event, drops, run_cases, selling

PORT, PROXY, USERS = os.environ["PORT"], os.environ["PROXY_PORT"], os.environ["USERS_PORT"]
report = Report()


def check_that(is_so, what):
    if not is_so:
        raise Failure(what)


class Bridge:
    """One running program."""

    def __init__(self, port, protocol, login=()):
        filled = [word.replace("PORT", port).replace("PROTOCOL", protocol) for word in PROGRAM]
        environment = os.environ | dict(zip(("CLIENT_USER", "CLIENT_PASSWORD"), login, strict=False))
        self.process = subprocess.Popen(filled, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment)

    def line(self, text):
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        check_that(answer, f"the program has ended at {text}")
        return json.loads(answer)

    def ask(self, *words):
        return self.line(" ".join(word.encode().hex() or "." for word in map(str, words)))

    def send(self, commands):
        return [plain(self.ask(*command)) for command in commands]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def plain(reply):
    if isinstance(reply, dict) and list(reply) == ["error"]:
        return ErrorReply(reply["error"])
    if isinstance(reply, dict) and list(reply) == ["lost"]:
        raise Failure(f"a lost connection: {reply['lost']}")
    return reply


def with_bridge(function, port=PORT, protocol="0", login=()):
    def run():
        bridge = Bridge(port, protocol, login)
        try:
            return function(bridge)
        finally:
            bridge.close()

    return run


def speaks(protocol):
    def run(bridge):
        shown = bridge.ask("CLIENT", "INFO")
        check_that(f" resp={protocol} " in shown, shown)

    return run


def says_true(line):
    def run(bridge):
        for product in (f"{LANGUAGE}-mug", "java-mug"):
            bridge.ask("STOCK.SET", product, 10)
        check_that(bridge.line(line) is True, line)

    return run


def reconnects(bridge):
    bridge.ask("PING")
    own = bridge.ask("CLIENT", "ID")
    with_bridge(lambda other: other.ask("CLIENT", "KILL", "ID", own))()
    # A client that tells of the loss works again after that.
    replies = [bridge.ask("PING") for _ in range(3)]
    check_that(replies[-1] == "PONG", replies)


def subscribes(bridge):
    product = f"{LANGUAGE}-event"
    with selling(product):
        message = bridge.line(f"subscribe stock:events:{product}")
    check_event(message, product)


def refused_with(reply, word):
    """Whether it is the error with this word."""
    return isinstance(reply, dict) and reply.get("error", "").startswith(f"{word} ")


def error_words(through):
    """A program does not meet those after which its client itself sends the command again."""
    direct = Bridge(PORT, "0")
    reply = direct.ask("STOCK.INCR", f"{LANGUAGE}-unknown", 1)
    check_that(refused_with(reply, "NOTFOUND"), reply)
    through.ask("PING")
    for word in REFUSED_ONCE:
        product = f"{word.lower()}-{LANGUAGE}"
        direct.ask("STOCK.SET", product, 1)
        command = ("STOCK.DECR", product, 1, "REQUEST", product)
        if word not in SENT_AGAIN:
            reply = through.ask(*command)
            check_that(refused_with(reply, word), reply)
        reply = through.ask(*command)
        check_that(isinstance(reply, list) and reply[:2] == ["OK", 0], reply)
    direct.close()


def logs_in():
    user, password = os.environ["LOGIN_USER"], os.environ["LOGIN_PASSWORD"]
    for protocol in PROTOCOLS.replace("-", "0"):
        bridge = Bridge(USERS, protocol, (user, password))
        reply = bridge.ask("STOCK.INCR", "users", 1)
        check_that(isinstance(reply, list) and reply[0] == "OK", reply)
        reply = bridge.ask("STOCK.SET", "users", 1)
        check_that(refused_with(reply, "NOPERM"), reply)
        bridge.close()
    for word, login in (("NOAUTH", ()), ("WRONGPASS", (user, "wrong"))):
        reply = with_bridge(lambda bridge: bridge.ask("STOCK.GET", "users"), port=USERS, login=login)()
        check_that(refused_with(reply, word), reply)


def one_effect(bridge):
    """Each connection is lost twice after the command was executed; where the client does not send it again, its program does."""
    product = f"{LANGUAGE}-lost"
    with_bridge(lambda direct: direct.ask("STOCK.SET", product, LOST))()
    for number in range(LOST):
        request = f"{LANGUAGE}-lost-{number}"
        for _ in range(4):
            reply = bridge.ask("STOCK.DECR", product, 1, "REQUEST", request)
            if not isinstance(reply, dict):
                break
        check_that(isinstance(reply, list) and reply[0] == "OK", reply)
        check_that(drops(request) == 2, f"{drops(request)} replies were dropped")
    left = with_bridge(lambda direct: direct.ask("STOCK.GET", product))()
    check_that(left == 0, f"{left} are left")


def effects(expected):
    """The same without a REQUEST, where a program does not send it again: how often it takes effect is up to the client."""

    def run(bridge):
        direct = Bridge(PORT, "0")
        for number in range(LOST):
            product = f"bare-{LANGUAGE}-{number}"
            direct.ask("STOCK.SET", product, 10, "ACK", "redis")
            bridge.ask("STOCK.DECR", product, 1)
            left = direct.ask("STOCK.GET", product)
            check_that(left == 10 - expected, f"{left} of 10 are left")
            direct.ask("STOCK.DEL", product, "ACK", "redis")
        direct.close()

    return run


NAME, MAPS, PROTOCOLS, LANGUAGE, *PROGRAM = sys.argv[1:]
# After these errors the client itself sends a command again.
SENT_AGAIN = ("LOADING", "TRYAGAIN") if LANGUAGE == "redisson" else ()
# Redisson takes no notice of a lost connection before its time-out, 3 s, and waits for up to 2 s more.
LOST = 3 if LANGUAGE == "redisson" else 100
for protocol in PROTOCOLS.replace("-", "0"):
    maps = MAPS if protocol != "2" else "flat"
    client = NAME if protocol == "0" else f"{NAME} RESP{protocol}"
    bridge = Bridge(PORT, protocol)
    run_cases(report, client, f"{LANGUAGE}{protocol}-", maps, bridge.send)
    bridge.close()
cell = lambda column, run: report.check(f"cell {NAME} | {column}", run)  # noqa: E731
cell("connects", with_bridge(lambda bridge: check_that(bridge.ask("PING") == "PONG", "PING")))
for protocol in "23":
    if protocol in PROTOCOLS:
        cell(f"RESP{protocol}", with_bridge(speaks(protocol), protocol=protocol))
    elif protocol == "2":
        cell("RESP2", with_bridge(speaks("2")))
cell("pool of 50", with_bridge(says_true("pool 50")))
cell("pipeline of 10,000", with_bridge(says_true("pipeline 10000")))
cell("reconnects", with_bridge(reconnects))
cell("pub/sub", with_bridge(subscribes))
cell("error words", with_bridge(error_words, port=PROXY))
cell("logs in", logs_in)
cell("one effect", with_bridge(one_effect, port=PROXY))
# These send a command again that was under way when its connection was lost.
count = 3 if LANGUAGE in ("lettuce", "redisson") else 1
cell(f"without REQUEST={count}", with_bridge(effects(count), port=PROXY))
raise SystemExit(report.failed)
