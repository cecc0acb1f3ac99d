//! ACL: who the users are, and what rules may name.

use std::collections::BTreeSet;

use super::server::{NO_INTEGER, integer};
use super::spec::{ADMIN, LOADING, SHOWS, Spec, text};
use super::{Args, Call, Step, describe, rights};
use crate::limits::{CLIENT_NAME_MAX, ERROR_ECHO_MAX, REQUEST_BULK_MAX, USER_NAME_MAX};
use crate::resp::{Reply, Request};

const SHOW: u32 = ADMIN | LOADING | SHOWS;

pub static ACL: Spec = sub("ACL", "Shows users and command categories; users are changed in the users file.")
    .example("ACL WHOAMI")
    .subcommands(&[&WHOAMI, &CAT, &USERS, &LIST, &GETUSER, &DRYRUN, &SETUSER, &DELUSER, &LOG, &HELP]);

static WHOAMI: Spec = sub("ACL|WHOAMI", "Answers the connection's user.")
    .reply("text")
    .run(|call| Step::Reply(Reply::text(call.session.user().name.clone())));

static CAT: Spec = sub("ACL|CAT", "Lists the command categories, or the commands in one.")
    .args(&[text("category", CLIENT_NAME_MAX).optional()])
    .reply("array of text")
    .run(cat);

fn cat(call: &mut Call<'_>) -> Step {
    let specs = call.cx.commands.all();
    let Some(category) = call.args.maybe_text("category") else {
        let categories: BTreeSet<&str> = specs.iter().flat_map(|spec| describe::categories(spec)).collect();
        return Step::Reply(Reply::Array(categories.into_iter().map(Reply::word).collect()));
    };
    let within = |spec: &Spec| describe::categories(spec).iter().any(|known| category.eq_ignore_ascii_case(known.as_bytes()));
    let names: Vec<Reply> = specs.iter().filter(|spec| within(spec)).map(|spec| Reply::text(spec.lower_name())).collect();
    if names.is_empty() {
        return Step::Reply(Reply::error(format!("ERR Unknown category '{}'", super::cut(category, ERROR_ECHO_MAX))));
    }
    Step::Reply(Reply::Array(names))
}

static USERS: Spec = sub("ACL|USERS", "Lists the users.").flags(SHOW).reply("array of text").run(|call| {
    let users = call.cx.users.users();
    Step::Reply(Reply::Array(users.all().map(|user| Reply::text(user.name.clone())).collect()))
});

static LIST: Spec =
    sub("ACL|LIST", "Lists the users with their rights, without their passwords.").flags(SHOW).reply("array of text").run(|call| {
        let users = call.cx.users.users();
        Step::Reply(Reply::Array(users.all().map(|user| Reply::text(user.show())).collect()))
    });

static GETUSER: Spec = sub("ACL|GETUSER", "Describes a user, without its passwords.")
    .args(&[text("username", USER_NAME_MAX)])
    .flags(SHOW)
    .reply("map of `flags passwords commands keys channels selectors`, or nil")
    .example("ACL GETUSER default")
    .run(|call| {
        let users = call.cx.users.users();
        let name = String::from_utf8_lossy(call.args.text("username"));
        let Some(user) = users.find(&name) else { return Step::Reply(Reply::Nil) };
        Step::Reply(Reply::map([
            ("flags", Reply::Set(user.flags().map(Reply::word).collect())),
            ("passwords", Reply::Array(vec![Reply::word("(redacted)"); user.secrets()])),
            ("commands", Reply::text(user.show_commands())),
            ("keys", Reply::text(user.show_ids())),
            ("channels", Reply::text(user.show_channels())),
            ("selectors", Reply::Array(vec![])),
        ]))
    });

static DRYRUN: Spec = sub("ACL|DRYRUN", "Says whether a user may run a command, without running it.")
    .args(&[text("username", USER_NAME_MAX), text("word", REQUEST_BULK_MAX).repeated()])
    .flags(SHOW)
    .reply("`OK`, or why not")
    .example("ACL DRYRUN default STOCK.GET sku-1")
    .run(dry_run);

fn dry_run(call: &mut Call<'_>) -> Step {
    let users = call.cx.users.users();
    let name = super::cut(call.args.text("username"), ERROR_ECHO_MAX);
    let Some(user) = users.find(&name) else { return Step::Reply(Reply::error(format!("ERR User '{name}' not found"))) };
    let words: Request = call.args.list("word").collect();
    let (number, spec) = match call.cx.commands.find(&words) {
        Ok(found) => found,
        Err(_) => return Step::Reply(Reply::error(format!("ERR Command '{}' not found", super::cut(&words[0], ERROR_ECHO_MAX)))),
    };
    let args = match Args::parse(spec, words) {
        Ok(args) => args,
        Err(error) => return Step::Reply(Reply::error(error)),
    };
    Step::Reply(if !user.may_run(number) {
        Reply::text(format!("User {} has no permissions to run the '{}' command", user.name, spec.lower_name()))
    } else if !rights::touches_only_its_own(user, spec, &args) {
        Reply::text(format!("User {} has no permissions to access a key of this command", user.name))
    } else if !rights::watches_only_its_own(user, spec, &args) {
        Reply::text(format!("User {} has no permissions to access a channel of this command", user.name))
    } else {
        Reply::ok()
    })
}

