// The table of clients: what each column means, run with the clients for Node.js.

import assert from "node:assert/strict";
import { setTimeout } from "node:timers/promises";
import { LOGIN, PORT, PROXY_PORT, USERS_PORT, check } from "./cases.mjs";

const LOST = 100;
// For a machine where something hangs.
const TURNS_MAX = 1500;

/**
 * Runs the table's row of a client. `connect` takes a port and options and resolves to a client, as a first program makes it; `call` sends
 * words on it; `close` ends it; `subscribe` resolves to the first message of a channel; `refused` to the error that a client is told which
 * these options do not let in; `protocol` makes the options for one; `retries`: whether the client sends a command again by itself when its
 * connection was lost.
 */
export async function runCells(name, { connect, call, close, subscribe, refused, protocol, retries }) {
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
  await cell("pub/sub", async (client) => {
    const product = `${name}-event`;
    await call(client, "STOCK.SET", product, "1");
    let listens = true;
    const heard = subscribe(client, `stock:events:${product}`).finally(() => (listens = false));
    heard.catch(() => {});
    // Events are told only while somebody listens, so a first one may come too early.
    for (let turn = 0; listens && turn < TURNS_MAX; turn++) {
      await call(client, "STOCK.DECR", product, "1");
      await call(client, "STOCK.INCR", product, "1");
      await setTimeout(20);
    }
    assert.ok(!listens, "no event");
    const { position, ...event } = JSON.parse(await heard);
    assert.match(position, /^\d+-\d+$/);
    assert.deepEqual(event, { event: event.event, product, available: { soldout: 0, back: 1 }[event.event] });
  });
  await cell("error words", async (client) => {
    await assert.rejects(call(client, "STOCK.INCR", `${name}-unknown`, "1"), { message: /^NOTFOUND no product/ });
    const through = await connect(PROXY_PORT);
    await call(through, "PING");
    for (const word of ["LOADING", "TRYAGAIN", "INDOUBT"]) {
      const product = `${word.toLowerCase()}-${name}`;
      await call(client, "STOCK.SET", product, "1");
      const command = ["STOCK.DECR", product, "1", "REQUEST", product];
      await assert.rejects(call(through, ...command), { message: new RegExp(`^${word} `) });
      assert.deepEqual((await call(through, ...command)).slice(0, 2), ["OK", 0]);
    }
    await close(through);
  });
  await check(`cell ${name} | logs in`, async () => {
    for (const number of [2, 3]) {
      const client = await connect(USERS_PORT, { ...protocol(number), ...LOGIN });
      assert.equal((await call(client, "STOCK.INCR", "users", "1"))[0], "OK");
      await assert.rejects(call(client, "STOCK.SET", "users", "1"), { message: /^NOPERM / });
      await close(client);
      assert.match((await refused(USERS_PORT, protocol(number))).message, /^NOAUTH /);
      assert.match((await refused(USERS_PORT, { ...protocol(number), ...LOGIN, password: "wrong" })).message, /^WRONGPASS /);
    }
  });
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
