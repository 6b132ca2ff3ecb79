//! Device tasks on a thread or in a process, and what threads cost.

use std::io::{BufRead, BufReader, Read as _, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use ioregion_dispatch::server::{DeviceEnd, Stats, Stop, WaitPolicy, serve};
use ioregion_dispatch::{Device, handoff};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, gettid};
use serde::{Deserialize, Serialize};

use super::hold::{Held, hold};
use super::meter::{Check, Meter, Seen};
use crate::scenarios::{self, Wait};

/// CPU time and context switches of a thread since it began.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Cost {
    /// CPU time in nanoseconds.
    pub cpu_ns: u64,
    /// Voluntary context switches.
    pub switches: u64,
    /// Involuntary ones.
    pub preemptions: u64,
}

impl Cost {
    /// Of a thread of this process.
    pub fn of(thread: Pid) -> Result<Self> {
        // The kernel's MAKE_THREAD_CPUCLOCK(tid, CPUCLOCK_SCHED).
        let clock = ClockId::from_raw(!thread.as_raw() << 3 | 6);
        let time = clock_gettime(clock).context("CPU clock of a thread")?;
        let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status"))?;
        let count = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let count = line.and_then(|n| n.trim().parse().ok());
            count.with_context(|| format!("{name} context switches of a thread"))
        };
        Ok(Self {
            cpu_ns: time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64,
            switches: count("voluntary_ctxt_switches:")?,
            preemptions: count("nonvoluntary_ctxt_switches:")?,
        })
    }

    /// What has been spent since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_sub(earlier.cpu_ns),
            switches: self.switches.saturating_sub(earlier.switches),
            preemptions: self.preemptions.saturating_sub(earlier.preemptions),
        }
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.cpu_ns += other.cpu_ns;
        self.switches += other.switches;
        self.preemptions += other.preemptions;
    }
}

/// Threads of this process that have that name.
pub fn threads_named(name: &str) -> Vec<Pid> {
    let tasks = std::fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let named = tasks.filter(|task| {
        let comm = std::fs::read_to_string(task.path().join("comm"));
        comm.is_ok_and(|comm| comm.trim() == name)
    });
    named
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .collect()
}

/// Binds the calling thread, and those that it will start, to a CPU.
pub fn pin(cpu: Option<usize>) -> Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)
        .with_context(|| format!("binding a thread to CPU {cpu}"))
}

/// From now on the calling thread runs only while nobody else wants its CPU.
fn only_in_gaps() -> Result<()> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: `param` lives until the call returns; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const param) };
    Errno::result(result).context("SCHED_IDLE")?;
    Ok(())
}

/// A device task under way.
#[derive(Debug)]
pub enum Task {
    /// On a thread of this process.
    Thread(Thread),
    /// In a process of its own.
    Process(Process),
}

/// A device task on a thread.
#[derive(Debug)]
pub struct Thread {
    stop: Stop,
    handle: JoinHandle<Result<Stats>>,
    meter: Meter,
    id: Pid,
    polls: bool,
}

/// A device task in a process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    socket: UnixStream,
    answers: BufReader<UnixStream>,
}

/// What the process is to do; the first line that it is sent.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    check: Check,
    mixed: bool,
    doorbells: u32,
    cpu: Option<usize>,
}

/// `(ends, finals)`, as for [`Meter::seen`].
type Question = ([u32; 2], Vec<[u32; 2]>);

impl Task {
    /// Serves `device` on a thread on `cpu`, which has `meter`'s figures; with `in_gaps` only while
    /// nobody else wants that CPU.
    pub fn thread(
        end: DeviceEnd,
        mut device: Box<dyn Device>,
        meter: Meter,
        wait: Wait,
        cpu: Option<usize>,
        in_gaps: bool,
    ) -> Result<Self> {
        let stop = Stop::new()?;
        let (started, id) = mpsc::channel();
        let handle = {
            let stop = stop.clone();
            std::thread::Builder::new()
                .name("device".into())
                .spawn(move || {
                    pin(cpu)?;
                    if in_gaps {
                        only_in_gaps()?;
                    }
                    let _ = started.send(gettid());
                    Ok(serve(end, &mut *device, wait.policy(), &stop)?)
                })?
        };
        let id = id
            .recv()
            .map_err(|_| anyhow!("the device task did not start"))?;
        Ok(Self::Thread(Thread {
            stop,
            handle,
            meter,
            id,
            polls: wait == Wait::Poll,
        }))
    }

