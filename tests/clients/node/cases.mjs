// The shared cases of cases.json, and whether a reply is what they expect: see ../python/cases.py, which says the same in Python.

import { readFileSync } from "node:fs";
import { isDeepStrictEqual } from "node:util";

// One call of a scan sees all keys only while there are few.
export const CASES = JSON.parse(readFileSync(new URL("../cases.json", import.meta.url))).filter((one) => !(one.few_keys && process.env.MANY_KEYS));
export const HOST = "127.0.0.1";
export const PORT = Number(process.env.PORT);
export const PROXY_PORT = Number(process.env.PROXY_PORT);
/** Where a client has to log in, as this user. */
export const USERS_PORT = Number(process.env.USERS_PORT);
export const LOGIN = { username: process.env.LOGIN_USER, password: process.env.LOGIN_PASSWORD };

/** An error reply as the server has sent it. */
export class ErrorReply {
  constructor(text) {
    this.text = text;
  }
}

/** Prints a line for a check, which is an async function that throws where it has failed. */
export async function check(name, run) {
  try {
    await run();
    console.log(`ok   ${name}`);
  } catch (error) {
    process.exitCode = 1;
    console.log(`FAIL ${name}: ${error.stack ?? error}`);
  }
}

function matches(expected, reply, maps) {
  if (Array.isArray(expected)) {
    return Array.isArray(reply) && reply.length === expected.length && expected.every((item, at) => matches(item, reply[at], maps));
  }
  if (expected !== null && typeof expected === "object") {
    if (maps === "flat") {
      if (!Array.isArray(reply) || reply.length % 2) return false;
      reply = Object.fromEntries(Array.from({ length: reply.length / 2 }, (_, at) => reply.slice(2 * at, 2 * at + 2)));
    }
    if (reply === null || typeof reply !== "object" || Array.isArray(reply)) return false;
    const keys = Object.keys(expected).filter((key) => key !== "...");
    if (!("..." in expected) && Object.keys(reply).length !== keys.length) return false;
    return keys.every((key) => Object.hasOwn(reply, key) && matches(expected[key], reply[key], maps));
  }
  if (typeof expected === "string" && expected.startsWith("<")) {
    if (expected === "<any>") return true;
    if (expected === "<int>") return Number.isSafeInteger(reply);
    if (expected.startsWith("<list containing ")) return Array.isArray(reply) && reply.includes(expected.slice(17, -1));
    if (typeof reply !== "string") return false;
    if (expected.startsWith("<text containing ")) return reply.includes(expected.slice(17, -1));
    return { "<position>": /^\d+-\d+$/, "<digits>": /^\d+$/, "<text>": /./ }[expected].test(reply);
  }
  return isDeepStrictEqual(reply, expected);
}

function fill(value, prefix, kept) {
  if (typeof value === "string") return value.startsWith("$") ? kept[value.slice(1)] : value.replaceAll("~", prefix);
  if (Array.isArray(value)) return value.map((item) => fill(item, prefix, kept));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, fill(item, prefix, kept)]));
}

function batches(steps) {
  const all = [[]];
  for (const step of steps) {
    if (all.at(-1).length && step.send.some((word) => word.startsWith("$"))) all.push([]);
    all.at(-1).push(step);
  }
  return all;
}

/** Runs all cases. `send` takes a list of commands, and resolves to their replies; the prefix must be no other run's. */
export async function runCases(client, prefix, maps, send) {
  for (const { name, steps } of CASES) {
    await check(`${client}: ${name}`, async () => {
      const kept = {};
      for (const batch of batches(steps)) {
        const replies = await send(batch.map((step) => fill(step.send, prefix, kept)));
        if (replies.length !== batch.length) throw new Error(`${replies.length} replies to ${batch.length} commands`);
        batch.forEach((step, at) => {
          const reply = replies[at];
          const expected = fill(step.error ?? step.expect, prefix, kept);
          const good = "error" in step ? reply instanceof ErrorReply && reply.text.startsWith(expected) : matches(expected, reply, maps);
          if (!good) throw new Error(`${step.send.join(" ")}: ${JSON.stringify(reply)}, expected ${JSON.stringify(expected)}`);
          if (step.keep) kept[step.keep] = reply.at(step.at ?? -1);
        });
      }
    });
  }
}

/** How many replies to this REQUEST the proxy has swallowed. */
export function drops(request) {
  return readFileSync(process.env.DROPS, "utf8").split("\n").filter((line) => line === request).length;
}
