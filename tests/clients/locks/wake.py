"""How long after a release the next of many waiters has the lock: Holdfast, redis-py's Lock, Redisson's RLock, one after the other.

Each waiter, once it has the lock, notes how long ago the one before released it, and releases it. Every way has one program, with a
connection a waiter; Redisson's threads share its connections. Holdfast's clients are in Go where it is there: a thousand threads of Python
would keep each other waiting. LOCK_WAKE is the number of waiters: then Holdfast has to wake in a third of the time of each, with ten times
as many waiters where its clients are in Go. Without it there are few, and a stall of the machine decides by how much it is faster, but not
whether. redis-py, whose waiters poll, has 500 at the most, which is in its favour.
Arguments: the program of go, empty where there is none, and the words that start java/RedissonLocks, none where there is no Java.
"""

import faulthandler
import os
import subprocess
import sys
import threading
import time

import redis

PROMISED = "LOCK_WAKE" in os.environ
WAITERS = int(os.environ.get("LOCK_WAKE", "200"))
POLLING_MAX = 500
# Seconds that one way may take; all of them, and then it is shown where the threads stand.
PATIENCE, PATIENCE_MAX = 150, 540
threading.stack_size(256 * 1024)


def connect(port):
    options = {"decode_responses": True, "socket_timeout": 600, "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0)}
    return redis.Redis("127.0.0.1", int(os.environ[port]), **options)


def holdfast(name):
    client = connect("PORT")

    def acquire():
        reply = client.execute_command("LOCK.ACQUIRE", name, "LEASE", 600_000, "WAIT", 600_000)
        assert reply[0] == "ACQUIRED", reply
        return lambda: client.execute_command("LOCK.RELEASE", name, reply[1])

    client.ping()
    return acquire


def redis_py(name):
    client = connect("REDIS_PORT")
    lock = client.lock(name, timeout=600)

    def acquire():
        assert lock.acquire()
        return lock.release

    client.ping()
    return acquire


def measure(way, waiters):
    """The waits in ms."""
    name = f"wake-{way.__name__}"
    first = way(name)()
    waits, released = [], [0.0]
    all_ready = threading.Barrier(waiters + 1)

    def work(acquire):
        all_ready.wait()
        release = acquire()
        waits.append((time.perf_counter() - released[0]) * 1e3)
        released[0] = time.perf_counter()
        release()

    threads = [threading.Thread(target=work, args=(way(name),), daemon=True) for _ in range(waiters)]
    for thread in threads:
        thread.start()
    all_ready.wait(PATIENCE)
    # Until all of them wait.
    time.sleep(1 + waiters / 1_000)
    released[0] = time.perf_counter()
    first()
    until = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))
    assert len(waits) == waiters, f"{way.__name__}: {len(waits)} of {waiters} had the lock within {PATIENCE} s: {whose(name)}"
    return waits


def whose(name):
    """What there is to be known of a lock that somebody waits for in vain."""
    lock = connect("REDIS_PORT")
    held = lock.hgetall(name) if lock.type(name) == "hash" else lock.get(name)
    return f"{name} is {held}, for {lock.pttl(name)} ms; {connect('PORT').execute_command('LOCK.INFO', name)}"


def program(words, port, waiters):
    name = f"wake-{port}"
    words = [*words, "wake", os.environ[port], name, str(waiters)]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    except subprocess.SubprocessError as error:
        sys.exit(f"FAIL {error}: {error.stderr}; {whose(name)}")
    return [float(word) for word in said.split()]


def percentiles(waits):
    waits.sort()
    return [waits[min(int(len(waits) * part), len(waits) - 1)] for part in (0.5, 0.99)]


def main():
    faulthandler.dump_traceback_later(PATIENCE_MAX, exit=True)
    go, java = sys.argv[1:2], sys.argv[2:]
    ways = {
        "Holdfast": lambda: program(go, "PORT", WAITERS * 10 if PROMISED else WAITERS) if go[0] else measure(holdfast, WAITERS),
        "redis-py Lock": lambda: measure(redis_py, min(WAITERS, POLLING_MAX)),
    }
    if java:
        ways["Redisson RLock"] = lambda: program(java, "REDIS_PORT", WAITERS)
    found = {}
    for way, waits in ways.items():
        waits = waits()
        found[way] = half, p99 = percentiles(waits)
        print(f"     {way}: woken {half:.2f} ms after the release, 99 % within {p99:.2f} ms ({len(waits)} waiters)", flush=True)
    ours = found.pop("Holdfast")[1]
    for way, (_, p99) in found.items():
        good = ours <= (p99 / 3 if PROMISED else p99)
        print(f"{'ok  ' if good else 'FAIL'} a release wakes in {ours / p99:.2f} of the time that {way} takes", flush=True)


main()
