//! The NVMe controller, by a driver that does what Linux's does.

mod nvme_rig;
mod support;

use ioregion_devices::nvme::{Controller, NvmeError, Options};
use nvme_rig::{CAP, CSTS, PAGE, RDY, Rig, SECTORS, VS, WAYS, Way, sqe};
use support::put;

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;
const COMPARE: u8 = 5;
const ZEROES: u8 = 8;
const DATASET: u8 = 9;

fn options(queues: u16) -> Options {
    Options {
        queues,
        vectors: queues + 1,
        serial: "abc".into(),
        ..Options::default()
    }
}

#[test]
fn probe_finds_controller_and_namespace() {
    for way in WAYS {
        let mut rig = Rig::new(way, &options(2));
        // Contiguous queues, no stride, NVM commands, 4 KiB pages.
        let capabilities = rig.read(CAP) | rig.read(CAP + 4) << 32;
        assert_eq!(capabilities & 0xffff, 1023);
        assert_eq!(capabilities >> 16 & 1, 1);
        assert_eq!(capabilities >> 32 & 0xf, 0);
        assert_eq!(capabilities >> 37 & 0xff, 1);
        assert_eq!(capabilities >> 48 & 0xf, 0);
        assert_eq!(rig.read(VS), 0x10400);
        rig.enable(32);

        let controller = rig.identify(1, 0).unwrap();
        assert_eq!(controller[4..24], *b"abc                 ");
        assert_eq!(controller[80..84], 0x10400u32.to_le_bytes());
        assert_eq!(controller[512..514], [0x66, 0x44]);
        assert_eq!(controller[516..520], [1, 0, 0, 0]);
        assert_eq!(controller[768..800], *b"nqn.2014-08.org.nvmexpress:uuid:");
        assert_eq!(rig.identify(2, 0).unwrap()[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(rig.identify(2, 1).unwrap()[..8], [0; 8]);
        let namespace = rig.identify(0, 1).unwrap();
        assert_eq!(namespace[..8], SECTORS.to_le_bytes());
        assert_eq!(namespace[8..16], SECTORS.to_le_bytes());
        // Format 0 of one: 2^9 bytes without metadata.
        assert_eq!((namespace[25], namespace[26]), (0, 0));
        assert_eq!(namespace[128..132], [0, 0, 9, 0]);
        let names = rig.identify(3, 1).unwrap();
        assert_eq!(names[..4], [2, 16, 0, 0]);
        assert_eq!(names[4..20], namespace[104..120]);
        assert_eq!(names[20..24], [3, 16, 0, 0]);
        assert_eq!(names[40], 0);
        for (cns, nsid) in [(0, 2), (0, 0xffff_ffff), (3, 2), (2, 0xffff_fffe)] {
            assert_eq!(rig.identify(cns, nsid), Err(0x0b), "{cns} {nsid}");
        }
        // What later versions have.
        for cns in [0x05, 0x06, 0x08, 0x10, 0xff] {
            assert_eq!(rig.identify(cns, 1), Err(0x02), "{cns}");
        }

        // As many queues as wanted, and no more than there are.
        assert_eq!(rig.set_feature(7, 0), Ok(0));
        assert_eq!(rig.set_feature(7, 0x001f_001f), Ok(0x0001_0001));
        for id in [1, 2] {
            rig.create_pair(id, 64);
        }
        assert_eq!(rig.set_feature(7, 0), Err(0x0c));
        for id in [1, 2] {
            assert_eq!(rig.ask_on(id, sqe(FLUSH, 1, [0; 2], &[])).status, 0);
        }
        // Each with its interrupt.
        let mut raised = rig.raised.lock().unwrap().clone();
        raised.dedup();
        assert_eq!(raised, [0, 1]);
    }
}

#[test]
fn what_is_written_is_read_through_pages_and_lists() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let before = rig.content();
        let (data, list) = (rig.pages(80), rig.pages(3));
        // Sectors, offset in the first page.
        for (count, offset) in [
            (1, 0),
            (1, 512),
            (8, 0),
            (8, 8),
            (16, 0),
            (9, 4092),
            (600, 4),
        ] {
            let len = count * 512usize;
            let pattern: Vec<u8> = (0..len).map(|at| (at % 249) as u8 ^ offset as u8).collect();
            put(&*rig.memory, data + offset, &pattern);
            // Pages behind the first in a list that begins at the end of a page.
            let mut prp = [data + offset, data + PAGE];
            let pages = (offset + len as u64).div_ceil(PAGE);
            if pages > 2 {
                let mut at = list + PAGE - 16;
                prp[1] = at;
                for page in 1..pages {
                    // The last entry of a page leads to the next list, if more than one is left.
                    if at % PAGE == PAGE - 8 && page + 1 < pages {
                        let next = at + 8;
                        put(&*rig.memory, at, &next.to_le_bytes());
                        at = next;
                    }
                    put(&*rig.memory, at, &(data + page * PAGE).to_le_bytes());
                    at += 8;
                }
            }
            let first = 100;
            let write = Rig::blocks(WRITE, first, count as u32, prp, 0);
            assert_eq!(rig.ask_on(1, write).status, 0, "{count} {offset}");
            assert_eq!(rig.content()[100 * 512..100 * 512 + len], pattern);
            put(&*rig.memory, data + offset, &vec![0xee; len]);
            let read = Rig::blocks(READ, first, count as u32, prp, 0);
            assert_eq!(rig.ask_on(1, read).status, 0);
            assert_eq!(
                rig.bytes(data + offset, len),
                pattern,
                "{way:?} {count} {offset}"
            );
        }
        assert_eq!(rig.content()[..100 * 512], before[..100 * 512]);
        assert_eq!(rig.content()[700 * 512..], before[700 * 512..]);
        let totals = rig.controller.totals();
        assert_eq!((totals.reads, totals.writes), (7, 7));
        assert_eq!(totals.sectors_read, 643);
    }
}

