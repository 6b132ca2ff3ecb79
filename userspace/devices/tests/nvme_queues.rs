//! The NVMe controller's queues, doorbells, resets and events, by a driver that does what Linux's
//! does, and by one that does not.

mod nvme_rig;
mod support;

use ioregion_devices::nvme::Options;
use nvme_rig::{
    ACQ, AQA, ASQ, CC, CC_ENABLED, CFS, CSTS, INTMC, INTMS, PAGE, RDY, Rig, SECTORS, SHUT_DOWN,
    Shadows, WAYS, Way, sqe,
};
use support::{Flat, put, u32_at};

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;

fn options(queues: u16) -> Options {
    Options {
        queues,
        vectors: queues + 1,
        serial: "abc".into(),
        ..Options::default()
    }
}

fn shadowed(queues: u16) -> Options {
    Options {
        memory_doorbells: true,
        ..options(queues)
    }
}

#[test]
fn queues_are_made_and_deleted_by_the_rules() {
    for way in WAYS {
        let mut rig = Rig::new(way, &options(2));
        rig.enable(8);
        let page = rig.pages(1);
        let cq = |id: u32, size: u32, flags: u32| {
            sqe(5, 0, [page, 0], &[(10, id | (size - 1) << 16), (11, flags)])
        };
        let sq = |id: u32, size: u32, flags: u32| {
            sqe(1, 0, [page, 0], &[(10, id | (size - 1) << 16), (11, flags)])
        };
        for (entry, status) in [
            (cq(0, 8, 1), 0x101),
            (cq(3, 8, 1), 0x101),
            (cq(1, 1, 1), 0x102),
            (cq(1, 1025, 1), 0x102),
            (cq(1, 8, 0), 0x02),
            (cq(1, 8, 3 | 3 << 16), 0x108),
            // Nothing to answer on.
            (sq(1, 8, 1 | 1 << 16), 0x100),
            (sq(1, 8, 1), 0x100),
            (cq(1, 1024, 3), 0),
            (cq(1, 8, 3), 0x101),
            (sq(0, 8, 1 | 1 << 16), 0x101),
            (sq(3, 8, 1 | 1 << 16), 0x101),
            (sq(1, 1, 1 | 1 << 16), 0x102),
            (sq(1, 8, 1 << 16), 0x02),
            (sq(1, 8, 1 | 2 << 16), 0x100),
            (sq(1, 8, 1 | 1 << 16), 0),
            (sq(1, 8, 1 | 1 << 16), 0x101),
            (
                sqe(5, 0, [page + 8, 0], &[(10, 2 | 7 << 16), (11, 1)]),
                0x13,
            ),
        ] {
            assert_eq!(rig.ask(entry).status, status, "{entry:?}");
        }
        assert_eq!(rig.delete_cq(1), 0x10c);
        assert_eq!(rig.delete_cq(2), 0x101);
        assert_eq!(rig.delete_cq(0), 0x101);
        assert_eq!(rig.delete_sq(0), 0x101);
        assert_eq!(rig.delete_sq(2), 0x101);
        assert_eq!(rig.delete_sq(1), 0);
        assert_eq!(rig.delete_sq(1), 0x101);
        assert_eq!(rig.delete_cq(1), 0);
        rig.create_pair(1, 16);
        assert_eq!(rig.ask_on(1, sqe(FLUSH, 1, [0; 2], &[])).status, 0);
    }
}

#[test]
fn event_requests_are_limited_aborted_and_forgotten_by_a_reset() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let request = |rig: &mut Rig| rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
        let commands: Vec<u16> = (0..4).map(|_| request(&mut rig)).collect();
        rig.kick(0);
        assert_eq!(rig.peek(0), None);
        let fifth = request(&mut rig);
        rig.kick(0);
        let refused = rig.answer(0);
        assert_eq!((refused.command, refused.status), (fifth, 0x105));
        let name = u32::from(commands[2]) << 16;
        let abort = rig.push(0, sqe(0x08, 0, [0; 2], &[(10, name)]));
        rig.kick(0);
        let mut answers = [rig.answer(0), rig.answer(0)];
        answers.sort_by_key(|answer| answer.command);
        assert_eq!((answers[0].command, answers[0].status), (commands[2], 0x07));
        assert_eq!(answers[1].command, abort);
        assert_eq!((answers[1].status, answers[1].result), (0, 0));
        // It is not there any more; nor is a command of another queue.
        for what in [name, 1 | 5 << 16] {
            let answer = rig.ask(sqe(0x08, 0, [0; 2], &[(10, what)]));
            assert_eq!((answer.status, answer.result), (0, 1));
        }
        assert_eq!(rig.ask(sqe(0x08, 0, [0; 2], &[(10, 9)])).status, 0x02);
        rig.disable();
        rig.enable(2);
        // With room for one answer at a time, requests that wait take none.
        let first = request(&mut rig);
        rig.kick(0);
        assert!(rig.identify(1, 0).is_ok());
        // A doorbell of a queue that there is not.
        rig.ring_with(1, 0, Some(1));
        let told = rig.answer(0);
        assert_eq!((told.command, told.result), (first, 0x0001_0000));
    }
}

