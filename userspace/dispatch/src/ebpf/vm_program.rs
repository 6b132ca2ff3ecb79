//! The program's side of one virtual machine: its number, its ring, and the task that drains it.

use std::collections::HashMap;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ioregion_abi::bpf::{
    CONTROL_ARM, CONTROL_WORDS, MAX_VCPUS, MatchEntry, MatchKey, Slot, SlotBlock, VcpuRecord,
    ZONE_GRANULE_SHIFT, ZoneKey,
};
use ioregion_abi::{Bus, Size};
use kvm_ioctls::VcpuFd;
use nix::poll::PollFlags;

use super::control::{Control, PortFds};
use super::program::{Program, ProgramCounters};
use super::ring::{Ring, Swallowed};
use crate::channel::Channel;
use crate::device::BusAccess;
use crate::region::{Delivery, Sink};
use crate::source::WakeRing;
use crate::sys::mmap::Mapping;
use crate::vm::{Tables, VmShared};
use crate::waiter::Bell;

/// How long the draining task sleeps while a write is between the program and the ring.
const FIRST_NAP: Duration = Duration::from_micros(50);
const LONGEST_NAP: Duration = Duration::from_millis(10);
/// How long it believes in a write that does not come.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a vCPU waits until the doorbells of a program that is gone are out of the kernel.
const UNSINKING: Duration = Duration::from_secs(30);

/// The program's side of one virtual machine.
#[derive(Debug)]
pub(crate) struct VmProgram {
    program: Arc<Program>,
    vm: u32,
    records: Arc<Mapping>,
    vcpus: Mutex<Vec<u32>>,
    /// Where the program announces writes that will come through the ring.
    port: u32,
    slots: Mapping,
    controls: Mapping,
    wake: WakeRing,
    ringbuf: OwnedFd,
    ring: OnceLock<Mutex<Ring>>,
    /// Announced writes that have arrived, in the ring or by an exit.
    accounted: AtomicU64,
    /// Writes in the ring that belonged to no region.
    strays: AtomicU64,
    zones: Mutex<HashMap<ZoneKey, usize>>,
    channels: Mutex<Vec<Weak<Channel>>>,
    bell: Arc<Bell>,
    stop: AtomicBool,
    /// The loader is gone, and the records stand still.
    gone: AtomicBool,
    /// And the doorbells are taken out of the kernel.
    unsunk: (Mutex<bool>, Condvar),
    thread: Mutex<Option<JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VmProgram {
    pub(crate) fn new(program: &Arc<Program>) -> io::Result<Self> {
        let control = program.control();
        let vm = control.new_vm()?;
        let len = MAX_VCPUS as usize * size_of::<VcpuRecord>();
        let records = Arc::new(Mapping::of_kernel(control.records(), 0, len, false)?);
        let PortFds {
            port,
            slots,
            controls,
            ringbuf,
        } = control.create_port(1)?;
        let mapping =
            |fd: &OwnedFd, len, writable| Mapping::of_kernel(fd.as_fd(), 0, len, writable);
        Ok(Self {
            program: Arc::clone(program),
            vm,
            records,
            vcpus: Mutex::default(),
            port,
            slots: mapping(&slots, size_of::<SlotBlock>(), false)?,
            controls: mapping(&controls, CONTROL_WORDS as usize * 8, true)?,
            wake: WakeRing::new(ringbuf.as_fd())?,
            ringbuf,
            ring: OnceLock::new(),
            accounted: AtomicU64::new(0),
            strays: AtomicU64::new(0),
            zones: Mutex::default(),
            channels: Mutex::default(),
            bell: Arc::new(Bell::new()?),
            stop: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            unsunk: Default::default(),
            thread: Mutex::default(),
        })
    }

    /// Starts the draining task.
    pub(crate) fn start(self: &Arc<Self>, shared: &Arc<VmShared>) -> io::Result<()> {
        let program = Arc::clone(self);
        let shared = Arc::downgrade(shared);
        let thread = std::thread::Builder::new()
            .name("ioregion-drain".into())
            .spawn(move || program.drain_loop(&shared))?;
        *lock(&self.thread) = Some(thread);
        Ok(())
    }

    /// Ends the draining task, when the VM is dropped.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.bell.ring();
        if let Some(thread) = lock(&self.thread).take()
            && thread.thread().id() != std::thread::current().id()
        {
            // It panicked only if a device did, on its own account.
            let _ = thread.join();
        }
        if let Err(error) = self.control().retire(&[], Some(self.port)) {
            tracing::warn!(%error, "cannot free a port");
        }
    }

