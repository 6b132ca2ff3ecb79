use super::*;
use ioregion_devices::virtio::{Format, Layout, Memory, MemoryError, Position, Queue, Setup};

fn logged(inode: u64) -> Logged {
    Logged {
        name: "disk".into(),
        identity: Identity { boot: 7, inode },
        kind: 2,
        features: 0x1234,
        queues: 2,
        queue_size: 8,
    }
}

fn open(path: &Path, logged: &Logged) -> Result<Log, LogFileError> {
    Log::open_with(path, logged, |_, _| false)
}

/// Memory of zeroes.
struct Nothing;

impl Memory for Nothing {
    fn read(&self, _addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        into.fill(0);
        Ok(())
    }

    fn write(&self, _addr: u64, _from: &[u8]) -> Result<(), MemoryError> {
        Ok(())
    }

    fn load(&self, _addr: u64) -> Result<u16, MemoryError> {
        Ok(0)
    }

    fn store(&self, _addr: u64, _value: u16) -> Result<(), MemoryError> {
        Ok(())
    }
}

/// Puts a queue on record.
fn begin(log: &Log, index: u16) {
    let setup = Setup {
        format: Format::Split,
        layout: Layout {
            size: 8,
            descriptors: 0,
            driver: 0,
            device: 0,
        },
        indirect: false,
        event_idx: false,
    };
    let position = Position::start(Format::Split);
    let queue = log.queue(index).unwrap();
    Queue::begin(&Nothing, &setup, position, queue).unwrap();
}

fn active(log: &Log) -> [bool; 2] {
    [0, 1].map(|index| log.queue(index).unwrap().is_active().unwrap())
}

#[test]
fn log_keeps_what_it_says_for_the_next_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/log");
    let log = open(&path, &logged(1)).unwrap();
    assert_eq!(log.session(), Session::None);
    assert!(log.queue(2).is_none());
    log.begin_session();
    begin(&log, 1);
    drop(log);
    let log = open(&path, &logged(1)).unwrap();
    assert_eq!(log.session(), Session::Driver);
    assert_eq!(active(&log), [false, true]);
    assert_eq!(*log.logged(), logged(1));
    // The next driver has nothing of this one's.
    log.begin_session();
    assert_eq!(active(&log), [false, false]);
    begin(&log, 0);
    log.end_session();
    assert_eq!(
        (active(&log), log.session()),
        ([false, false], Session::None)
    );
    log.remove().unwrap();
    assert!(!path.exists());
}

#[test]
fn log_has_one_service_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let _log = open(&path, &logged(1)).unwrap();
    let error = open(&path, &logged(1)).unwrap_err();
    assert!(matches!(error, LogFileError::Locked(_)), "{error}");
}

#[test]
fn log_of_a_device_that_is_gone_is_used_again_and_of_one_that_is_there_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut first = logged(1);
    first.name = "first".into();
    let log = open(&path, &first).unwrap();
    log.begin_session();
    begin(&log, 0);
    drop(log);
    let before = std::fs::read(&path).unwrap();
    let exists = |name: &str, identity: Identity| {
        assert_eq!((name, identity), ("first", first.identity));
        true
    };
    let error = Log::open_with(&path, &logged(2), exists).unwrap_err();
    assert!(error.to_string().contains("first"), "{error}");
    assert!(std::fs::read(&path).unwrap() == before);
    let log = open(&path, &logged(2)).unwrap();
    assert_eq!(
        (active(&log), log.session()),
        ([false, false], Session::None)
    );
}

#[test]
fn log_becomes_that_of_a_device_which_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut log = open(&path, &logged(1)).unwrap();
    log.begin_session();
    begin(&log, 0);
    log.renew(logged(2).identity);
    assert_eq!(*log.logged(), logged(2));
    let is_empty = |log: &Log| (active(log), log.session()) == ([false, false], Session::None);
    assert!(is_empty(&log));
    log.begin_session();
    begin(&log, 1);
    let error = open(&path, &logged(2)).unwrap_err();
    assert!(matches!(error, LogFileError::Locked(_)), "{error}");
    drop(log);
    let log = open(&path, &logged(2)).unwrap();
    assert_eq!(
        (active(&log), log.session()),
        ([false, true], Session::Driver)
    );
    drop(log);
    // Of the device before it says nothing.
    assert!(is_empty(&open(&path, &logged(1)).unwrap()));
}