#[test]
fn doorbell_values_that_cannot_be_are_told_and_change_nothing() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let expect = |rig: &mut Rig, result: u32, misuse: &mut dyn FnMut(&mut Rig)| {
            rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
            rig.kick(0);
            assert_eq!(rig.peek(0), None);
            misuse(rig);
            assert_eq!(rig.answer(0).result, result);
            rig.log(1, 64, 0, false).unwrap();
        };
        for value in [64, 65, 0xffff, 0x1_0000, u64::MAX] {
            expect(&mut rig, 0x0001_0100, &mut |rig| {
                rig.ring_with(1, 0, Some(value))
            });
            expect(&mut rig, 0x0001_0100, &mut |rig| {
                rig.ring_with(1, 4, Some(value))
            });
        }
        // Answers that nobody gave.
        expect(&mut rig, 0x0001_0100, &mut |rig| {
            rig.ring_with(1, 4, Some(1))
        });
        assert_eq!(rig.ask_on(1, sqe(FLUSH, 1, [0; 2], &[])).status, 0);
        assert_eq!(rig.read(CSTS), RDY);
    }
}

#[test]
fn completion_queue_that_is_full_makes_commands_wait() {
    for way in WAYS {
        let mut rig = Rig::new(way, &options(2));
        rig.enable(8);
        assert_eq!(rig.create_cq(1, 4, 1), 0);
        assert_eq!(rig.create_sq(1, 32, 1), 0);
        // Of another number, on the same completion queue.
        assert_eq!(rig.create_sq(2, 32, 1), 0);
        for _ in 0..10 {
            rig.push(1, sqe(FLUSH, 1, [0; 2], &[]));
            rig.push(2, sqe(FLUSH, 1, [0; 2], &[]));
        }
        rig.kick(1);
        rig.kick(2);
        let mut got = vec![Vec::new(), Vec::new()];
        while got[0].len() + got[1].len() < 20 {
            let mut answers = 0;
            rig.wait_for("an answer", |rig| {
                while let Some(answer) = rig.peek(1) {
                    assert_eq!(answer.status, 0);
                    got[usize::from(answer.sq) - 1].push(answer.command);
                    answers += 1;
                }
                answers > 0
            });
            assert!(answers <= 3, "more answers than there is room for");
            rig.consume(1);
        }
        for mut commands in got {
            commands.sort_unstable();
            assert!(commands.into_iter().eq(0..10));
        }
    }
}

#[test]
fn deep_queues_come_round_many_times() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let data = rig.pages(32);
        for round in 0..40u64 {
            for number in 0..32 {
                let sector = (round * 37 + number * 8) % (SECTORS - 8);
                let page = data + number * PAGE;
                rig.push(1, Rig::blocks(READ, sector, 8, [page, 0], 0));
            }
            rig.kick(1);
            let mut seen = Vec::new();
            for _ in 0..32 {
                let answer = rig.answer(1);
                assert_eq!(answer.status, 0);
                seen.push(answer.command);
            }
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 32);
            for number in 0..32 {
                let at = (round * 37 + number * 8) % (SECTORS - 8) * 512;
                let got = rig.bytes(data + number * PAGE, 4096);
                assert!(
                    (at..)
                        .map(|at| (at % 251) as u8)
                        .zip(got)
                        .all(|(a, b)| a == b)
                );
            }
        }
    }
}

#[test]
fn queue_that_is_deleted_with_commands_under_way_answers_them_first() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        for round in 0..20 {
            let data = Flat::BASE + 4 * (1 << 20);
            for number in 0..20 {
                let prp = [data + number * PAGE, 0];
                rig.push(1, Rig::blocks(READ, number * 8, 8, prp, 0));
            }
            rig.kick(1);
            let delete = rig.push(0, sqe(0, 0, [0; 2], &[(10, 1)]));
            rig.kick(0);
            let answer = rig.answer(0);
            assert_eq!(
                (answer.command, answer.status),
                (delete, 0),
                "round {round}"
            );
            // All that was taken is answered by now; the memory is the driver's again.
            let mut answers = 0;
            while let Some(answer) = rig.peek(1) {
                assert_eq!(answer.status, 0);
                answers += 1;
            }
            assert_eq!(answers, 20);
            rig.consume(1);
            assert_eq!(rig.delete_cq(1), 0);
            rig.create_pair(1, 64);
        }
    }
}

