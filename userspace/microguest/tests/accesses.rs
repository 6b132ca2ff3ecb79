//! Every access that a program lists leaves the guest exactly as listed.

mod common;

use common::{Exit, read, run, written};
use ioregion_microguest::Bus::{Mmio, Pio};
use ioregion_microguest::{DEFAULT_RAM, Error, MMIO_BASE, MMIO_END, MicroVm, Program};

const PORT: u64 = 0x510;
const VALUE: u64 = 0x8877_6655_4433_2211;

/// Runs a program on vCPU 0; returns its exits and its log.
fn execute(build: impl FnOnce(&mut Program)) -> (Vec<Exit>, Vec<u64>) {
    let mut program = Program::new();
    build(&mut program);
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    let mut vcpu = vm.vcpu(0, &program).unwrap();
    (run(&mut vcpu), vm.log(0).unwrap())
}

fn load_error(build: impl FnOnce(&mut Program)) -> Error {
    let mut program = Program::new();
    build(&mut program);
    MicroVm::new(DEFAULT_RAM)
        .unwrap()
        .vcpu(0, &program)
        .unwrap_err()
}

#[test]
fn empty_program_halts() {
    assert_eq!(execute(|_| {}), (vec![], vec![]));
}

#[test]
fn cpuid_leaves_loops_times_and_values_alone() {
    let mut program = Program::new();
    program.repeat(3, |p| {
        p.timed(|p| {
            p.cpuid();
        });
        p.write_counter(Mmio, MMIO_BASE, 4, 7, 1);
    });
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    let mut vcpu = vm.vcpu(0, &program).unwrap();
    let values = [7_u32, 8, 9].map(|value| written(Mmio, MMIO_BASE, &value.to_le_bytes()));
    assert_eq!(run(&mut vcpu), values);
    let timings = vm.timings(0).unwrap();
    assert_eq!(timings.len(), 3);
    assert!(timings.iter().all(|ticks| *ticks > 0), "{timings:?}");
}

#[test]
fn writes_of_every_width_arrive_with_their_bytes() {
    for (bus, addr, sizes) in [
        (Mmio, MMIO_BASE, &[1, 2, 4, 8][..]),
        (Pio, PORT, &[1, 2, 4]),
    ] {
        for &size in sizes {
            let (exits, _) = execute(|p| {
                p.write(bus, addr, size, VALUE);
            });
            let bytes = &VALUE.to_le_bytes()[..size.into()];
            assert_eq!(exits, [written(bus, addr, bytes)]);
        }
    }
}

#[test]
fn reads_of_every_width_land_in_the_log() {
    let (exits, log) = execute(|p| {
        assert_eq!(p.read(Mmio, MMIO_BASE, 1), 0);
        assert_eq!(p.read(Mmio, MMIO_BASE, 2), 1);
        assert_eq!(p.read(Mmio, MMIO_BASE, 4), 2);
        assert_eq!(p.read(Mmio, MMIO_BASE, 8), 3);
        assert_eq!(p.read(Pio, PORT, 1), 4);
        assert_eq!(p.read(Pio, PORT, 2), 5);
        assert_eq!(p.read(Pio, PORT, 4), 6);
    });
    assert_eq!(exits.len(), 7);
    assert_eq!(
        exits[3],
        read(Mmio, MMIO_BASE, &[8, 9, 10, 11, 12, 13, 14, 15])
    );
    assert_eq!(
        log,
        [
            0x01,
            0x0302,
            0x0706_0504,
            0x0f0e_0d0c_0b0a_0908,
            0x10,
            0x1211,
            0x1615_1413
        ]
    );
}

#[test]
fn sixteen_byte_accesses_arrive_as_two_halves() {
    let (exits, log) = execute(|p| {
        p.write16(MMIO_BASE, 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100);
        assert_eq!(p.read16(MMIO_BASE), 0);
    });
    let halves = [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]];
    assert_eq!(
        exits[..2],
        [
            written(Mmio, MMIO_BASE, &halves[0]),
            written(Mmio, MMIO_BASE + 8, &halves[1])
        ]
    );
    assert_eq!(exits.len(), 4);
    assert_eq!(log, [0x0807_0605_0403_0201, 0x100f_0e0d_0c0b_0a09]);
}

#[test]
fn page_crossing_write_arrives_as_two_fragments() {
    let page = MMIO_BASE + 0x1000;
    let (exits, _) = execute(|p| {
        p.write(Mmio, page - 1, 4, 0x4433_2211);
        p.write(Mmio, page - 3, 8, VALUE);
    });
    assert_eq!(
        exits,
        [
            written(Mmio, page - 1, &[0x11]),
            written(Mmio, page, &[0x22, 0x33, 0x44]),
            written(Mmio, page - 3, &[0x11, 0x22, 0x33]),
            written(Mmio, page, &[0x44, 0x55, 0x66, 0x77, 0x88]),
        ]
    );
}

