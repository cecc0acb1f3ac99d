//! CLIENT: what the server knows of its clients, and what they tell it about themselves.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::spec::{ADMIN, CONNECTION, FAST, LOADING, SHOWS, Spec, text, word};
use super::{Call, Step, describe};
use crate::limits::{CLIENT_NAME_MAX, ERROR_ECHO_MAX, REQUEST_BULK_MAX};
use crate::resp::Reply;
use crate::session::client::{Client, Replies};

const ALWAYS: u32 = CONNECTION | LOADING;

pub static CLIENT: Spec = Spec::new("CLIENT", "Shows and names client connections.")
    .family("connection")
    .flags(ALWAYS)
    .example("CLIENT ID")
    .subcommands(&[&ID, &INFO, &LIST, &KILL, &SETNAME, &GETNAME, &SETINFO, &REPLY, &NO_EVICT, &NO_TOUCH, &GETREDIR, &TRACKING, &HELP]);

static ID: Spec = sub("CLIENT|ID", "Answers the connection's number.")
    .flags(ALWAYS | FAST)
    .reply("integer")
    .run(|call| Step::Reply(Reply::Integer(i64::try_from(call.session.client.id).unwrap_or(i64::MAX))));

static INFO: Spec = sub("CLIENT|INFO", "Describes this connection.").reply("text").run(|call| {
    call.session.publish(call.pipeline().in_flight(), 0, 0);
    Step::Reply(Reply::Verbatim(format!("{}\n", call.session.client.line())))
});

static LIST: Spec = sub("CLIENT|LIST", "Describes every connection, one a line.")
    .args(&[text("filter", CLIENT_NAME_MAX).any_number()])
    .flags(ALWAYS | ADMIN | SHOWS)
    .complexity("O(N) where N is the number of connections")
    .reply("text")
    .run(list);

fn list(call: &mut Call<'_>) -> Step {
    call.session.publish(call.pipeline().in_flight(), 0, 0);
    let filters: Vec<&[u8]> = call.args.list("filter").collect();
    let clients = call.cx.registry.clients();
    let show = |clients: &mut dyn Iterator<Item = &Arc<Client>>| Reply::Verbatim(clients.map(|client| client.line() + "\n").collect());
    Step::Reply(match filters.split_first() {
        None => show(&mut clients.iter()),
        Some((kind, [which])) if kind.eq_ignore_ascii_case(b"TYPE") => match of_type(which) {
            Ok(wanted) => show(&mut clients.iter().filter(|client| wanted(client))),
            Err(error) => Reply::error(error),
        },
        Some((kind, ids)) if kind.eq_ignore_ascii_case(b"ID") && !ids.is_empty() => {
            let Some(ids) = ids.iter().map(|id| number(id)).collect::<Option<BTreeSet<u64>>>() else {
                return Step::Reply(Reply::error("ERR Invalid client ID"));
            };
            // Both are in the order of the ids.
            let found = ids.iter().filter_map(|id| clients.binary_search_by_key(id, |client| client.id).ok());
            show(&mut found.map(|at| &clients[at]))
        }
        Some(_) => Reply::error("ERR syntax error"),
    })
}

/// Whether a client is of this type, as Redis names them: replicas and masters are none of ours. Errors with the error reply's text.
fn of_type(which: &[u8]) -> Result<impl Fn(&Client) -> bool + use<>, String> {
    let subscribed = match which.to_ascii_lowercase().as_slice() {
        b"normal" => Some(false),
        b"pubsub" => Some(true),
        b"master" | b"replica" | b"slave" => None,
        _ => return Err(format!("ERR Unknown client type '{}'", super::cut(which, ERROR_ECHO_MAX))),
    };
    Ok(move |client: &Client| subscribed == Some(client.profile().subscribes()))
}

static KILL: Spec = sub(
    "CLIENT|KILL",
    "Closes connections: `KILL address`, or `KILL ID id`, `ADDR`, `LADDR`, `USER`, `TYPE`, `SKIPME yes|no` in any order.",
)
.args(&[text("filter", CLIENT_NAME_MAX).repeated()])
.flags(ALWAYS | ADMIN)
.complexity("O(N) where N is the number of connections")
.reply("`OK`, or how many were closed")
.example("CLIENT KILL ID 7")
.run(kill);

