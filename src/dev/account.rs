//! Who runs Postgres: it refuses to run as root.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::Error;

/// A user of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    /// Its name.
    pub(super) name: String,
    /// Its number.
    pub(super) uid: u32,
    /// The number of its group.
    pub(super) gid: u32,
}

/// Who runs Postgres where root must not: `postgres`, which its package creates, else `nobody`. None where we are not root.
pub(super) fn for_postgres() -> Result<Option<Account>, Error> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd").map_err(|error| Error(format!("cannot read /etc/passwd: {error}")))?;
    let account = find(&users, "postgres").or_else(|| find(&users, "nobody"));
    account.map(Some).ok_or_else(|| {
        Error(
            "Postgres does not run as root, and there is neither a user postgres nor a user nobody: run holdfast dev as another user"
                .into(),
        )
    })
}

fn find(passwd: &str, name: &str) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        let mut numbers = fields.skip(1);
        Some(Account { name: name.to_owned(), uid: numbers.next()?.parse().ok()?, gid: numbers.next()?.parse().ok()? })
    })
}

/// Whether the account may pass through a directory and all above it.
pub(super) fn can_enter(dir: &Path, account: &Account) -> bool {
    dir.ancestors().all(|dir| {
        fs::metadata(dir).is_ok_and(|metadata| {
            let bit = if metadata.uid() == account.uid {
                0o100
            } else if metadata.gid() == account.gid {
                0o010
            } else {
                0o001
            };
            metadata.mode() & bit != 0
        })
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn accounts_are_found_by_name() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65533:nobody:/:/bin/false\npostgres:x:101:104::/var/lib:/bin/bash\n";
        assert_eq!(find(passwd, "postgres"), Some(Account { name: "postgres".into(), uid: 101, gid: 104 }));
        assert_eq!(find(passwd, "nobody").map(|account| (account.uid, account.gid)), Some((65534, 65533)));
        assert_eq!(find(passwd, "post"), None);
    }

    #[test]
    fn a_closed_directory_keeps_others_out_of_all_below_it() {
        let closed = std::env::temp_dir().join(format!("holdfast-{}", uuid::Uuid::new_v4()));
        let inner = closed.join("inner");
        fs::create_dir_all(&inner).unwrap();
        let metadata = fs::metadata(&closed).unwrap();
        let owner = Account { name: "owner".into(), uid: metadata.uid(), gid: metadata.gid() };
        let stranger = Account { name: "stranger".into(), uid: metadata.uid() + 1, gid: metadata.gid() + 1 };
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(can_enter(&inner, &stranger) && can_enter(&inner, &owner));
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!can_enter(&inner, &stranger) && can_enter(&inner, &owner));
        fs::remove_dir_all(closed).unwrap();
    }
}
