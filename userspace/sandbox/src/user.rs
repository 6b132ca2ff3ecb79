//! Whom a process runs as.

use std::fmt;

use nix::errno::Errno;
use nix::unistd::{Gid, Group, Uid};

use crate::error::{Error, system};

/// A user and the one group that it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    uid: u32,
    gid: u32,
}

impl User {
    /// `nobody` and its group, by the numbers that the kernel itself uses for users that there
    /// are not.
    pub const NOBODY: Self = Self {
        uid: 65534,
        gid: 65534,
    };

    /// Reads `USER` or `USER:GROUP`, each a name or a number. Without a group it is the user's
    /// own, and for a number that nobody has the group of the same number.
    ///
    /// # Errors
    ///
    /// Names that the system does not know; root.
    pub fn find(text: &str) -> Result<Self, Error> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let unknown = |what, name: &str| Error::Unknown {
            what,
            name: name.into(),
        };
        let looked = "looking a user up";
        let (uid, found) = match user.parse() {
            Ok(uid) => {
                let found = nix::unistd::User::from_uid(Uid::from_raw(uid));
                (uid, known(found).map_err(system(looked))?)
            }
            Err(_) => match known(nix::unistd::User::from_name(user)).map_err(system(looked))? {
                Some(found) => (found.uid.as_raw(), Some(found)),
                None => return Err(unknown("user", user)),
            },
        };
        let gid = match group {
            None => found.map_or(uid, |found| found.gid.as_raw()),
            Some(group) => match group.parse() {
                Ok(gid) => gid,
                Err(_) => known(Group::from_name(group))
                    .map_err(system("looking a group up"))?
                    .map(|found| found.gid.as_raw())
                    .ok_or_else(|| unknown("group", group))?,
            },
        };
        if uid == 0 || gid == 0 {
            return Err(Error::Root(text.into()));
        }
        Ok(Self { uid, gid })
    }

    /// The user's number.
    #[must_use]
    pub fn uid(self) -> Uid {
        Uid::from_raw(self.uid)
    }

    /// The group's number.
    #[must_use]
    pub fn gid(self) -> Gid {
        Gid::from_raw(self.gid)
    }
}

/// What was found, where the system has no lists, too (getpwnam(3) names these errors for that).
fn known<T>(found: nix::Result<Option<T>>) -> nix::Result<Option<T>> {
    match found {
        Err(Errno::ENOENT | Errno::ESRCH | Errno::EBADF | Errno::EPERM) => Ok(None),
        found => found,
    }
}

impl fmt::Display for User {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}", self.uid, self.gid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_names_or_numbers() {
        let find = |text| User::find(text).map(|user| user.to_string());
        assert_eq!(find("1234567:89").unwrap(), "1234567:89");
        assert_eq!(find("1234567").unwrap(), "1234567:1234567");
        // On any system.
        assert!(matches!(find("root"), Err(Error::Root(_))));
        for text in ["0", "0:5", "5:0", "5:root"] {
            assert!(matches!(find(text), Err(Error::Root(_))), "{text}");
        }
        for text in ["no-such-user", "", "5:no-such-group", "-1", "5:", ":5"] {
            let error = find(text).unwrap_err();
            assert!(matches!(error, Error::Unknown { .. }), "{text}: {error}");
        }
    }
}
