use super::*;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;

const PAGE: u64 = 4096;
/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// A file in memory, of `len` bytes.
fn file(len: u64) -> File {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let file = File::from(nix::sys::memfd::memfd_create("test", flags).unwrap());
    file.set_len(len).unwrap();
    file
}

/// First address, last address, whether it can be read and written, file and offset.
type Described = (u64, u64, bool, bool, File, u64);

/// The kernel's side: regions as files.
#[derive(Debug, Default)]
struct Kernel {
    regions: Mutex<Vec<Described>>,
    fetched: AtomicU64,
}

impl Kernel {
    fn add(&self, first: u64, len: u64, read: bool, write: bool, file: &File, offset: u64) {
        let region = (
            first,
            first + (len - 1),
            read,
            write,
            file.try_clone().unwrap(),
            offset,
        );
        self.regions.lock().unwrap().push(region);
    }
}

impl Source for Kernel {
    fn region(&self, addr: u64) -> io::Result<Option<Region>> {
        self.fetched.fetch_add(1, Ordering::Relaxed);
        let regions = self.regions.lock().unwrap();
        let found = regions
            .iter()
            .find(|region| region.0 <= addr && addr <= region.1);
        let Some((first, last, read, write, file, offset)) = found else {
            return Ok(None);
        };
        Ok(Some(Region {
            first: *first,
            last: *last,
            read: *read,
            write: *write,
            file: file.try_clone()?.into(),
            offset: *offset,
        }))
    }
}

fn iotlb() -> Arc<Iotlb<Kernel>> {
    Arc::new(Iotlb::new(Kernel::default()))
}

fn read(session: &Session<Kernel>, addr: u64, len: usize) -> Result<Vec<u8>, MemoryError> {
    let mut bytes = vec![0; len];
    session.read(addr, &mut bytes).map(|()| bytes)
}

#[test]
fn regions_are_mapped_once_when_touched_and_again_after_an_update() {
    let iotlb = iotlb();
    let kernel = iotlb.source();
    for number in 0..4 {
        kernel.add(number * PAGE, PAGE, true, true, &file(PAGE), 0);
    }
    let session = iotlb.session();
    assert_eq!(iotlb.regions(), 0);
    session.write(PAGE - 2, &[1, 2, 3, 4]).unwrap();
    assert_eq!(
        (iotlb.regions(), kernel.fetched.load(Ordering::Relaxed)),
        (2, 2)
    );
    assert_eq!(read(&session, PAGE - 2, 4).unwrap(), [1, 2, 3, 4]);
    read(&session, 2 * PAGE, 1).unwrap();
    assert_eq!(kernel.fetched.load(Ordering::Relaxed), 3);
    // One byte of the second region.
    iotlb.update(2 * PAGE - 1, 2 * PAGE - 1, LONG).unwrap();
    assert_eq!(iotlb.regions(), 2);
    assert_eq!(read(&session, PAGE - 2, 4).unwrap(), [1, 2, 3, 4]);
    assert_eq!(kernel.fetched.load(Ordering::Relaxed), 4);
    // Between regions that stay, and beyond them.
    iotlb.update(4 * PAGE, u64::MAX, LONG).unwrap();
    assert_eq!(iotlb.regions(), 3);
    iotlb.update(0, u64::MAX, LONG).unwrap();
    assert_eq!(iotlb.regions(), 0);
}

#[test]
fn offsets_in_files_need_not_be_pages() {
    let iotlb = iotlb();
    let file = file(3 * PAGE);
    file.write_all_at(b"odd", 4097).unwrap();
    iotlb.source().add(10 * PAGE, 100, true, true, &file, 4097);
    let session = iotlb.session();
    assert_eq!(read(&session, 10 * PAGE, 3).unwrap(), b"odd");
    // Even as an address, odd in memory.
    let addr = 10 * PAGE;
    assert_eq!(session.load(addr), Err(MemoryError::Misaligned { addr }));
    assert_eq!(
        session.store(addr, 1),
        Err(MemoryError::Misaligned { addr })
    );
    assert_eq!(session.load(addr + 1).unwrap(), u16::from_le_bytes(*b"dd"));
    let addr = 10 * PAGE + 99;
    assert_eq!(session.load(addr), Err(MemoryError::Misaligned { addr }));
    let addr = 10 * PAGE + 100;
    let gone = Err(MemoryError::Unmapped { addr });
    assert_eq!(session.write(addr - 1, &[0, 0]), gone);
}

