//! The console, by what a guest writes and reads.

mod guest;
mod support;

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use guest::Guest;
use ioregion_devices::console::{self, Console, Extent};
use ioregion_devices::mmio::at;
use ioregion_devices::virtio::{Format, Health};
use ioregion_dispatch::Size;
use support::{DATA, get, put};

const FORMATS: [Format; 2] = [Format::Split, Format::Packed];

fn console(extent: Option<Extent>) -> (Arc<Console>, UnixStream, io::PipeReader) {
    let (keyboard, input) = UnixStream::pair().unwrap();
    let (screen, output) = io::pipe().unwrap();
    let console = Console::new(input.into(), output.into(), extent);
    (Arc::new(console), keyboard, screen)
}

#[test]
fn console_carries_both_ways_and_has_a_size() {
    for format in FORMATS {
        let extent = Extent {
            columns: 80,
            rows: 25,
        };
        let (device, mut keyboard, mut screen) = console(Some(extent));
        let mut guest = Guest::new(Arc::clone(&device) as _);
        assert_eq!(guest.read(at::DEVICE_ID), 3);
        guest.bring_up(format);
        assert_eq!(guest.config(0, Size::B2), 80);
        assert_eq!(guest.config(2, Size::B2), 25);
        for round in 0..40u32 {
            let line = format!("line {round} of output");
            put(&guest.memory, DATA, line.as_bytes());
            let len = u32::try_from(line.len()).unwrap();
            let id = guest.request(
                console::SEND,
                &[(DATA, 3, false), (DATA + 3, len - 3, false)],
            );
            assert_eq!(guest.collect(console::SEND), [(id, 0)]);
            let mut bytes = vec![0; line.len()];
            screen.read_exact(&mut bytes).unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), line);
            // Typed before there is room for it, and after.
            if round % 2 == 0 {
                keyboard.write_all(b"typed").unwrap();
            }
            let room = guest.request(console::RECEIVE, &[(DATA + 64, 3, true)]);
            if round % 2 == 1 {
                keyboard.write_all(b"typed").unwrap();
            }
            assert_eq!(guest.collect(console::RECEIVE), [(room, 3)]);
            assert_eq!(get(&guest.memory, DATA + 64, 3), b"typ");
            let room = guest.request(console::RECEIVE, &[(DATA + 64, 300, true)]);
            assert_eq!(guest.collect(console::RECEIVE), [(room, 2)]);
            assert_eq!(get(&guest.memory, DATA + 64, 3), b"edp");
        }
        assert_eq!(device.lost(), 0);
    }
}

#[test]
fn console_without_a_size_offers_none() {
    let (device, _keyboard, _screen) = console(None);
    let (columns, rows) = (1, 1);
    assert!(!device.resize(Extent { columns, rows }));
    let mut guest = Guest::new(device);
    assert_eq!(guest.offered() & 1, 0);
    assert_eq!(guest.config(0, Size::B4), 0);
}

#[test]
fn new_size_of_a_console_interrupts_and_has_a_new_generation() {
    let columns = 80;
    let extent = |rows| Extent { columns, rows };
    let (device, _keyboard, _screen) = console(Some(extent(25)));
    let mut guest = Guest::new(Arc::clone(&device) as _);
    guest.bring_up(Format::Split);
    let before = guest.read(at::CONFIG_GENERATION);
    assert!(!device.resize(extent(25)));
    assert!(device.resize(extent(50)));
    // Not before the driver is told.
    assert_eq!(guest.config(2, Size::B2), 25);
    guest.handle.config_changed();
    assert_eq!(guest.interrupted(), 2);
    assert_ne!(guest.read(at::CONFIG_GENERATION), before);
    assert_eq!(guest.config(2, Size::B2), 50);
}

#[test]
fn output_that_nobody_reads_waits_and_what_nobody_will_read_is_counted() {
    let (device, _keyboard, mut screen) = console(None);
    let mut guest = Guest::new(Arc::clone(&device) as _);
    guest.bring_up(Format::Split);
    // More than a pipe holds.
    let len = 0x8000;
    let mut ids = Vec::new();
    for round in 0..4u8 {
        ids.push(guest.request(console::SEND, &[(DATA, len, false)]));
        if round == 0 {
            let done = guest.collect(console::SEND);
            assert_eq!(done, [(ids[0], 0)]);
        }
    }
    let mut read = vec![0; 4 * len as usize];
    screen.read_exact(&mut read).unwrap();
    let mut done = Vec::new();
    while done.len() < 3 {
        done.extend(guest.collect(console::SEND));
    }
    assert_eq!(device.lost(), 0);
    drop(screen);
    let id = guest.request(console::SEND, &[(DATA, 700, false)]);
    assert_eq!(guest.collect(console::SEND), [(id, 0)]);
    assert_eq!(device.lost(), 700);
    assert_eq!(guest.handle.health(), [Health::Running; 2]);
}

#[test]
fn input_that_no_driver_took_is_the_next_ones() {
    let (device, mut keyboard, _screen) = console(None);
    let mut guest = Guest::new(device);
    guest.bring_up(Format::Split);
    keyboard.write_all(b"first").unwrap();
    let room = guest.request(console::RECEIVE, &[(DATA, 2, true)]);
    assert_eq!(guest.collect(console::RECEIVE), [(room, 2)]);
    guest.bring_up(Format::Packed);
    let room = guest.request(console::RECEIVE, &[(DATA, 100, true)]);
    assert_eq!(guest.collect(console::RECEIVE), [(room, 3)]);
    assert_eq!(get(&guest.memory, DATA, 3), b"rst");
    // The end of the input is no end of the console.
    drop(keyboard);
    let id = guest.request(console::SEND, &[(DATA, 3, false)]);
    assert_eq!(guest.collect(console::SEND), [(id, 0)]);
}
