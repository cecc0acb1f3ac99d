// node-redis against Holdfast.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { ErrorReply as ReplyError, createClient } from "redis";
import { ErrorReply, HOST, PORT, PROXY_PORT, check, drops, runCases } from "./cases.mjs";
import { runCells } from "./cells.mjs";

const { version } = createRequire(import.meta.url)("redis/package.json");

async function connect(port, options) {
  const client = createClient({ socket: { host: HOST, port }, ...options });
  // A lost connection is also reported as an event.
  client.on("error", () => {});
  await client.connect();
  return client;
}

function plain(error) {
  if (error instanceof ReplyError) return new ErrorReply(error.message);
  throw error;
}

function oneByOne(client) {
  return async (commands) => {
    const replies = [];
    for (const command of commands) replies.push(await client.sendCommand(command).catch(plain));
    return replies;
  };
}

// What is sent in one turn of the event loop goes out together.
function pipelined(client) {
  return (commands) => Promise.all(commands.map((command) => client.sendCommand(command).catch(plain)));
}

/** What node-redis makes of the replies to Redis's own commands. */
async function methods(client) {
  assert.equal(await client.ping(), "PONG");
  assert.equal(await client.echo("x"), "x");
  assert.match(await client.info(), /\r\nloading:0\r\n/);
  assert.deepEqual({ ...(await client.configGet("timeout")) }, { timeout: "0" });
  await client.clientSetName("shop");
  assert.equal(await client.clientGetName(), "shop");
  assert.equal((await client.clientInfo()).libName, "node-redis");
  const id = await client.clientId();
  assert.ok((await client.clientList()).some((entry) => entry.id === id));
  assert.ok((await client.command()).some((command) => command.name === "stock.decr"));
  assert.equal(await client.commandCount(), (await client.commandList()).length);
  assert.equal((await client.time()).length, 2);
  assert.equal(await client.dbSize(), 0);
}

/** The connection is lost twice after the command was executed; node-redis says so, and the program sends it again. */
async function dropped(direct, options, prefix) {
  const [product, request] = [`${prefix}lost`, `${prefix}lost-1`];
  await direct.sendCommand(["STOCK.SET", product, "10"]);
  const command = ["STOCK.DECR", product, "1", "REQUEST", request];
  const client = await connect(PROXY_PORT, options);
  await assert.rejects(client.sendCommand(command));
  await assert.rejects(client.sendCommand(command));
  const reply = await client.sendCommand(command);
  await client.close();
  assert.deepEqual(reply.slice(0, 2), ["OK", 9]);
  assert.equal(drops(request), 2);
  assert.deepEqual(await direct.sendCommand(command), reply);
  assert.equal(await direct.sendCommand(["STOCK.GET", product]), 9);
}

async function run(name, prefix, maps, options) {
  let client;
  await check(`${name}: connects`, async () => {
    client = await connect(PORT, options);
  });
  await check(`${name}: methods`, () => methods(client));
  await runCases(name, `${prefix}-`, maps, oneByOne(client));
  await runCases(`${name}, pipelined`, `${prefix}-pipe-`, maps, pipelined(client));
  await check(`${name}: a dropped connection, one effect`, () => dropped(client, options, `${prefix}-`));
  await check(`${name}: disconnects`, () => client.close());
}

await run(`node-redis ${version}`, "nr3", "map", {});
await run(`node-redis ${version} RESP2`, "nr2", "flat", { RESP: 2 });

await runCells("node-redis", {
  connect: (port, options = {}) => connect(port, options),
  call: (client, ...words) => client.sendCommand(words),
  close: (client) => client.close(),
  async subscribe(client, channel) {
    const subscriber = client.duplicate();
    subscriber.on("error", () => {});
    await subscriber.connect();
    const text = await new Promise((heard, failed) => subscriber.subscribe(channel, heard).catch(failed));
    await subscriber.unsubscribe(channel);
    await subscriber.close();
    return text;
  },
  async refused(port, options) {
    const client = createClient({ socket: { host: HOST, port, reconnectStrategy: false }, ...options });
    client.on("error", () => {});
    try {
      await client.connect();
      await client.sendCommand(["STOCK.GET", "users"]);
    } catch (error) {
      return error;
    } finally {
      if (client.isOpen) client.destroy();
    }
  },
  protocol: (number) => ({ RESP: number }),
  retries: false,
});