#[test]
fn flush_zeroes_deallocate_and_compare_do_what_they_say() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let before = rig.content();
        let data = rig.pages(1);
        for nsid in [1, 0xffff_ffff] {
            assert_eq!(rig.ask_on(1, sqe(FLUSH, nsid, [0; 2], &[])).status, 0);
        }
        let deallocate = 1 << 25;
        let force = 1 << 30;
        for (first, flags) in [(8, 0), (24, deallocate), (40, deallocate | force)] {
            let zeroes = Rig::blocks(ZEROES, first, 8, [0; 2], flags);
            assert_eq!(rig.ask_on(1, zeroes).status, 0);
        }
        put(&*rig.memory, data, &[7; 512]);
        let write = Rig::blocks(WRITE, 2, 1, [data, 0], force);
        assert_eq!(rig.ask_on(1, write).status, 0);
        // Two ranges, one of them empty.
        let mut ranges = [0; 32];
        ranges[4..8].copy_from_slice(&8u32.to_le_bytes());
        ranges[8..16].copy_from_slice(&64u64.to_le_bytes());
        put(&*rig.memory, data + 64, &ranges);
        let trim = sqe(DATASET, 1, [data + 64, 0], &[(10, 1), (11, 4)]);
        assert_eq!(rig.ask_on(1, trim).status, 0);
        // Hints alone, without data.
        let hint = sqe(DATASET, 1, [0; 2], &[(10, 0), (11, 3)]);
        assert_eq!(rig.ask_on(1, hint).status, 0);
        let after = rig.content();
        for (sector, (old, new)) in before.chunks(512).zip(after.chunks(512)).enumerate() {
            match sector {
                2 => assert_eq!(new, [7; 512]),
                8..16 | 24..32 | 40..48 => assert_eq!(new, [0; 512], "sector {sector}"),
                // What deallocated blocks read as is not said.
                64..72 => {}
                _ => assert_eq!(new, old, "sector {sector}"),
            }
        }
        put(&*rig.memory, data, &before[..1024]);
        let compare = |rig: &mut Rig| {
            let compare = Rig::blocks(COMPARE, 0, 2, [data, 0], 0);
            rig.ask_on(1, compare).status
        };
        assert_eq!(compare(&mut rig), 0);
        put(&*rig.memory, data + 1023, &[!before[1023]]);
        assert_eq!(compare(&mut rig), 0x285);
        assert_eq!(
            rig.bytes(data, 1023),
            before[..1023],
            "compared data were written"
        );
    }
}