    pub(crate) fn control(&self) -> &dyn Control {
        self.program.control()
    }

    pub(crate) fn program(&self) -> &Arc<Program> {
        &self.program
    }

    pub(crate) fn vm(&self) -> u32 {
        self.vm
    }

    /// The port of the draining task.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Whether the program no longer sees accesses.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    /// Whether a request failed because the program is gone. Waits until that has been seen to, so
    /// that no doorbell rings unseen.
    pub(super) fn failed_for_good(&self, error: &io::Error) -> bool {
        use io::ErrorKind as Kind;
        let hung_up = matches!(
            error.kind(),
            Kind::BrokenPipe | Kind::ConnectionReset | Kind::UnexpectedEof
        );
        if self.control().hangup().is_none() || !hung_up {
            return false;
        }
        let (unsunk, condition) = &self.unsunk;
        let waited = condition.wait_timeout_while(lock(unsunk), UNSINKING, |unsunk| !*unsunk);
        let (unsunk, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *unsunk
    }

    /// Whether the program is gone and nothing of its doorbells is left in the kernel.
    pub(super) fn is_unsunk(&self) -> bool {
        self.is_gone() && *lock(&self.unsunk.0)
    }

    pub(crate) fn records(&self) -> &Arc<Mapping> {
        &self.records
    }

    /// Notes a vCPU's record and maps the ring through the first one.
    pub(crate) fn add_vcpu(&self, vcpu: &VcpuFd, record: u32) -> io::Result<()> {
        lock(&self.vcpus).push(record);
        if self.ring.get().is_none() {
            // A second vCPU that is created at the same time maps the same ring.
            let _ = self.ring.set(Mutex::new(Ring::of(vcpu)?));
        }
        Ok(())
    }

    pub(crate) fn remove_vcpu(&self, record: u32) {
        lock(&self.vcpus).retain(|other| *other != record);
    }

    /// Has the writes to a zone announced.
    pub(crate) fn add_zone(&self, bus: Bus, addr: u64, len: u64) -> io::Result<()> {
        let mut zones = lock(&self.zones);
        for granule in granules(self.vm, bus, addr, len) {
            if !zones.contains_key(&granule)
                && let Err(error) = self.control().set_zone(granule, Some(self.port))
            {
                let done = granules(self.vm, bus, addr, len).take_while(|other| *other != granule);
                self.forget(&mut zones, done);
                return Err(error);
            }
            *zones.entry(granule).or_insert(0) += 1;
        }
        Ok(())
    }

    /// Takes [`add_zone`](Self::add_zone) back.
    pub(crate) fn remove_zone(&self, bus: Bus, addr: u64, len: u64) {
        self.forget(&mut lock(&self.zones), granules(self.vm, bus, addr, len));
    }

    fn forget(&self, zones: &mut HashMap<ZoneKey, usize>, granules: impl Iterator<Item = ZoneKey>) {
        for granule in granules {
            let Some(users) = zones.get_mut(&granule) else {
                continue;
            };
            *users -= 1;
            if *users == 0 {
                zones.remove(&granule);
                if let Err(error) = self.control().set_zone(granule, None) {
                    tracing::warn!(?granule, %error, "cannot forget a zone");
                }
            }
        }
    }

    /// Keeps a channel going when the ring has left requests in it that nobody waits for.
    pub(crate) fn serve_backlog(&self, channel: &Arc<Channel>) {
        channel.set_helper(Arc::clone(&self.bell));
        let mut channels = lock(&self.channels);
        channels.retain(|other| other.strong_count() > 0);
        if !channels
            .iter()
            .any(|other| other.as_ptr() == Arc::as_ptr(channel))
        {
            channels.push(Arc::downgrade(channel));
        }
    }

    /// An announced write came by another way than the ring.
    pub(crate) fn account(&self) {
        // Never ahead: a write that the program missed was not announced, but comes.
        let announced = self.announced();
        let step = |accounted| (accounted < announced).then_some(accounted + 1);
        let _ = self
            .accounted
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, step);
    }