const IN_THE_FILE: &str = "ERR users are changed in the file that auth.users_file names, and taken over with a SIGHUP";

static SETUSER: Spec = sub("ACL|SETUSER", "Refused: users are changed in the users file.")
    .args(&[text("username", USER_NAME_MAX), text("rule", REQUEST_BULK_MAX).any_number()])
    .flags(ADMIN | LOADING | super::spec::SECRET)
    .reply("an error")
    .example("ACL SETUSER shop on")
    .run(|_| Step::Reply(Reply::error(IN_THE_FILE)));

static DELUSER: Spec = sub("ACL|DELUSER", "Refused: users are changed in the users file.")
    .args(&[text("username", USER_NAME_MAX).repeated()])
    .flags(ADMIN | LOADING)
    .reply("an error")
    .example("ACL DELUSER shop")
    .run(|_| Step::Reply(Reply::error(IN_THE_FILE)));

static LOG: Spec = sub("ACL|LOG", "Answers no entries: what was denied is in the log and in the metrics.")
    .args(&[text("count", 32).optional()])
    .flags(SHOW)
    .reply("an empty array, or `OK` for RESET")
    .run(|call| {
        Step::Reply(match call.args.maybe_text("count") {
            Some(reset) if reset.eq_ignore_ascii_case(b"RESET") => Reply::ok(),
            Some(count) if integer(count).is_none() => Reply::error(NO_INTEGER),
            _ => Reply::Array(vec![]),
        })
    });

static HELP: Spec = sub("ACL|HELP", "Lists the subcommands.").reply("array of text").run(|_| Step::Reply(describe::help(&ACL)));

const fn sub(name: &'static str, summary: &'static str) -> Spec {
    Spec::new(name, summary).flags(LOADING)
}

#[cfg(test)]
mod tests {
    use crate::command::Commands;
    use crate::command::table::TABLE;
    use crate::command::tests::{Wire, answers};
    use crate::session::users::Users;

    const FILE: &str = "user default on nopass ~* &* +@all\nuser shop on #2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b ~shop-* &stock:events:shop-* +@stock +@pubsub";

    #[test]
    fn users_are_shown_without_their_passwords() {
        let users = Users::read(Some(FILE), None, &Commands::new(TABLE)).unwrap();
        let mut wire = Wire::with_users(users);
        assert_eq!(wire.send("ACL USERS"), "*2\r\n$7\r\ndefault\r\n$4\r\nshop\r\n");
        let list = wire.send("ACL LIST");
        assert!(list.contains("user default on nopass ~* &* +@all\r\n"), "{list}");
        assert!(
            list.contains("user shop on #(redacted) ~shop-* &stock:events:shop-* +@stock +@pubsub\r\n") && !list.contains("2bb8"),
            "{list}"
        );
        let user = wire.send("ACL GETUSER shop");
        assert!(user.starts_with("*12\r\n$5\r\nflags\r\n*1\r\n$2\r\non\r\n$9\r\npasswords\r\n*1\r\n$10\r\n(redacted)\r\n"), "{user}");
        assert_eq!(wire.send("ACL GETUSER nobody"), "$-1\r\n");
        assert_eq!(wire.send("ACL DRYRUN shop STOCK.GET shop-mug"), "+OK\r\n");
        assert!(wire.send("ACL DRYRUN shop STOCK.GET mug").contains("no permissions to access a key"));
        assert!(wire.send("ACL DRYRUN shop INFO").contains("no permissions to run the 'info' command"));
        for (subscription, may) in [
            ("SUBSCRIBE stock:events:shop-mug", true),
            ("SUBSCRIBE stock:events:shop-mug stock:events:cup", false),
            ("PSUBSCRIBE stock:events:shop-*", true),
            ("PSUBSCRIBE stock:events:*", false),
            ("UNSUBSCRIBE stock:events:cup", true),
        ] {
            let said = wire.send(&format!("ACL DRYRUN shop {subscription}"));
            assert_eq!(said == "+OK\r\n", may, "{said}");
            assert_eq!(said.contains("no permissions to access a channel"), !may, "{said}");
        }
        assert_eq!(wire.send("AUTH shop secret"), "+OK\r\n");
        assert_eq!(wire.send("SUBSCRIBE stock:events:cup"), "-NOPERM No permissions to access a channel\r\n");
        assert_eq!(wire.send("ACL WHOAMI"), "-NOPERM User shop has no permissions to run the 'acl|whoami' command\r\n");
    }

    #[test]
    fn without_users_everybody_is_default() {
        answers(&[
            ("ACL WHOAMI", "$7\r\ndefault\r\n"),
            ("ACL CAT nonsense", "-ERR Unknown category 'nonsense'\r\n"),
            ("ACL LIST", "*1\r\n$34\r\nuser default on nopass ~* &* +@all\r\n"),
            ("ACL SETUSER a on >secret", "-ERR users are changed in the file that auth.users_file names, and taken over with a SIGHUP\r\n"),
            ("ACL LOG", "*0\r\n"),
            ("ACL LOG 10", "*0\r\n"),
            ("ACL LOG reset", "+OK\r\n"),
            ("ACL LOG x", "-ERR value is not an integer or out of range\r\n"),
            ("ACL GETUSER nobody", "$-1\r\n"),
        ]);
    }
}