#[test]
fn log_of_a_device_with_other_options_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    drop(open(&path, &logged(1)).unwrap());
    type Change = fn(&mut Logged);
    let change: [(&str, Change); 4] = [
        ("features", |logged| logged.features ^= 1),
        ("type", |logged| logged.kind = 1),
        ("2 queues", |logged| logged.queues = 3),
        ("8 as queue size", |logged| logged.queue_size = 16),
    ];
    for (says, change) in change {
        let mut other = logged(1);
        change(&mut other);
        let error = open(&path, &other).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("options"), "{error}");
    }
    assert!(open(&path, &logged(1)).is_ok());
}

#[test]
fn files_that_are_no_log_are_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good");
    drop(open(&good, &logged(1)).unwrap());
    let good = std::fs::read(good).unwrap();
    let mut version = good.clone();
    version[8] = 9;
    let mut longer = good.clone();
    longer.extend([0; 8]);
    for (number, bytes) in [
        vec![0; 1],
        vec![0; 1 << 16],
        b"something else".to_vec(),
        good[..good.len() - 1].to_vec(),
        good[..200].to_vec(),
        longer,
        version,
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(number.to_string());
        std::fs::write(&path, &bytes).unwrap();
        let error = open(&path, &logged(1)).unwrap_err();
        let refused = matches!(
            error,
            LogFileError::NoLog(_) | LogFileError::Version { version: 9, .. }
        );
        assert!(refused, "{number}: {error}");
        assert!(std::fs::read(&path).unwrap() == bytes, "{number}");
    }
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("0"), &link).unwrap();
    for path in [&link, dir.path(), Path::new("/dev/null")] {
        assert!(open(path, &logged(1)).is_err(), "{}", path.display());
    }
}

#[test]
fn log_whose_writer_died_at_any_moment_of_making_it_becomes_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    drop(open(&path, &logged(1)).unwrap());
    let mut unfinished = std::fs::read(&path).unwrap();
    unfinished[8..16].fill(0);
    for len in [0, 8, 16, 17, unfinished.len() / 2, unfinished.len()] {
        std::fs::write(&path, &unfinished[..len]).unwrap();
        let log = open(&path, &logged(1)).unwrap();
        assert_eq!(
            (active(&log), log.session()),
            ([false, false], Session::None)
        );
    }
}

#[test]
fn file_that_is_cut_short_is_noticed_without_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let log = open(&path, &logged(1)).unwrap();
    log.begin_session();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(0)
        .unwrap();
    begin(&log, 0);
    log.check();
    assert!(log.said.load(Ordering::Relaxed));
}

#[test]
fn standing_queues_and_spaces_outlive_the_service_and_spaces_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let at = Position::Split { avail: 7 };
    let log = open(&path, &logged(1)).unwrap();
    assert_eq!((log.position(1), log.space(1)), (None, 0));
    log.set_space(1, 3);
    log.begin_session();
    log.set_position(1, Some(at));
    log.suspend(true);
    drop(log);
    let log = open(&path, &logged(1)).unwrap();
    assert_eq!(log.session(), Session::Suspended);
    assert_eq!((log.position(0), log.position(1)), (None, Some(at)));
    assert_eq!((log.space(0), log.space(1)), (0, 3));
    // Queues that the device does not have.
    log.set_position(2, Some(at));
    assert_eq!((log.position(2), log.space(2)), (None, 0));
    log.end_session();
    assert_eq!((log.position(1), log.space(1)), (None, 3));
    // Another device begins anew.
    drop(log);
    assert_eq!(open(&path, &logged(2)).unwrap().space(1), 0);
}
