//! SUBSCRIBE and its relatives, and MONITOR: messages that answer no request.
//!
//! Each of these runs alone on its connection, after every earlier reply, so that no message overtakes the confirmation of its subscription.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::spec::{ADMIN, LOADING, PUBSUB, SECRET, Spec, text};
use super::{Call, Context, Step, rights};
use crate::limits::{CHANNEL_MAX, PATTERN_TAILS_EACH_MAX, PATTERNS_MAX, SUBSCRIPTIONS_MAX};
use crate::resp::{Protocol, Reply, Request};
use crate::session::Session;
use crate::session::hub::{Kind, Subscriptions};

const FLAGS: u32 = PUBSUB | LOADING;

pub static SUBSCRIBE: Spec = Spec::new("SUBSCRIBE", "Subscribes to channels: `stock:events:<product>`, `coupon:events:<coupon>`.")
    .family("pubsub")
    .args(&[text("channel", CHANNEL_MAX).repeated()])
    .flags(FLAGS)
    .complexity("O(N) where N is the number of channels")
    .reply("of each channel a push `subscribe channel count`")
    .example("SUBSCRIBE stock:events:sku-1")
    .run(|call| subscribe(call, Kind::Channel));

pub static PSUBSCRIBE: Spec = Spec::new("PSUBSCRIBE", "Subscribes to all channels that match patterns: `stock:events:*`.")
    .family("pubsub")
    .args(&[text("pattern", CHANNEL_MAX).repeated()])
    .flags(FLAGS)
    .complexity("O(N) where N is the number of patterns")
    .reply("of each pattern a push `psubscribe pattern count`")
    .example("PSUBSCRIBE stock:events:*")
    .run(|call| subscribe(call, Kind::Pattern));

pub static UNSUBSCRIBE: Spec = Spec::new("UNSUBSCRIBE", "Ends subscriptions to channels: those named, or all.")
    .family("pubsub")
    .args(&[text("channel", CHANNEL_MAX).any_number()])
    .flags(FLAGS)
    .complexity("O(N) where N is the number of channels")
    .reply("of each channel a push `unsubscribe channel count`")
    .run(|call| unsubscribe(call, Kind::Channel));

pub static PUNSUBSCRIBE: Spec = Spec::new("PUNSUBSCRIBE", "Ends subscriptions to patterns: those named, or all.")
    .family("pubsub")
    .args(&[text("pattern", CHANNEL_MAX).any_number()])
    .flags(FLAGS)
    .complexity("O(N) where N is the number of patterns")
    .reply("of each pattern a push `punsubscribe pattern count`")
    .run(|call| unsubscribe(call, Kind::Pattern));

/// The client's subscriptions, which begin with the first.
fn subscriptions(call: &mut Call<'_>) -> Rc<Subscriptions> {
    if let Some(known) = call.session.kept::<Rc<Subscriptions>>().next() {
        return Rc::clone(known);
    }
    let new = Subscriptions::new(&call.cx.subscribers, &call.session.client, call.pipeline());
    call.session.keep(Rc::clone(&new));
    call.session.has_subscribed = true;
    new
}

const fn words(kind: Kind) -> (&'static str, &'static str, &'static str) {
    match kind {
        Kind::Channel => ("channel", "subscribe", "unsubscribe"),
        Kind::Pattern => ("pattern", "psubscribe", "punsubscribe"),
    }
}

fn subscribe(call: &mut Call<'_>, kind: Kind) -> Step {
    let (argument, word, _) = words(kind);
    let names: Vec<Bytes> = call.args.shared_list(argument).collect();
    if !rights::watches_only_its_own(call.session.user(), call.args.spec(), &call.args) {
        rights::denied(call.session, call.args.spec(), "channel");
        return Step::Reply(Reply::error("NOPERM No permissions to access a channel"));
    }
    let subscriptions = subscriptions(call);
    let mut new: Vec<&Bytes> = names.iter().filter(|name| !subscriptions.has(kind, name)).collect();
    new.sort_unstable();
    new.dedup();
    if subscriptions.count() + new.len() > SUBSCRIPTIONS_MAX {
        return Step::Reply(Reply::error(format!("ERR too many subscriptions: a connection may have {SUBSCRIPTIONS_MAX}")));
    }
    if kind == Kind::Pattern && subscriptions.count_of(kind) + new.len() > PATTERNS_MAX {
        return Step::Reply(Reply::error(format!("ERR too many patterns: a connection may have {PATTERNS_MAX}")));
    }
    if subscriptions.tails() + new.iter().map(|name| kind.tail(name)).sum::<usize>() > PATTERN_TAILS_EACH_MAX {
        return Step::Reply(Reply::error(format!(
            "ERR too many patterns: a connection may have {PATTERN_TAILS_EACH_MAX} bytes behind the first star of each"
        )));
    }
    confirmed(call, names, move |name| match subscriptions.add(kind, &name) {
        Ok(()) => confirmation(word, Reply::Bulk(name), &subscriptions),
        Err(full) => Reply::error(format!("ERR {full}")),
    })
}

fn unsubscribe(call: &mut Call<'_>, kind: Kind) -> Step {
    let (argument, _, word) = words(kind);
    let mut names: Vec<Bytes> = call.args.shared_list(argument).collect();
    let subscriptions = subscriptions(call);
    if names.is_empty() {
        names = subscriptions.names(kind);
    }
    if names.is_empty() {
        return confirmed(call, vec![Bytes::new()], move |_| confirmation(word, Reply::Nil, &subscriptions));
    }
    confirmed(call, names, move |name| {
        subscriptions.remove(kind, &name);
        confirmation(word, Reply::Bulk(name), &subscriptions)
    })
}