#[test]
fn commands_that_make_no_sense_get_the_specified_status_and_change_nothing() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let before = rig.content();
        let data = rig.pages(2);
        let gone = 8;
        let cases = [
            // Opcode, namespace, fused, scatter list.
            (sqe(0x7f, 1, [0; 2], &[]), 0x01),
            (Rig::blocks(0x0c, 0, 1, [data, 0], 0), 0x01),
            (sqe(WRITE, 0, [data, 0], &[]), 0x0b),
            (sqe(WRITE, 0xffff_ffff, [data, 0], &[]), 0x0b),
            (sqe(FLUSH, 2, [0; 2], &[]), 0x0b),
            (sqe(u8::MAX, 7, [0; 2], &[]), 0x01),
            // Past the end.
            (Rig::blocks(READ, SECTORS, 1, [data, 0], 0), 0x80),
            (Rig::blocks(WRITE, SECTORS - 1, 2, [data, 0], 0), 0x80),
            (Rig::blocks(ZEROES, u64::MAX, 1, [data, 0], 0), 0x80),
            (Rig::blocks(COMPARE, u64::MAX - 1, 1, [data, 0], 0), 0x80),
            // More than MDTS; a directive.
            (Rig::blocks(READ, 0, 2049, [data, 0], 0), 0x02),
            (Rig::blocks(WRITE, 0, 1, [data, 0], 1 << 20), 0x02),
            // Addresses.
            (Rig::blocks(WRITE, 0, 1, [data + 2, 0], 0), 0x13),
            (Rig::blocks(WRITE, 0, 9, [data, data + 512], 0), 0x13),
            (Rig::blocks(WRITE, 0, 100, [data, data + 4], 0), 0x13),
            (Rig::blocks(WRITE, 0, 1, [gone, 0], 0), 0x04),
            (Rig::blocks(READ, 0, 1, [gone, 0], 0), 0x04),
            (Rig::blocks(READ, 0, 9, [data, !4095], 0), 0x04),
            (Rig::blocks(READ, 0, 100, [data, !7], 0), 0x04),
            (sqe(DATASET, 1, [gone, 0], &[(11, 4)]), 0x04),
        ];
        let many = cases.len() as u64;
        for (number, (entry, status)) in cases.into_iter().enumerate() {
            assert_eq!(
                rig.ask_on(1, entry).status,
                status,
                "{way:?}: case {number}"
            );
        }
        let mut fused = Rig::blocks(WRITE, 0, 1, [data, 0], 0);
        fused[1] = 1;
        assert_eq!(rig.ask_on(1, fused).status, 0x02);
        // A range of two that is past the end.
        let mut ranges = [0; 32];
        ranges[4] = 1;
        ranges[20] = 1;
        ranges[24..32].copy_from_slice(&SECTORS.to_le_bytes());
        put(&*rig.memory, data, &ranges);
        let trim = sqe(DATASET, 1, [data, 0], &[(10, 1), (11, 4)]);
        assert_eq!(rig.ask_on(1, trim).status, 0x80);
        assert_eq!(rig.content(), before);
        // All of them are in the log, the last one first.
        let log = rig.log(1, 1024, 0, true).unwrap();
        assert_eq!(log[..8], (many + 2).to_le_bytes());
        assert_eq!(log[8..10], [1, 0]);
        assert_eq!(log[12..14], (0x4080u16 << 1).to_le_bytes());
        assert_eq!(rig.log(1, 64, 64, true).unwrap(), log[64..128]);
        assert_eq!(rig.read(CSTS), RDY);
    }
}

#[test]
fn read_only_namespace_is_never_written() {
    for way in WAYS {
        let read_only = Options {
            read_only: true,
            ..options(1)
        };
        let mut rig = Rig::probed(way, &read_only);
        let before = rig.content();
        let data = rig.pages(1);
        assert_eq!(rig.identify(0, 1).unwrap()[99], 1);
        for opcode in [WRITE, ZEROES] {
            let change = Rig::blocks(opcode, 0, 1, [data, 0], 0);
            assert_eq!(rig.ask_on(1, change).status, 0x182);
        }
        let trim = sqe(DATASET, 1, [data, 0], &[(11, 4)]);
        assert_eq!(rig.ask_on(1, trim).status, 0x182);
        let read = Rig::blocks(READ, 0, 1, [data, 0], 0);
        assert_eq!(rig.ask_on(1, read).status, 0);
        assert_eq!(rig.content(), before);
    }
}

