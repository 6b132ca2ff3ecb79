//! The program's log, where it was built with one.

use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use ioregion_conformance::{Kind, Recorder, Rig};
use ioregion_dispatch::mechanism::Ebpf;
use ioregion_dispatch::{Bus, Doorbell, Program as Bpf, Region, Size, Transport};
use ioregion_microguest::{MMIO_BASE, Program};

/// Keeps what is logged.
struct Lines(Mutex<Vec<String>>);

static LINES: Lines = Lines(Mutex::new(Vec::new()));

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

#[test]
fn matched_doorbells_are_logged_by_the_object_that_logs_and_by_no_other() -> Result<()> {
    log::set_logger(&LINES).expect("no other logger");
    log::set_max_level(log::LevelFilter::Trace);
    let quiet = Bpf::find()?;
    let logging = quiet.with_file_name("ioregion-log.bpf.o");
    for (object, expected) in [(&quiet, false), (&logging, true)] {
        let bytes = std::fs::read(object).with_context(|| {
            format!(
                "{} (made by `cargo xtask build-ebpf --log`)",
                object.display()
            )
        })?;
        let bpf = Bpf::load(&bytes)?;
        let rig = Rig::with(Some(Arc::clone(&bpf)))?;
        let region = Region::mmio(MMIO_BASE, 0x1000).doorbell(Doorbell::new(0x10, Size::B4));
        let kind = Kind {
            name: Ebpf::NAME,
            transport: Transport::Stream,
        };
        let task = rig.serve(kind, &region, Recorder::default())?;
        let mut program = Program::new();
        program.write(Bus::Mmio, MMIO_BASE + 0x10, 4, 0xabcd);
        rig.run(&program)?;
        bpf.flush_log();
        let lines = std::mem::take(&mut *LINES.0.lock().unwrap());
        let wanted = format!("doorbell {:x} <- abcd", MMIO_BASE + 0x10);
        assert_eq!(lines.contains(&wanted), expected, "{lines:?}");
        drop(rig);
        task.map(ioregion_conformance::Task::finish).transpose()?;
    }
    Ok(())
}