#[test]
fn reset_with_commands_under_way_waits_for_them() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let data = rig.pages(20);
        for _ in 0..20 {
            for number in 0..20 {
                let prp = [data + number * PAGE, 0];
                rig.push(1, Rig::blocks(READ, number * 8, 8, prp, 0));
            }
            rig.kick(1);
            rig.disable();
            // Nothing is written from now on.
            put(&*rig.memory, data, &vec![0x5a; 20 * PAGE as usize]);
            for _ in 0..3 {
                rig.pump();
            }
            assert_eq!(
                rig.bytes(data, 20 * PAGE as usize),
                vec![0x5a; 20 * PAGE as usize]
            );
            rig.enable(32);
            rig.create_pair(1, 32);
            assert_eq!(rig.ask_on(1, sqe(FLUSH, 1, [0; 2], &[])).status, 0);
        }
    }
}

#[test]
fn shutdown_makes_all_safe_and_a_reset_brings_it_back() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &options(1));
        let data = rig.pages(1);
        for kind in [1, 2] {
            put(&*rig.memory, data, &[kind; 512]);
            rig.push(1, Rig::blocks(WRITE, 7, 1, [data, 0], 0));
            rig.kick(1);
            rig.write(CC, CC_ENABLED | u64::from(kind) << 14);
            rig.wait_for("shut down", |rig| rig.read(CSTS) == RDY | SHUT_DOWN);
            assert_eq!(rig.content()[7 * 512..8 * 512], [kind; 512]);
            rig.disable();
            assert_eq!(rig.read(CSTS), 0);
            rig.enable(32);
            rig.create_pair(1, 32);
        }
    }
}

#[test]
fn controller_that_cannot_be_enabled_so_is_fatal_until_a_reset() {
    let mut rig = Rig::new(Way::AtOnce, &options(1));
    let page = rig.pages(2);
    let good = (0x001f_001f, page, page + PAGE, CC_ENABLED);
    for (aqa, asq, acq, cc) in [
        (0x0000_001f, page, page + PAGE, CC_ENABLED),
        (0x001f_0000, page, page + PAGE, CC_ENABLED),
        (good.0, page, page + PAGE, CC_ENABLED | 1 << 4),
        (good.0, page, page + PAGE, CC_ENABLED | 1 << 11),
        (good.0, page, page + PAGE, CC_ENABLED | 5 << 7),
        // Pages of 64 KiB, and queues that do not begin with one.
        (good.0, page + PAGE, page, CC_ENABLED | 4 << 7),
    ] {
        rig.write(AQA, aqa);
        rig.write_long(ASQ, asq);
        rig.write_long(ACQ, acq);
        rig.write(CC, cc);
        assert_eq!(rig.read(CSTS), CFS, "{cc:#x}");
        rig.write(CC, 0);
        assert_eq!(rig.read(CSTS), 0);
    }
    // An admin queue that is no memory.
    rig.write(AQA, good.0);
    rig.write_long(ASQ, 0x1000);
    rig.write_long(ACQ, good.2);
    rig.write(CC, good.3);
    assert_eq!(rig.read(CSTS), RDY);
    rig.ring_with(0, 0, Some(1));
    assert_eq!(rig.read(CSTS), RDY | CFS);
    rig.disable();
    rig.enable(32);
    assert!(rig.identify(1, 0).is_ok());
}

#[test]
fn io_queue_that_is_no_memory_is_fatal() {
    for way in WAYS {
        for sq_gone in [false, true] {
            let mut rig = Rig::new(way, &options(1));
            rig.enable(8);
            let page = rig.pages(1);
            let gone = 0x1000;
            let bases = if sq_gone { [page, gone] } else { [gone, page] };
            let cq = sqe(5, 0, [bases[0], 0], &[(10, 1 | 7 << 16), (11, 3)]);
            assert_eq!(rig.ask(cq).status, 0);
            let sq = sqe(1, 0, [bases[1], 0], &[(10, 1 | 7 << 16), (11, 1 | 1 << 16)]);
            assert_eq!(rig.ask(sq).status, 0);
            rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
            rig.kick(0);
            rig.ring_with(1, 0, Some(1));
            rig.wait_for("fatal", |rig| rig.read(CSTS) == RDY | CFS);
            // Which is told as well, as far as that goes.
            assert_eq!(rig.answer(0).result, 0x0001_0300);
            rig.disable();
            rig.enable(32);
            rig.create_pair(1, 8);
            assert_eq!(rig.ask_on(1, sqe(FLUSH, 1, [0; 2], &[])).status, 0);
        }
    }
}

