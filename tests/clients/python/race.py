"""Clients that add to a number in a file, each under one lock of Holdfast: see ../locks/race.py."""

import sys
import threading
from pathlib import Path

import redis

port, file, name, clients, total = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
begin = threading.Event()
added = []


def work(client):
    begin.wait()
    count = 0
    more = True
    while more:
        word, token = client.execute_command("LOCK.ACQUIRE", name, "WAIT", 60_000)[:2]
        assert word == "ACQUIRED", word
        number = int(file.read_text())
        more = number < total
        if more:
            file.write_text(str(number + 1))
            count += 1
        released = client.execute_command("LOCK.RELEASE", name, token)
        assert released == ["RELEASED"], released
    added.append(count)


# A wait longer than the longest WAIT, and nothing that is sent again.
options = {"decode_responses": True, "socket_timeout": 120, "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0)}
connections = [redis.Redis("127.0.0.1", port, **options) for _ in range(clients)]
for connection in connections:
    connection.ping()
threads = [threading.Thread(target=work, args=(connection,)) for connection in connections]
for thread in threads:
    thread.start()
print("ready", flush=True)
sys.stdin.readline()
begin.set()
for thread in threads:
    thread.join()
assert len(added) == clients, "a client has ended early"
print(sum(added))
