"""The table of clients: what each column means, run with redis-py."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from cases import REFUSED_ONCE, Failure, check_event, drops, selling

HOST, PORT, PROXY, USERS = "127.0.0.1", *(int(os.environ[name]) for name in ("PORT", "PROXY_PORT", "USERS_PORT"))
USER, PASSWORD = os.environ["LOGIN_USER"], os.environ["LOGIN_PASSWORD"]
LOST = 100
# After this error redis-py itself sends a command again.
SENT_AGAIN = "LOADING"
PATIENCE = 30
# What is said to who has not logged in, to a wrong password, and about what the user may not do: each client's cell "logs in" meets them.
OF_LOGINS = ("NOAUTH", "WRONGPASS", "NOPERM")


def check_that(is_so, what):
    if not is_so:
        raise Failure(what)


def word(error):
    """redis-py keeps the word apart where it knows it, and in the text where it does not."""
    return getattr(error, "status_code", None) or str(error).split(" ")[0]


def synchronous(report, name):
    """As in a first program: with nothing but an address, or with what the column names."""

    def cell(column, run, **options):
        def with_client():
            with redis.Redis(HOST, PORT, **options) as client:
                run(client)

        report.check(f"cell {name} | {column}", with_client)

    def speaks(protocol):
        return lambda client: check_that(client.client_info()["resp"] == str(protocol), client.client_info())

    def pool(client):
        client.execute_command("STOCK.SET", "cell-pool", 1000)
        with ThreadPoolExecutor(50) as threads:
            list(threads.map(lambda _: client.execute_command("STOCK.DECR", "cell-pool", 1), range(1000)))
        check_that(client.execute_command("STOCK.GET", "cell-pool") == 0, "another number of sales")

    def deep(client):
        client.execute_command("STOCK.SET", "cell-deep", 10_000)
        with client.pipeline(transaction=False) as pipeline:
            for _ in range(10_000):
                pipeline.execute_command("STOCK.DECR", "cell-deep", 1)
            replies = pipeline.execute()
        check_that(len(replies) == 10_000 and client.execute_command("STOCK.GET", "cell-deep") == 0, "another number of sales")

    def reconnects(client):
        client.ping()
        with redis.Redis(HOST, PORT) as other:
            other.client_kill_filter(_id=client.client_id())
        check_that(client.ping() is True, "ping")

    def subscribes(client):
        with client.pubsub() as subscription:
            subscription.subscribe("stock:events:cell-event")
            check_that(subscription.get_message(timeout=PATIENCE)["type"] == "subscribe", "not confirmed")
            subscription.psubscribe("stock:*:cell-event")
            check_that(subscription.get_message(timeout=PATIENCE)["type"] == "psubscribe", "not confirmed")
            with selling("cell-event"):
                messages = {}
                while messages.keys() != {"message", "pmessage"}:
                    message = subscription.get_message(timeout=PATIENCE)
                    messages[message["type"]] = message["data"]
            for data in messages.values():
                check_event(data, "cell-event")
            subscription.unsubscribe()
            while subscription.get_message(timeout=PATIENCE)["type"] != "unsubscribe":
                pass

    def refused_with(client, *command):
        """The word of the error, or nothing."""
        try:
            client.execute_command(*command)
        except redis.RedisError as error:
            return word(error)
        return None

    def words(client):
        found = refused_with(client, "STOCK.INCR", "cell-unknown", 1)
        check_that(found == "NOTFOUND", found)
        with redis.Redis(HOST, PROXY) as through:
            through.ping()
            for expected in REFUSED_ONCE:
                product = f"{expected.lower()}-cell"
                client.execute_command("STOCK.SET", product, 1)
                command = ("STOCK.DECR", product, 1, "REQUEST", product)
                found = refused_with(through, *command)
                check_that(found == (expected if expected != SENT_AGAIN else None), f"{found}, not {expected}")
                reply = through.execute_command(*command)
                check_that(reply[:2] == [b"OK", 0], reply)

    def logs_in():
        at_once = {"retry": Retry(NoBackoff(), 0)}
        for protocol in (2, 3):
            with redis.Redis(HOST, USERS, username=USER, password=PASSWORD, protocol=protocol) as client:
                check_that(client.execute_command("STOCK.INCR", "users", 1)[0] == b"OK", "INCR")
                found = refused_with(client, "STOCK.SET", "users", 1)
                check_that(found == "NOPERM", found)
            for expected, options in (("NOAUTH", {}), ("WRONGPASS", {"username": USER, "password": "wrong"})):
                with redis.Redis(HOST, USERS, **options, **at_once, protocol=protocol) as client:
                    found = refused_with(client, "STOCK.GET", "users")
                    check_that(found == expected, f"{found}, not {expected}")

    def one_effect(client):
        client.execute_command("STOCK.SET", "cell-lost", LOST)
        with redis.Redis(HOST, PROXY) as through:
            for number in range(LOST):
                request = f"cell-lost-{number}"
                through.execute_command("STOCK.DECR", "cell-lost", 1, "REQUEST", request)
                check_that(drops(request) == 2, f"{drops(request)} replies were dropped")
        check_that(client.execute_command("STOCK.GET", "cell-lost") == 0, "another number of sales")

    def effects(expected):
        def run(client):
            with redis.Redis(HOST, PROXY) as through:
                for number in range(LOST):
                    product = f"bare-py-{number}"
                    client.execute_command("STOCK.SET", product, 10, "ACK", "redis")
                    through.execute_command("STOCK.DECR", product, 1)
                    left = client.execute_command("STOCK.GET", product)
                    check_that(left == 10 - expected, f"{10 - left} effects")
                    client.execute_command("STOCK.DEL", product, "ACK", "redis")

        return run

    cell("connects", lambda client: client.ping())
    cell("RESP2", speaks(2), protocol=2)
    cell("RESP3", speaks(3), protocol=3)
    cell("pool of 50", pool, max_connections=50)
    cell("pipeline of 10,000", deep)
    cell("reconnects", reconnects)
    cell("pub/sub", subscribes)
    cell("error words", words)
    report.check(f"cell {name} | logs in", logs_in)
    cell("one effect", one_effect)
    cell("without REQUEST=3", effects(3))


async def asynchronous(report, name):
    async def cell(column, run, port=PORT, **options):
        client = redis.asyncio.Redis(host=HOST, port=port, **options)
        problem = None
        try:
            await run(client)
        except Exception as error:  # Whatever a client throws is a failed check.
            problem = error
        await client.aclose()

        def outcome():
            if problem is not None:
                raise problem

        report.check(f"cell {name} | {column}", outcome)

    def speaks(protocol):
        async def run(client):
            info = await client.client_info()
            check_that(info["resp"] == str(protocol), info)

        return run

    async def pool(client):
        await client.execute_command("STOCK.SET", "cella-pool", 1000)
        for _ in range(20):
            await asyncio.gather(*(client.execute_command("STOCK.DECR", "cella-pool", 1) for _ in range(50)))
        check_that(await client.execute_command("STOCK.GET", "cella-pool") == 0, "another number of sales")

    async def deep(client):
        await client.execute_command("STOCK.SET", "cella-deep", 10_000)
        async with client.pipeline(transaction=False) as pipeline:
            for _ in range(10_000):
                pipeline.execute_command("STOCK.DECR", "cella-deep", 1)
            replies = await pipeline.execute()
        check_that(len(replies) == 10_000 and await client.execute_command("STOCK.GET", "cella-deep") == 0, "another number of sales")

    async def reconnects(client):
        own = await client.client_id()
        other = redis.asyncio.Redis(host=HOST, port=PORT)
        await other.client_kill_filter(_id=own)
        await other.aclose()
        check_that(await client.ping() is True, "ping")

    async def subscribes(client):
        async with client.pubsub() as subscription:
            await subscription.subscribe("stock:events:cella-event")
            message = await subscription.get_message(timeout=PATIENCE)
            check_that(message["type"] == "subscribe", message)
            with selling("cella-event"):
                message = await subscription.get_message(timeout=PATIENCE)
            check_event(message["data"], "cella-event")

    async def refused_with(client, *command):
        try:
            await client.execute_command(*command)
        except redis.RedisError as error:
            return word(error)
        return None

    async def words(client):
        found = await refused_with(client, "STOCK.INCR", "cella-unknown", 1)
        check_that(found == "NOTFOUND", found)
        async with redis.asyncio.Redis(host=HOST, port=PROXY) as through:
            await through.ping()
            for expected in REFUSED_ONCE:
                product = f"{expected.lower()}-cella"
                await client.execute_command("STOCK.SET", product, 1)
                command = ("STOCK.DECR", product, 1, "REQUEST", product)
                found = await refused_with(through, *command)
                check_that(found == (expected if expected != SENT_AGAIN else None), f"{found}, not {expected}")
                reply = await through.execute_command(*command)
                check_that(reply[:2] == [b"OK", 0], reply)

    async def logs_in(client):
        check_that((await client.execute_command("STOCK.INCR", "users", 1))[0] == b"OK", "INCR")
        found = await refused_with(client, "STOCK.SET", "users", 1)
        check_that(found == "NOPERM", found)
        for expected, options in (("NOAUTH", {}), ("WRONGPASS", {"username": USER, "password": "wrong"})):
            async with redis.asyncio.Redis(host=HOST, port=USERS, **options, retry=AsyncRetry(NoBackoff(), 0)) as other:
                found = await refused_with(other, "STOCK.GET", "users")
                check_that(found == expected, f"{found}, not {expected}")

    async def one_effect(client):
        await client.execute_command("STOCK.SET", "cella-lost", LOST)
        through = redis.asyncio.Redis(host=HOST, port=PROXY)
        for number in range(LOST):
            await through.execute_command("STOCK.DECR", "cella-lost", 1, "REQUEST", f"cella-lost-{number}")
        await through.aclose()
        check_that(await client.execute_command("STOCK.GET", "cella-lost") == 0, "another number of sales")

    def effects(expected):
        async def run(client):
            through = redis.asyncio.Redis(host=HOST, port=PROXY)
            for number in range(LOST):
                product = f"bare-pya-{number}"
                await client.execute_command("STOCK.SET", product, 10, "ACK", "redis")
                await through.execute_command("STOCK.DECR", product, 1)
                left = await client.execute_command("STOCK.GET", product)
                check_that(left == 10 - expected, f"{10 - left} effects")
                await client.execute_command("STOCK.DEL", product, "ACK", "redis")
            await through.aclose()

        return run

    await cell("connects", lambda client: client.ping())
    await cell("RESP2", speaks(2), protocol=2)
    await cell("RESP3", speaks(3), protocol=3)
    await cell("pool of 50", pool, max_connections=50)
    await cell("pipeline of 10,000", deep)
    await cell("reconnects", reconnects)
    await cell("pub/sub", subscribes)
    await cell("error words", words)
    await cell("logs in", logs_in, port=USERS, username=USER, password=PASSWORD)
    await cell("one effect", one_effect)
    await cell("without REQUEST=3", effects(3))
