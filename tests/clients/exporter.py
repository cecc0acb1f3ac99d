"""redis_exporter against Holdfast: its scrape succeeds, and reads what it reads of a Redis."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import redis

from cases import Failure, Report

PROGRAM, PORT, REDIS_PORT = sys.argv[1], os.environ["PORT"], os.environ["REDIS_PORT"]
PATIENCE = 60
report = Report()
# What dashboards and alarms are made of.
WANTED = """
redis_blocked_clients redis_commands_duration_seconds_total redis_commands_processed_total redis_commands_total redis_config_maxclients
redis_connected_clients redis_connected_slaves redis_connections_received_total redis_cpu_sys_seconds_total redis_cpu_user_seconds_total
redis_db_keys redis_exporter_last_scrape_error redis_instance_info redis_loading_dump_file redis_memory_max_bytes redis_memory_used_bytes
redis_process_id redis_pubsub_channels redis_pubsub_patterns
redis_rejected_connections_total redis_slowlog_last_id redis_slowlog_length redis_start_time_seconds redis_up redis_uptime_in_seconds
""".split()


def check_that(is_so, what):
    if not is_so:
        raise Failure(what)


def scrape(port):
    """Its metrics, of the server at this port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = free.getsockname()[1]
    words = [PROGRAM, "--redis.addr", f"redis://127.0.0.1:{port}", "--web.listen-address", f"127.0.0.1:{own}"]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        began = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{own}/metrics", timeout=PATIENCE) as answer:
                    return answer.read().decode()
            except OSError as error:
                if child.poll() is not None or time.monotonic() - began > PATIENCE:
                    raise Failure(f"no scrape: {error}") from error
                time.sleep(0.05)
    finally:
        child.kill()
        child.communicate()


def names(text):
    return set(re.findall(r"^(redis_\w+)", text, re.MULTILINE))


def scraped():
    with redis.Redis("127.0.0.1", int(PORT)) as client:
        client.execute_command("STOCK.SET", "exporter", 5, "ACK", "redis")
        client.execute_command("STOCK.DECR", "exporter", 1)
        client.execute_command("STOCK.DEL", "exporter", "ACK", "redis")
    shown, real = scrape(PORT), scrape(REDIS_PORT)
    for line in ("redis_up 1", "redis_exporter_last_scrape_error{err=\"\"} 0"):
        check_that(line in shown, f"no {line}")
    for pattern in (r'redis_commands_total\{cmd="stock\.decr"\} [1-9]', r'redis_instance_info\{.*redis_version="7\.2\.', r"redis_connected_clients [1-9]"):
        check_that(re.search(pattern, shown), f"no {pattern}")
    # What it does not read of this Redis either is not asked for.
    missing = (set(WANTED) & names(real)) - names(shown)
    check_that(not missing, f"without {sorted(missing)}; of a Redis also {sorted(names(real) - names(shown))}")


report.check("redis_exporter: a scrape", scraped)
raise SystemExit(report.failed)