#[test]
fn image_that_shrinks_fails_commands_and_is_found_out() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let data = rig.pages(1);
        let image = std::fs::File::options()
            .write(true)
            .open(&rig.path)
            .unwrap();
        image.set_len(512).unwrap();
        let read = |rig: &mut Rig, sector| {
            let read = Rig::blocks(READ, sector, 1, [data, 0], 0);
            rig.ask_on(1, read).status
        };
        assert_eq!(read(&mut rig, 0), 0);
        assert_eq!(read(&mut rig, 1), 0x281);
        // Two events at a time: of one that was told, nothing more until the log is read.
        rig.set_feature(0x0b, 1 << 8).unwrap();
        let event = rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
        rig.kick(0);
        assert_eq!(rig.peek(0), None);
        assert!(rig.controller.refresh().unwrap());
        let told = rig.answer(0);
        assert_eq!((told.command, told.result), (event, 0x0004_0002));
        assert_eq!(
            rig.log(4, 4096, 0, false).unwrap()[..8],
            [1, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(rig.log(4, 4096, 0, false).unwrap()[..4], [0; 4]);
        assert_eq!(rig.identify(0, 1).unwrap()[..8], 1u64.to_le_bytes());
        assert_eq!(read(&mut rig, 1), 0x80);
        let health = rig.log(2, 512, 0, false).unwrap();
        assert_eq!(health[160], 1, "a media error");
    }
}

#[test]
fn features_are_kept_until_a_reset() {
    let mut rig = Rig::probed(Way::AtOnce, &options(2));
    for (feature, dword, value) in [
        (0x01, 0x0102_0304, 0x0102_0304),
        (0x02, 0, 0),
        (0x05, 7, 7),
        (0x06, 0, 0),
        (0x08, 0x0a0b, 0x0a0b),
        (0x0a, 1, 1),
        (0x0b, 0x100, 0x100),
    ] {
        let first = rig.get_feature(feature, 0).unwrap();
        rig.set_feature(feature, dword).unwrap();
        assert_eq!(rig.get_feature(feature, 0), Ok(value));
        // Default; what it can do.
        assert_eq!(rig.get_feature(feature | 1 << 8, 0), Ok(first));
        assert_eq!(rig.get_feature(feature | 3 << 8, 0), Ok(4));
        // To save it.
        assert_eq!(rig.set_feature(feature | 1 << 31, dword), Err(0x10d));
    }
    // Vectors, of which there are three.
    assert_eq!(rig.set_feature(9, 1 << 16 | 2), Ok(0));
    assert_eq!(rig.get_feature(9, 2), Ok(1 << 16 | 2));
    assert_eq!(rig.get_feature(9, 1), Ok(1));
    assert_eq!(rig.set_feature(9, 3), Err(0x02));
    assert_eq!(rig.get_feature(0x0e, 0), Err(0x02));
    assert_eq!(rig.set_feature(0x7f, 0), Err(0x02));
    assert_eq!(rig.set_feature(0x02, 1), Err(0x02));
    let of_namespace = sqe(0x09, 1, [0; 2], &[(10, 6), (11, 1)]);
    assert_eq!(rig.ask(of_namespace).status, 0x10f);
    rig.disable();
    rig.enable(32);
    for (feature, value) in [(0x06, 1), (0x01, 0), (0x0b, 0), (0x07, 0x0001_0001)] {
        assert_eq!(rig.get_feature(feature, 0), Ok(value));
    }
}

#[test]
fn temperature_beyond_a_threshold_is_told() {
    let mut rig = Rig::probed(Way::AtOnce, &options(1));
    assert_eq!(rig.log(2, 512, 0, false).unwrap()[..3], [0, 0x39, 0x01]);
    rig.set_feature(0x0b, 2).unwrap();
    rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
    rig.kick(0);
    rig.set_feature(4, 300).unwrap();
    let told = rig.answer(0);
    assert_eq!(told.result, 0x0002_0101);
    assert_eq!(rig.log(2, 512, 0, false).unwrap()[0], 2);
    // Under; and a sensor that there is not.
    assert_eq!(rig.get_feature(4, 1 << 20), Ok(0));
    assert_eq!(rig.set_feature(4, 1 << 16), Err(0x02));
}