    /// Serves a device like [`Meter::new`]'s in a process on `cpu`.
    pub fn process(
        end: DeviceEnd,
        check: Check,
        operation: scenarios::Operation,
        doorbells: u32,
        cpu: Option<usize>,
    ) -> Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let child = std::process::Command::new("/proc/self/exe")
            .arg("device")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .context("starting the device process")?;
        let answers = BufReader::new(socket.try_clone()?);
        let mut process = Process {
            child,
            socket,
            answers,
        };
        let mixed = operation == scenarios::Operation::Mixed;
        process.say(&Order {
            check,
            mixed,
            doorbells,
            cpu,
        })?;
        let ready: String = process.hear()?;
        if ready != "ready" {
            bail!("the device process said {ready:?}");
        }
        handoff::send(&process.socket, end)?;
        Ok(Self::Process(process))
    }

    /// What it has seen and what it has cost.
    pub fn look(&mut self, ends: [u32; 2], finals: &[[u32; 2]]) -> Result<(Seen, Cost)> {
        match self {
            Self::Thread(task) => {
                if task.handle.is_finished() {
                    bail!("the device task has ended");
                }
                Ok((task.meter.seen(ends, finals), Cost::of(task.id)?))
            }
            Self::Process(process) => {
                process.say(&(ends, finals))?;
                process.hear()
            }
        }
    }

    /// Holds it if it polls: a task that sleeps keeps no CPU busy.
    pub fn hold(&self) -> Result<Option<Held>> {
        match self {
            Self::Thread(task) if task.polls => hold(task.id).map(Some),
            _ => Ok(None),
        }
    }

    /// Ends it and waits for its end.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::Thread(task) => {
                task.stop.trigger();
                match task.handle.join() {
                    Ok(stats) => stats.map(drop),
                    Err(_) => bail!("the device task panicked"),
                }
            }
            Self::Process(Process {
                mut child,
                socket,
                answers,
            }) => {
                drop((socket, answers));
                let status = child.wait()?;
                if !status.success() {
                    bail!("the device process ended with {status}");
                }
                Ok(())
            }
        }
    }
}

impl Process {
    fn say(&mut self, what: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(what)?;
        line.push(b'\n');
        self.socket
            .write_all(&line)
            .context("talking to the device process")
    }

    fn hear<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.answers
            .read_line(&mut line)
            .context("listening to the device process")?;
        serde_json::from_str(&line).with_context(|| format!("the device process said {line:?}"))
    }
}

/// Reads one line without reading on: what follows may be descriptors.
fn read_line(mut socket: &UnixStream) -> Result<Option<String>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while socket.read(&mut byte)? == 1 {
        if byte == *b"\n" {
            return Ok(Some(String::from_utf8(line)?));
        }
        line.push(byte[0]);
    }
    Ok(None)
}

/// The device process: serves what it is handed over standard input, and answers questions
/// there until it is closed.
pub fn device_process() -> Result<()> {
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let order = read_line(&socket)?.context("no order")?;
    let Order {
        check,
        mixed,
        doorbells,
        cpu,
    } = serde_json::from_str(&order)?;
    let answer = |json: String| (&socket).write_all(format!("{json}\n").as_bytes());
    answer(serde_json::to_string("ready")?)?;
    let end = handoff::recv(&socket)?;
    let operation = if mixed {
        scenarios::Operation::Mixed
    } else {
        scenarios::Operation::Posted
    };
    let meter = Meter::new(check, operation, doorbells);
    let mut task = Task::thread(end, Box::new(meter.clone()), meter, Wait::Sleep, cpu, false)?;
    while let Some(line) = read_line(&socket)? {
        let (ends, finals): Question = serde_json::from_str(&line)?;
        answer(serde_json::to_string(&task.look(ends, &finals)?)?)?;
    }
    task.finish()
}

/// Delivers what `end` holds, without a task.
pub fn serve_once(end: DeviceEnd, mut device: Box<dyn Device>) -> Result<()> {
    let stop = Stop::new()?;
    stop.trigger();
    serve(end, &mut *device, WaitPolicy::Sleep, &stop)?;
    Ok(())
}