#[test]
fn doorbell_that_lost_its_value_is_fatal_without_doorbells_in_memory() {
    let mut rig = Rig::probed(Way::AtOnce, &options(1));
    rig.ring_with(1, 0, None);
    assert_eq!(rig.read(CSTS), RDY | CFS);
}

#[test]
fn doorbells_in_memory_need_the_register_now_and_then_only() {
    for way in WAYS {
        let mut rig = Rig::probed(way, &shadowed(2));
        let data = rig.pages(1);
        // One in use before, one made afterwards.
        assert_eq!(rig.ask_on(1, sqe(FLUSH, 1, [0; 2], &[])).status, 0);
        assert_eq!(rig.delete_sq(2), 0);
        assert_eq!(rig.delete_cq(2), 0);
        let shadows = Shadows {
            doorbells: rig.pages(1),
            events: rig.pages(1),
        };
        put(&*rig.memory, shadows.doorbells, &[0xee; 64]);
        let odd = sqe(0x7c, 0, [shadows.doorbells + 8, shadows.events], &[]);
        assert_eq!(rig.ask(odd).status, 0x02);
        let gone = sqe(0x7c, 0, [shadows.doorbells, 0x1000], &[]);
        assert_eq!(rig.ask(gone).status, 0x02);
        let config = sqe(0x7c, 0, [shadows.doorbells, shadows.events], &[]);
        assert_eq!(rig.ask(config).status, 0);
        rig.shadows = Some(shadows);
        assert_eq!(u32_at(&*rig.memory, shadows.doorbells + 8), 1);
        rig.create_pair(2, 64);
        for id in [1, 2] {
            for _ in 0..200 {
                let read = Rig::blocks(READ, 5, 1, [data, 0], 0);
                assert_eq!(rig.ask_on(id, read).status, 0);
            }
            // Many commands, each told of by memory: while the controller works, and where it
            // does not look any more, by the register.
            rig.rung = 0;
            for _ in 0..30 {
                rig.push(id, Rig::blocks(READ, 5, 1, [data, 0], 0));
            }
            rig.kick(id);
            for _ in 0..30 {
                assert_eq!(rig.answer(id).status, 0);
            }
            assert!(rig.rung <= 10, "{way:?}: {} rings", rig.rung);
            // With the value lost, memory has it.
            rig.push(id, Rig::blocks(READ, 5, 1, [data, 0], 0));
            let tail = rig.sqs[&id].tail;
            let at = shadows.doorbells + 8 * u64::from(id);
            put(&*rig.memory, at, &tail.to_le_bytes());
            rig.ring_with(id, 0, None);
            assert_eq!(rig.answer(id).status, 0);
            // What memory says can be as wrong as a register.
            rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
            rig.kick(0);
            put(&*rig.memory, at, &0x1_0000u32.to_le_bytes());
            rig.ring_with(id, 0, Some(0));
            assert_eq!(rig.answer(0).result, 0x0001_0100);
            rig.log(1, 64, 0, false).unwrap();
            put(&*rig.memory, at, &tail.to_le_bytes());
            assert_eq!(rig.ask_on(id, sqe(FLUSH, 1, [0; 2], &[])).status, 0);
        }
        assert_eq!(rig.read(CSTS), RDY);
    }
}

#[test]
fn full_queue_goes_on_with_doorbells_in_memory() {
    for way in WAYS {
        let mut rig = Rig::new(way, &shadowed(1));
        rig.enable(8);
        let shadows = Shadows {
            doorbells: rig.pages(1),
            events: rig.pages(1),
        };
        let config = sqe(0x7c, 0, [shadows.doorbells, shadows.events], &[]);
        assert_eq!(rig.ask(config).status, 0);
        rig.shadows = Some(shadows);
        assert_eq!(rig.create_cq(1, 5, 1), 0);
        assert_eq!(rig.create_sq(1, 64, 1), 0);
        for _ in 0..10 {
            for _ in 0..40 {
                rig.push(1, sqe(FLUSH, 1, [0; 2], &[]));
            }
            rig.kick(1);
            for _ in 0..40 {
                assert_eq!(rig.answer(1).status, 0);
            }
        }
    }
}