fn kill(call: &mut Call<'_>) -> Step {
    let filters: Vec<&[u8]> = call.args.list("filter").collect();
    let clients = call.cx.registry.clients();
    let own = call.session.client.id;
    if let [address] = filters[..] {
        let found = clients.iter().find(|client| client.address.to_string().as_bytes() == address);
        return match found {
            None => Step::Reply(Reply::error("ERR No such client")),
            Some(client) if client.id == own => close_own(Reply::ok()),
            Some(client) => {
                client.kill(KILLED);
                Step::Reply(Reply::ok())
            }
        };
    }
    let mut skip_own = true;
    type Test<'a> = Box<dyn Fn(&Client) -> bool + 'a>;
    let mut tests: Vec<Test<'_>> = Vec::new();
    for pair in filters.chunks(2) {
        let [kind, value] = pair else { return Step::Reply(Reply::error("ERR syntax error")) };
        let is = |word: &str| kind.eq_ignore_ascii_case(word.as_bytes());
        if is("ID") {
            let Some(id) = number(value).filter(|&id| id > 0) else {
                return Step::Reply(Reply::error("ERR client-id should be greater than 0"));
            };
            tests.push(Box::new(move |client| client.id == id));
        } else if is("ADDR") {
            tests.push(Box::new(|client| client.address.to_string().as_bytes() == &value[..]));
        } else if is("LADDR") {
            tests.push(Box::new(|client| client.local.to_string().as_bytes() == &value[..]));
        } else if is("USER") {
            let name = super::cut(value, ERROR_ECHO_MAX);
            if call.cx.users.users().find(&name).is_none() {
                return Step::Reply(Reply::error(format!("ERR No such user '{name}'")));
            }
            tests.push(Box::new(move |client| client.profile().login.as_ref().is_some_and(|login| login.user.name == name)));
        } else if is("TYPE") {
            match of_type(value) {
                Ok(wanted) => tests.push(Box::new(wanted)),
                Err(error) => return Step::Reply(Reply::error(error)),
            }
        } else if is("SKIPME") && (value.eq_ignore_ascii_case(b"yes") || value.eq_ignore_ascii_case(b"no")) {
            skip_own = value.eq_ignore_ascii_case(b"yes");
        } else {
            return Step::Reply(Reply::error("ERR syntax error"));
        }
    }
    let chosen: Vec<_> = clients.iter().filter(|client| !(skip_own && client.id == own) && tests.iter().all(|test| test(client))).collect();
    let count = Reply::Integer(i64::try_from(chosen.len()).unwrap_or(i64::MAX));
    chosen.iter().filter(|client| client.id != own).for_each(|client| client.kill(KILLED));
    if chosen.iter().any(|client| client.id == own) { close_own(count) } else { Step::Reply(count) }
}

/// What a connection that CLIENT KILL ends is counted as.
const KILLED: &str = "killed";

fn close_own(reply: Reply) -> Step {
    super::closed(KILLED);
    Step::Close(reply)
}

static SETNAME: Spec = sub("CLIENT|SETNAME", "Names this connection.")
    .args(&[text("name", REQUEST_BULK_MAX)])
    .flags(ALWAYS | FAST)
    .example("CLIENT SETNAME shop")
    .run(|call| match valid_name(call.args.text("name"), "Client names") {
        Ok(name) => {
            call.session.client.profile().name = name;
            Step::Reply(Reply::ok())
        }
        Err(error) => Step::Reply(Reply::error(error)),
    });

static GETNAME: Spec = sub("CLIENT|GETNAME", "Answers this connection's name.").flags(ALWAYS | FAST).reply("text, or nil").run(|call| {
    let name = call.session.client.profile().name.clone();
    Step::Reply(if name.is_empty() { Reply::Nil } else { Reply::text(name) })
});

static SETINFO: Spec = sub("CLIENT|SETINFO", "Tells the client library's name or version.")
    .args(&[text("attribute", CLIENT_NAME_MAX), text("value", REQUEST_BULK_MAX)])
    .flags(ALWAYS | FAST)
    .example("CLIENT SETINFO LIB-NAME redis-py")
    .run(set_info);