fn confirmation(word: &'static str, name: Reply, subscriptions: &Subscriptions) -> Reply {
    Reply::Push(vec![Reply::word(word), name, Reply::Integer(i64::try_from(subscriptions.count()).unwrap_or(i64::MAX))])
}

/// Does `one` for each name when every earlier reply is on its way, and says so in the same queue as the messages: so none comes before. While all
/// clients leave much unread, a few at a time.
fn confirmed(call: &Call<'_>, names: Vec<Bytes>, mut one: impl FnMut(Bytes) -> Reply + 'static) -> Step {
    let pipeline = Rc::downgrade(call.pipeline());
    Step::Wait(Box::pin(async move {
        for name in names {
            let has_room = || pipeline.upgrade().is_none_or(|pipeline| pipeline.has_room_for_message());
            // Whoever takes messages polls this again.
            poll_fn(|_| if has_room() { Poll::Ready(()) } else { Poll::Pending }).await;
            let said = one(name);
            if let Some(pipeline) = pipeline.upgrade() {
                pipeline.push_message(said);
            }
        }
        Reply::Nothing
    }))
}

/// Why a command may not run while its client has subscribed and speaks RESP2, in which no reply can be told from a message.
pub fn refusal(session: &Session, spec: &Spec) -> Option<String> {
    if session.protocol == Protocol::Resp3 || !session.subscribes() {
        return None;
    }
    let permitted = matches!(spec.name, "SUBSCRIBE" | "UNSUBSCRIBE" | "PSUBSCRIBE" | "PUNSUBSCRIBE" | "PING" | "QUIT" | "RESET");
    (!permitted).then(|| {
        let name = spec.lower_name();
        format!("ERR Can't execute '{name}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context")
    })
}

pub static PUBSUB_COMMAND: Spec = Spec::new("PUBSUB", "Shows what clients have subscribed to.")
    .family("pubsub")
    .flags(FLAGS)
    .example("PUBSUB NUMPAT")
    .subcommands(&[&CHANNELS, &NUMSUB, &NUMPAT, &HELP]);

static CHANNELS: Spec = Spec::new("PUBSUB|CHANNELS", "Lists the channels subscribed to, or those that match a pattern.")
    .args(&[text("pattern", CHANNEL_MAX).optional()])
    .flags(FLAGS)
    .reply("array of text")
    .run(|call| {
        let pattern = call.args.maybe_text("pattern").map(Bytes::copy_from_slice);
        let hub = Arc::clone(call.cx.subscribers.hub());
        Step::Wait(Box::pin(async move {
            match hub.channels(pattern.as_deref()).await {
                Some(channels) => Reply::Array(channels.into_iter().map(Reply::Bulk).collect()),
                None => Reply::error("ERR too many channels: name a narrower pattern"),
            }
        }))
    });

static NUMSUB: Spec = Spec::new("PUBSUB|NUMSUB", "Counts the subscribers of channels.")
    .args(&[text("channel", CHANNEL_MAX).any_number()])
    .flags(FLAGS)
    .reply("array of channel and count")
    .run(|call| {
        let hub = call.cx.subscribers.hub();
        let count = |name: &Bytes| i64::try_from(hub.count(Kind::Channel, name)).unwrap_or(i64::MAX);
        let pair = |name: Bytes| [Reply::Integer(count(&name)), Reply::Bulk(name)].into_iter().rev();
        Step::Reply(Reply::Array(call.args.shared_list("channel").flat_map(pair).collect()))
    });

static NUMPAT: Spec = Spec::new("PUBSUB|NUMPAT", "Counts the patterns subscribed to.")
    .flags(FLAGS)
    .reply("integer")
    .run(|call| Step::Reply(Reply::Integer(i64::try_from(call.cx.subscribers.hub().len(Kind::Pattern)).unwrap_or(i64::MAX))));

static HELP: Spec = Spec::new("PUBSUB|HELP", "Lists the subcommands.")
    .flags(FLAGS)
    .reply("array of text")
    .run(|_| Step::Reply(super::describe::help(&PUBSUB_COMMAND)));

pub static MONITOR: Spec = Spec::new("MONITOR", "Shows every command that any client sends, without secrets, until the connection ends.")
    .flags(ADMIN | LOADING)
    .reply("`OK`, then a line a command")
    .run(|call| {
        let subscriptions = subscriptions(call);
        let Some((number, _)) = call.cx.commands.named(MONITOR.name.as_bytes()) else { return Step::Reply(Reply::Nothing) };
        let pipeline = Rc::downgrade(call.pipeline());
        Step::Wait(Box::pin(async move {
            if let Some(pipeline) = pipeline.upgrade() {
                pipeline.push_message(Reply::ok());
            }
            subscriptions.monitor(number);
            Reply::Nothing
        }))
    });

/// Shows a command to those who watch with MONITOR, as Redis does: those of operators are left out, and what may be secret.
pub fn show(cx: &Context, session: &Session, spec: &Spec, words: &Request) {
    if spec.is(ADMIN) {
        return;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, micros, client) = (now.as_secs(), now.subsec_micros(), session.client.address);
    let mut line = format!("{seconds}.{micros:06} [0 {client}] ");
    rights::quote(&mut line, &words[0]);
    if spec.is(SECRET) {
        line.push_str(" \"(redacted)\"");
    } else if words.len() > 1 {
        line.push(' ');
        line.push_str(&rights::shown(spec, words, 1));
    }
    cx.subscribers.hub().show(line);
}
