//! Reading the backing Redis through this server, for people who look for a fault (`passthrough = "read-only"`). Off by default: then these commands
//! are unknown. Only commands that cannot change anything, over a connection of their own, so that no sale waits for them.

use std::rc::Rc;

use super::spec::{ADMIN, Arg, READONLY, SHOWS, Spec, text};
use super::{Call, Step};
use crate::limits::{PASSED_REPLY_MAX, REQUEST_BULK_MAX};
use crate::resp::Reply;

/// What is added to the table of commands where reading through is on.
pub static TABLE: &[&Spec] = &[
    &GET, &MGET, &STRLEN, &EXISTS, &TYPE, &TTL, &PTTL, &HGET, &HGETALL, &HLEN, &SISMEMBER, &SCARD, &ZSCORE, &ZRANGE, &XLEN, &XRANGE,
    &XREVRANGE, &XINFO, &SCAN,
];

/// What is behind a command's name: Redis itself says what is wrong with it.
static ARGUMENTS: &[Arg] = &[text("argument", REQUEST_BULK_MAX).repeated()];

const fn passed(name: &'static str, summary: &'static str) -> Spec {
    Spec::new(name, summary)
        .family("passthrough")
        .args(ARGUMENTS)
        .flags(READONLY | ADMIN | SHOWS)
        .complexity("as in Redis")
        .reply("what the backing Redis answers")
        .run(pass)
}

static GET: Spec = passed("GET", "Reads a text of the backing Redis.").example("GET stock:product:sku-1");
static MGET: Spec = passed("MGET", "Reads texts of the backing Redis.").example("MGET stock:product:sku-1 stock:product:sku-2");
static STRLEN: Spec = passed("STRLEN", "Tells how long a text of the backing Redis is.").example("STRLEN stock:product:sku-1");
static EXISTS: Spec = passed("EXISTS", "Counts keys that the backing Redis has.").example("EXISTS holdfast:meta");
static TYPE: Spec = passed("TYPE", "Tells what kind of value the backing Redis has there.").example("TYPE holdfast:meta");
static TTL: Spec = passed("TTL", "Tells how many seconds a key of the backing Redis has.").example("TTL holdfast:meta");
static PTTL: Spec = passed("PTTL", "Tells how many milliseconds a key of the backing Redis has.").example("PTTL holdfast:meta");
static HGET: Spec = passed("HGET", "Reads a field of a hash of the backing Redis.").example("HGET holdfast:meta epoch");
static HGETALL: Spec = passed("HGETALL", "Reads a hash of the backing Redis.").example("HGETALL holdfast:meta");
static HLEN: Spec = passed("HLEN", "Counts the fields of a hash of the backing Redis.").example("HLEN stock:held");
static SISMEMBER: Spec = passed("SISMEMBER", "Tells whether a set of the backing Redis has a member.").example("SISMEMBER key member");
static SCARD: Spec = passed("SCARD", "Counts the members of a set of the backing Redis.").example("SCARD key");
static ZSCORE: Spec = passed("ZSCORE", "Reads a score of a sorted set of the backing Redis.").example("ZSCORE stock:expiry order-1");
static ZRANGE: Spec = passed("ZRANGE", "Reads a range of a sorted set of the backing Redis.").example("ZRANGE stock:expiry 0 10");
static XLEN: Spec = passed("XLEN", "Counts the entries of a stream of the backing Redis.").example("XLEN holdfast:outbox");
static XRANGE: Spec = passed("XRANGE", "Reads entries of a stream of the backing Redis.").example("XRANGE holdfast:outbox - + COUNT 10");
static XREVRANGE: Spec =
    passed("XREVRANGE", "Reads entries of a stream, the newest first.").example("XREVRANGE holdfast:outbox + - COUNT 10");
static XINFO: Spec = passed("XINFO", "Describes a stream of the backing Redis.").example("XINFO STREAM holdfast:outbox");
static SCAN: Spec = passed("SCAN", "Lists keys of the backing Redis.").example("SCAN 0 MATCH stock:* COUNT 100");

fn pass(call: &mut Call<'_>) -> Step {
    let Some(reads) = call.cx.passing.clone() else { return Step::Reply(Reply::error("ERR reading through to Redis is off")) };
    let reads = Rc::clone(&reads);
    let words = call.args.words().to_vec();
    // One at a time on each connection: the replies may be long.
    Step::Wait(Box::pin(async move {
        match reads.pass(&words).await {
            Ok(reply) if reply.weight() > PASSED_REPLY_MAX => {
                Reply::error(format!("ERR the reply has more than {PASSED_REPLY_MAX} bytes: ask for less, or ask Redis itself"))
            }
            Ok(reply) => reply,
            Err(error) => Reply::error(format!("TRYAGAIN Redis does not answer: {error}")),
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Args, Commands, table};

    #[test]
    fn what_is_passed_through_can_change_nothing_and_is_unknown_otherwise() {
        let known = Commands::new(table::TABLE);
        let commands = Commands::new(&[table::TABLE, TABLE].concat());
        for spec in TABLE {
            assert!(known.named(spec.name.as_bytes()).is_none(), "{}", spec.name);
            let words: Vec<_> = spec.example.split(' ').map(|word| bytes::Bytes::copy_from_slice(word.as_bytes())).collect();
            let (_, found) = commands.find(&words).unwrap();
            assert!(Args::parse(found, words).is_ok() && spec.is(READONLY | ADMIN) && spec.summary.ends_with('.'), "{}", spec.name);
        }
        for never in ["SET", "DEL", "EVAL", "EVALSHA", "KEYS", "FLUSHALL", "SCRIPT", "FUNCTION", "DEBUG", "MIGRATE", "RESTORE", "SORT"] {
            assert!(commands.named(never.as_bytes()).is_none(), "{never}");
        }
    }
}