#[test]
fn string_output_arrives_in_order() {
    for size in [1_u8, 2, 4] {
        let values = [0x1122_3344, 0x5566_7788, 0x99aa_bbcc];
        let (exits, _) = execute(|p| {
            p.out_string(PORT, size, &values);
        });
        let expected: Vec<u8> = values
            .iter()
            .flat_map(|v: &u32| v.to_le_bytes().into_iter().take(size.into()))
            .collect();
        assert!(
            exits
                .iter()
                .all(|e| e.bus == Pio && e.write && e.addr == PORT)
        );
        assert_eq!(exits.concat_data(), expected);
    }
}

#[test]
fn string_input_lands_in_the_log_one_entry_per_value() {
    for (size, expected) in [
        (1, [0x01, 0x02, 0x03]),
        (2, [0x0201, 0x0403, 0x0605]),
        (4, [0x0403_0201, 0x0807_0605, 0x0c0b_0a09]),
    ] {
        let (_, log) = execute(|p| {
            assert_eq!(p.in_string(PORT, size, 3), 0..3);
            assert_eq!(p.in_string(PORT, size, 0), 3..3);
        });
        assert_eq!(log, expected);
    }
}

trait ConcatData {
    fn concat_data(&self) -> Vec<u8>;
}

impl ConcatData for Vec<Exit> {
    fn concat_data(&self) -> Vec<u8> {
        self.iter().flat_map(|e| e.data.clone()).collect()
    }
}

#[test]
fn counters_follow_the_innermost_loop() {
    let (exits, _) = execute(|p| {
        p.write_counter(Mmio, MMIO_BASE, 4, 5, 3);
        p.repeat(2, |p| {
            p.repeat(3, |p| {
                p.write_counter(Mmio, MMIO_BASE, 2, 0x10, 1);
            });
            p.write_counter(Pio, PORT, 1, 7, 100);
        });
        p.repeat(2, |p| {
            p.write_counter(Mmio, MMIO_BASE, 8, 0x1_ffff_ffff, 2);
        });
        p.repeat(0, |p| {
            p.write(Mmio, MMIO_BASE, 1, 0);
        });
        p.repeat(1000, |_| {});
    });
    let inner = [0x10, 0x11, 0x12].map(|v| written(Mmio, MMIO_BASE, &[v, 0]));
    let mut expected = vec![written(Mmio, MMIO_BASE, &[5, 0, 0, 0])];
    for outer in [7, 107] {
        expected.extend_from_slice(&inner);
        expected.push(written(Pio, PORT, &[outer]));
    }
    // Only the low half counts.
    expected.push(written(
        Mmio,
        MMIO_BASE,
        &[0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0],
    ));
    expected.push(written(Mmio, MMIO_BASE, &[1, 0, 0, 0, 1, 0, 0, 0]));
    assert_eq!(exits, expected);
}

#[test]
fn strided_counters_walk_round_their_addresses() {
    for (bus, addr, size) in [(Mmio, MMIO_BASE, 4), (Mmio, MMIO_BASE, 8), (Pio, PORT, 2)] {
        let (exits, _) = execute(|p| {
            p.repeat(7, |p| {
                p.write_counter_strided(bus, addr, size, 100, 3, 16);
            });
        });
        let expected: Vec<Exit> = (0..7_u64)
            .map(|i| {
                written(
                    bus,
                    addr + i % 3 * 16,
                    &(100 + i).to_le_bytes()[..size.into()],
                )
            })
            .collect();
        assert_eq!(exits, expected);
    }
}

