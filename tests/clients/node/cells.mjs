// The table of clients: what each column means, run with the clients for Node.js.

import assert from "node:assert/strict";
import { PORT, PROXY_PORT, check } from "./cases.mjs";

const LOST = 100;

/**
 * Runs the table's row of a client. `connect` takes a port and options and resolves to a client, as a first program makes it; `call` sends
 * words on it; `close` ends it; `subscribe` resolves once a channel is subscribed to; `protocol` makes the options for one; `retries`: whether
 * the client sends a command again by itself.
 */
export async function runCells(name, { connect, call, close, subscribe, protocol, retries }) {
  const cell = (column, run, options) =>
    check(`cell ${name} | ${column}`, async () => {
      const client = await connect(PORT, options);
      try {
        await run(client);
      } finally {
        await close(client);
      }
    });
  const speaks = (number) => async (client) => assert.match(await call(client, "CLIENT", "INFO"), new RegExp(` resp=${number} `));
  await cell("connects", async (client) => assert.equal(await call(client, "PING"), "PONG"));
  await cell("RESP2", speaks(2), protocol(2));
  await cell("RESP3", speaks(3), protocol(3));
  await cell("pool of 50", async (client) => {
    await call(client, "STOCK.SET", `${name}-pool`, "1000");
    const all = await Promise.all(Array.from({ length: 50 }, () => connect(PORT)));
    await Promise.all(all.flatMap((one) => Array.from({ length: 20 }, () => call(one, "STOCK.DECR", `${name}-pool`, "1"))));
    await Promise.all(all.map(close));
    assert.equal(await call(client, "STOCK.GET", `${name}-pool`), 0);
  });
  await cell("pipeline of 10,000", async (client) => {
    await call(client, "STOCK.SET", `${name}-deep`, "10000");
    await Promise.all(Array.from({ length: 10000 }, () => call(client, "STOCK.DECR", `${name}-deep`, "1")));
    assert.equal(await call(client, "STOCK.GET", `${name}-deep`), 0);
  });
  await cell("reconnects", async (client) => {
    const own = await call(client, "CLIENT", "ID");
    const other = await connect(PORT);
    await call(other, "CLIENT", "KILL", "ID", String(own));
    await close(other);
    for (let attempt = 0; ; attempt++) {
      try {
        assert.equal(await call(client, "PING"), "PONG");
        break;
      } catch (error) {
        if (attempt === 3) throw error;
      }
    }
  });
  await cell("pub/sub", (client) => subscribe(client, "stock:events:mug"));
  await cell("error words", (client) => assert.rejects(call(client, "STOCK.INCR", `${name}-unknown`, "1"), { message: /^NOTFOUND no product/ }));
  await cell("one effect", async (client) => {
    await call(client, "STOCK.SET", `${name}-lost`, String(LOST));
    const through = await connect(PROXY_PORT);
    for (let number = 0; number < LOST; number++) {
      const command = ["STOCK.DECR", `${name}-lost`, "1", "REQUEST", `${name}-lost-${number}`];
      for (let attempt = 0; ; attempt++) {
        try {
          await call(through, ...command);
          break;
        } catch (error) {
          // Where the client only tells of a lost connection, the program sends the command again.
          if (retries || attempt === 3) throw error;
        }
      }
    }
    await close(through);
    assert.equal(await call(client, "STOCK.GET", `${name}-lost`), 0);
  });
  const effects = retries ? 3 : 1;
  await cell(`without REQUEST=${effects}`, async (client) => {
    const through = await connect(PROXY_PORT);
    for (let number = 0; number < LOST; number++) {
      const product = `bare-${name}-${number}`;
      await call(client, "STOCK.SET", product, "10", "ACK", "redis");
      const sold = call(through, "STOCK.DECR", product, "1");
      await (retries ? sold : assert.rejects(sold));
      assert.equal(await call(client, "STOCK.GET", product), 10 - effects);
      await call(client, "STOCK.DEL", product, "ACK", "redis");
    }
    await close(through);
  });
}
