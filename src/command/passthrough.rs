//! Reading the backing Redis through this server, for people who look for a fault (`passthrough = "read-only"`). Off by default: then these commands
//! are unknown. Only commands that cannot change anything, over a connection of their own. Redis does one thing at a time, and sales wait meanwhile:
//! so what makes it walk over more than [`PASSED_ITEMS_MAX`] keys, members, fields or entries is refused.

use bytes::Bytes;

use super::spec::{ADMIN, Arg, READONLY, SHOWS, Spec, text};
use super::{Call, Step};
use crate::domain::quantity::parse;
use crate::limits::{PASSED_ITEMS_MAX, PASSED_REPLY_MAX, PATTERN_MAX, REQUEST_BULK_MAX};
use crate::resp::Reply;
use crate::store::Error;

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
    let name = call.args.spec().name;
    let mut words: Vec<Bytes> = call.args.words().iter().map(Bytes::copy_from_slice).collect();
    if let Err(refusal) = bound(name, &mut words) {
        return Step::Reply(Reply::error(refusal));
    }
    // One at a time on each connection: the replies may be long.
    Step::Wait(Box::pin(async move {
        if name == "HGETALL" {
            match reads.pass(&[Bytes::from_static(b"HLEN"), words[1].clone()]).await {
                Ok(Reply::Integer(fields)) if fields <= PASSED_ITEMS_MAX => {}
                Ok(Reply::Integer(fields)) => return Reply::error(format!("ERR the hash has {fields} fields: HGET reads one")),
                Ok(refused) => return refused,
                Err(error) => return unanswered(&error),
            }
        }
        match reads.pass(&words).await {
            Ok(reply) if reply.weight() > PASSED_REPLY_MAX => {
                Reply::error(format!("ERR the reply has more than {PASSED_REPLY_MAX} bytes: ask for less, or ask Redis itself"))
            }
            Ok(reply) => reply,
            Err(error) => unanswered(&error),
        }
    }))
}

fn unanswered(error: &Error) -> Reply {
    Reply::error(format!("TRYAGAIN Redis does not answer: {error}"))
}

/// Keeps Redis from working on one command for long. What Redis refuses by itself is left to it. Errors with the error reply's text.
fn bound(name: &str, words: &mut [Bytes]) -> Result<(), String> {
    let is = |at: usize, word: &[u8]| words.get(at).is_some_and(|known| known.eq_ignore_ascii_case(word));
    let within = |at: usize, least: i64| words.get(at).and_then(|word| parse(word, least, PASSED_ITEMS_MAX));
    let refused = |what: &str| Err(format!("ERR name {what} of at most {PASSED_ITEMS_MAX}: sales wait while Redis works on it"));
    match name {
        // How many keys it looks at is only a hint; each of them is compared with the pattern.
        "SCAN" => {
            for option in words.get_mut(2..).unwrap_or_default().chunks_exact_mut(2) {
                if option[0].eq_ignore_ascii_case(b"MATCH") && option[1].len() > PATTERN_MAX {
                    return Err(format!("ERR name a MATCH of at most {PATTERN_MAX} bytes: sales wait while Redis works on it"));
                }
                if option[0].eq_ignore_ascii_case(b"COUNT") && parse(&option[1], PASSED_ITEMS_MAX, i64::MAX).is_some() {
                    option[1] = PASSED_ITEMS_MAX.to_string().into();
                }
            }
            Ok(())
        }
        "XRANGE" | "XREVRANGE" if !is(4, b"COUNT") || within(5, 0).is_none() => refused("a COUNT"),
        "XINFO" if is(3, b"FULL") && words.len() > 4 && within(5, 1).is_none() => refused("a COUNT"),
        "ZRANGE" if words.iter().skip(4).any(|word| word.eq_ignore_ascii_case(b"BYSCORE") || word.eq_ignore_ascii_case(b"BYLEX")) => {
            let limit = words.iter().rposition(|word| word.eq_ignore_ascii_case(b"LIMIT")).unwrap_or(words.len());
            let looked_at = within(limit + 1, 0).zip(within(limit + 2, 0)).map(|(offset, count)| offset + count);
            if looked_at.is_some_and(|members| members <= PASSED_ITEMS_MAX) { Ok(()) } else { refused("a LIMIT") }
        }
        "ZRANGE" => match (words.get(2).and_then(index), words.get(3).and_then(index)) {
            (Some(first), Some(last)) if (first < 0) == (last < 0) && last - first < PASSED_ITEMS_MAX => Ok(()),
            _ => refused("a range"),
        },
        _ => Ok(()),
    }
}