fn set_info(call: &mut Call<'_>) -> Step {
    let (attribute, value) = (call.args.text("attribute"), call.args.text("value"));
    let (is_name, shown) = match attribute {
        name if name.eq_ignore_ascii_case(b"LIB-NAME") => (true, "lib-name"),
        ver if ver.eq_ignore_ascii_case(b"LIB-VER") => (false, "lib-ver"),
        other => return Step::Reply(Reply::error(format!("ERR Unrecognized option '{}'", super::cut(other, ERROR_ECHO_MAX)))),
    };
    Step::Reply(match valid_name(value, shown) {
        Ok(value) => {
            let mut profile = call.session.client.profile();
            *(if is_name { &mut profile.lib_name } else { &mut profile.lib_ver }) = value;
            Reply::ok()
        }
        Err(error) => Reply::error(error),
    })
}

static REPLY: Spec = sub("CLIENT|REPLY", "Turns replies off, on, or off for the next command.")
    .args(&[word("mode", &["on", "off", "skip"])])
    .reply("`OK` for ON, nothing for the others")
    .example("CLIENT REPLY ON")
    .run(|call| {
        call.session.replies = match call.args.maybe_word("mode") {
            Some("off") => Replies::Off,
            Some("skip") if call.session.replies == Replies::Off => Replies::Off,
            Some("skip") => Replies::SkipNext,
            _ => Replies::On,
        };
        Step::Reply(Reply::ok())
    });

static NO_EVICT: Spec = sub("CLIENT|NO-EVICT", "Accepted: connections are not evicted.")
    .args(&[word("enabled", &["on", "off"])])
    .flags(ALWAYS | ADMIN)
    .example("CLIENT NO-EVICT ON")
    .run(|_| Step::Reply(Reply::ok()));

static NO_TOUCH: Spec = sub("CLIENT|NO-TOUCH", "Accepted: reads do not touch an eviction order.")
    .args(&[word("enabled", &["on", "off"])])
    .example("CLIENT NO-TOUCH ON")
    .run(|_| Step::Reply(Reply::ok()));

static GETREDIR: Spec =
    sub("CLIENT|GETREDIR", "Answers -1: there is no tracking to redirect.").reply("integer").run(|_| Step::Reply(Reply::Integer(-1)));

static TRACKING: Spec = sub("CLIENT|TRACKING", "Refused: what a client caches of stock is wrong at once.")
    .args(&[text("option", CLIENT_NAME_MAX).repeated()])
    .reply("`OK` for OFF, else an error")
    .example("CLIENT TRACKING ON")
    .run(|call| {
        let options: Vec<&[u8]> = call.args.list("option").collect();
        Step::Reply(match options[..] {
            [off] if off.eq_ignore_ascii_case(b"OFF") => Reply::ok(),
            [on, ..] if on.eq_ignore_ascii_case(b"ON") => {
                Reply::error("ERR client-side caching is not supported: connect without CLIENT TRACKING")
            }
            _ => Reply::error("ERR syntax error"),
        })
    });

static HELP: Spec = sub("CLIENT|HELP", "Lists the subcommands.").reply("array of text").run(|_| Step::Reply(describe::help(&CLIENT)));

const fn sub(name: &'static str, summary: &'static str) -> Spec {
    Spec::new(name, summary).family("connection").flags(ALWAYS)
}

