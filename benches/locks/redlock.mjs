// Issues a coupon under redlock, on one Redis: port, workers, seconds, prefix of the keys. Prints issued, seconds, p50, p99, p99.9, max (ms).
import Redis from "ioredis";
import Redlock from "redlock";

const [port, workers, seconds, prefix] = [Number(process.argv[2]), Number(process.argv[3]), Number(process.argv[4]), process.argv[5]];

// It gives up after 10 tries by default. Tried again sooner than this, it spends its time on refusals.
const settings = { retryCount: -1, retryDelay: 100, retryJitter: 100 };

const times = [];
async function worker(client, redlock, name, until) {
  for (let number = 0, started; (started = performance.now()) < until; number++) {
    const lock = await redlock.acquire([`${prefix}:lock`], 30_000);
    const issued = Number((await client.get(`${prefix}:issued`)) ?? 0);
    if (issued < 1_000_000_000) {
      await client
        .pipeline()
        .set(`${prefix}:issued`, issued + 1)
        .hset(`${prefix}:users`, `${name}-${number}`, issued + 1)
        .exec();
    }
    await lock.release();
    times.push(performance.now() - started);
  }
}

const clients = Array.from({ length: workers }, () => new Redis(port, "127.0.0.1"));
await Promise.all(clients.map((client) => client.ping()));
const began = performance.now();
await Promise.all(clients.map((client, w) => worker(client, new Redlock([client], settings), w, began + seconds * 1000)));
const took = (performance.now() - began) / 1000;
times.sort((a, b) => a - b);
const at = (part) => times[Math.min(Math.floor(times.length * part), times.length - 1)];
console.log(times.length, took, at(0.5), at(0.99), at(0.999), at(1));
process.exit(0);
