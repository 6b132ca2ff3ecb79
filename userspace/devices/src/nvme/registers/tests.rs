use proptest::prelude::*;

use super::*;

const ENABLED: u64 = 4 << 20 | 6 << 16 | 1;

fn ready_to_enable() -> Registers {
    let mut registers = Registers::new();
    assert_eq!(registers.write(at::AQA, 4, 0x00ff_001f), []);
    // In one write, and in two.
    assert_eq!(registers.write(at::ASQ, 8, 0x1_2345_6fff), []);
    assert_eq!(registers.write(at::ACQ, 4, 0x0000_7000), []);
    assert_eq!(registers.write(at::ACQ + 4, 4, 1), []);
    registers
}

#[test]
fn registers_are_read_in_any_part() {
    let registers = ready_to_enable();
    let capabilities = registers.read(at::CAP, 8);
    assert_eq!(registers.read(at::CAP, 4), capabilities & 0xffff_ffff);
    assert_eq!(registers.read(at::CAP + 4, 4), capabilities >> 32);
    assert_eq!(registers.read(at::CAP + 3, 1), capabilities >> 24 & 0xff);
    assert_eq!(registers.read(at::VS + 1, 2), 0x0104);
    assert_eq!(registers.read(at::ASQ, 8), 0x1_2345_6000);
    assert_eq!(registers.read(at::ACQ, 8), 0x1_0000_7000);
    assert_eq!(registers.read(0x20, 8), 0x00ff_001f << 32);
    for offset in [0x38, 0x3c, 0xe00, 0xff8] {
        assert_eq!(registers.read(offset, 8), 0);
    }
}

#[test]
fn enabling_says_where_the_admin_queues_are() {
    let mut registers = ready_to_enable();
    let queues = AdminQueues {
        sq: 0x1_2345_6000,
        cq: 0x1_0000_7000,
        sq_size: 32,
        cq_size: 256,
        page: 4096,
    };
    assert_eq!(
        registers.write(at::CC, 4, ENABLED),
        [Effect::Enable(queues)]
    );
    assert_eq!(registers.read(at::CSTS, 4), 1);
    assert!(registers.is_enabled());
    assert_eq!(registers.entry_sizes(), (true, true));
    // Again: nothing.
    assert_eq!(registers.write(at::CC, 4, ENABLED), []);
    let reset = [Effect::Mask(0), Effect::Reset];
    assert_eq!(registers.write(at::CC, 4, ENABLED & !1), reset);
    // Ready until the reset is over.
    assert_eq!(registers.read(at::CSTS, 4), 1);
    registers.stopped();
    assert_eq!(registers.read(at::CSTS, 4), 0);
    // The admin queues stay where they were.
    assert_eq!(
        registers.write(at::CC, 4, ENABLED),
        [Effect::Enable(queues)]
    );
}

#[test]
fn enabling_before_a_reset_is_over_is_fatal() {
    let mut registers = ready_to_enable();
    registers.write(at::CC, 4, ENABLED);
    registers.write(at::CC, 4, 0);
    let effects = registers.write(at::CC, 4, ENABLED);
    assert!(matches!(effects[..], [Effect::Refused(_)]), "{effects:?}");
    assert_eq!(registers.read(at::CSTS, 4), 3);
    registers.stopped();
    registers.write(at::CC, 4, 0);
    assert_eq!(registers.read(at::CSTS, 4), 0);
}

#[test]
fn shutdown_is_told_once_and_over_when_it_is() {
    let mut registers = ready_to_enable();
    registers.write(at::CC, 4, ENABLED);
    let shutdown = ENABLED | 1 << 14;
    assert_eq!(registers.write(at::CC, 4, shutdown), [Effect::Shutdown]);
    assert_eq!(registers.read(at::CSTS, 4), 1 | 1 << 2);
    assert_eq!(registers.write(at::CC, 4, shutdown), []);
    registers.shut_down();
    assert_eq!(registers.read(at::CSTS, 4), 1 | 2 << 2);
    registers.write(at::CC, 4, 0);
    registers.stopped();
    assert_eq!(registers.read(at::CSTS, 4), 0);
    // Late.
    registers.shut_down();
    assert_eq!(registers.read(at::CSTS, 4), 0);
}

#[test]
fn writes_in_part_go_nowhere() {
    let mut registers = ready_to_enable();
    for (offset, bytes) in [(at::CC, 1), (at::CC, 2), (at::CC + 1, 4), (at::CC + 2, 8)] {
        assert_eq!(registers.write(offset, bytes, u64::MAX), []);
    }
    for offset in [at::CAP, at::VS, at::CSTS, 0x20, 0x38, 0xffc] {
        assert_eq!(registers.write(offset, 4, u64::MAX), []);
    }
    assert_eq!(registers.read(at::CC, 4), 0);
    assert_eq!(registers.read(at::VS, 4), 0x10400);
}

proptest! {
    /// Whatever is written: it is enabled only from a state in which it can be, reset only when
    /// it was enabled, and ready from then until that is over.
    #[test]
    fn effects_come_in_turn(writes in proptest::collection::vec(
        (prop_oneof![Just(0x14u64), Just(0x14), 0u64..0x40], prop_oneof![Just(4u8), Just(8)],
         prop_oneof![Just(0u64), Just(ENABLED), Just(ENABLED | 1 << 14), any::<u64>()], any::<bool>()),
        1..60)) {
        let mut registers = ready_to_enable();
        let mut running = false;
        for (offset, bytes, value, stopped) in writes {
            for effect in registers.write(offset, bytes, value) {
                match effect {
                    Effect::Enable(queues) => {
                        prop_assert!(!running);
                        prop_assert!((2..=4096).contains(&queues.sq_size));
                        prop_assert!(queues.sq.is_multiple_of(queues.page));
                        prop_assert!(queues.cq.is_multiple_of(queues.page));
                        running = true;
                    }
                    Effect::Reset => {
                        if stopped {
                            registers.stopped();
                            running = false;
                        }
                    }
                    Effect::Refused(_) => {
                        prop_assert!(registers.read(at::CSTS, 4) & 2 != 0);
                    }
                    Effect::Mask(_) | Effect::Shutdown => {}
                }
            }
            prop_assert_eq!(registers.read(at::CSTS, 4) & 1 != 0, running);
        }
    }
}