#[test]
fn permissions_are_kept() {
    let iotlb = iotlb();
    iotlb.source().add(0, PAGE, true, false, &file(PAGE), 0);
    let session = iotlb.session();
    assert_eq!(read(&session, 0, 4).unwrap(), [0; 4]);
    assert_eq!(session.load(0), Ok(0));
    let refused = Err(MemoryError::NotWritable { addr: 4 });
    assert_eq!(session.write(4, &[1]), refused);
    assert_eq!(session.store(4, 1), refused);
    iotlb.source().regions.lock().unwrap()[0].2 = false;
    iotlb.source().regions.lock().unwrap()[0].3 = true;
    iotlb.update(0, 0, LONG).unwrap();
    assert_eq!(session.write(4, &[1]), Ok(()));
    let refused = MemoryError::NotReadable { addr: 4 };
    assert_eq!(read(&session, 4, 1), Err(refused));
    assert_eq!(session.load(4), Err(refused));
}

#[test]
fn ranges_past_the_end_of_the_address_space_are_refused() {
    let iotlb = iotlb();
    iotlb
        .source()
        .add(u64::MAX - (PAGE - 1), PAGE, true, true, &file(PAGE), 0);
    let session = iotlb.session();
    let addr = u64::MAX;
    assert_eq!(read(&session, addr, 1).unwrap(), [0]);
    let overflow = Err(MemoryError::Overflow { addr, len: 2 });
    assert_eq!(read(&session, addr, 2), overflow);
    assert_eq!(session.write(addr, &[]), Ok(()));
    assert!(session.load(addr).is_err());
}

#[test]
fn regions_that_cannot_be_are_not_mapped() {
    for (first, last) in [(0, u64::MAX), (PAGE, 2 * PAGE), (1, 0)] {
        let iotlb = iotlb();
        let region = (0, u64::MAX, true, true, file(PAGE), 0);
        iotlb.source().regions.lock().unwrap().push(region);
        // What `find` above matches on is not what is described.
        struct Lying<'a>(&'a Kernel, u64, u64);
        impl Source for Lying<'_> {
            fn region(&self, addr: u64) -> io::Result<Option<Region>> {
                let region = self.0.region(addr)?;
                Ok(region.map(|region| Region {
                    first: self.1,
                    last: self.2,
                    ..region
                }))
            }
        }
        let lying = Arc::new(Iotlb::new(Lying(iotlb.source(), first, last)));
        let read = lying.session().read(8, &mut [0]);
        assert_eq!(read, Err(MemoryError::Unmapped { addr: 8 }));
    }
}

#[test]
fn sessions_end_with_the_reset_that_follows_them() {
    let iotlb = iotlb();
    iotlb.source().add(0, PAGE, true, true, &file(PAGE), 0);
    let session = iotlb.session();
    session.write(0, &[1]).unwrap();
    iotlb.close(LONG).unwrap();
    assert!(!session.is_open());
    assert_eq!(read(&session, 0, 1), Err(MemoryError::Closed));
    assert_eq!(session.write(0, &[1]), Err(MemoryError::Closed));
    assert_eq!(session.load(0), Err(MemoryError::Closed));
    assert_eq!(session.store(0, 1), Err(MemoryError::Closed));
    assert_eq!(iotlb.regions(), 0);
    assert_eq!(read(&iotlb.session(), 0, 1).unwrap(), [1]);
}

