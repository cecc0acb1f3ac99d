//! The commands a client greets and leaves with: HELLO AUTH PING ECHO SELECT QUIT RESET.

use std::time::Duration;

use bytes::Bytes;
use tokio::task::spawn_local;

use super::server::{NO_INTEGER, integer};
use super::spec::{CONNECTION, FAST, LOADING, NOAUTH, SECRET, Spec, text};
use super::{Args, Call, Step, closed};
use crate::domain::quantity;
use crate::limits::{GUESS_TURN_PART, REQUEST_BULK_MAX};
use crate::resp::{Protocol, Reply};
use crate::session::chatter::{self, Line};
use crate::session::client::Rejected;
use crate::session::guesses::{Turn, Waited};

/// The version of Redis whose behaviour clients are promised. 7.2 has CLIENT SETINFO and COMMAND DOCS, and not the caching and
/// maintenance features that newer clients would otherwise turn on.
pub const REDIS_VERSION: &str = "7.2.0";

/// The version of Holdfast.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

const ALWAYS: u32 = CONNECTION | FAST | LOADING;
const WRONG_PASSWORD: &str = "WRONGPASS invalid username-password pair or user is disabled.";

pub static HELLO: Spec = Spec::new("HELLO", "Greets the server, chooses RESP2 or RESP3, and may authenticate and name the connection.")
    .family("connection")
    .args(&[text("protover", 16).optional(), text("option", REQUEST_BULK_MAX).any_number()])
    .flags(ALWAYS | NOAUTH | SECRET)
    .reply("map of `server version proto id mode role modules`")
    .example("HELLO 3 AUTH default secret SETNAME shop")
    .run(hello);

fn hello(call: &mut Call<'_>) -> Step {
    match greet(call) {
        Ok(()) => Step::Reply(Reply::map([
            ("server", Reply::word("redis")),
            ("version", Reply::word(REDIS_VERSION)),
            ("proto", Reply::Integer(call.session.protocol.number())),
            ("id", Reply::Integer(i64::try_from(call.session.client.id).unwrap_or(i64::MAX))),
            ("mode", Reply::word("standalone")),
            ("role", Reply::word("master")),
            ("modules", Reply::Array(vec![super::server::module()])),
        ])),
        Err(step) => step,
    }
}

/// Does what HELLO's arguments ask for: all of it or nothing.
fn greet(call: &mut Call<'_>) -> Result<(), Step> {
    let Wanted { protocol, name, user } = wanted(&call.args).map_err(|error| Step::Reply(Reply::error(error)))?;
    if let Some((user, password)) = user {
        log_in(call, &user, &password)?;
    }
    if !call.session.authenticated {
        return Err(Step::Reply(Reply::error(HELLO_WITHOUT_AUTH)));
    }
    if let Some(name) = name {
        call.session.client.profile().name = name;
    }
    if let Some(protocol) = protocol {
        call.session.protocol = protocol;
    }
    Ok(())
}

/// What HELLO's arguments ask for.
#[derive(Default)]
struct Wanted {
    protocol: Option<Protocol>,
    name: Option<String>,
    /// A name and a password.
    user: Option<(Bytes, Bytes)>,
}

fn wanted(args: &Args) -> Result<Wanted, String> {
    let mut wanted = Wanted::default();
    let Some(version) = args.maybe_text("protover") else { return Ok(wanted) };
    let version = quantity::parse(version, 0, i64::MAX).ok_or("ERR Protocol version is not an integer or out of range")?;
    wanted.protocol = match version {
        2 => Some(Protocol::Resp2),
        3 => Some(Protocol::Resp3),
        _ => return Err("NOPROTO unsupported protocol version".to_owned()),
    };
    let mut options = args.list("option");
    while let Some(option) = options.next() {
        let syntax = || format!("ERR Syntax error in HELLO option '{}'", super::cut(option, crate::limits::ERROR_ECHO_MAX));
        if option.eq_ignore_ascii_case(b"AUTH") {
            let mut word = || options.next().map(Bytes::copy_from_slice).ok_or_else(syntax);
            wanted.user = Some((word()?, word()?));
        } else if option.eq_ignore_ascii_case(b"SETNAME") {
            wanted.name = Some(super::client::valid_name(options.next().ok_or_else(syntax)?, "Client names")?);
        } else {
            return Err(syntax());
        }
    }
    Ok(wanted)
}

const HELLO_WITHOUT_AUTH: &str = "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> <pass> option can be used to \
     authenticate the client and select the RESP protocol version at the same time";