#[test]
fn log_holds_reads_of_loops_in_order_of_execution() {
    let (_, log) = execute(|p| {
        assert_eq!(p.read(Pio, PORT, 1), 0);
        p.repeat(3, |p| {
            assert_eq!(p.read(Pio, PORT, 1), 1);
            p.timed(|p| assert_eq!(p.read(Mmio, MMIO_BASE, 1), 2));
        });
        assert_eq!(p.read(Pio, PORT, 1), 7);
    });
    assert_eq!(log, [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn long_straight_programs_fit() {
    const N: u64 = 200_000;
    let mut program = Program::new();
    for i in 0..N {
        program.write(Mmio, MMIO_BASE + i % 4096 * 8, 8, i);
    }
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    let mut vcpu = vm.vcpu(0, &program).unwrap();
    let exits = run(&mut vcpu);
    assert_eq!(exits.len() as u64, N);
    for (i, exit) in exits.iter().enumerate() {
        assert_eq!(exit.data, (i as u64).to_le_bytes());
    }
}

#[test]
fn another_program_runs_after_halt_with_a_new_log() {
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    let mut program = Program::new();
    program.read(Mmio, MMIO_BASE, 4);
    program.read(Mmio, MMIO_BASE, 4);
    let mut vcpu = vm.vcpu(0, &program).unwrap();
    run(&mut vcpu);
    assert_eq!(vm.log(0).unwrap().len(), 2);
    let mut program = Program::new();
    program.read(Pio, PORT, 1);
    vm.reload(&vcpu, 0, &program).unwrap();
    assert_eq!(vm.log(0).unwrap(), [0]);
    assert_eq!(run(&mut vcpu), [read(Pio, PORT, &[1])]);
    assert_eq!(vm.log(0).unwrap(), [1]);
}

#[test]
fn wrong_programs_are_refused_with_their_reason() {
    assert!(matches!(
        load_error(|p| {
            p.write(Mmio, MMIO_BASE, 3, 0);
        }),
        Error::BadSize { bus: Mmio, size: 3 }
    ));
    for size in [0, 16] {
        assert!(matches!(
            load_error(|p| {
                p.write(Mmio, MMIO_BASE, size, 0);
            }),
            Error::BadSize { .. }
        ));
    }
    assert!(matches!(
        load_error(|p| {
            p.read(Pio, PORT, 8);
        }),
        Error::BadSize { bus: Pio, size: 8 }
    ));
    let ram = DEFAULT_RAM as u64;
    assert!(matches!(
        load_error(|p| {
            p.write(Mmio, ram - 1, 4, 0);
        }),
        Error::AddressInRam { .. }
    ));
    assert!(matches!(
        load_error(|p| {
            p.write(Mmio, MMIO_END - 3, 4, 0);
        }),
        Error::AddressOutOfRange { .. }
    ));
    assert!(matches!(
        load_error(|p| {
            p.write(Mmio, u64::MAX, 4, 0);
        }),
        Error::AddressOutOfRange { .. }
    ));
    assert!(matches!(
        load_error(|p| {
            p.write(Pio, 0xffff, 2, 0);
        }),
        Error::AddressOutOfRange { bus: Pio, .. }
    ));
    assert!(matches!(
        load_error(|p| {
            p.write_counter_strided(Mmio, MMIO_BASE, 4, 0, u32::MAX, u32::MAX);
        }),
        Error::AddressOutOfRange { .. }
    ));
    assert!(matches!(
        load_error(|p| {
            p.ram_store(4096, 0);
        }),
        Error::BadCell(4096)
    ));
    assert!(matches!(
        load_error(|p| {
            p.repeat(u32::MAX, |p| {
                p.timed(|_| {});
            });
        }),
        Error::TooLarge {
            section: "timings",
            ..
        }
    ));
    assert!(matches!(
        load_error(|p| {
            p.in_string(PORT, 4, 1_000_000);
        }),
        Error::TooLarge { section: "log", .. }
    ));
    assert!(matches!(
        load_error(|p| {
            (0..2_000_000).for_each(|_| {
                p.write(Mmio, MMIO_BASE, 4, 0);
            });
        }),
        Error::TooLarge {
            section: "code",
            ..
        }
    ));
    for size in [8, 16, 255] {
        assert!(matches!(
            load_error(|p| {
                p.write_counter(Pio, PORT, size, 0, 1);
            }),
            Error::BadSize { .. }
        ));
    }
    assert!(matches!(
        load_error(|p| {
            p.write_tsc(Mmio, MMIO_BASE, 16);
        }),
        Error::BadSize { size: 16, .. }
    ));
    assert!(matches!(
        load_error(|p| {
            p.write16(MMIO_END - 8, 0);
        }),
        Error::AddressOutOfRange { .. }
    ));
    assert!(matches!(
        load_error(|p| {
            p.write16(u64::MAX, 0);
        }),
        Error::AddressOutOfRange { .. }
    ));
    fn nest(p: &mut Program, depth: usize) {
        if depth > 0 {
            p.repeat(1, |p| nest(p, depth - 1));
        }
    }
    assert!(matches!(load_error(|p| nest(p, 65)), Error::TooDeep));
}

#[test]
fn impossible_machines_are_refused() {
    assert!(matches!(MicroVm::new(0), Err(Error::Ram { .. })));
    assert!(matches!(MicroVm::new(4095), Err(Error::Ram { .. })));
    assert!(matches!(MicroVm::new(0xe000_0000), Err(Error::Ram { .. })));
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    assert!(matches!(
        vm.vcpu(3, &Program::new()),
        Err(Error::NoArea { index: 3, .. })
    ));
    let mut wrong = Program::new();
    wrong.write(Mmio, 0, 4, 0);
    assert!(vm.vcpu(0, &wrong).is_err());
    vm.vcpu(0, &Program::new())
        .expect("the refused program left the index free");
    assert!(matches!(vm.log(u64::MAX), Err(Error::NoArea { .. })));
    assert!(matches!(vm.cell(4096), Err(Error::BadCell(4096))));
}