#[test]
fn memory_that_is_cut_short_is_an_error_and_comes_back() {
    let iotlb = iotlb();
    let file = file(4 * PAGE);
    iotlb.source().add(0, 4 * PAGE, true, true, &file, 0);
    let session = iotlb.session();
    session.write(3 * PAGE, &[1]).unwrap();
    file.set_len(PAGE).unwrap();
    let vanished = |addr| Err(MemoryError::Vanished { addr });
    assert_eq!(session.write(3 * PAGE, &[2]), vanished(3 * PAGE));
    let gone = vanished(2 * PAGE - 1).map(|()| Vec::new());
    assert_eq!(read(&session, 2 * PAGE - 1, 2), gone);
    assert_eq!(session.load(3 * PAGE), vanished(3 * PAGE).map(|()| 0));
    assert_eq!(session.store(3 * PAGE, 1), vanished(3 * PAGE));
    // What is still there is reached, and what grows again too.
    assert_eq!(session.write(0, &[3]), Ok(()));
    file.set_len(4 * PAGE).unwrap();
    assert_eq!(read(&session, 3 * PAGE, 1).unwrap(), [0]);
    assert_eq!(read(&session, 0, 1).unwrap(), [3]);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [3], "the access went past the file");
}

#[test]
fn what_was_taken_back_is_never_seen_again() {
    // The number of the mapping stands in its memory.
    let iotlb = iotlb();
    let numbered = |number: u64| {
        let file = file(PAGE);
        file.write_all_at(&number.to_le_bytes(), 0).unwrap();
        vec![(0, PAGE - 1, true, true, file, 0)]
    };
    *iotlb.source().regions.lock().unwrap() = numbered(0);
    let taken_back = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let session = iotlb.session();
                    let mut reads = 0;
                    while !done.load(Ordering::Relaxed) {
                        let least = taken_back.load(Ordering::SeqCst);
                        let mut bytes = [0; 8];
                        match session.read(0, &mut bytes) {
                            Ok(()) => assert!(u64::from_le_bytes(bytes) >= least),
                            // Taken back again and again while it was fetched.
                            Err(error) => assert_eq!(error, MemoryError::Vanished { addr: 0 }),
                        }
                        reads += 1;
                    }
                    reads
                })
            })
            .collect();
        for number in 1..2000 {
            *iotlb.source().regions.lock().unwrap() = numbered(number);
            iotlb.update(0, PAGE - 1, LONG).unwrap();
            taken_back.store(number, Ordering::SeqCst);
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().unwrap() > 0);
        }
    });
}

fn pin(session: &Session<Kernel>, addr: u64, len: usize) -> Result<Option<Pin>, MemoryError> {
    session.pin(&mut std::iter::once((addr, len)), Access::Write)
}

/// What `read(2)` puts into pinned memory.
fn kernel_reads(file: &File, pin: &Pin) -> nix::Result<usize> {
    use std::os::fd::AsRawFd as _;
    let ranges = pin.ranges();
    // SAFETY: The ranges are mapped as long as the pin, and only the kernel touches them.
    let read = unsafe {
        libc::preadv(
            file.as_raw_fd(),
            ranges.as_ptr(),
            ranges.len() as libc::c_int,
            0,
        )
    };
    nix::errno::Errno::result(read).map(|read| read as usize)
}

#[test]
fn pinned_ranges_are_what_the_driver_sees() {
    let iotlb = iotlb();
    for number in 0..3 {
        let kernel = iotlb.source();
        kernel.add(number * PAGE, PAGE, true, number < 2, &file(PAGE), 0);
    }
    let session = iotlb.session();
    let source = file(PAGE);
    source.write_all_at(&[7; 300], 0).unwrap();
    let pin = pin(&session, PAGE - 100, 300).unwrap().unwrap();
    let lens: Vec<_> = pin.ranges().iter().map(|range| range.iov_len).collect();
    assert_eq!(lens, [100, 200]);
    assert_eq!(kernel_reads(&source, &pin), Ok(300));
    assert!(pin.intact());
    assert_eq!(read(&session, PAGE - 100, 300).unwrap(), [7; 300]);
    assert_eq!(read(&session, PAGE + 200, 1).unwrap(), [0]);
    drop(pin);
    for (addr, error) in [
        (2 * PAGE, MemoryError::NotWritable { addr: 2 * PAGE }),
        (3 * PAGE, MemoryError::Unmapped { addr: 3 * PAGE }),
        (
            u64::MAX,
            MemoryError::Overflow {
                addr: u64::MAX,
                len: 2,
            },
        ),
    ] {
        assert_eq!(self::pin(&session, addr, 2).unwrap_err(), error);
    }
    // What was refused halfway holds nothing.
    let gap = self::pin(&session, 2 * PAGE - 1, 2).unwrap_err();
    assert_eq!(gap, MemoryError::NotWritable { addr: 2 * PAGE });
    iotlb.close(Duration::ZERO).unwrap();
    let closed = self::pin(&session, 0, 1).unwrap_err();
    assert_eq!(closed, MemoryError::Closed);
}