/// Looks whether the name and the password belong together, when it is their turn. Errors with what is done where it is not, or they do not.
fn log_in(call: &mut Call<'_>, user: &[u8], password: &[u8]) -> Result<(), Step> {
    let bounds = &call.cx.bounds;
    let turn = turn(call, user)?;
    match call.session.authenticate(user, password, bounds.auth_failures) {
        Ok(()) if call.session.has_subscribed && !call.session.client.profile().suits(call.session.user()) => {
            closed("user_changed");
            Err(Step::Close(Reply::error("NOPERM this user may not have what the connection has subscribed to")))
        }
        Ok(()) => Ok(()),
        Err(rejected) => {
            let wait = call.cx.guesses.wrong(call.session.client.address.ip(), call.arrived, bounds.auth_delay);
            if let Some(turn) = turn.filter(|_| !wait.is_zero()) {
                // It goes on although its client may leave.
                spawn_local(async move {
                    tokio::time::sleep(wait).await;
                    drop(turn);
                });
            }
            Err(rejection(call, rejected, wait))
        }
    }
}

/// The turn of a name and a password; `None` where they need none. Errors with what is done until it begins, or where it does not.
fn turn(call: &mut Call<'_>, user: &[u8]) -> Result<Option<Turn>, Step> {
    let bounds = &call.cx.bounds;
    match call.session.turn.take() {
        Some(Waited::For(turn)) => return Ok(Some(turn)),
        Some(Waited::InVain) => {
            metrics::counter!("holdfast_auth_refused_total").increment(1);
            return Err(Step::Reply(Reply::error("TRYAGAIN too many wrong passwords come from this address: try again later")));
        }
        None => {}
    }
    let Some(queue) = call.cx.guesses.queue(call.session.client.address.ip(), user, call.arrived, bounds.auth_delay) else {
        return Ok(None);
    };
    if let Some(turn) = queue.begin() {
        return Ok(Some(turn));
    }
    metrics::counter!("holdfast_auth_queued_total").increment(1);
    Err(Step::Again(Box::pin(queue.wait(bounds.auth_within / GUESS_TURN_PART))))
}

/// Says no after so long, in the same words whether the name or the password is wrong. The name is not logged: it may be a password in the wrong
/// place.
fn rejection(call: &Call<'_>, rejected: Rejected, wait: Duration) -> Step {
    metrics::counter!("holdfast_auth_failures_total").increment(1);
    if let Some(left_out) = chatter::allows(Line::WrongPassword) {
        tracing::info!(target: "holdfast::audit", client = %call.session.client.address, left_out, "wrong user or password");
    }
    if rejected == Rejected::TooOften {
        closed("auth_failures");
    }
    let error = Reply::error(WRONG_PASSWORD);
    if wait.is_zero() {
        return if rejected == Rejected::TooOften { Step::Close(error) } else { Step::Reply(error) };
    }
    metrics::counter!("holdfast_auth_delayed_total").increment(1);
    let later = Box::pin(async move {
        tokio::time::sleep(wait).await;
        error
    });
    if rejected == Rejected::TooOften { Step::CloseAfter(later) } else { Step::Wait(later) }
}

pub static AUTH: Spec = Spec::new("AUTH", "Authenticates the connection.")
    .family("connection")
    .args(&[text("username", REQUEST_BULK_MAX), text("password", REQUEST_BULK_MAX).optional()])
    .flags(ALWAYS | NOAUTH | SECRET)
    .example("AUTH default secret")
    .run(auth);

fn auth(call: &mut Call<'_>) -> Step {
    let (user, password) = match (call.args.shared("username"), call.args.maybe_shared("password")) {
        (user, Some(password)) => (user, password),
        (_, None) if call.session.needs_no_password() => {
            return Step::Reply(Reply::error(
                "ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?",
            ));
        }
        (password, None) => (Bytes::from_static(b"default"), password),
    };
    match log_in(call, &user, &password) {
        Ok(()) => Step::Reply(Reply::ok()),
        Err(step) => step,
    }
}

pub static PING: Spec = Spec::new("PING", "Answers PONG, or the message given, whatever the state of the backends.")
    .family("connection")
    .args(&[text("message", REQUEST_BULK_MAX).optional()])
    .flags(ALWAYS)
    .reply("`PONG`, or the message")
    .run(ping);

fn ping(call: &mut Call<'_>) -> Step {
    let subscribed = call.session.protocol == Protocol::Resp2 && call.session.subscribes();
    let message = call.args.maybe_text("message");
    Step::Reply(match message {
        message if subscribed => Reply::Array(vec![Reply::word("pong"), Reply::bulk(message.unwrap_or_default().to_vec())]),
        // In memory of its own: a small message is not to keep a large buffer.
        Some(message) => Reply::bulk(message.to_vec()),
        None => Reply::simple("PONG"),
    })
}

