// Holdfast from Node.js, with node-redis: `npm install redis && node example.mjs` after `make run`. An argument is another port.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { ErrorReply, createClient } from "redis";

/**
 * Sends a change, and resolves to its outcome: element 0 tells which. Every try carries the same REQUEST, so that there is one effect at
 * most; node-redis itself tells of a lost connection, and connects again.
 */
async function change(client, ...command) {
  const request = randomUUID();
  let last;
  for (let attempt = 0; attempt < 5; attempt++) {
    try {
      return await client.sendCommand([...command, "REQUEST", request]);
    } catch (error) {
      if (error instanceof ErrorReply && !/^(LOADING|TRYAGAIN|INDOUBT) /.test(error.message)) throw error;
      last = error;
    }
  }
  throw new Error(`${command[0]} was not answered: ask again with REQUEST ${request}`, { cause: last });
}

const client = createClient({ socket: { host: "127.0.0.1", port: Number(process.argv[2] ?? 6380) } });
client.on("error", (error) => console.error(error.message));
await client.connect();
await change(client, "STOCK.SET", "node-mug", "10");
const sold = await change(client, "STOCK.DECR", "node-mug", "3");
console.log(sold[0], sold[1]); // OK 7
// A refusal is a reply, not an error.
const refusal = await change(client, "STOCK.DECR", "node-mug", "8");
console.log(...refusal); // INSUFFICIENT node-mug 7
await client.close();
assert.deepEqual([sold.slice(0, 2), refusal], [["OK", 7], ["INSUFFICIENT", "node-mug", 7]]);
