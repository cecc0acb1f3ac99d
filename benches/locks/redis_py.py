"""Issues a coupon under redis-py's Lock: port, workers, seconds, prefix of the keys. Prints issued, seconds, p50, p99, p99.9, max (ms)."""

import multiprocessing
import sys
import threading
import time

import redis

# The default. Tried again sooner, it spends its time on refusals.
SLEEP = 0.1
PROCESSES = 2


def worker(port, prefix, name, begin, until, times):
    client = redis.Redis(port=port, decode_responses=True)
    client.ping()
    begin.wait()
    end = time.monotonic() + until
    number = 0
    while (started := time.monotonic()) < end:
        number += 1
        with client.lock(f"{prefix}:lock", timeout=30, sleep=SLEEP):
            issued = int(client.get(f"{prefix}:issued") or 0)
            if issued >= 1_000_000_000:
                continue
            pipe = client.pipeline(transaction=False)
            pipe.set(f"{prefix}:issued", issued + 1)
            pipe.hset(f"{prefix}:users", f"{name}-{number}", issued + 1)
            pipe.execute()
        times.append(time.monotonic() - started)


def process(port, prefix, workers, number, begin, until, queue):
    times = []
    threads = [
        threading.Thread(target=worker, args=(port, prefix, f"{number}-{w}", begin, until, times)) for w in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put(times)


def main():
    port, workers, until, prefix = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    begin = multiprocessing.Barrier(workers + 1)
    queue = multiprocessing.Queue()
    each = workers // PROCESSES
    processes = [
        multiprocessing.Process(target=process, args=(port, prefix, each, number, begin, until, queue)) for number in range(PROCESSES)
    ]
    for one in processes:
        one.start()
    begin.wait()
    started = time.monotonic()
    times = sorted(sum((queue.get() for _ in processes), []))
    took = time.monotonic() - started
    at = lambda part: times[min(int(len(times) * part), len(times) - 1)] * 1000
    print(len(times), took, at(0.5), at(0.99), at(0.999), at(1))


if __name__ == "__main__":
    main()
