//! Every user there is, and whether a name and a password belong together.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

use super::user::{Catalogue, Secret, User, secret};
use crate::limits::USERS_MAX;

/// Users, one of whom is `default`: who has not named another is that one.
#[derive(Debug)]
pub struct Users {
    /// `default` first.
    users: Vec<(Secret, Arc<User>)>,
}

/// What a client is after it has shown a name and a password.
#[derive(Clone, Debug)]
pub struct Login {
    pub user: Arc<User>,
    /// What it showed. A user whose passwords change keeps those who showed one that stays. `None` before anything was shown.
    pub secret: Option<Secret>,
}

impl Users {
    /// Everybody is `default` and may do everything.
    pub fn open() -> Self {
        Self::of(User::unrestricted(None), Vec::new())
    }

    fn of(default: User, others: Vec<User>) -> Self {
        let users = std::iter::once(default).chain(others);
        Self { users: users.map(|user| (secret(user.name.as_bytes()), Arc::new(user))).collect() }
    }

    /// Reads a users file, a user a line, and the password of `default`, either of which may be missing. With a file or a password nobody is
    /// let in without: `default` is off unless one of them says otherwise. Errors with what is wrong and in which line, without any secret.
    pub fn read(file: Option<&str>, password: Option<&str>, catalogue: &dyn Catalogue) -> Result<Self, String> {
        let mut default = password.map(|password| User::unrestricted(Some(password.as_bytes())));
        if file.is_none() && default.is_none() {
            return Ok(Self::open());
        }
        let mut others: Vec<User> = Vec::new();
        for (number, line) in file.unwrap_or_default().lines().enumerate() {
            if line.trim_start().starts_with('#') || line.trim().is_empty() {
                continue;
            }
            let at = |why: String| format!("line {}: {why}", number + 1);
            let user = User::parse(line, catalogue).map_err(at)?;
            if others.iter().any(|other| other.name == user.name) || (user.name == "default" && default.is_some()) {
                return Err(at(format!(
                    "the user {} is there twice{}",
                    user.name,
                    if password.is_some() { ", or has requirepass, too" } else { "" }
                )));
            }
            if others.len() >= USERS_MAX {
                return Err(at(format!("more than {USERS_MAX} users")));
            }
            if user.name == "default" { default = Some(user) } else { others.push(user) }
        }
        Ok(Self::of(default.unwrap_or_else(User::nobody), others))
    }

    /// Who has this name and this password. It takes the same time whether the name, the password or neither is right: every user's name and
    /// every password of theirs is compared, by hashes of equal length.
    pub fn authenticate(&self, name: &[u8], password: &[u8]) -> Option<Login> {
        let (name, shown) = (secret(name), secret(password));
        let mut found = u64::MAX;
        for (number, (known, user)) in (0_u64..).zip(&self.users) {
            let password_fits = user.has_secret(&shown) | Choice::from(u8::from(user.any_password));
            let fits = known.ct_eq(&name) & password_fits & Choice::from(u8::from(user.enabled));
            found = u64::conditional_select(&found, &number, fits);
        }
        let (_, user) = self.users.get(usize::try_from(found).ok()?)?;
        Some(Login { user: Arc::clone(user), secret: Some(shown) })
    }

    /// Who has not named a user.
    pub fn default_user(&self) -> &Arc<User> {
        &self.users[0].1
    }

    /// The user with this name.
    pub fn find(&self, name: &str) -> Option<&Arc<User>> {
        self.all().find(|user| user.name == name)
    }

    /// All of them, `default` first.
    pub fn all(&self) -> impl Iterator<Item = &Arc<User>> {
        self.users.iter().map(|(_, user)| user)
    }

    /// Whether anybody is let in without a password.
    pub fn admit_anybody(&self) -> bool {
        self.all().any(|user| user.admits(None))
    }

    /// The user that this client goes on as, if it may.
    pub fn renew(&self, login: &Login) -> Option<Arc<User>> {
        self.find(&login.user.name).filter(|user| user.admits(login.secret.as_ref())).cloned()
    }
}

/// The users as they are now, which a reload replaces. Shared by every thread.
pub struct Directory {
    users: RwLock<Arc<Users>>,
    generation: AtomicU64,
}

