//! The NVMe controller's channels, each served by a thread of its own over a wire.

mod nvme_rig;
mod support;

use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ioregion_abi::wire::{Command, Layout, Operation, Response};
use ioregion_devices::memory::{Access, Memory, MemoryError, Pin};
use ioregion_devices::nvme::{AdminChannel, CalledBy, Controller, Options, QueueChannel};
use ioregion_dispatch::Size;
use ioregion_dispatch::server::{DeviceEnd, Stats, Stop, WaitPolicy, serve};
use ioregion_dispatch::wire::{Message, Transport, Try, Wire, pair};
use nvme_rig::{ACQ, AQA, ASQ, CC, CC_ENABLED, CSTS, PAGE, RDY, Rig, Sqe, sqe};
use support::{Flat, put, u16_at};

const READ: u8 = 2;
const REGISTERS: u64 = 1 << 32;

/// Memory of which one page is slow.
struct Slow {
    memory: Flat,
    page: u64,
    pause: Duration,
    accesses: AtomicUsize,
}

impl Memory for Slow {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(addr, into)
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        if (self.page..self.page + PAGE).contains(&addr) {
            self.accesses.fetch_add(1, Ordering::SeqCst);
            thread::sleep(self.pause);
        }
        self.memory.write(addr, from)
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        self.memory.load(addr)
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        self.memory.store(addr, value)
    }

    fn pin(
        &self,
        _: &mut dyn Iterator<Item = (u64, usize)>,
        _: Access,
    ) -> Result<Option<Pin>, MemoryError> {
        Ok(None)
    }
}

/// A VMM's end of a channel.
struct Vmm(Box<dyn Wire>);

impl Vmm {
    fn send(&mut self, operation: Operation, user_data: u64, offset: u64, data: u64, wait: bool) {
        let command = Command {
            operation,
            size: Size::B4,
            response: wait,
            user_data,
            offset,
            data,
        };
        let message = command.encode(Layout::Info);
        while self.0.try_send(&message).unwrap() == Try::WouldBlock {
            thread::yield_now();
        }
        while self.0.try_flush().unwrap() == Try::WouldBlock {
            thread::yield_now();
        }
    }

    fn response(&mut self) -> u64 {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Try::Done(message) = self.0.try_recv().unwrap() {
                let message: Message = message;
                return Response::decode(&message).data;
            }
            assert!(Instant::now() < until, "no response within a minute");
            thread::yield_now();
        }
    }

    fn doorbell(&mut self, queue: u16, offset: u64, value: u32) {
        self.send(Operation::Write, queue.into(), offset, value.into(), false);
    }

    fn write(&mut self, offset: u64, value: u64) {
        self.send(Operation::Write, REGISTERS, offset, value, true);
        self.response();
    }

    fn read(&mut self, offset: u64) -> u64 {
        self.send(Operation::Read, REGISTERS, offset, 0, true);
        self.response()
    }
}

struct Machine {
    _dir: tempfile::TempDir,
    memory: Arc<Slow>,
    admin: Vmm,
    /// From queue 1 on.
    queues: Vec<Vmm>,
    stop: Stop,
    servers: Vec<JoinHandle<Stats>>,
    admin_tail: u32,
    admin_head: u32,
    /// Pages given out.
    free: u64,
}

/// Slots of queue 1 and 2: submission queue, completion queue, data.
const QUEUE_PAGES: u64 = Flat::BASE + 0x10_0000;

fn sq(queue: u16) -> u64 {
    QUEUE_PAGES + u64::from(queue) * 0x10_0000
}

fn cq(queue: u16) -> u64 {
    sq(queue) + 0x2_0000
}

fn data(queue: u16) -> u64 {
    sq(queue) + 0x4_0000
}

