"""A proxy that loses replies: it forwards everything, except the first two replies to each STOCK.DECR with a REQUEST, or of a product whose
name begins with `bare-`. In place of such a reply the client sees its connection end: the first time reset, the second time closed.
The first STOCK.DECR of a product whose name begins with `loading-`, `tryagain-` or `indoubt-` it answers itself, with that error, and forwards
the next.

Prints its port, and appends the REQUEST, or the product, of each lost reply to the file $DROPS.
"""

import asyncio
import os
import re
import signal

SOLD = re.compile(rb"STOCK\.DECR\r\n.*REQUEST\r\n\$\d+\r\n([^\r]+)\r\n", re.DOTALL | re.IGNORECASE)
BARE = re.compile(rb"STOCK\.DECR\r\n\$\d+\r\n(bare-[^\r]+)\r\n", re.IGNORECASE)
REFUSED = re.compile(rb"\*\d+\r\n\$10\r\nSTOCK\.DECR\r\n\$\d+\r\n((loading|tryagain|indoubt)-[^\r]+)\r\n")
ERRORS = {
    b"loading": b"-LOADING starting: waiting for Redis and Postgres, see /readyz\r\n",
    b"tryagain": b"-TRYAGAIN overloaded: more operations wait for Redis than it does in time; nothing was changed\r\n",
    b"indoubt": b"-INDOUBT %s it is not known yet whether it was executed: ask again with REQUEST %s\r\n",
}
LOST_MAX = 2
lost = {}
refused = set()


async def serve(client_reader, client_writer):
    server_reader, server_writer = await asyncio.open_connection("127.0.0.1", int(os.environ["PORT"]))
    losing = None

    async def requests():
        nonlocal losing
        while data := await client_reader.read(65536):
            if (sale := REFUSED.match(data)) and sale[1] not in refused:
                refused.add(sale[1])
                client_writer.write(ERRORS[sale[2]].replace(b"%s", sale[1]))
                continue
            sold = not sale and (SOLD.search(data) or BARE.search(data))
            if sold and lost.get(sold[1], 0) < LOST_MAX:
                losing = sold[1]
            server_writer.write(data)
            await server_writer.drain()

    async def replies():
        while data := await server_reader.read(65536):
            if losing is None:
                client_writer.write(data)
                await client_writer.drain()
                continue
            lost[losing] = lost.get(losing, 0) + 1
            with open(os.environ["DROPS"], "a") as file:
                file.write(losing.decode() + "\n")
            if lost[losing] == 1:
                client_writer.transport.abort()
            return

    both = [asyncio.create_task(requests()), asyncio.create_task(replies())]
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    for task in both:
        task.cancel()
    await asyncio.gather(*both, return_exceptions=True)
    client_writer.close()
    server_writer.close()


async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()


asyncio.run(main())