    pub(crate) fn counters(&self) -> ProgramCounters {
        let mut sum = ProgramCounters {
            lost: self.program.recursion_misses().unwrap_or(0)
                + self.strays.load(Ordering::Relaxed),
            ..Default::default()
        };
        for &record in &*lock(&self.vcpus) {
            let record = read_record(&self.records, record);
            sum.matched += record.matched;
            sum.unmatched += record.unmatched;
            sum.wakeups += record.wakeups;
            sum.wakeups_refused += record.wakeups_refused;
            sum.lost += record.truncated + record.misdirected;
        }
        sum
    }

    /// Empties the ring into the channels, in order.
    pub(crate) fn drain(&self, tables: &Tables) {
        let Some(ring) = self.ring.get() else { return };
        let mut ring = lock(ring);
        while let Some(write) = ring.pop() {
            self.deliver(tables, &write);
        }
    }

    fn deliver(&self, tables: &Tables, write: &Swallowed) {
        let value = write.value();
        let whole = Size::from_bytes(write.bytes.into());
        if let Some(size) = whole
            && let Some(entry) = VmShared::find(tables, write.bus, write.addr, size)
            && let Some((_, doorbell)) = entry.placed.doorbell(write.addr, size, value)
            && doorbell.delivery == Delivery::Latest
            && doorbell.sink == Sink::Coalesced
            && !self.is_gone()
        {
            // The program has put it in its slot.
            return;
        }
        self.account();
        let (mut at, end) = (0, write.bytes);
        while at < end {
            let bytes = 1 << (end - at).ilog2();
            let size = Size::from_bytes(bytes).unwrap_or(Size::B8);
            let addr = write.addr + u64::from(at);
            let data = value >> (8 * u32::from(at)) & size.mask();
            let access = BusAccess {
                bus: write.bus,
                addr,
                size,
                write: Some(data),
            };
            match VmShared::find(tables, write.bus, addr, size) {
                Some(entry) => {
                    entry.carrier.replay(&access);
                }
                None => {
                    self.strays.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(?access, "the coalesced ring holds a write to no region");
                }
            }
            at += size.bytes();
        }
    }

    fn announced(&self) -> u64 {
        let at = offset_of!(SlotBlock, slots) + offset_of!(Slot, sequence);
        self.slots.word(at).load(Ordering::Acquire)
    }

    /// Whether a write is on its way from the program to the ring.
    fn is_expecting(&self) -> bool {
        self.announced()
            .wrapping_sub(self.accounted.load(Ordering::SeqCst))
            .cast_signed()
            > 0
    }

    fn is_ring_empty(&self) -> bool {
        self.ring.get().is_none_or(|ring| lock(ring).is_empty())
    }