#[test]
fn all_ranges_of_a_pin_are_held_until_it_is_dropped_and_neighbours_are_one() {
    let iotlb = iotlb();
    for number in 0..2 {
        // Not neighbours of each other.
        iotlb
            .source()
            .add(2 * number * PAGE, PAGE, true, true, &file(PAGE), 0);
    }
    let session = iotlb.session();
    let ranges = [
        (0, 10),
        (10, 20),
        (100, 7),
        (2 * PAGE + 8, 5),
        (50, 3),
        (40, 4),
    ];
    let pinned = session.pin(&mut ranges.into_iter(), Access::Write);
    let pin = pinned.unwrap().unwrap();
    let lens: Vec<_> = pin.ranges().iter().map(|range| range.iov_len).collect();
    assert_eq!(lens, [30, 7, 5, 3, 4]);
    let source = file(PAGE);
    let bytes: Vec<u8> = (1..50).collect();
    source.write_all_at(&bytes, 0).unwrap();
    assert_eq!(kernel_reads(&source, &pin), Ok(49));
    let mut at = 0;
    for (addr, len) in ranges {
        let here = read(&session, addr, len).unwrap();
        assert_eq!(here, bytes[at..at + len], "{addr}");
        at += len;
    }
    // A range in the same region that reaches past its end is not taken for a part of it.
    let past = session.pin(&mut [(0, 1), (PAGE - 1, 2)].into_iter(), Access::Write);
    let addr = PAGE;
    assert_eq!(past.map(drop), Err(MemoryError::Unmapped { addr }));
    let still = Err(StillPinned { mappings: 2 });
    assert_eq!(iotlb.close(Duration::ZERO), still);
    assert_eq!(kernel_reads(&source, &pin), Err(nix::errno::Errno::EFAULT));
    drop(pin);
    iotlb.close(Duration::ZERO).unwrap();
}

#[test]
fn taking_memory_back_waits_for_its_pins_and_for_no_others() {
    let iotlb = iotlb();
    let kernel = iotlb.source();
    let files = [file(PAGE), file(PAGE)];
    kernel.add(0, PAGE, true, true, &files[0], 0);
    kernel.add(PAGE, PAGE, true, true, &files[1], 0);
    let session = iotlb.session();
    let held = pin(&session, 0, 10).unwrap().unwrap();
    iotlb.update(PAGE, PAGE, Duration::ZERO).unwrap();
    std::thread::scope(|scope| {
        let (sender, done) = std::sync::mpsc::channel();
        let iotlb = &iotlb;
        scope.spawn(move || {
            iotlb.update(5, 5, LONG).unwrap();
            sender.send(()).unwrap();
        });
        let pause = Duration::from_millis(50);
        assert!(done.recv_timeout(pause).is_err(), "it did not wait");
        // Meanwhile the kernel's next mapping can be pinned, and nobody waits for that.
        let next = pin(&session, 0, 10).unwrap().unwrap();
        drop(held);
        done.recv_timeout(LONG).unwrap();
        drop(next);
    });
    iotlb.close(Duration::ZERO).unwrap();
}

