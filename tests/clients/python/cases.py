"""The shared cases of cases.json, and whether a reply is what they expect. ../node/cases.mjs says the same in JavaScript.

In a case `~` stands for a prefix of the client's own, `$name` for what a step before kept: the last element of its reply, or that `at` a place. Expected is
a JSON value, in which a text in angle brackets stands for many: see `matches`. A map with the key `...` may have keys beyond the
expected ones.
"""

import contextlib
import json
import os
import re
import sys
import threading
from pathlib import Path

import redis

# To each of these the proxy's answer is the error, once, for a product that is named after it.
REFUSED_ONCE = ("LOADING", "TRYAGAIN", "INDOUBT")
CASES = json.loads((Path(__file__).parent.parent / "cases.json").read_text())
# One call of a scan sees all keys only while there are few.
if os.environ.get("MANY_KEYS"):
    CASES = [case for case in CASES if not case.get("few_keys")]


class Failure(Exception):
    """Why a check has failed."""


class Report:
    """Prints a line for each check, and remembers whether one has failed."""

    def __init__(self):
        self.failed = False

    def check(self, name, function):
        try:
            function()
        except Exception as error:  # Whatever a client throws is a failed check.
            self.failed = True
            print(f"FAIL {name}: {type(error).__name__} {error}")
        else:
            print(f"ok   {name}")
        sys.stdout.flush()


class ErrorReply:
    """An error reply as the server has sent it."""

    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return f"error {self.text!r}"


def matches(expected, reply, maps):
    """Whether a reply is what is expected. `maps` says how this client shows maps: as "map", "flat" as they are in RESP2, or as "pairs", of
    which an empty list may be none."""
    if isinstance(expected, dict):
        if maps == "flat":
            if not isinstance(reply, list) or len(reply) % 2:
                return False
            reply = dict(zip(reply[::2], reply[1::2], strict=True))
        if maps == "pairs" and reply == []:
            reply = {}
        if not isinstance(reply, dict):
            return False
        keys = expected.keys() - {"..."}
        known = keys <= reply.keys() if "..." in expected else keys == reply.keys()
        return known and all(matches(expected[key], reply[key], maps) for key in keys)
    if isinstance(expected, list):
        same = isinstance(reply, list) and len(reply) == len(expected)
        return same and all(matches(*pair, maps) for pair in zip(expected, reply, strict=True))
    if isinstance(expected, str) and expected.startswith("<"):
        if expected == "<any>":
            return True
        if expected == "<int>":
            return type(reply) is int
        if expected.startswith("<list containing "):
            return isinstance(reply, list) and expected[17:-1] in reply
        if not isinstance(reply, str):
            return False
        if expected.startswith("<text containing "):
            return expected[17:-1] in reply
        patterns = {"<position>": r"\d+-\d+", "<digits>": r"\d+", "<text>": r".+"}
        return re.fullmatch(patterns[expected], reply) is not None
    return type(reply) is type(expected) and reply == expected


def fill(value, prefix, kept):
    """A copy of a case's value, with what stands for something replaced."""
    if isinstance(value, str):
        if value.startswith("$"):
            return kept[value[1:]]
        return value.replace("~", prefix)
    if isinstance(value, list):
        return [fill(item, prefix, kept) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, prefix, kept) for key, item in value.items()}
    return value


def batches(steps):
    """The steps in groups that can be sent together: none uses what another of its group keeps."""
    batch = []
    for step in steps:
        if batch and any(word.startswith("$") for word in step["send"]):
            yield batch
            batch = []
        batch.append(step)
    yield batch


def run_case(case, prefix, maps, send):
    """Runs a case. `send` takes a list of commands and returns their replies in plain Python values."""
    kept = {}
    for batch in batches(case["steps"]):
        replies = send([fill(step["send"], prefix, kept) for step in batch])
        if len(replies) != len(batch):
            raise Failure(f"{len(replies)} replies to {len(batch)} commands")
        for step, reply in zip(batch, replies, strict=True):
            if "error" in step:
                expected = fill(step["error"], prefix, kept)
                good = isinstance(reply, ErrorReply) and reply.text.startswith(expected)
            else:
                expected = fill(step["expect"], prefix, kept)
                good = matches(expected, reply, maps)
            if not good:
                raise Failure(f"{' '.join(step['send'])}: {reply!r}, expected {expected!r}")
            if "keep" in step:
                kept[step["keep"]] = reply[step.get("at", -1)]


def run_cases(report, client, prefix, maps, send):
    """Runs all cases. The prefix must be no other run's."""
    for case in CASES:
        report.check(f"{client}: {case['name']}", lambda case=case: run_case(case, prefix, maps, send))


def drops(request):
    """How many replies to this REQUEST the proxy has swallowed."""
    return Path(os.environ["DROPS"]).read_text().split().count(request)


@contextlib.contextmanager
def selling(product):
    """Sells the only unit of a product and puts it back, again and again: who listens to its events hears one before long. Events are told
    only while somebody listens, so a first one may come too early."""
    ended = threading.Event()
    with redis.Redis("127.0.0.1", int(os.environ["PORT"])) as client:
        client.execute_command("STOCK.SET", product, 1)

        def sell():
            while not ended.wait(0.02):
                client.execute_command("STOCK.DECR", product, 1)
                client.execute_command("STOCK.INCR", product, 1)

        thread = threading.Thread(target=sell)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def check_event(text, product):
    """Fails where this is not what is told of a product that `selling` sells."""
    event = json.loads(text)
    available = {"soldout": 0, "back": 1}[event["event"]]
    if not matches({"event": "<text>", "product": product, "available": available, "position": "<position>"}, event, "map"):
        raise Failure(f"{text} of {product}")
