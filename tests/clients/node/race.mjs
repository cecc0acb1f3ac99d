// Clients that add to a number in a file, each under one lock of Holdfast: see ../locks/race.py.
import { readFileSync, writeFileSync } from "node:fs";
import { once } from "node:events";
import Redis from "ioredis";

const [port, file, name, count, total] = process.argv.slice(2);
const clients = Array.from({ length: Number(count) }, () => new Redis(Number(port), "127.0.0.1"));
await Promise.all(clients.map((client) => client.ping()));
console.log("ready");
await once(process.stdin, "data");

let added = 0;
await Promise.all(
  clients.map(async (client) => {
    for (let more = true; more; ) {
      const [word, token] = await client.call("LOCK.ACQUIRE", name, "WAIT", "60000");
      if (word !== "ACQUIRED") throw new Error(`LOCK.ACQUIRE: ${word}`);
      const number = Number(readFileSync(file, "utf8"));
      more = number < Number(total);
      if (more) {
        writeFileSync(file, String(number + 1));
        added += 1;
      }
      const [released] = await client.call("LOCK.RELEASE", name, token);
      if (released !== "RELEASED") throw new Error(`LOCK.RELEASE: ${released}`);
    }
  }),
);
console.log(added);
process.exit(0);
