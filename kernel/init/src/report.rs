//! What the first process says on the report line, among the programs' own output.

use std::fmt;

use crate::hex;

/// How each report begins. A line that begins otherwise is a program's own.
const MARK: &str = "@ioregion-vm";

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// Killed because its time was over.
    Timeout,
    /// It was never started: why.
    NotStarted(String),
}

impl Ending {
    /// Whether the program succeeded.
    pub fn passed(&self) -> bool {
        *self == Self::Exit(0)
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(status) => write!(out, "exit {status}"),
            Self::Signal(signal) => write!(out, "signal {signal}"),
            Self::Timeout => write!(out, "timeout"),
            Self::NotStarted(why) => write!(out, "not started: {why}"),
        }
    }
}

/// One report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// Whether VMs can be made in the VM, or why not.
    Kvm(Result<(), String>),
    /// What next? Of programs that several VMs share, the answer is the number of one in the
    /// manifest, from 0, or of none that is there: a line of digits on the report line.
    Next,
    /// A program starts.
    Start {
        /// The job's name.
        name: String,
    },
    /// A program ended.
    End {
        /// The job's name.
        name: String,
        /// In milliseconds of the VM's clock.
        millis: u64,
        /// How.
        ending: Ending,
    },
    /// A file that a program left behind; its bytes follow in [`Data`](Self::Data).
    File {
        /// Its name: one word, no folder.
        name: String,
        /// In bytes.
        size: usize,
        /// [`checksum`](crate::hex::checksum) of its bytes.
        checksum: u64,
    },
    /// A piece of the file that was named last.
    Data(Vec<u8>),
    /// The last word: how many programs succeeded, of how many.
    Verdict {
        /// Programs that succeeded.
        passed: usize,
        /// Programs that it ran: all in the manifest, unless other VMs share them.
        total: usize,
    },
    /// The first process could not do its work.
    Broken(String),
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm(Ok(())) => write!(out, "{MARK} kvm usable"),
            Self::Kvm(Err(why)) => write!(out, "{MARK} kvm unusable: {}", one_line(why)),
            Self::Next => write!(out, "{MARK} next"),
            Self::Start { name } => write!(out, "{MARK} start {name}"),
            Self::End {
                name,
                millis,
                ending,
            } => {
                let ending = one_line(&ending.to_string());
                write!(out, "{MARK} end {name} {millis} {ending}")
            }
            Self::File {
                name,
                size,
                checksum,
            } => write!(out, "{MARK} file {name} {size} {checksum:016x}"),
            Self::Data(bytes) => write!(out, "{MARK} data {}", hex::encode(bytes)),
            Self::Verdict { passed, total } => write!(out, "{MARK} verdict {passed} of {total}"),
            Self::Broken(why) => write!(out, "{MARK} broken: {}", one_line(why)),
        }
    }
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

impl Report {
    /// Reads a line; `None` where it is not a report.
    pub fn parse(line: &str) -> Option<Self> {
        let text = line.trim_end().strip_prefix(MARK)?.strip_prefix(' ')?;
        if text == "kvm usable" {
            return Some(Self::Kvm(Ok(())));
        }
        if text == "next" {
            return Some(Self::Next);
        }
        if let Some(why) = text.strip_prefix("kvm unusable: ") {
            return Some(Self::Kvm(Err(why.into())));
        }
        if let Some(why) = text.strip_prefix("broken: ") {
            return Some(Self::Broken(why.into()));
        }
        let (verb, rest) = text.split_once(' ')?;
        match verb {
            "start" => Some(Self::Start { name: rest.into() }),
            "end" => {
                let mut fields = rest.splitn(3, ' ');
                Some(Self::End {
                    name: fields.next()?.into(),
                    millis: fields.next()?.parse().ok()?,
                    ending: parse_ending(fields.next()?)?,
                })
            }
            "file" => {
                let mut fields = rest.split(' ');
                let file = Self::File {
                    name: fields.next()?.into(),
                    size: fields.next()?.parse().ok()?,
                    checksum: u64::from_str_radix(fields.next()?, 16).ok()?,
                };
                fields.next().is_none().then_some(file)
            }
            "data" => hex::decode(rest).map(Self::Data),
            "verdict" => {
                let (passed, total) = rest.split_once(" of ")?;
                Some(Self::Verdict {
                    passed: passed.parse().ok()?,
                    total: total.parse().ok()?,
                })
            }
            _ => None,
        }
    }
}

fn parse_ending(text: &str) -> Option<Ending> {
    if let Some(why) = text.strip_prefix("not started: ") {
        return Some(Ending::NotStarted(why.into()));
    }
    match text.split_once(' ') {
        None if text == "timeout" => Some(Ending::Timeout),
        Some(("exit", status)) => status.parse().ok().map(Ending::Exit),
        Some(("signal", signal)) => signal.parse().ok().map(Ending::Signal),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        let end = |ending| Report::End {
            name: "order-1".into(),
            millis: 1234,
            ending,
        };
        for report in [
            Report::Kvm(Ok(())),
            Report::Kvm(Err("no /dev/kvm".into())),
            Report::Next,
            Report::Start { name: "x".into() },
            end(Ending::Exit(0)),
            end(Ending::Exit(101)),
            end(Ending::Signal(6)),
            end(Ending::Timeout),
            end(Ending::NotStarted("no such file".into())),
            Report::File {
                name: "run.json".into(),
                size: 12,
                checksum: u64::MAX,
            },
            Report::Data(vec![0, 1, 0xff]),
            Report::Verdict {
                passed: 3,
                total: 4,
            },
            Report::Broken("mount /proc: busy".into()),
        ] {
            let line = format!("{report}\r\n");
            assert_eq!(Report::parse(&line), Some(report), "{line}");
        }
    }

    #[test]
    fn programs_lines_and_cut_reports_are_no_reports() {
        for line in [
            "",
            "test result: ok",
            " @ioregion-vm verdict 1 of 1",
            "@ioregion-vm verdict 1",
            "@ioregion-vm end x 5",
            "@ioregion-vm end x 5 exit",
            "@ioregion-vm end x soon exit 0",
            "@ioregion-vm file run.json 12",
            "@ioregion-vm file run.json 12 0 0",
            "@ioregion-vm data 0",
            "@ioregion-vmverdict 1 of 1",
        ] {
            assert_eq!(Report::parse(line), None, "{line}");
        }
    }

    #[test]
    fn reports_stay_on_one_line() {
        let report = Report::Broken("a\nb".into());
        assert!(!report.to_string().contains('\n'));
    }
}