    fn drain_loop(&self, shared: &Weak<VmShared>) {
        let arm = self.controls.word(CONTROL_ARM as usize * 8);
        let mut nap = FIRST_NAP;
        let mut expecting_since = None;
        let mut hangup = self.control().hangup().map(|fd| fd.as_raw_fd());
        while !self.stop.load(Ordering::SeqCst) {
            let Some(vm) = shared.upgrade() else { return };
            vm.drain_ring(&vm.tables());
            let mut fds: Vec<(RawFd, PollFlags)> = vec![
                (self.bell.fd(), PollFlags::POLLIN),
                (self.ringbuf.as_raw_fd(), PollFlags::POLLIN),
            ];
            // Not readable: that would be the answer to another thread's request.
            fds.extend(hangup.map(|fd| (fd, PollFlags::from_bits_retain(libc::POLLRDHUP))));
            let mut is_backlog = false;
            // Those with a backlog live until the poll is over, and their descriptors with them;
            // the others must not: their device tasks wait to be told of the end.
            let channels: Vec<_> = lock(&self.channels)
                .iter()
                .filter_map(Weak::upgrade)
                .filter(|channel| {
                    let (backlog, wait_for) = channel.advance();
                    fds.extend_from_slice(wait_for);
                    is_backlog |= backlog > 0;
                    backlog > 0
                })
                .collect();
            drop(vm);
            let timeout = if self.is_expecting() {
                nap = (nap * 2).min(LONGEST_NAP);
                let since = *expecting_since.get_or_insert_with(Instant::now);
                if since.elapsed() > PATIENCE {
                    // Another consumer took what was announced to us.
                    self.accounted.fetch_max(self.announced(), Ordering::SeqCst);
                }
                Some(nap)
            } else {
                nap = FIRST_NAP;
                expecting_since = None;
                arm.store(1, Ordering::SeqCst);
                // Pairs with the barrier in the program between announcing and looking here.
                fence(Ordering::SeqCst);
                if self.is_expecting() || !self.is_ring_empty() {
                    arm.store(0, Ordering::SeqCst);
                    continue;
                }
                // A channel may refuse on account of a peer that never reads; look again then.
                is_backlog.then_some(Duration::from_millis(100))
            };
            let ready = poll(&fds, timeout);
            drop(channels);
            arm.store(0, Ordering::SeqCst);
            self.bell.clear();
            self.wake.consume();
            if let Some(at) = hangup.and_then(|fd| fds.iter().position(|(other, _)| *other == fd))
                && ready.get(at).is_some_and(|ready| *ready)
            {
                tracing::error!("the eBPF loader is gone; doorbells exit from now on");
                hangup = None;
                self.control().await_end();
                self.gone.store(true, Ordering::SeqCst);
                if let Some(vm) = shared.upgrade() {
                    vm.unsink_all();
                }
                *lock(&self.unsunk.0) = true;
                self.unsunk.1.notify_all();
            }
        }
    }
}

/// Which of the descriptors are ready.
fn poll(fds: &[(RawFd, PollFlags)], timeout: Option<Duration>) -> Vec<bool> {
    let mut set: Vec<_> = fds
        .iter()
        .map(|&(fd, flags)| libc::pollfd {
            fd,
            events: flags.bits(),
            revents: 0,
        })
        .collect();
    let timeout = timeout.map(|time| libc::timespec {
        tv_sec: time.as_secs().cast_signed(),
        tv_nsec: time.subsec_nanos().into(),
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `set` has as many entries as are passed, `timeout` is null or outlives the call.
    unsafe {
        libc::ppoll(
            set.as_mut_ptr(),
            set.len() as u64,
            timeout,
            std::ptr::null(),
        )
    };
    set.iter().map(|entry| entry.revents != 0).collect()
}

fn granules(vm: u32, bus: Bus, addr: u64, len: u64) -> impl Iterator<Item = ZoneKey> {
    let (first, last) = (
        addr >> ZONE_GRANULE_SHIFT,
        (addr + (len - 1)) >> ZONE_GRANULE_SHIFT,
    );
    (first..=last).map(move |granule| ZoneKey {
        granule,
        vm,
        bus: bus as u32,
    })
}

/// Copies a vCPU's record out of the shared map.
pub(super) fn read_record(records: &Mapping, record: u32) -> VcpuRecord {
    const WORDS: usize = size_of::<VcpuRecord>() / 8;
    let base = record as usize * size_of::<VcpuRecord>();
    let mut words = [0_u64; WORDS];
    for (at, word) in words.iter_mut().enumerate() {
        *word = records.word(base + at * 8).load(Ordering::Relaxed);
    }
    // SAFETY: Same size; the record is `repr(C)`, made of integers without padding.
    unsafe { std::mem::transmute::<[u64; WORDS], VcpuRecord>(words) }
}

/// Entries of the match table for the doorbells of a region.
pub(crate) type TableEntry = (MatchKey, MatchEntry);