impl Directory {
    pub fn new(users: Users) -> Self {
        Self { users: RwLock::new(Arc::new(users)), generation: AtomicU64::new(0) }
    }

    pub fn users(&self) -> Arc<Users> {
        Arc::clone(&self.users.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Which users these are: a session looks again when it has changed.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Replaces all of them.
    pub fn replace(&self, users: Users) {
        *self.users.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(users);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Directory({})", self.users().users.len())
    }
}

#[cfg(test)]
mod tests {
    use super::super::user::tests::{Five, HASH};
    use super::*;

    fn users(file: &str) -> Users {
        Users::read(Some(file), None, &Five).unwrap()
    }

    fn named(users: &Users, name: &str, password: &str) -> Option<String> {
        users.authenticate(name.as_bytes(), password.as_bytes()).map(|login| login.user.name.clone())
    }

    #[test]
    fn a_name_and_its_password_belong_together() {
        let users = users(&format!("# the shops\nuser shop on #{HASH} +@stock\n\nuser gone off #{HASH}\nuser open on nopass\n"));
        assert_eq!(named(&users, "shop", "secret").as_deref(), Some("shop"));
        for (name, password) in
            [("shop", "Secret"), ("shop", ""), ("Shop", "secret"), ("gone", "secret"), ("nobody", "secret"), ("default", "secret")]
        {
            assert_eq!(named(&users, name, password), None, "{name} {password}");
        }
        assert_eq!(named(&users, "open", "anything").as_deref(), Some("open"));
        assert!(users.admit_anybody());
    }

    #[test]
    fn a_wrong_password_and_an_unknown_user_take_the_same_time() {
        let file: String = (0..20).map(|n| format!("user u-{n} on #{HASH} +@all\n")).collect();
        let users = users(&file);
        let measure = |name: &[u8]| {
            let began = std::time::Instant::now();
            for _ in 0..10 {
                assert!(std::hint::black_box(&users).authenticate(std::hint::black_box(name), b"s3cret-of-some-length").is_none());
            }
            began.elapsed()
        };
        // In turns, so that whatever else the machine does falls on all of them.
        let names: [&[u8]; 4] = [b"u-0", b"u-19", b"nobody", b"default"];
        let mut took = [const { Vec::new() }; 4];
        for _ in 0..2_000 {
            for (name, took) in names.iter().zip(&mut took) {
                took.push(measure(name));
            }
        }
        let medians = took.map(|mut took| {
            took.sort();
            took[took.len() / 2]
        });
        let (least, most) = (medians.iter().min().unwrap(), medians.iter().max().unwrap());
        assert!(most.as_secs_f64() < least.as_secs_f64() * 1.15, "{medians:?}");
    }

    #[test]
    fn default_is_off_where_there_are_others_unless_it_is_given_a_password() {
        assert!(Users::open().default_user().admits(None));
        let with_file = users(&format!("user shop on #{HASH}"));
        assert!(!with_file.default_user().admits(None) && !with_file.admit_anybody());
        let with_password = Users::read(None, Some("pass"), &Five).unwrap();
        assert_eq!(named(&with_password, "default", "pass").as_deref(), Some("default"));
        assert_eq!(named(&with_password, "default", "other"), None);
        assert!(!with_password.admit_anybody());
        let both = Users::read(Some("user default on nopass"), Some("pass"), &Five);
        assert!(both.unwrap_err().starts_with("line 1: the user default is there twice"));
        assert!(Users::read(Some("user a on\nuser a on"), None, &Five).unwrap_err().starts_with("line 2: the user a is there twice"));
    }

    #[test]
    fn a_changed_user_keeps_those_who_still_belong() {
        let other = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8";
        let before = users(&format!("user a on #{HASH} +get"));
        let login = before.authenticate(b"a", b"secret").unwrap();
        assert!(users(&format!("user a on #{other} #{HASH} +set")).renew(&login).unwrap().may_run(1));
        for after in [format!("user a on #{other}"), format!("user a off #{HASH}"), format!("user b on #{HASH}")] {
            assert!(users(&after).renew(&login).is_none(), "{after}");
        }
    }
}