#[test]
fn masked_interrupts_wait() {
    let mut rig = Rig::probed(Way::AtOnce, &options(1));
    rig.raised.lock().unwrap().clear();
    rig.write(INTMS, 2);
    assert_eq!(rig.read(INTMC), 2);
    assert_eq!(rig.ask_on(1, sqe(FLUSH, 1, [0; 2], &[])).status, 0);
    assert!(rig.raised.lock().unwrap().is_empty());
    rig.write(INTMC, 2);
    assert_eq!(*rig.raised.lock().unwrap(), [1]);
}

#[test]
fn pages_can_be_larger() {
    for way in WAYS {
        let mut rig = Rig::new(way, &options(1));
        // Aligned to 64 KiB, as the memory's start is.
        let (sq, cq) = (rig.pages(16), rig.pages(16));
        rig.write(AQA, 0x0007_0007);
        rig.write_long(ASQ, sq);
        rig.write_long(ACQ, cq);
        rig.write(CC, CC_ENABLED | 4 << 7);
        rig.add_sq(0, sq, 8);
        rig.add_cq(0, cq, 8);
        let place = rig.pages(32);
        let create = sqe(5, 0, [place, 0], &[(10, 1 | 7 << 16), (11, 3)]);
        assert_eq!(rig.ask(create).status, 0);
        rig.add_cq(1, place, 8);
        let create = sqe(
            1,
            0,
            [place + 0x1000, 0],
            &[(10, 1 | 7 << 16), (11, 1 | 1 << 16)],
        );
        assert_eq!(rig.ask(create).status, 0x13);
        let sq = place + 0x10000;
        let create = sqe(1, 0, [sq, 0], &[(10, 1 | 7 << 16), (11, 1 | 1 << 16)]);
        assert_eq!(rig.ask(create).status, 0);
        rig.add_sq(1, sq, 8);
        // 200 sectors are two such pages.
        let data = rig.pages(32);
        let read = Rig::blocks(READ, 1, 200, [data, data + 0x10000], 0);
        assert_eq!(rig.ask_on(1, read).status, 0);
        assert_eq!(rig.bytes(data, 200 * 512), rig.content()[512..201 * 512]);
    }
}

#[test]
fn queue_has_gone_only_when_doorbells_on_their_way_have_arrived() {
    for way in [Way::AtOnce, Way::Copied, Way::Pinned] {
        let mut rig = Rig::probed(way, &options(1));
        // What is late is nobody's mistake: this is never answered.
        rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
        for (opcode, offset) in [(0, 0), (4, 4)] {
            rig.push(0, sqe(opcode, 0, [0; 2], &[(10, 1)]));
            rig.kick(0);
            assert_eq!(rig.peek(0), None, "{way:?}: the channel was not asked");
            rig.ring_with(1, offset, Some(3));
            assert_eq!(rig.peek(0), None);
            assert_eq!(rig.answer(0).status, 0);
        }
        rig.create_pair(1, 8);
        rig.write(CC, CC_ENABLED & !1);
        assert_eq!(rig.read(CSTS), RDY);
        rig.ring_with(1, 0, Some(3));
        assert_eq!(rig.read(CSTS), RDY);
        rig.wait_for("not ready", |rig| rig.read(CSTS) == 0);
        rig.enable(32);
        rig.create_pair(1, 8);
        rig.pump();
        assert_eq!(rig.peek(1), None);
        // From now on it is one.
        assert_eq!(rig.delete_sq(1), 0);
        rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
        rig.kick(0);
        rig.ring_with(1, 0, Some(3));
        assert_eq!(rig.answer(0).result, 0x0001_0000);
    }
}

#[test]
fn doorbells_in_memory_are_offered_only_where_they_are_wanted() {
    for (options, wanted) in [(options(1), false), (shadowed(1), true)] {
        let mut rig = Rig::probed(Way::AtOnce, &options);
        let commands = rig.identify(1, 0).unwrap()[256..258].to_vec();
        assert_eq!(commands, [0, u8::from(wanted)]);
        let effects = rig.log(5, 4096, 0, true).unwrap();
        assert_eq!(effects[0x7c * 4], u8::from(wanted));
        let pages = rig.pages(2);
        let config = sqe(0x7c, 0, [pages, pages + PAGE], &[]);
        let status = if wanted { 0 } else { 0x01 };
        assert_eq!(rig.ask(config).status, status);
    }
}