/// A member's place in a sorted set: from the end where it is negative.
fn index(word: &Bytes) -> Option<i64> {
    match word.strip_prefix(b"-") {
        Some(digits) => parse(digits, 1, i64::MAX).map(|place| -place),
        None => parse(word, 0, i64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Args, Commands, table};
    use crate::resp::Request;

    fn words(request: &str) -> Vec<Bytes> {
        request.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect()
    }

    #[test]
    fn what_redis_would_work_on_for_long_is_bounded() {
        let bounded = |request: &str| {
            let mut words = words(request);
            let name = String::from_utf8_lossy(&words[0]).into_owned();
            bound(&name, &mut words).map(|()| words.iter().map(|word| String::from_utf8_lossy(word)).collect::<Vec<_>>().join(" "))
        };
        for (request, sent) in [
            ("SCAN 0 COUNT 1000000000", "SCAN 0 COUNT 1000"),
            ("SCAN 0 MATCH COUNT count 1001 TYPE string", "SCAN 0 MATCH COUNT count 1000 TYPE string"),
            ("SCAN 0 COUNT 10 COUNT 5000", "SCAN 0 COUNT 10 COUNT 1000"),
            ("SCAN 0 COUNT x", "SCAN 0 COUNT x"),
            ("SCAN 0", "SCAN 0"),
            ("XRANGE k - + COUNT 1000", "XRANGE k - + COUNT 1000"),
            ("XINFO STREAM k FULL", "XINFO STREAM k FULL"),
            ("XINFO STREAM k FULL COUNT 1000", "XINFO STREAM k FULL COUNT 1000"),
            ("ZRANGE k 1000000 1000999", "ZRANGE k 1000000 1000999"),
            ("ZRANGE k -1000 -1 REV WITHSCORES", "ZRANGE k -1000 -1 REV WITHSCORES"),
            ("ZRANGE k -inf +inf BYSCORE LIMIT 10 990", "ZRANGE k -inf +inf BYSCORE LIMIT 10 990"),
        ] {
            assert_eq!(bounded(request).as_deref(), Ok(sent));
        }
        for (what, requests) in [
            ("a COUNT", &["XRANGE k - +", "XREVRANGE k + - COUNT 1001", "XRANGE k - + COUNT -1", "XINFO STREAM k FULL COUNT 0"][..]),
            ("a range", &["ZRANGE k 0 -1", "ZRANGE k -5 5", "ZRANGE k 0 1000", "ZRANGE k 0 x", "ZRANGE k 0", "ZRANGE k 00 1"]),
            (
                "a LIMIT",
                &[
                    "ZRANGE k 0 9 BYSCORE",
                    "ZRANGE k - + bylex LIMIT 0 1001",
                    "ZRANGE k 0 9 BYSCORE LIMIT 1000000 1",
                    "ZRANGE k 0 9 BYSCORE LIMIT 0 -1",
                    "ZRANGE k 0 9 BYSCORE LIMIT 0 1 LIMIT 0 9999",
                    "ZRANGE k 0 9 BYSCORE LIMIT",
                ],
            ),
        ] {
            for request in requests {
                let refusal = format!("ERR name {what} of at most 1000: sales wait while Redis works on it");
                assert_eq!(bounded(request), Err(refusal), "{request}");
            }
        }
    }

    #[test]
    fn what_redis_would_compare_with_many_keys_is_short() {
        let scan = |pattern: usize| bound("SCAN", &mut words(&format!("SCAN 0 COUNT 10 match {}", "*a".repeat(pattern / 2))));
        assert_eq!(scan(PATTERN_MAX), Ok(()));
        assert_eq!(scan(PATTERN_MAX + 2).unwrap_err(), "ERR name a MATCH of at most 256 bytes: sales wait while Redis works on it");
    }

    #[test]
    fn what_is_passed_through_can_change_nothing_and_is_unknown_otherwise() {
        let known = Commands::new(table::TABLE);
        let commands = Commands::new(&[table::TABLE, TABLE].concat());
        for spec in TABLE {
            assert!(known.named(spec.name.as_bytes()).is_none(), "{}", spec.name);
            let mut words = words(spec.example);
            let request: Request = words.iter().collect();
            let (_, found) = commands.find(&request).unwrap();
            assert_eq!(bound(found.name, &mut words), Ok(()), "{}", spec.example);
            assert!(Args::parse(found, request).is_ok() && spec.is(READONLY | ADMIN) && spec.summary.ends_with('.'), "{}", spec.name);
        }
        for never in ["SET", "DEL", "EVAL", "EVALSHA", "KEYS", "FLUSHALL", "SCRIPT", "FUNCTION", "DEBUG", "MIGRATE", "RESTORE", "SORT"] {
            assert!(commands.named(never.as_bytes()).is_none(), "{never}");
        }
    }
}