fn number(bytes: &[u8]) -> Option<u64> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// Checks a client's name or a library's: printable ASCII without spaces, so that CLIENT LIST stays one word a field.
pub fn valid_name(bytes: &[u8], what: &str) -> Result<String, String> {
    if bytes.len() > CLIENT_NAME_MAX {
        return Err(format!("ERR {what} cannot be longer than {CLIENT_NAME_MAX} bytes"));
    }
    if !bytes.iter().all(u8::is_ascii_graphic) {
        return Err(format!("ERR {what} cannot contain spaces, newlines or special characters."));
    }
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use crate::command::tests::{Wire, answers};

    #[test]
    fn clients_introduce_themselves_as_to_redis() {
        answers(&[
            ("CLIENT ID", ":7\r\n"),
            ("CLIENT GETNAME", "$-1\r\n"),
            ("client setinfo lib-name redis-py", "+OK\r\n"),
            ("CLIENT SETINFO LIB-VER 8.0", "+OK\r\n"),
            ("CLIENT SETINFO x y", "-ERR Unrecognized option 'x'\r\n"),
            ("CLIENT SETNAME a\u{e9}", "-ERR Client names cannot contain spaces, newlines or special characters.\r\n"),
            ("CLIENT SETNAME", "-ERR wrong number of arguments for 'client|setname' command\r\n"),
            ("CLIENT", "-ERR wrong number of arguments for 'client' command\r\n"),
            ("CLIENT MAINT_NOTIFICATIONS ON", "-ERR unknown subcommand 'MAINT_NOTIFICATIONS'. Try CLIENT HELP.\r\n"),
            ("CLIENT NO-EVICT ON", "+OK\r\n"),
            ("CLIENT KILL 1.2.3.4:5", "-ERR No such client\r\n"),
            ("CLIENT KILL ID 99", ":0\r\n"),
            ("CLIENT KILL ID 0", "-ERR client-id should be greater than 0\r\n"),
            ("CLIENT KILL USER nobody", "-ERR No such user 'nobody'\r\n"),
            ("CLIENT KILL USER default", ":0\r\n"),
            ("CLIENT KILL TYPE foo", "-ERR Unknown client type 'foo'\r\n"),
            ("CLIENT KILL TYPE pubsub SKIPME no", ":0\r\n"),
            ("CLIENT KILL TYPE master", ":0\r\n"),
            ("CLIENT KILL SKIPME foo", "-ERR syntax error\r\n"),
            ("CLIENT KILL FOO bar", "-ERR syntax error\r\n"),
            ("CLIENT LIST TYPE foo", "-ERR Unknown client type 'foo'\r\n"),
            ("CLIENT LIST TYPE master", "$0\r\n\r\n"),
            ("CLIENT LIST ID", "-ERR syntax error\r\n"),
            ("CLIENT LIST ID x", "-ERR Invalid client ID\r\n"),
            ("CLIENT LIST ID 99999", "$0\r\n\r\n"),
            ("CLIENT TRACKING OFF", "+OK\r\n"),
            ("CLIENT TRACKING off foo", "-ERR syntax error\r\n"),
            ("CLIENT TRACKING foo", "-ERR syntax error\r\n"),
            ("CLIENT REPLY foo", "-ERR syntax error\r\n"),
            ("CLIENT NO-EVICT foo", "-ERR syntax error\r\n"),
            ("CLIENT LIST FOO", "-ERR syntax error\r\n"),
        ]);
    }

    #[test]
    fn replies_can_be_turned_off_and_skipped() {
        let mut wire = Wire::new();
        assert_eq!(wire.send("CLIENT REPLY SKIP"), "");
        assert_eq!(wire.send("PING"), "");
        assert_eq!(wire.send("PING"), "+PONG\r\n");
        assert_eq!(wire.send("CLIENT REPLY OFF"), "");
        assert_eq!(wire.send("PING"), "");
        assert_eq!(wire.send("CLIENT REPLY SKIP"), "");
        assert_eq!(wire.send("PING"), "");
        assert_eq!(wire.send("PING"), "");
        assert_eq!(wire.send("CLIENT REPLY ON"), "+OK\r\n");
        assert_eq!(wire.send("PING"), "+PONG\r\n");
        // What is sent behind SKIP is skipped, unless it asks for replies.
        for (next, reply, then) in [
            ("CLIENT REPLY ON", "+OK\r\n", "+PONG\r\n"),
            ("CLIENT REPLY SKIP", "", ""),
            ("PING", "", "+PONG\r\n"),
            ("NO-SUCH-COMMAND", "", "+PONG\r\n"),
            ("RESET", "", "+PONG\r\n"),
            ("CLIENT REPLY OFF", "", ""),
            ("RESET", "+RESET\r\n", "+PONG\r\n"),
        ] {
            let asked = if reply == "+RESET\r\n" { "CLIENT REPLY OFF" } else { "CLIENT REPLY SKIP" };
            assert_eq!(wire.send(asked), "", "{next}");
            assert_eq!(wire.send(next), reply, "{next}");
            assert_eq!(wire.send("PING"), then, "{next}");
        }
    }

    #[test]
    fn a_client_sees_itself_in_the_list() {
        let mut wire = Wire::new();
        wire.send("CLIENT SETNAME shop");
        assert!(wire.send("CLIENT INFO").contains(" name=shop "));
    }
}
