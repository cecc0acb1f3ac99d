// ioredis against Holdfast.

import assert from "node:assert/strict";
import { once } from "node:events";
import { createRequire } from "node:module";
import Redis, { ReplyError } from "ioredis";
import { ErrorReply, HOST, PORT, PROXY_PORT, check, drops, runCases } from "./cases.mjs";
import { runCells } from "./cells.mjs";

const { version } = createRequire(import.meta.url)("ioredis/package.json");

function plain(error) {
  if (error instanceof ReplyError) return new ErrorReply(error.message);
  throw error;
}

function oneByOne(client) {
  return async (commands) => {
    const replies = [];
    for (const command of commands) replies.push(await client.call(...command).catch(plain));
    return replies;
  };
}

function pipelined(client) {
  return async (commands) => {
    const pipeline = client.pipeline();
    for (const command of commands) pipeline.call(...command);
    return (await pipeline.exec()).map(([error, reply]) => (error ? plain(error) : reply));
  };
}

/** What ioredis makes of the replies to Redis's own commands. */
async function methods(client, maps) {
  assert.equal(await client.ping(), "PONG");
  assert.equal(await client.echo("x"), "x");
  assert.match(await client.info(), /\r\nloading:0\r\n/);
  assert.deepEqual(await client.config("GET", "timeout"), maps === "map" ? { timeout: "0" } : ["timeout", "0"]);
  assert.equal(await client.client("SETNAME", "shop"), "OK");
  assert.equal(await client.client("GETNAME"), "shop");
  assert.match(await client.client("INFO"), / lib-name=ioredis/);
  assert.equal(typeof (await client.command("COUNT")), "number");
  assert.equal((await client.time()).length, 2);
  assert.equal(await client.dbsize(), 0);
}

/** The connection is lost twice after the command was executed; ioredis itself sends it again. */
async function dropped(direct, options, prefix) {
  const [product, request] = [`${prefix}lost`, `${prefix}lost-1`];
  await direct.call("STOCK.SET", product, 10);
  const command = ["STOCK.DECR", product, 1, "REQUEST", request];
  const client = new Redis(PROXY_PORT, HOST, options);
  // A reset connection is also reported as an event.
  client.on("error", () => {});
  const reply = await client.call(...command);
  await client.quit();
  assert.deepEqual(reply.slice(0, 2), ["OK", 9]);
  assert.equal(drops(request), 2);
  assert.deepEqual(await direct.call(...command), reply);
  assert.equal(await direct.call("STOCK.GET", product), 9);
}

async function run(name, prefix, maps, options) {
  // As in a first program: with nothing but an address.
  const client = new Redis(PORT, HOST, options);
  await check(`${name}: connects`, () => once(client, "ready"));
  await check(`${name}: methods`, () => methods(client, maps));
  await runCases(name, `${prefix}-`, maps, oneByOne(client));
  await runCases(`${name}, pipelined`, `${prefix}-pipe-`, maps, pipelined(client));
  await check(`${name}: a dropped connection, one effect`, () => dropped(client, options, `${prefix}-`));
  await check(`${name}: disconnects`, async () => assert.equal(await client.quit(), "OK"));
}

await run(`ioredis ${version}`, "io3", "flat", {});
await run(`ioredis ${version} with maps`, "io3m", "map", { replyMapping: "resp3" });
await run(`ioredis ${version} RESP2`, "io2", "flat", { protocol: 2 });

await runCells("ioredis", {
  async connect(port, options = {}) {
    const client = new Redis(port, HOST, options);
    client.on("error", () => {});
    return client;
  },
  call: (client, ...words) => client.call(...words),
  close: (client) => client.quit(),
  async subscribe(client, channel) {
    const subscriber = client.duplicate();
    const message = once(subscriber, "message");
    assert.equal(await subscriber.subscribe(channel), 1);
    const [, text] = await message;
    assert.equal(await subscriber.unsubscribe(channel), 0);
    await subscriber.quit();
    return text;
  },
  async refused(port, options) {
    const client = new Redis(port, HOST, { ...options, retryStrategy: null });
    const told = once(client, "error").then(([error]) => error, (error) => error);
    const replied = client.call("STOCK.GET", "users").catch((error) => error);
    const error = await Promise.race([told, replied]);
    client.disconnect();
    return error;
  },
  protocol: (number) => ({ protocol: number }),
  retries: true,
});