#[test]
fn memory_that_stays_pinned_too_long_is_out_of_the_kernels_reach() {
    let iotlb = iotlb();
    let memory = file(PAGE);
    iotlb.source().add(0, PAGE, true, true, &memory, 0);
    let session = iotlb.session();
    let held = pin(&session, 0, 100).unwrap().unwrap();
    let pause = Duration::from_millis(20);
    let still = Err(StillPinned { mappings: 1 });
    assert_eq!(iotlb.update(0, 0, pause), still);
    let source = file(PAGE);
    source.write_all_at(&[7; 100], 0).unwrap();
    let efault = Err(nix::errno::Errno::EFAULT);
    assert_eq!(kernel_reads(&source, &held), efault);
    let mut bytes = [0; 100];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 100]);
    // It is not forgotten, by a reset neither, until the pin has gone.
    assert_eq!(iotlb.close(pause), still);
    drop(held);
    iotlb.close(Duration::ZERO).unwrap();
}

#[test]
fn pinned_memory_that_vanished_says_so_and_is_waited_for() {
    let iotlb = iotlb();
    let memory = file(2 * PAGE);
    iotlb.source().add(0, 2 * PAGE, true, true, &memory, 0);
    let session = iotlb.session();
    let held = pin(&session, PAGE, 10).unwrap().unwrap();
    memory.set_len(PAGE).unwrap();
    // The kernel is told that there are no pages; nobody gets a signal.
    let source = file(PAGE);
    let efault = Err(nix::errno::Errno::EFAULT);
    assert_eq!(kernel_reads(&source, &held), efault);
    assert!(held.intact());
    // A copy has the whole mapping replaced, so that the kernel would write into nowhere.
    assert!(session.write(PAGE, &[1]).is_err());
    assert!(!held.intact());
    assert_eq!(iotlb.regions(), 0);
    let still = Err(StillPinned { mappings: 1 });
    assert_eq!(iotlb.update(0, 0, Duration::ZERO), still);
    drop(held);
    iotlb.update(0, 0, Duration::ZERO).unwrap();
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    /// The kernel replaces region `n` by other memory, or by none, and says so.
    Replace(u64, bool),
}

fn step() -> impl Strategy<Value = Step> {
    let addr = || 0..7 * PAGE;
    prop_oneof![
        (addr(), proptest::collection::vec(any::<u8>(), 0..9000))
            .prop_map(|(addr, bytes)| Step::Write(addr, bytes)),
        (addr(), 0..9000usize).prop_map(|(addr, len)| Step::Read(addr, len)),
        (0..6u64, any::<bool>()).prop_map(|(number, there)| Step::Replace(number, there)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn memory_is_what_it_would_be_without_mappings(
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let iotlb = iotlb();
        let session = iotlb.session();
        // Six regions of a page; what there is of each.
        let mut model: Vec<Option<Vec<u8>>> = vec![None; 6];
        let whole = |model: &[Option<Vec<u8>>], addr: u64, len: usize| {
            (addr..addr + len as u64)
                .map(|at| {
                    let page = model.get((at / PAGE) as usize)?.as_ref()?;
                    Some(page[(at % PAGE) as usize])
                })
                .collect::<Option<Vec<u8>>>()
        };
        for step in steps {
            match step {
                Step::Read(addr, len) => {
                    let got = read(&session, addr, len);
                    match whole(&model, addr, len) {
                        Some(bytes) => prop_assert_eq!(got, Ok(bytes)),
                        None => {
                            let unmapped = matches!(got, Err(MemoryError::Unmapped { .. }));
                            prop_assert!(unmapped, "{:?}", got);
                        }
                    }
                }
                Step::Write(addr, bytes) => {
                    let complete = whole(&model, addr, bytes.len()).is_some();
                    prop_assert_eq!(session.write(addr, &bytes).is_ok(), complete);
                    // As far as there is memory without a gap.
                    for (at, byte) in (addr..).zip(bytes) {
                        let page = model.get_mut((at / PAGE) as usize);
                        let Some(Some(page)) = page else { break };
                        page[(at % PAGE) as usize] = byte;
                    }
                }
                Step::Replace(number, there) => {
                    model[number as usize] = there.then(|| vec![0; PAGE as usize]);
                    let first = number * PAGE;
                    let kernel = iotlb.source();
                    kernel.regions.lock().unwrap().retain(|region| region.0 != first);
                    if there {
                        kernel.add(first, PAGE, true, true, &file(PAGE), 0);
                    }
                    iotlb.update(first, first + (PAGE - 1), LONG).unwrap();
                }
            }
        }
    }
}