pub static ECHO: Spec = Spec::new("ECHO", "Answers the message given.")
    .family("connection")
    .args(&[text("message", REQUEST_BULK_MAX)])
    .flags(ALWAYS)
    .reply("the message")
    .example("ECHO hello")
    .run(|call| Step::Reply(Reply::bulk(call.args.text("message").to_vec())));

pub static SELECT: Spec = Spec::new("SELECT", "Accepts database 0, the only one.")
    .family("connection")
    .args(&[text("index", 32)])
    .flags(ALWAYS)
    .example("SELECT 0")
    .run(select);

fn select(call: &mut Call<'_>) -> Step {
    Step::Reply(match integer(call.args.text("index")) {
        Some(0) => Reply::ok(),
        Some(index) if i32::try_from(index).is_ok() => Reply::error("ERR DB index is out of range"),
        Some(_) => Reply::error("ERR value is out of range, value must between -2147483648 and 2147483647"),
        None => Reply::error(NO_INTEGER),
    })
}

pub static QUIT: Spec = Spec::new("QUIT", "Ends the connection after every earlier reply.")
    .family("connection")
    .args(&[text("ignored", REQUEST_BULK_MAX).any_number()])
    .flags(ALWAYS | NOAUTH)
    .run(|_| Step::Close(Reply::ok()));

pub static RESET: Spec = Spec::new("RESET", "Puts the connection back into the state of a new one and releases what it holds.")
    .family("connection")
    .flags(ALWAYS | NOAUTH)
    .reply("`RESET`")
    .run(reset);

fn reset(call: &mut Call<'_>) -> Step {
    call.session.reset();
    Step::Reply(Reply::simple("RESET"))
}

#[cfg(test)]
mod tests {
    use crate::command::tests::{Wire, answers};

    #[test]
    fn hello_switches_the_dialect_of_its_own_reply() {
        let mut wire = Wire::new();
        assert!(wire.send("HELLO").starts_with("*14\r\n"));
        assert!(wire.send("hello 3 SETNAME shop").starts_with("%7\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$5\r\n7.2.0\r\n"));
        assert_eq!(wire.send("CLIENT GETNAME"), "$4\r\nshop\r\n");
        assert!(wire.send("HELLO").starts_with("%7\r\n"));
        assert!(wire.send("HELLO 2").starts_with("*14\r\n"));
    }

    #[test]
    fn greetings_answer_in_redis_words() {
        answers(&[
            ("HELLO 4", "-NOPROTO unsupported protocol version\r\n"),
            ("HELLO x", "-ERR Protocol version is not an integer or out of range\r\n"),
            ("HELLO 3 FOO", "-ERR Syntax error in HELLO option 'FOO'\r\n"),
            ("HELLO 3 AUTH default", "-ERR Syntax error in HELLO option 'AUTH'\r\n"),
            ("HELLO 3 AUTH bob x", "-WRONGPASS invalid username-password pair or user is disabled.\r\n"),
            ("AUTH default x", "+OK\r\n"),
            ("AUTH bob x", "-WRONGPASS invalid username-password pair or user is disabled.\r\n"),
            (
                "AUTH x",
                "-ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?\r\n",
            ),
            ("AUTH default x y", "-ERR wrong number of arguments for 'auth' command\r\n"),
            ("AUTH", "-ERR wrong number of arguments for 'auth' command\r\n"),
            ("ping", "+PONG\r\n"),
            ("PING hi", "$2\r\nhi\r\n"),
            ("PING a b", "-ERR wrong number of arguments for 'ping' command\r\n"),
            ("ECHO request", "$7\r\nrequest\r\n"),
            ("SELECT 0", "+OK\r\n"),
            ("SELECT 1", "-ERR DB index is out of range\r\n"),
            ("SELECT x", "-ERR value is not an integer or out of range\r\n"),
            ("SELECT +0", "-ERR value is not an integer or out of range\r\n"),
            ("SELECT 00", "-ERR value is not an integer or out of range\r\n"),
            ("SELECT -0", "-ERR value is not an integer or out of range\r\n"),
            ("SELECT -1", "-ERR DB index is out of range\r\n"),
            ("SELECT 99999999999", "-ERR value is out of range, value must between -2147483648 and 2147483647\r\n"),
            ("RESET", "+RESET\r\n"),
        ]);
    }
}