impl Machine {
    fn new(queues: u16, io_uring: bool, pause: Duration, policy: WaitPolicy) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut image = std::fs::File::create(&path).unwrap();
        image.write_all(&vec![0x77; 1 << 20]).unwrap();
        let memory = Arc::new(Slow {
            memory: Flat::new(8 << 20),
            page: data(1),
            pause,
            accesses: AtomicUsize::new(0),
        });
        let options = Options {
            queues,
            vectors: queues + 1,
            io_uring,
            ..Options::default()
        };
        let shared = Arc::clone(&memory);
        let controller = Controller::open(&path, &options, shared, Box::new(|_| {})).unwrap();
        let stop = Stop::new().unwrap();
        let (vmm, end) = pair(Transport::Stream).unwrap();
        let (switch, admin) = (stop.clone(), Arc::clone(&controller));
        let mut servers = vec![thread::spawn(move || {
            let mut admin = AdminChannel::new(&admin);
            serve(
                DeviceEnd::new(end, Layout::Info),
                &mut admin,
                policy,
                &switch,
            )
            .unwrap()
        })];
        let ready = Arc::new(Barrier::new(usize::from(queues) + 1));
        let mut ends = Vec::new();
        for id in 1..=queues {
            let (vmm, end) = pair(Transport::Stream).unwrap();
            ends.push(Vmm(vmm));
            let (switch, controller) = (stop.clone(), Arc::clone(&controller));
            let ready = Arc::clone(&ready);
            servers.push(thread::spawn(move || {
                let mut channel = QueueChannel::new(&controller, id, CalledBy::Server).unwrap();
                ready.wait();
                let end = DeviceEnd::new(end, Layout::Info);
                serve(end, &mut channel, policy, &switch).unwrap()
            }));
        }
        ready.wait();
        let mut machine = Self {
            _dir: dir,
            memory,
            admin: Vmm(vmm),
            queues: ends,
            stop,
            servers,
            admin_tail: 0,
            admin_head: 0,
            free: 0,
        };
        machine.enable();
        machine
    }

    fn enable(&mut self) {
        let base = Flat::BASE + self.free;
        self.free += 2 * PAGE;
        self.admin.write(AQA, 0x001f_001f);
        self.admin.write(ASQ, base);
        self.admin.write(ASQ + 4, 0);
        self.admin.write(ACQ, base + PAGE);
        self.admin.write(ACQ + 4, 0);
        self.admin.write(CC, CC_ENABLED);
        assert_eq!(self.admin.read(CSTS), RDY);
        (self.admin_tail, self.admin_head) = (0, 0);
    }

    fn disable(&mut self) {
        self.admin.write(CC, CC_ENABLED & !1);
        let until = Instant::now() + Duration::from_secs(60);
        while self.admin.read(CSTS) & RDY != 0 {
            assert!(Instant::now() < until, "still ready after a minute");
        }
    }

    /// An admin command (fewer than 32 of them): its status.
    fn ask(&mut self, mut entry: Sqe) -> u16 {
        let base = Flat::BASE + self.free - 2 * PAGE;
        entry[2] = self.admin_tail as u8;
        put(
            &*self.memory,
            base + u64::from(self.admin_tail) * 64,
            &entry,
        );
        self.admin_tail += 1;
        self.admin.doorbell(0, 0, self.admin_tail);
        let at = base + PAGE + u64::from(self.admin_head) * 16 + 14;
        self.admin_head += 1;
        wait("an admin answer", || u16_at(&*self.memory, at) & 1 == 1);
        u16_at(&*self.memory, at) >> 1 & 0x7ff
    }

    fn create_pair(&mut self, id: u16) {
        put(&*self.memory, cq(id), &vec![0; 1024 * 16]);
        let size = 1023 << 16;
        let entry = sqe(
            5,
            0,
            [cq(id), 0],
            &[(10, u32::from(id) | size), (11, 3 | u32::from(id) << 16)],
        );
        assert_eq!(self.ask(entry), 0);
        let entry = sqe(
            1,
            0,
            [sq(id), 0],
            &[(10, u32::from(id) | size), (11, 1 | u32::from(id) << 16)],
        );
        assert_eq!(self.ask(entry), 0);
    }

    /// Entries that read a block each into the queue's first page of data.
    fn fill(&self, id: u16, from: u32, count: u32) {
        for number in from..from + count {
            let mut entry = Rig::blocks(READ, number.into(), 1, [data(id), 0], 0);
            entry[2..4].copy_from_slice(&(number as u16).to_le_bytes());
            put(&*self.memory, sq(id) + u64::from(number) * 64, &entry);
        }
    }

    /// Answers in the first round of a completion queue.
    fn answers(&self, id: u16) -> u32 {
        let done =
            |number: &u32| u16_at(&*self.memory, cq(id) + u64::from(*number) * 16 + 14) & 1 == 1;
        (0..1023).take_while(done).count() as u32
    }

    fn end(self) {
        self.stop.trigger();
        for server in self.servers {
            server.join().unwrap();
        }
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < until, "{what}: not within a minute");
        thread::sleep(Duration::from_micros(100));
    }
}

const POLICIES: [WaitPolicy; 3] = [
    WaitPolicy::Sleep,
    WaitPolicy::SpinThenSleep(Duration::from_micros(50)),
    WaitPolicy::Poll,
];

