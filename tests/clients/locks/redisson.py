"""Holdfast's locks and Redisson's, both ways. Arguments: the words that start java/RedissonLocks."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import redis

sys.path.append(str(Path(__file__).parent.parent / "python"))

from cases import Failure, Report  # noqa: E402

report = Report()


class Java:
    """A Java service with Redisson, which does as it is told."""

    def __init__(self):
        words = [*sys.argv[1:], "follow", os.environ["REDIS_PORT"]]
        self.program = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.answer() == "ready"

    def tell(self, *words):
        self.program.stdin.write(" ".join(map(str, words)) + "\n")
        self.program.stdin.flush()

    def answer(self):
        return self.program.stdout.readline().strip()

    def ask(self, *words):
        self.tell(*words)
        return self.answer()


def connect(port):
    return redis.Redis("127.0.0.1", int(os.environ[port]), decode_responses=True, socket_timeout=60)


java, holdfast, backing = Java(), connect("PORT"), connect("REDIS_PORT")


def check_that(is_so, what):
    if not is_so:
        raise Failure(what)


def is_(expected, found):
    check_that(found == expected, f"{found!r}, expected {expected!r}")


def ask(*words):
    return holdfast.execute_command(*words)


def acquire(name, *options):
    reply = ask("LOCK.ACQUIRE", name, *options)
    check_that(reply[0] == "ACQUIRED", reply)
    return int(reply[1])


def listeners(name):
    return backing.pubsub_numsub(f"redisson_lock__channel:{{{name}}}")[0][1]


def until(so, what):
    began = time.monotonic()
    while not so():
        check_that(time.monotonic() - began < 30, f"never: {what}")
        time.sleep(0.01)


def java_keeps_holdfast_out():
    is_("locked", java.ask("lock", "a"))
    is_("HELD", ask("LOCK.ACQUIRE", "a")[0])
    info = ask("LOCK.INFO", "a")
    check_that(":" in info["owner"] and info["token"] is None, info)
    is_("locked", java.ask("lock", "a"))
    is_("2", java.ask("count", "a"))
    is_("unlocked", java.ask("unlock", "a"))
    is_("HELD", ask("LOCK.ACQUIRE", "a")[0])
    replies = []
    waiter = threading.Thread(target=lambda: replies.append(connect("PORT").execute_command("LOCK.ACQUIRE", "a", "WAIT", 50_000)))
    waiter.start()
    until(lambda: listeners("a") == 1, "the sidecar listens")
    is_("unlocked", java.ask("unlock", "a"))
    waiter.join()
    is_("ACQUIRED", replies[0][0])
    ask("LOCK.RELEASE", "a", replies[0][1])


def holdfast_keeps_java_out():
    token = acquire("b")
    is_("false", java.ask("try", "b"))
    is_("true", java.ask("islocked", "b"))
    java.tell("lock", "b")
    until(lambda: listeners("b") == 1, "Redisson listens")
    began = time.monotonic()
    is_(["RELEASED"], ask("LOCK.RELEASE", "b", token))
    is_("locked", java.answer())
    # Woken by the message: the lease would have lasted for half a minute.
    check_that(time.monotonic() - began < 10, "Redisson was not woken")
    is_("HELD", ask("LOCK.ACQUIRE", "b")[0])
    is_("unlocked", java.ask("unlock", "b"))


def tokens_go_on():
    first = acquire("c")
    ask("LOCK.RELEASE", "c", first)
    second = int(java.ask("fenced", "c"))
    check_that(second > first, f"{second} after {first}")
    is_(str(second), java.ask("token", "c"))
    is_("HELD", ask("LOCK.ACQUIRE", "c")[0])
    is_("unlocked", java.ask("unlock", "c"))
    third = acquire("c")
    check_that(third > second, f"{third} after {second}")
    ask("LOCK.RELEASE", "c", third)


def watchdogs_keep_to_their_own():
    is_("locked", java.ask("lock", "d"))
    ours = acquire("e", "LEASE", 2_000)
    session = connect("PORT")
    sessions = session.execute_command("LOCK.ACQUIRE", "f", "SESSION")[1]
    # Java's watchdog holds for 3 s at a time.
    time.sleep(5)
    is_("HELD", ask("LOCK.ACQUIRE", "d")[0])
    is_(["LOST"], ask("LOCK.CHECK", "e", ours))
    is_("VALID", ask("LOCK.CHECK", "f", sessions)[0])
    is_("unlocked", java.ask("unlock", "d"))
    is_("locked", java.ask("lease", "e", 2_000))
    session.close()
    until(lambda: ask("LOCK.INFO", "f") is None, "the session's lock is free")
    time.sleep(2.5)
    is_("ACQUIRED", ask("LOCK.ACQUIRE", "e")[0])


def what_java_forces_open_is_lost():
    token = acquire("g")
    is_("true", java.ask("force", "g"))
    is_(["LOST"], ask("LOCK.CHECK", "g", token))
    is_(["LOST"], ask("LOCK.RELEASE", "g", token))


def a_coupons_lock_stops_issuing():
    ask("COUPON.CREATE", "redisson", 10)
    is_("locked", java.ask("lock", "coupon:issue:redisson"))
    try:
        reply = ask("COUPON.ISSUE", "redisson", "u1")
    except redis.ResponseError as error:
        reply = f"{getattr(error, 'status_code', None) or ''} {error}"
    check_that("TRYAGAIN" in str(reply), reply)
    is_("unlocked", java.ask("unlock", "coupon:issue:redisson"))
    is_("ISSUED", ask("COUPON.ISSUE", "redisson", "u1")[0])
    # The sidecar gives it back after the reply, so it may have it yet.
    token = acquire("coupon:issue:redisson", "WAIT", 30_000)
    is_("false", java.ask("try", "coupon:issue:redisson"))
    ask("LOCK.RELEASE", "coupon:issue:redisson", token)


report.check("Redisson: a Java lock keeps LOCK.ACQUIRE out, and its release wakes it", java_keeps_holdfast_out)
report.check("Redisson: LOCK.ACQUIRE keeps Java out, and its release wakes it", holdfast_keeps_java_out)
report.check("Redisson: tokens go on through RFencedLock", tokens_go_on)
report.check("Redisson: neither prolongs what the other holds", watchdogs_keep_to_their_own)
report.check("Redisson: what Java forces open is lost", what_java_forces_open_is_lost)
report.check("Redisson: a coupon's lock stops issuing, both ways", a_coupons_lock_stops_issuing)
java.program.kill()
raise SystemExit(report.failed)