#[test]
fn log_pages_are_told_in_any_part() {
    let mut rig = Rig::probed(Way::AtOnce, &options(1));
    let effects = rig.log(5, 4096, 0, true).unwrap();
    // Identify; Write changes what there is; no such commands.
    assert_eq!(effects[6 * 4..6 * 4 + 4], [1, 0, 0, 0]);
    assert_eq!(effects[1024 + 4..1024 + 8], [3, 0, 0, 0]);
    assert_eq!(effects[0x10 * 4], 0);
    assert_eq!(effects[1024 + 4 * 4], 0);
    let firmware = rig.log(3, 512, 0, true).unwrap();
    assert_eq!(firmware[0], 1);
    let controller = rig.identify(1, 0).unwrap();
    assert_eq!(firmware[8..16], controller[64..72]);
    // The rest of a page, and what is past it.
    assert_eq!(rig.log(5, 8, 1024, true).unwrap(), effects[1024..1032]);
    assert_eq!(rig.log(3, 1024, 0, true).unwrap()[512..], [0; 512]);
    assert_eq!(rig.log(3, 4, 516, true), Err(0x02));
    assert_eq!(rig.log(3, 4, 2, true), Err(0x02));
    for page in [0, 6, 0x80, 0xff] {
        assert_eq!(rig.log(page, 4, 0, true), Err(0x109));
    }
    // 16 GiB of log.
    let huge = sqe(0x02, 0, [0; 2], &[(10, 2 | 0xffff << 16), (11, 0xffff)]);
    assert_eq!(rig.ask(huge).status, 0x02);
}

#[test]
fn admin_commands_that_there_are_not_are_refused_and_the_next_one_works() {
    let mut rig = Rig::probed(Way::AtOnce, &options(1));
    for opcode in [0x03, 0x0d, 0x10, 0x14, 0x18, 0x80, 0x84, 0xc0, 0xff] {
        assert_eq!(rig.ask(sqe(opcode, 1, [0; 2], &[])).status, 0x01);
    }
    let mut fused = sqe(6, 0, [0; 2], &[(10, 1)]);
    fused[1] = 0x41;
    assert_eq!(rig.ask(fused).status, 0x02);
    // Data that is nowhere.
    assert_eq!(rig.ask(sqe(6, 0, [8, 0], &[(10, 1)])).status, 0x04);
    assert!(rig.identify(1, 0).is_ok());
}

#[test]
fn without_a_write_cache_writes_are_safe_at_once() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let data = rig.pages(1);
        put(&*rig.memory, data, &[9; 512]);
        assert_eq!(rig.set_feature(6, 0), Ok(0));
        assert_eq!(rig.get_feature(6, 0), Ok(0));
        let write = Rig::blocks(WRITE, 3, 1, [data, 0], 0);
        assert_eq!(rig.ask_on(1, write).status, 0);
        let zeroes = Rig::blocks(ZEROES, 4, 1, [0; 2], 0);
        assert_eq!(rig.ask_on(1, zeroes).status, 0);
        assert_eq!(rig.content()[3 * 512..4 * 512], [9; 512]);
        assert_eq!(rig.content()[4 * 512..5 * 512], [0; 512]);
    }
}

#[test]
fn options_that_make_no_controller_are_refused() {
    let rig = Rig::new(Way::AtOnce, &options(1));
    let open = |options: Options| {
        let memory = std::sync::Arc::clone(&rig.memory);
        Controller::open(&rig.path, &options, memory, Box::new(|_| {})).map(drop)
    };
    let queues = |queues| {
        open(options(1)).and(open(Options {
            queues,
            ..options(1)
        }))
    };
    // Somebody has the image.
    assert!(matches!(queues(1), Err(NvmeError::Image(_))));
    for bad in [0, 512] {
        let error = open(Options {
            queues: bad,
            ..options(1)
        });
        assert!(matches!(error, Err(NvmeError::Queues(_))), "{error:?}");
    }
    let vectors = Options {
        vectors: 0,
        ..options(1)
    };
    assert!(matches!(open(vectors), Err(NvmeError::Vectors(0))));
    for serial in ["x".repeat(21), "tab\t".into(), "ß".into()] {
        let error = open(Options {
            serial,
            ..options(1)
        });
        assert!(matches!(error, Err(NvmeError::Serial(_))), "{error:?}");
    }
}