#[test]
fn queues_work_through_servers_of_every_policy() {
    for policy in POLICIES {
        for io_uring in [false, true] {
            let mut machine = Machine::new(2, io_uring, Duration::ZERO, policy);
            for id in [1, 2] {
                machine.create_pair(id);
                for tail in (10..=100).step_by(10) {
                    machine.fill(id, tail - 10, 10);
                    machine.queues[usize::from(id) - 1].doorbell(id, 0, tail);
                    wait("answers", || machine.answers(id) == tail);
                }
            }
            machine.end();
        }
    }
}

#[test]
fn slow_queue_keeps_no_other_one_waiting() {
    for io_uring in [false, true] {
        let pause = Duration::from_millis(20);
        let mut machine = Machine::new(2, io_uring, pause, WaitPolicy::Sleep);
        machine.create_pair(1);
        machine.create_pair(2);
        // Two seconds of work for the one.
        machine.fill(1, 0, 100);
        machine.queues[0].doorbell(1, 0, 100);
        wait("slow work", || {
            machine.memory.accesses.load(Ordering::SeqCst) > 0
        });
        machine.fill(2, 0, 200);
        for tail in 1..=200 {
            machine.queues[1].doorbell(2, 0, tail);
            wait("an answer", || machine.answers(2) == tail);
        }
        // Nor the admin queue, and the registers.
        assert_eq!(machine.ask(sqe(0x0a, 0, [0; 2], &[(10, 7)])), 0);
        assert_eq!(machine.admin.read(CSTS), RDY);
        let slow = machine.memory.accesses.load(Ordering::SeqCst);
        assert!(
            slow < 100,
            "{slow} slow commands were over before 200 quick ones"
        );
        wait("all answers", || machine.answers(1) == 100);
        machine.end();
    }
}

#[test]
fn doorbell_that_comes_late_is_none_of_the_next_queue() {
    for io_uring in [false, true] {
        for reset in [false, true] {
            let pause = Duration::from_millis(30);
            let mut machine = Machine::new(1, io_uring, pause, WaitPolicy::Sleep);
            for _ in 0..5 {
                machine.create_pair(1);
                machine.fill(1, 0, 8);
                let before = machine.memory.accesses.load(Ordering::SeqCst);
                machine.queues[0].doorbell(1, 0, 2);
                wait("slow work", || {
                    machine.memory.accesses.load(Ordering::SeqCst) > before
                });
                // The channel is at work: these wait in it.
                for tail in 3..=8 {
                    machine.queues[0].doorbell(1, 0, tail);
                }
                if reset {
                    machine.disable();
                    machine.enable();
                } else {
                    assert_eq!(machine.ask(sqe(0, 0, [0; 2], &[(10, 1)])), 0);
                    assert_eq!(machine.ask(sqe(4, 0, [0; 2], &[(10, 1)])), 0);
                }
                // A new queue, of which nothing was told.
                let after = machine.memory.accesses.load(Ordering::SeqCst);
                machine.create_pair(1);
                thread::sleep(Duration::from_millis(100));
                assert_eq!(machine.answers(1), 0, "commands of a queue that has gone");
                assert_eq!(machine.memory.accesses.load(Ordering::SeqCst), after);
                assert_eq!(machine.admin.read(CSTS), RDY);
                machine.disable();
                machine.enable();
            }
            machine.end();
        }
    }
}

#[test]
fn channel_that_ends_with_commands_under_way_answers_them() {
    let pause = Duration::from_millis(20);
    let mut machine = Machine::new(1, true, pause, WaitPolicy::Sleep);
    machine.create_pair(1);
    machine.fill(1, 0, 50);
    machine.queues[0].doorbell(1, 0, 50);
    wait("slow work", || {
        machine.memory.accesses.load(Ordering::SeqCst) > 0
    });
    machine.stop.trigger();
    for server in machine.servers {
        server.join().unwrap();
    }
    // Each has an answer, some that they failed, and the memory is nobody's but the driver's.
    let done = |number: u64| u16_at(&*machine.memory, cq(1) + number * 16 + 14) & 1 == 1;
    let answers = (0..1023).take_while(|number| done(*number)).count();
    assert!(answers >= 1);
    // As many as were taken.
    let last = cq(1) + (answers as u64 - 1) * 16;
    assert_eq!(usize::from(u16_at(&*machine.memory, last + 8)), answers);
    let status = |number: u64| u16_at(&*machine.memory, cq(1) + number * 16 + 14) >> 1;
    for number in 0..answers as u64 {
        assert!([0, 6].contains(&status(number)));
    }
}
